"""Reads a database, and cannot write to it: for what is not kept in memory, and for looking beside a live engine.

It can neither write nor checkpoint, and each read ends at once, so that it never holds the WAL back.
"""

import json
import sqlite3
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TypeVar

from limpet.engine.database.page import EventPage
from limpet.engine.database.sqlite import statements as sql
from limpet.engine.database.sqlite.connection import (
    copy_database,
    fetch_all,
    find_damage,
    find_format_damage,
    read_revision,
    require_integer,
    translate,
)
from limpet.engine.database.sqlite.labels import find_damaged_labels
from limpet.engine.database.sqlite.pool import Pool
from limpet.schema.codec import (
    label_text,
    require_readable_status,
    row_to_deadline,
    row_to_event,
    row_to_item,
    row_to_metadata,
    row_to_sandbox,
    row_to_sandbox_status,
    rows_to_history,
)
from limpet.schema.errors import NotFoundError, StoreDamagedError, StoreError, StoreTooNewError, quote
from limpet.schema.events import STATE_CHANGES, EventKind
from limpet.schema.history import Transition
from limpet.schema.metadata import Metadata
from limpet.schema.revision import SCHEMA_REVISION
from limpet.schema.rows import (
    AnyRow,
    ContainerRow,
    DeadlineRow,
    EventRow,
    ItemRow,
    NameRow,
    SandboxRow,
    SandboxStatusRow,
    StatusRow,
)

_KEPT_METADATA = 1024
_MANY = 1000
"""Of so many containers with a label, the index of labels leads to each by itself no faster than reading all."""
_Row = TypeVar("_Row", bound=AnyRow)


