"""A database in memory: what the store asks of one, in a page. Nothing of it outlives the process.

It keeps the contract honest, as its second implementation: the store's laws, durability aside, are tested on both.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from limpet.engine.database.changes import KEPT_EVENTS, KEPT_RECOVERIES, Changes
from limpet.engine.database.page import EventPage
from limpet.schema.codec import read_labels, row_to_metadata, rows_to_history
from limpet.schema.deadline import DeadlineKind
from limpet.schema.errors import NotFoundError, StoreError, StoreFencedError, UnsupportedError, quote
from limpet.schema.events import ENDINGS, STATE_CHANGES, EventKind
from limpet.schema.history import KEPT_TRANSITIONS, Transition
from limpet.schema.metadata import Metadata
from limpet.schema.rows import (
    ContainerRow,
    DeadlineRow,
    EventRow,
    ItemRow,
    NameRow,
    ReportRow,
    SandboxRow,
    SandboxStatusRow,
    StatusRow,
)


@dataclass
class Tables:
    """One node's rows. They outlive the databases that are opened on them."""

    sandboxes: dict[str, SandboxRow] = field(default_factory=dict)
    sandbox_statuses: dict[str, SandboxStatusRow] = field(default_factory=dict)
    containers: dict[str, ContainerRow] = field(default_factory=dict)
    statuses: dict[str, StatusRow] = field(default_factory=dict)
    events: list[EventRow] = field(default_factory=list)
    histories: dict[str, list[EventRow]] = field(default_factory=dict)
    deadlines: dict[tuple[str, str], DeadlineRow | None] = field(default_factory=dict)
    items: dict[tuple[str, str], ItemRow] = field(default_factory=dict)
    reports: list[ReportRow] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    """The last ones of what was deleted."""
    epoch: int = 0


class MemoryDatabase:
    """A node's database on some tables; one that was opened on them before can no longer write."""

    def __init__(self, tables: Tables, node: str) -> None:
        self.node = node
        tables.epoch += 1
        self.journal = _Journal(tables)
        self.records = _Records(tables, node)

    def back_up(self, target_path: str) -> None:
        """Raise UnsupportedError: there is no file to copy."""
        raise UnsupportedError(f"{target_path}: a database in memory cannot be backed up; use one on disk")

    def close(self) -> None:
        """Do nothing: the tables stay."""

    def leave(self) -> None:
        """Do nothing: the tables stay."""

    def abandon(self) -> None:
        """Do nothing: a fork has a copy of its own."""


class _Journal:
    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._epoch = tables.epoch

    def commit(self, changes: Changes) -> None:
        tables = self._tables
        if tables.epoch != self._epoch:
            raise StoreFencedError(f"opened again since epoch {self._epoch} began; close this store")
        for row, before in changes.statuses.values():
            if row.id not in tables.statuses or tables.statuses[row.id].seq != before:
                raise StoreError(f"container {row.id}: its newest checkpoint is not {before}")
        for key in changes.deleted_containers:
            for table in (tables.containers, tables.statuses, tables.histories):
                table.pop(key, None)
        for key in changes.deleted_sandboxes:
            tables.sandboxes.pop(key, None)
            tables.sandbox_statuses.pop(key, None)
        tables.sandboxes.update(changes.new_sandboxes)
        tables.sandbox_statuses.update(changes.new_sandbox_statuses)
        tables.sandbox_statuses.update((row.id, row) for row, _ in changes.sandbox_statuses.values())
        for name in changes.deleted_items:
            tables.items.pop(name, None)
        tables.items.update(changes.items)
        tables.deadlines.update(changes.deadlines)
        tables.containers.update(changes.new_containers)
        tables.statuses.update(changes.new_statuses)
        tables.statuses.update((row.id, row) for row, _ in changes.statuses.values())
        tables.events = [*tables.events, *changes.events][-KEPT_EVENTS:]
        for event in changes.events:
            if event.kind in (*STATE_CHANGES, EventKind.DELETED) and event.id in tables.containers:
                kept = tables.histories.setdefault(event.id, [])
                kept.append(event)
                del kept[:-KEPT_TRANSITIONS]
        ends = [event for event in changes.events if event.kind in ENDINGS]
        tables.versions.update((one.id, max(one.seq, tables.versions.get(one.id, 0))) for one in ends)
        tables.reports += changes.reports
        del tables.reports[:-KEPT_RECOVERIES]

    def has_landed(self, changes: Changes, error: BaseException) -> bool:  # noqa: ARG002  # it makes no difference
        if changes.events:
            return changes.events[0] in self._tables.events
        tables = self._tables
        statuses = changes.new_statuses | {key: row for key, (row, _) in changes.statuses.items()}
        sandbox_statuses = {key: row for key, (row, _) in changes.sandbox_statuses.items()}
        return (
            statuses.items() <= tables.statuses.items()
            and changes.new_sandboxes.items() <= tables.sandboxes.items()
            and sandbox_statuses.items() <= tables.sandbox_statuses.items()
            and changes.items.items() <= tables.items.items()
            and changes.deadlines.items() <= tables.deadlines.items()
            and set(changes.reports) <= set(tables.reports)
            and tables.containers.keys().isdisjoint(set(changes.deleted_containers) - statuses.keys())
            and tables.sandboxes.keys().isdisjoint(set(changes.deleted_sandboxes) - changes.new_sandboxes.keys())
            and tables.items.keys().isdisjoint(set(changes.deleted_items) - changes.items.keys())
        )

    def load_status(self, container_id: str) -> StatusRow | None:
        return self._tables.statuses.get(container_id)

    def load_name(self, container_id: str) -> NameRow | None:
        row = self._tables.containers.get(container_id)
        return None if row is None else NameRow(row.id, row.sandbox_id, row.name, row.labels)

    def last_revision(self) -> int:
        return self._tables.events[-1].revision if self._tables.events else 0

    def last_version(self, key: str) -> int:
        return self._tables.versions.get(key, 0)

    def find_container_by_name(self, sandbox_id: str, name: str, attempt: int) -> str | None:
        return _find_by_name(self._tables, sandbox_id, name, attempt)

    def load_ids_of_sandbox(self, sandbox_id: str) -> Sequence[str]:
        return [row.id for row in self._tables.containers.values() if row.sandbox_id == sandbox_id]

    def load_item(self, kind: str, key: str) -> ItemRow | None:
        return self._tables.items.get((kind, key))

    def last_recovery(self) -> int:
        return self._tables.reports[-1].number if self._tables.reports else 0


