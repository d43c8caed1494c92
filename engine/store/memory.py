"""What is in memory of a store's records: each look sees a change whole, before or after it.

What most of them are is on disk alone. What is read from there to answer a look is read before it, where it may take
long, and kept.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from time import time_ns
from typing import TYPE_CHECKING

from limpet.engine.database import EventPage, Records
from limpet.engine.state.reads import View
from limpet.engine.store.deadlines import Deadlines, Of, times_of_container, times_of_sandbox
from limpet.engine.store.doubt import DAMAGED, NOT_VERIFIED, Doubt, status_with_doubt
from limpet.engine.store.match import Filter, Named
from limpet.engine.store.record import Record, Unsettled
from limpet.engine.store.rows import DAMAGED_ROW, Rows
from limpet.engine.store.sandboxes import Sandboxes
from limpet.schema.codec import row_to_sandbox_status, row_to_status
from limpet.schema.errors import NotFoundError, StoreDamagedError, quote
from limpet.schema.identity import ProcessIdentity
from limpet.schema.metadata import Metadata, SandboxMetadata, require_text
from limpet.schema.rows import EventRow, NameRow
from limpet.schema.sandbox_status import SandboxStatus
from limpet.schema.status import Status

if TYPE_CHECKING:
    from limpet.engine.store.draft import Draft

_RECENT = 512
_KEPT_NAMES = 4096


class Memory:
    """A node's containers and sandboxes as they are on disk, and what is doubted of them."""

    def __init__(self, node: str, records: Records, revision: int, load_metadata: Callable[[str], Metadata]) -> None:
        """Load what has not ended, expires, or is a sandbox. Raises StoreError."""
        self._node = node
        self._records = records
        self.load_metadata = load_metadata
        self.view = View()
        self.rows = Rows(node, records)
        unfinished = [key for key, row in self.rows.known() if row and not row.finished_at and not row.released]
        self.doubts: dict[str, Doubt] = dict.fromkeys(unfinished, NOT_VERIFIED)
        self._changes_of_doubts = 0
        self._copied_doubts: tuple[int, Mapping[str, Doubt]] = (-1, {})
        self.sandboxes = Sandboxes(node, records)
        self.deadlines = Deadlines(node, records)
        self.revision = revision
        """That of the newest event."""
        self.recent: deque[EventRow] = deque(maxlen=_RECENT)
        """The newest events, so that those who keep up need not read them from disk."""
        self.names: dict[str, NameRow] = {}
        """What events say of containers, of some of them."""
        self._population = 0
        """Changes whenever a container comes or goes."""

    def apply(self, draft: "Draft") -> None:
        """Take over what was written. Twice is the same as once."""
        with self.view.change():
            for key, row in draft.rows.items():
                if row is None:
                    self.rows.pop(key)
                    self._records.forget_metadata()
                else:
                    self.rows[key] = row
            for key, doubt in draft.doubts.items():
                self._set_doubt(key, doubt)
            for key, sandbox in draft.sandboxes.items():
                self.sandboxes.put(key, sandbox)
            self.deadlines.apply(draft.changes)
            if draft.changes.events:
                self._population += bool(draft.changes.new_containers or draft.changes.deleted_containers)
                for event in draft.changes.events:
                    if not self.recent or self.recent[-1].revision < event.revision:
                        self.recent.append(event)
                self.revision = draft.revision
        for key, new in draft.changes.new_containers.items():
            self.names[key] = NameRow(key, new.sandbox_id, new.name, new.labels)
        if len(self.names) > _KEPT_NAMES:
            self.names.clear()

    def doubt(self, container_id: str, doubt: Doubt) -> None:
        """Flag a container Unknown, if it is there and its end is not known: who doubts may have looked before that."""
        with self.view.change():
            row = self.rows.find(container_id)
            if row is not None and not (row and row.finished_at):
                self._set_doubt(container_id, doubt)

    def _set_doubt(self, container_id: str, doubt: Doubt | None) -> None:
        if doubt is not None:
            self._changes_of_doubts += 1
            self.doubts[container_id] = doubt
        elif container_id in self.doubts:
            self._changes_of_doubts += 1
            self.doubts.pop(container_id)

    def copy_doubts(self) -> Mapping[str, Doubt]:
        """Return why each container is Unknown that is: the same object as long as nothing changes of that."""
        if self._copied_doubts[0] != self.view.read(lambda: self._changes_of_doubts):
            self._copied_doubts = self.view.read(lambda: (self._changes_of_doubts, self.doubts.copy()))
        return self._copied_doubts[1]

    # Containers

    def get(self, container_id: str) -> Record:
        """Return a container by its id, its name, or the beginning of its id: see `Store.get`."""
        key = self._resolve(container_id)
        found = self.view.read(lambda: self._record(key) if key in self.rows else None)
        if found is None:  # deleted just now
            raise NotFoundError(f"container {quote(container_id)} does not exist")
        return found

    def status(self, container_id: str) -> Status:
        """Return the status of the container with exactly this id. Raises NotFoundError."""
        row, doubt = self.view.read(lambda: (self.rows.find(container_id), self.doubts.get(container_id)))
        if row is None:
            raise NotFoundError(f"container {quote(container_id)} does not exist")
        return status_with_doubt(row, doubt)

    def is_damaged(self, container_id: str) -> bool:
        """Say whether the container's status on disk cannot be read."""
        return self.view.read(lambda: self.rows.find(container_id)) == DAMAGED_ROW

    def list(
        self, wanted: Filter, *, ended: bool, is_populating: Callable[[], bool]
    ) -> "tuple[Sequence[Record], int, bool]":
        """Return the containers that are wanted, without `ended` none that has, the revision, and if this is whole.

        It is not where some came or went, or `is_populating` says so, between a look at the disk and one at memory.
        """
        population = self._population
        matching = self._match(wanted, ended=ended)
        found = self.rows.fetch(self._known_ids(ended=ended) if matching is None else matching)

        def look() -> "tuple[Sequence[Record], int, bool]":
            self.rows.keep(found)
            if matching is None:
                keys = [key for key in self._known_ids(ended=ended) if key.startswith(wanted.id)]
                return [self._record(key) for key in keys], self.revision, True
            records = [self._record(key) for key in matching if key in self.rows]
            return records, self.revision, self._population == population and not is_populating()

        return self.view.read(look)

    def _match(self, wanted: Filter, *, ended: bool) -> "Sequence[str] | None":
        """Return the ids of the containers that match, as the disk has them; None where memory has what is needed."""
        if wanted.asks_for_names:
            sandbox_ids = wanted.find_sandboxes(self.name_sandboxes()) if wanted.sandbox_id else None
            rows = self._records.load_names(wanted.name, sandbox_ids, wanted.labels)
            matching = [row.id for row in rows if wanted.accepts(row, sandbox_ids or ())]
        elif wanted.id and ended:
            matching = [*self._load_ids(wanted.id)]
        else:
            return None
        return matching if ended else [*{*matching} & {*self._known_ids(ended=False)}]

    def _known_ids(self, *, ended: bool) -> "Sequence[str]":
        """Return the ids of all containers; without `ended` of those that have not ended, or that are doubted."""
        return [*self.rows] if ended else [*{*self.rows.open(), *self.doubts.copy()}]

    def _resolve(self, text: str) -> str:
        text = require_text("container", text)
        if text in self.rows:
            return text
        named = [row for row in (self._records.load_names(text) if text else ()) if row.id in self.rows]
        return Named.resolve(text, self.rows.keys(), lambda: map(Named.container, named), "container", self._load_ids)

    def _load_ids(self, beginning: str) -> "Sequence[str]":
        return [key for key in self._records.load_ids(beginning) if key in self.rows]

    def _record(self, key: str) -> Record:
        row = self.rows.find(key) or ()
        return Record(key, status_with_doubt(row, self.doubts.get(key)), self.load_metadata, row.seq if row else 0)

    def unsettled(self, wanted: Collection[str]) -> "Sequence[Unsettled]":
        """Return all that has not ended or is in doubt, and those that are wanted, unless nothing is left of them."""
        return self.view.read(lambda: self._find_unsettled(wanted))

    def _find_unsettled(self, wanted: Collection[str]) -> "Sequence[Unsettled]":
        self.rows.keep(self.rows.fetch(wanted))
        return [
            Unsettled(
                Record(key, row_to_status(row) if row else Status(), self.load_metadata),
                "" if row else self.doubts.get(key, DAMAGED)[1],
            )
            for key, row in self.rows.known()
            if not row or key in self.doubts or (key in wanted if row.released else not row.finished_at)
        ]

    def find_running(self) -> "Sequence[str]":
        """Return the ids of the containers that run, as far as is on disk."""
        known = self.view.read(self.rows.known)
        return [key for key, row in known if row and row.started_at and not row.finished_at]

    def find_expiring(self) -> "Sequence[str]":
        """Return the ids of the containers that expire and are not released, or are paused."""
        known = self.view.read(self.rows.known)
        return [key for key, row in known if row and ((row.expires_at and not row.released) or row.paused)]

    def find_unwritten_times(self) -> Mapping[Of, int]:
        """Return the times to come that were set in another boot: no deadline of this one is known of them."""
        times = [times_of_container(row) for _, row in self.rows.known() if row]
        times += [times_of_sandbox(kept.row) for kept in self.sandboxes.kept.values()]
        now = time_ns()
        ahead = ((of, at) for each in times for of, at in each.items() if at > now)
        return {of: at for of, at in ahead if self.deadlines.find(of, at) is None}

    def identities(self) -> "Iterator[ProcessIdentity | None]":
        """Yield the process of each container whose row was read, as far as it has one."""
        return (row_to_status(row).identity for _, row in self.rows.known() if row)

    # Sandboxes

    def get_sandbox(self, text: str) -> SandboxMetadata:
        """Return a sandbox by its id, its name, or the beginning of its id: see `Store.get_sandbox`."""
        return self.view.read(lambda: self._find_sandbox(text))

    def _find_sandbox(self, text: str) -> SandboxMetadata:
        if text in self.sandboxes.damaged:
            raise StoreDamagedError(self.sandboxes.damaged[text])
        kept = self.sandboxes.kept
        return kept[Named.resolve(text, kept, lambda: self._find_named(text), "sandbox")].metadata

    def _find_named(self, name: str) -> Iterator[Named]:
        kept = self.sandboxes.kept.values()
        return (Named.sandbox(one.metadata) for one in kept if one.metadata.name == name)

    def sandbox_status(self, sandbox_id: str) -> tuple[SandboxStatus, int]:
        """Return status and version of the sandbox with exactly this id. Raises NotFoundError, StoreDamagedError."""
        kept, damage = self.view.read(
            lambda: (self.sandboxes.kept.get(sandbox_id), self.sandboxes.damaged.get(sandbox_id))
        )
        if kept is not None:
            return row_to_sandbox_status(self._node, kept.row), kept.row.seq
        if damage is not None:
            raise StoreDamagedError(damage)
        raise NotFoundError(f"sandbox {quote(sandbox_id)} does not exist")

    def list_sandboxes(self) -> "Sequence[SandboxMetadata]":
        """Return all sandboxes whose records can be read, oldest first."""
        found = self.view.read(lambda: [kept.metadata for kept in self.sandboxes.kept.values()])
        return sorted(found, key=lambda metadata: (metadata.created_at, metadata.id))

    def name_sandboxes(self) -> Mapping[str, str]:
        """Return the name of each sandbox by its id, none of those whose records cannot be read."""
        return self.view.read(self._name_sandboxes)

    def _name_sandboxes(self) -> Mapping[str, str]:
        names = {key: one.metadata.name for key, one in self.sandboxes.kept.items()}
        return dict.fromkeys(self.sandboxes.damaged, "") | names

    # Events

    def recent_events(self, after: int, limit: int) -> EventPage | None:
        """Return up to `limit` events that follow the revision `after`; None if not all of them are in memory."""
        return self.view.read(lambda: self._find_recent(after, limit))

    def _find_recent(self, after: int, limit: int) -> EventPage | None:
        if self.revision <= after:
            return EventPage(0, 0, self.revision, [])
        if not self.recent or self.recent[0].revision > after + 1:
            return None
        first = after + 1 - self.recent[0].revision
        return EventPage(0, 0, self.revision, [*islice(self.recent, first, first + limit)])