class Reader:
    """Reads one node's records. Thread-safe."""

    def __init__(self, path: str, node: str, *, immutable: bool = False) -> None:
        self._path = path
        self.node = node
        self._pool = Pool(path, immutable=immutable)
        self.metadata = lru_cache(_KEPT_METADATA)(self._load_metadata)

    def read_revision(self) -> str:
        """Return the database's schema revision. Raises StoreDamagedError if it is not one of ours."""
        with self._pool.lend() as connection:
            return read_revision(connection, self._path)

    def require_current(self) -> None:
        """Raise StoreTooNewError, or StoreDamagedError for an older one, unless the schema is this version's."""
        revision = self.read_revision()
        if revision < SCHEMA_REVISION:
            raise StoreDamagedError(
                f"{self._path}: schema {quote(revision)} is older than {SCHEMA_REVISION};"
                " open it with an engine once, which upgrades it"
            )
        if revision > SCHEMA_REVISION:
            raise too_new(self._path, revision)

    def load_statuses(self) -> list[StatusRow]:
        """Return the status row of every container."""
        return list(map(StatusRow._make, self._read_keyed(sql.SELECT_STATUSES)))

    def load_unsettled(self) -> list[StatusRow]:
        """Return the status row of every container that has not ended, says that it has a process, or expires yet."""
        return list(map(StatusRow._make, self._read_keyed(sql.SELECT_UNSETTLED)))

    def load_status_ids(self) -> list[str]:
        """Return the id of every container that has a status row, in order."""
        return [row[0] for row in self._read_keyed(sql.SELECT_STATUS_IDS)]

    def load_container_ids(self) -> list[str]:
        """Return the id of every container, also of those that have no status row, in order."""
        return [row[0] for row in self._read_keyed(sql.SELECT_CONTAINER_IDS)]

    def load_status(self, container_id: str) -> StatusRow | None:
        """Return the status row of one container, None if it has none."""
        rows = self._read(sql.SELECT_STATUS, container_id)
        return StatusRow._make(rows[0]) if rows else None

    def load_names(
        self, name: str = "", sandbox_ids: Collection[str] | None = None, labels: Mapping[str, str] | None = None
    ) -> list[NameRow]:
        """Return what lists are filtered by, of every container.

        Or of those with this name and in these sandboxes. Of `labels` each has one of them at least.
        """
        texts = [label_text(*label) for label in (labels or {}).items()]
        if "" in texts:  # what cannot be stored is in no row
            return []
        text = max(texts, key=len, default="")
        if sandbox_ids is None and name:
            rows = self._read(sql.SELECT_NAMES_BY_NAME, name, text)
        elif sandbox_ids is None:
            label = self._find_rare(labels or {})
            if label is None:
                rows = self._read(sql.SELECT_NAMES_BY_TEXT, text)
            else:
                rows = self._read(sql.SELECT_NAMES_BY_LABEL, *label)
        elif name:
            rows = self._read(sql.SELECT_NAMES_BY_BOTH, json.dumps(list(sandbox_ids)), text, name)
        else:
            rows = self._read(sql.SELECT_NAMES_BY_SANDBOX, json.dumps(list(sandbox_ids)), text)
        return list(map(NameRow._make, self._require_ids(rows)))

    def _find_rare(self, labels: Mapping[str, str]) -> tuple[str, str] | None:
        """Return the label that the fewest have; None if all are of so many that one look at all containers is less."""
        counts = {label: self._read(sql.COUNT_LABELLED, *label, _MANY)[0][0] for label in labels.items()}
        rare = min(counts, key=counts.__getitem__, default=None)
        return None if rare is None or counts[rare] == _MANY else rare

    def load_ids(self, beginning: str) -> list[str]:
        """Return the ids that begin so, of all that has a row of either kind, in order."""
        between = (beginning, _after(beginning))
        rows = self._read(sql.SELECT_IDS_BETWEEN, *between, self.node, *between)
        return [row[0] for row in self._require_ids(rows)]

    def load_restartable(self) -> list[str]:
        """Return the id of every container that has a restart policy."""
        return [row[0] for row in self._read_keyed(sql.SELECT_RESTARTABLE)]

    def find_container_by_name(self, sandbox_id: str, name: str, attempt: int) -> str | None:
        """Return the id of the container that has this name, if there is one."""
        rows = self._read(sql.SELECT_CONTAINER_BY_NAME, sandbox_id, name, attempt)
        return str(rows[0][0]) if rows else None

    def load_instant(self) -> tuple[int, list[SandboxRow], list[NameRow], list[StatusRow], list[SandboxStatusRow]]:
        """Return the newest revision, sandboxes, names, statuses, and the sandboxes', as they were at one instant."""
        with self._pool.lend_for_an_instant() as connection:
            sandboxes, names, statuses, sandbox_statuses = (
                self._require_ids(fetch_all(connection, statement, (self.node,)))
                for statement in (
                    sql.SELECT_SANDBOXES,
                    sql.SELECT_CONTAINER_NAMES,
                    sql.SELECT_STATUSES,
                    sql.SELECT_SANDBOX_STATUSES,
                )
            )
            revision = self._load_revision(connection, 0)
        return (
            revision,
            list(map(SandboxRow._make, sandboxes)),
            list(map(NameRow._make, names)),
            list(map(StatusRow._make, statuses)),
            list(map(SandboxStatusRow._make, sandbox_statuses)),
        )

    def load_sandboxes(self) -> list[SandboxRow]:
        """Return the row of every sandbox."""
        return list(map(SandboxRow._make, self._read_keyed(sql.SELECT_SANDBOXES)))

    def load_all_sandboxes(self) -> list[tuple[str, SandboxRow]]:
        """Return node and row of every sandbox of every node, read past the index: it may be what is damaged."""
        with self._pool.lend() as connection:
            rows = fetch_all(connection, sql.SELECT_ALL_SANDBOXES)
        return [(node, SandboxRow._make(row)) for node, *row in rows]

    def load_sandbox_statuses(self) -> list[SandboxStatusRow]:
        """Return the status row of every sandbox."""
        return list(map(SandboxStatusRow._make, self._read_keyed(sql.SELECT_SANDBOX_STATUSES)))

    def load_deadlines(self, boot_id: str, after: int) -> list[DeadlineRow]:
        """Return the rows of a boot's deadlines, without those of stops that are over at a time of its clock."""
        return list(map(DeadlineRow._make, self._read(sql.SELECT_DEADLINES, boot_id, after)))

    def load_items(self, kind: str) -> list[ItemRow]:
        """Return the row of every item of a kind, by key."""
        return list(map(ItemRow._make, self._read(sql.SELECT_ITEMS, kind)))

    def load_item(self, kind: str, key: str) -> ItemRow | None:
        """Return an item's row, None if there is none."""
        rows = self._read(sql.SELECT_ITEM, kind, key)
        return ItemRow._make(rows[0]) if rows else None

    def load_sandbox_ids_in_use(self) -> list[str]:
        """Return the ids of the sandboxes that containers are in."""
        return [row[0] for row in self._read_keyed(sql.SELECT_SANDBOX_IDS_IN_USE)]

    def history(self, container_id: str) -> list[Transition]:
        """Return the container's state changes that are kept, oldest first. Raises StoreDamagedError."""
        rows = self._read(sql.SELECT_EVENTS_OF_ONE, container_id)
        return rows_to_history(self.node, container_id, list(map(EventRow._make, rows)))

    def load_events(self, after: int, limit: int) -> EventPage:
        """Return at most `limit` events that follow the revision `after`, and how far the log goes, at one instant."""
        with self._pool.lend_for_an_instant() as connection:
            found = connection.execute(sql.SELECT_EPOCH_AND_PRUNED, (self.node,)).fetchone() or (0, 0)
            epoch, pruned = (require_integer(self._path, each) for each in found)
            newest = self._load_revision(connection, pruned)
            rows = fetch_all(connection, sql.SELECT_EVENTS, (self.node, after, limit))
        return EventPage(epoch, pruned, newest, list(map(EventRow._make, rows)))

    def _load_revision(self, connection: sqlite3.Connection, pruned: int) -> int:
        (newest,) = connection.execute(sql.SELECT_NEWEST_EVENT, (self.node,)).fetchone()
        return max(pruned, 0 if newest is None else require_integer(self._path, newest))

    def last_report(self) -> bytes | None:
        """Return the newest recovery report as JSON, None if there is none."""
        rows = self._read(sql.SELECT_LAST_REPORT)
        return str(rows[0][0]).encode() if rows else None

    def epochs(self) -> dict[str, int]:
        """Return the epoch of each node that has opened this database, by the node's name."""
        with self._pool.lend() as connection:
            rows = fetch_all(connection, sql.SELECT_NODES)
        return {name: require_integer(self._path, epoch) for name, epoch in self._require_ids(rows)}

    def find_damage(self) -> list[str]:
        """Return what SQLite's own checks find wrong."""
        return self._find(find_damage)

    def find_format_damage(self) -> list[str]:
        """Return what makes SQLite take the database for read-only. Takes as much memory as the database is long."""
        return self._find(find_format_damage)

    def check_structure(self) -> list[str]:
        """Return what SQLite's own checks find wrong, damage that ends them included. Raises any other StoreError."""
        try:
            return self._look(find_damage)
        except StoreDamagedError as error:
            return [str(error)]

    def _find(self, look: Callable[[sqlite3.Connection], list[str]]) -> list[str]:
        try:
            return self._look(look)
        except StoreError as error:
            return [str(error)]

    def _look(self, look: Callable[[sqlite3.Connection], list[str]]) -> list[str]:
        with self._pool.lend() as connection:
            return look(connection)

    def find_damaged_records(self) -> list[str]:
        """Return each record that cannot be believed, and each gap in the records, in words."""
        statuses = {row.id: row for row in self.load_statuses()}
        containers = list(map(ContainerRow._make, self._read(sql.SELECT_CONTAINERS)))
        sandboxes = list(map(SandboxRow._make, self._read(sql.SELECT_SANDBOXES)))
        sandbox_statuses = list(map(SandboxStatusRow._make, self._read(sql.SELECT_SANDBOX_STATUSES)))
        found = [
            *self._find_unreadable(row_to_metadata, containers),
            *self._find_unreadable(require_readable_status, statuses.values()),
            *self._find_unreadable(row_to_sandbox, sandboxes),
            *self._find_unreadable(row_to_sandbox_status, sandbox_statuses),
            *self._find_unreadable(row_to_item, map(ItemRow._make, self._read(sql.SELECT_ALL_ITEMS))),
            *self._find_unreadable(row_to_deadline, map(DeadlineRow._make, self._read(sql.SELECT_ALL_DEADLINES))),
        ]
        known = {row.id for row in sandbox_statuses}
        lost = statuses.keys() - {row.id for row in containers}
        found += [f"sandbox {row.id}: its status row is missing" for row in sandboxes if row.id not in known]
        found += [f"container {row.id}: its status row is missing" for row in containers if row.id not in statuses]
        found += [f"container {key}: its metadata is missing" for key in lost]
        index = self._read(sql.SELECT_LABELS)
        found += find_damaged_labels(containers, [row for row in index if row[-1] not in lost])
        self.epochs()  # the other tables can be read, as their columns should be
        for statement in sql.SELECT_READ_BY_PEOPLE:
            self._read(statement)
        return [*found, *self._find_damaged_events(statuses.values())]

    def _find_damaged_events(self, statuses: Iterable[StatusRow]) -> Iterator[str]:
        """Yield each event that cannot be believed, each gap in the log, and each history that ends too early."""
        page = self.load_events(0, -1)
        yield from self._find_unreadable(row_to_event, page.rows)
        expected = page.pruned + 1
        newest: dict[str, int] = {}
        for row in page.rows:
            if type(row.revision) is int and row.revision > page.pruned:
                if row.revision > expected:
                    yield f"events {expected} to {row.revision - 1} are missing"
                expected = row.revision + 1
            if row.kind in STATE_CHANGES:
                newest[row.id] = row.number
            elif row.kind == EventKind.DELETED:
                newest.pop(row.id, None)
        yield from (
            f"container {row.id}: its history does not reach its newest state change ({row.transitions})"
            for row in statuses
            if newest.get(row.id) != row.transitions
        )

    def _find_unreadable(self, decode: Callable[[str, _Row], object], rows: Iterable[_Row]) -> Iterator[str]:
        for row in rows:
            try:
                decode(self.node, row)
            except StoreDamagedError as error:
                yield str(error)

    def copy_to(self, target_path: str) -> None:
        """Copy the database, as it is at one instant, into a new file. Raises StoreError, OSError."""
        with self._pool.lend() as connection:
            try:
                copy_database(connection, target_path)
            except sqlite3.Error as error:
                raise translate(target_path, error) from error

    def forget_metadata(self) -> None:
        """Drop what is kept of metadata: a container was deleted."""
        self.metadata.cache_clear()

    def abandon(self) -> None:
        """In a fork: never touch the connections again, not even to close them; they are the parent's."""
        self._pool.abandon()

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    def _load_metadata(self, container_id: str) -> Metadata:
        rows = self._read(sql.SELECT_CONTAINER, container_id)
        if not rows:
            raise NotFoundError(f"container {quote(container_id)} does not exist")
        if rows[0][0] != container_id:
            raise StoreDamagedError(
                f"{self._path}: the key of container {container_id} leads to another; restore a backup"
            )
        return row_to_metadata(self.node, ContainerRow._make(rows[0]))

    def _read_keyed(self, statement: str) -> list[AnyRow]:
        return self._require_ids(self._read(statement))

    def _require_ids(self, rows: list[AnyRow]) -> list[AnyRow]:
        """Return rows that lead with an id; a page that has taken another's place leads with anything."""
        for row in rows:
            if type(row[0]) is not str:
                raise StoreDamagedError(f"{self._path}: {row[0]!r} stands where an id should; restore a backup")
        return rows

    def _read(self, statement: str, *parameters: object) -> list[AnyRow]:
        with self._pool.lend() as connection:
            try:
                return fetch_all(connection, statement, (self.node, *parameters))
            except (UnicodeEncodeError, OverflowError):  # what cannot be written is in no row
                return []


def _after(beginning: str) -> str:
    """Return a text that follows, in SQLite's order, all ids that begin so: what cannot be printed is in none."""
    return beginning + chr(sys.maxunicode)


def too_new(path: str, revision: str) -> StoreTooNewError:
    """Return the error for a database whose schema this version does not know."""
    return StoreTooNewError(
        f"{path}: its schema {quote(revision)} is newer than {SCHEMA_REVISION}, which this limpet knows;"
        " it was left untouched: use a newer limpet, or a backup"
    )