class _Records:
    def __init__(self, tables: Tables, node: str) -> None:
        self._tables = tables
        self._node = node

    def load_container_ids(self) -> Sequence[str]:
        return sorted(self._tables.containers)

    def load_status_ids(self) -> Sequence[str]:
        return sorted(self._tables.statuses)

    def load_unsettled(self) -> Sequence[StatusRow]:
        rows = self._tables.statuses.copy().values()
        return [row for row in rows if not row.finished_at or row.pid or (row.expires_at and not row.released)]

    def load_status(self, container_id: str) -> StatusRow | None:
        return self._tables.statuses.get(container_id)

    def load_statuses(self) -> Sequence[StatusRow]:
        return list(self._tables.statuses.copy().values())

    def load_names(
        self, name: str = "", sandbox_ids: Collection[str] | None = None, labels: Mapping[str, str] | None = None
    ) -> Sequence[NameRow]:
        rows = self._tables.containers.copy().values()
        return [
            NameRow(row.id, row.sandbox_id, row.name, row.labels, row.attempt)
            for row in rows
            if name in {"", row.name} and (sandbox_ids is None or row.sandbox_id in sandbox_ids)
            if not labels or labels.items() & read_labels(row.labels).items()
        ]

    def load_ids(self, beginning: str) -> Sequence[str]:
        known = self._tables.containers.copy().keys() | self._tables.statuses.copy().keys()
        return sorted(key for key in known if key.startswith(beginning))

    def load_restartable(self) -> Sequence[str]:
        return sorted(row.id for row in self._tables.containers.copy().values() if row.restart_policy != "no")

    def find_container_by_name(self, sandbox_id: str, name: str, attempt: int) -> str | None:
        return _find_by_name(self._tables, sandbox_id, name, attempt)

    def load_all_sandboxes(self) -> Sequence[tuple[str, SandboxRow]]:
        return [(self._node, row) for row in self._tables.sandboxes.copy().values()]

    def load_sandbox_statuses(self) -> Sequence[SandboxStatusRow]:
        return list(self._tables.sandbox_statuses.copy().values())

    def load_deadlines(self, boot_id: str, after: int) -> Sequence[DeadlineRow]:
        rows = [row for row in self._tables.deadlines.copy().values() if row is not None and row.boot_id == boot_id]
        return [row for row in rows if row.kind != DeadlineKind.STOP or row.boot_at > after]

    def load_items(self, kind: str) -> Sequence[ItemRow]:
        return sorted(row for row in self._tables.items.copy().values() if row.kind == kind)

    def load_item(self, kind: str, key: str) -> ItemRow | None:
        return self._tables.items.get((kind, key))

    def load_sandbox_ids_in_use(self) -> Sequence[str]:
        return list({row.sandbox_id for row in self._tables.containers.copy().values()})

    def metadata(self, container_id: str) -> Metadata:
        row = self._tables.containers.get(container_id)
        if row is None:
            raise NotFoundError(f"container {quote(container_id)} does not exist")
        return row_to_metadata(self._node, row)

    def forget_metadata(self) -> None:
        """Do nothing: none is kept."""

    def history(self, container_id: str) -> Sequence[Transition]:
        return rows_to_history(self._node, container_id, self._tables.histories.get(container_id, []))

    def load_events(self, after: int, limit: int) -> EventPage:
        events = self._tables.events
        rows = [row for row in events if row.revision > after][:limit]
        pruned, newest = (events[0].revision - 1, events[-1].revision) if events else (0, 0)
        return EventPage(self._tables.epoch, pruned, newest, rows)

    def last_report(self) -> bytes | None:
        return self._tables.reports[-1].report.encode() if self._tables.reports else None


def _find_by_name(tables: Tables, sandbox_id: str, name: str, attempt: int) -> str | None:
    wanted = (sandbox_id, name, attempt)
    rows = tables.containers.copy().values()
    return next((row.id for row in rows if (row.sandbox_id, row.name, row.attempt) == wanted), None)
