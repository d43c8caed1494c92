"""The status rows in memory: every container's id, and its row from the moment that it matters or is asked for.

Most containers of a long-lived store have ended and will never be looked at again. Their rows stay on disk until
somebody asks, so that opening costs little more than what runs; each row is verified when it is read.
"""

from collections.abc import Callable, Iterable, Iterator, KeysView, Sequence
from typing import Final

from limpet.engine.database import Records
from limpet.schema.codec import find_unsound, row_is_sound, status_can_be_read
from limpet.schema.rows import StatusRow

_FEW = 1000
"""Up to so many rows are read one by one, more of them all at once."""

Kept = StatusRow | tuple[()]
"""A status row, or DAMAGED_ROW."""
DAMAGED_ROW: Final = ()
"""Stands for a row that is damaged or missing."""


class Rows:
    """The newest status row of each container. A row that is damaged or missing on disk is DAMAGED_ROW.

    A row is read before it is changed: a change begins by looking at it. So what is unread is the same on disk as
    it was at opening, and may be read at any time by any thread. Only what is kept of it needs care: a row that
    was fetched may have been kept and changed by another thread in the meantime, and then stays as it is.
    """

    def __init__(self, node: str, reader: Records) -> None:
        """Read the ids, and the rows of all that has not ended or expires yet. Raises StoreError."""
        self._node = node
        self._reader = reader
        containers, statuses = reader.load_container_ids(), reader.load_status_ids()
        self._rows: dict[str, Kept | None] = dict.fromkeys(statuses)
        """None for a row that is unread."""
        self._open: set[str] = set()
        if containers != statuses:  # damage: what either table knows is known, and nothing is lost silently
            for key in set(containers) - set(statuses):
                self[key] = DAMAGED_ROW
        self.keep(self._verify(reader.load_unsettled()))

    def find(self, container_id: str, load: Callable[[str], StatusRow | None] | None = None) -> Kept | None:
        """Return a container's row, None if there is no such container. Raises StoreError.

        If it is unread it is read now, by `load` where the caller has a connection of its own.
        """
        row = self._rows.get(container_id)
        if row is None and container_id in self._rows:
            self.keep([(container_id, self._fetch(container_id, load or self._reader.load_status))])
            row = self._rows[container_id]
        return row

    def __contains__(self, container_id: object) -> bool:
        return container_id in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def keys(self) -> KeysView[str]:
        """Return the ids."""
        return self._rows.keys()

    def __setitem__(self, container_id: str, row: Kept) -> None:
        self._rows[container_id] = row
        if row and row.finished_at:
            self._open.discard(container_id)
        else:
            self._open.add(container_id)

    def pop(self, container_id: str) -> None:
        """Forget a container; one that is not there is fine."""
        self._rows.pop(container_id, None)
        self._open.discard(container_id)

    def open(self) -> "list[str]":
        """Return the ids of all that has not ended, and of what is damaged as far as that was seen."""
        return list(self._open)

    def known(self) -> "list[tuple[str, Kept]]":
        """Return the rows that were read, by id: all that had not ended or expire, and all that has changed, too."""
        return [(key, row) for key, row in self._rows.items() if row is not None]

    def fetch(self, container_ids: Iterable[str]) -> "list[tuple[str, Kept]]":
        """Read what is unread of these, and perhaps more. May take long, and changes nothing. Raises StoreError."""
        unread = [key for key in container_ids if self._rows.get(key, DAMAGED_ROW) is None]
        if len(unread) > _FEW:
            return self._verify(self._reader.load_statuses())
        return [(key, self._fetch(key, self._reader.load_status)) for key in unread]

    def keep(self, found: Iterable[tuple[str, Kept]]) -> None:
        """Keep rows that were fetched, where nobody has kept one before. Not while changes are applied."""
        for key, row in found:
            if self._rows.get(key, DAMAGED_ROW) is None:
                self[key] = row

    def _fetch(self, container_id: str, load: Callable[[str], StatusRow | None]) -> Kept:
        row = load(container_id)
        if row is None or row.id != container_id:  # where a tree is out of order, SQLite finds another
            return DAMAGED_ROW
        return row if row_is_sound(self._node, row) and status_can_be_read(row) else DAMAGED_ROW

    def _verify(self, rows: Sequence[StatusRow]) -> "list[tuple[str, Kept]]":
        damaged = {row.id for row in find_unsound(self._node, rows)}
        damaged.update(row.id for row in rows if row.id not in damaged and not status_can_be_read(row))
        return [(row.id, DAMAGED_ROW if row.id in damaged else row) for row in rows]
