"""The working copy of one commit: what memory will hold if the commit succeeds, and the rows that make it so.

Everything is checked here, before anything is written, so that a request that is refused fails alone and
the database sees only what it will accept.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from msgspec.structs import replace

from limpet.engine.database import Changes, Journal
from limpet.engine.state.clock import now
from limpet.engine.store.deadlines import (
    Of,
    deadlines_of_container,
    times_of_container,
    times_of_sandbox,
)
from limpet.engine.store.doubt import Doubt, status_with_doubt
from limpet.engine.store.memory import Memory
from limpet.engine.store.record import Record
from limpet.engine.store.rows import Kept
from limpet.engine.store.sandboxes import KeptSandbox, name_of
from limpet.recovery.host import read_boot_id
from limpet.schema.codec import (
    item_to_row,
    metadata_to_row,
    row_state,
    row_to_item,
    row_to_sandbox_status,
    row_to_status,
    sandbox_name_row,
    sandbox_status_to_row,
    sandbox_to_row,
    seal_event,
    state_of,
    status_to_row,
    status_to_text,
)
from limpet.schema.deadline import DeadlineKind
from limpet.schema.errors import (
    AlreadyExistsError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    StoreDamagedError,
    VersionConflictError,
    name_some,
    quote,
)
from limpet.schema.events import STATE_CHANGES, EventKind
from limpet.schema.item import Item, require_item_name
from limpet.schema.metadata import Metadata, SandboxMetadata, require_id, require_name, require_text
from limpet.schema.protobuf_json import is_text
from limpet.schema.restart import parse_restart_policy
from limpet.schema.rows import AnyRow, ItemRow, NameRow, OpenEvent, ReportRow, SandboxStatusRow, StatusRow
from limpet.schema.sandbox_status import SandboxState, SandboxStatus, require_namespaces
from limpet.schema.status import ContainerState, Reason, Status, declare_gone, end_never_run


class Draft:
    """Changes on top of the store's memory, which is read here and never written."""

    def __init__(
        self,
        node: str,
        journal: Journal,
        memory: Memory,
    ) -> None:
        self._node = node
        self._journal = journal
        self._memory = memory
        self.changes = Changes()
        self.rows: dict[str, Kept | None] = {}
        """New status rows; None for a container that is deleted."""
        self.doubts: dict[str, Doubt | None] = {}
        """Doubts that come, and None for those that go."""
        self.sandboxes: dict[str, KeptSandbox | None] = {}
        """New and changed sandboxes; None for one that is deleted."""
        self._last_versions: dict[str, int] = {}
        """The last versions of the containers and sandboxes that are deleted here."""
        self._names: dict[tuple[str, str, int], str] = {}
        """The ids of the containers that are added here, by sandbox, name and attempt."""
        self._revision = memory.revision
        self._event_names: dict[str, NameRow] = {}
        """What events say of the containers that they are of."""
        self._open_events: list[OpenEvent] = []
        """Those of the transaction under way, which lack what `end_transaction` adds."""
        self._is_over = False

    def __contains__(self, container_id: str) -> bool:
        return self._find(container_id) is not None

    def status(self, container_id: str) -> Status:
        """Return a container's status as this draft has it. Raises NotFoundError."""
        row = self._row(container_id)
        doubt = self.doubts.get(container_id, self._memory.doubts.get(container_id))
        return status_with_doubt(row, doubt)

    def version(self, container_id: str) -> int:
        """Return the version of a container's status, which grows by one each time; 0 if the record is damaged.

        Raises NotFoundError.
        """
        row = self._row(container_id)
        return row.seq if row else 0

    def checkpoint(self, container_id: str) -> Status | None:
        """Return a container's status as it is on disk, without any doubt; None if it is gone or damaged."""
        row = self._find(container_id)
        return row_to_status(row) if row else None

    def add(self, metadata: Metadata, status: Status) -> Record:
        """Add a container. Raises AlreadyExistsError, NotFoundError for its sandbox, InvalidInputError."""
        _require_kind(Metadata, metadata)
        _require_kind(Status, status)
        key = require_id(metadata.id)
        require_name(metadata.name)
        parse_restart_policy(metadata.restart_policy)
        if self._find(key) is not None:
            raise AlreadyExistsError(f"container {key} exists already; delete it first, or use another id")
        sandbox = self._find_sandbox(metadata.sandbox_id)
        if sandbox is None:
            raise NotFoundError(f"sandbox {quote(metadata.sandbox_id)} does not exist; create it first")
        _require_ready(metadata.sandbox_id, sandbox, f"cannot create container {quote(metadata.name)}")
        row = metadata_to_row(self._node, metadata)
        self._require_free_name(metadata)
        status_row = status_to_row(self._node, key, self._first_version(key), 1, status)
        self.changes.new_containers[key] = row
        self._names[row.sandbox_id, row.name, row.attempt] = key
        self.changes.new_statuses[key] = status_row
        self._event_names[key] = NameRow(key, row.sandbox_id, row.name, row.labels)
        self._note(EventKind.ADDED, key, status_row, status)
        self._set_deadlines({}, times_of_container(status_row))
        self._stage(key, status_row, status)
        return Record(key, self.status(key), self._memory.load_metadata, self.version(key))

    def find_attempt(self, sandbox_id: str, name: str, attempt: int) -> str | None:
        """Return the id of the container that has this name and attempt, if there is one."""
        found = self._journal.find_container_by_name(sandbox_id, name, attempt)
        if found is not None and self.rows.get(found, ()) is not None:
            return found
        return self._names.get((sandbox_id, name, attempt))

    def update(self, container_id: str, fn: Callable[[Status], Status], *, ready_sandbox: str | None = None) -> Status:
        """Replace a container's status by `fn` of it, and return the new one. What `fn` raises passes through.

        Raises InvalidStateError if the sandbox `ready_sandbox` is NOTREADY.
        """
        sandbox = None if ready_sandbox is None else self._find_sandbox(ready_sandbox)
        if ready_sandbox is not None and sandbox is not None:
            _require_ready(ready_sandbox, sandbox, f"cannot start container {container_id}")
        return self.replace(container_id, fn(self.status(container_id)))

    def replace(self, container_id: str, status: Status, expect: int | None = None) -> Status:
        """Replace a container's status, and return it.

        Raises VersionConflictError if its version is not the one that is expected, NotFoundError, InvalidInputError,
        StoreDamagedError.
        """
        container_id = require_text("container", container_id)
        old_row = self._row(container_id)
        if expect is not None and (not old_row or old_row.seq != expect):
            found = old_row.seq if old_row else "damaged"
            raise VersionConflictError(
                f"container {container_id}: its version is {found}, not {quote(expect)}; read it again, and decide anew"
            )
        if not isinstance(status, Status):
            raise InvalidInputError(f"container {container_id}: expected a Status, got {type(status).__name__}")
        if not old_row:
            message = self.status(container_id).message
            raise StoreDamagedError(f"container {container_id}: {message}; delete it, or restore a backup")
        status = _leave_restart_to_original(old_row, status)
        written = status
        if status.unknown:  # a doubt is not written, and what it hides is not forgotten
            checkpointed = row_to_status(old_row)
            written = replace(status, reason=checkpointed.reason, message=checkpointed.message)
        changed = row_state(old_row) != state_of(written)
        row = status_to_row(self._node, container_id, old_row.seq + 1, old_row.transitions + changed, written)
        if container_id in self.changes.new_statuses:
            self.changes.new_statuses[container_id] = row
        else:
            staged = self.changes.statuses.get(container_id)
            self.changes.statuses[container_id] = (row, staged[1] if staged else old_row.seq)
        kinds = list(_tell_apart(old_row, row, has_new_state=changed))
        for kind in kinds:
            self._note(kind, container_id, row, written)
        if EventKind.INTENT in kinds or row.released != old_row.released:
            self._set_deadlines(times_of_container(old_row), times_of_container(row))
        self._stage(container_id, row, status)
        return status

    def delete(self, container_id: str) -> bool:
        """Remove a container and its history; return False if it is gone already."""
        container_id = require_text("container", container_id)
        kept = self._find(container_id)
        if kept is None:
            return False
        self._note(EventKind.DELETED, container_id, kept or None, row_to_status(kept) if kept else Status())
        if kept:
            self._last_versions[container_id] = kept.seq
        self._memory.names.pop(container_id, None)
        self.changes.statuses.pop(container_id, None)
        self.changes.new_statuses.pop(container_id, None)
        row = self.changes.new_containers.pop(container_id, None)
        if row is not None:
            del self._names[row.sandbox_id, row.name, row.attempt]
        if container_id in self._memory.rows:
            self.changes.deleted_containers.append(container_id)
        if not kept or not kept.released:
            self.changes.deadlines.update(dict.fromkeys(deadlines_of_container(container_id)))
        self.rows[container_id] = None
        self.doubts[container_id] = None
        return True

    def add_sandbox(self, metadata: SandboxMetadata, status: SandboxStatus | None = None) -> None:
        """Add a sandbox, READY unless a status says otherwise. Raises AlreadyExistsError, InvalidInputError."""
        _require_kind(SandboxMetadata, metadata)
        _require_kind(SandboxStatus, status := status or SandboxStatus())
        key = require_id(metadata.id)
        require_name(metadata.name)
        if self._find_sandbox(key) is not None:
            raise AlreadyExistsError(f"sandbox {key} exists already; delete it first, or use another id")
        self._require_free_sandbox_name(metadata)
        require_namespaces(status.namespaces)
        if not status.boot_id and status.state is SandboxState.READY:
            status = replace(status, boot_id=read_boot_id() or "")
        row = sandbox_to_row(self._node, metadata)
        status_row = sandbox_status_to_row(self._node, key, self._first_version(key), status)
        self.changes.new_sandboxes[key] = row
        self.changes.new_sandbox_statuses[key] = status_row
        self._note_sandbox(EventKind.SANDBOX_ADDED, sandbox_name_row(metadata), status_row)
        self._set_deadlines({}, times_of_sandbox(status_row))
        self.sandboxes[key] = KeptSandbox(metadata, status_row)

    def sandbox_status(self, sandbox_id: str) -> SandboxStatus:
        """Return a sandbox's status as this draft has it. Raises NotFoundError, StoreDamagedError."""
        return row_to_sandbox_status(self._node, self._sandbox(sandbox_id).row)

    def update_sandbox(
        self, sandbox_id: str, fn: Callable[[SandboxStatus], SandboxStatus], expect: int | None = None
    ) -> SandboxStatus:
        """Replace a sandbox's status by `fn` of it, and return the new one. What `fn` raises passes through.

        Raises VersionConflictError if its version is not the one that is expected, NotFoundError, InvalidInputError,
        StoreDamagedError.
        """
        old = self._sandbox(sandbox_id)
        if expect is not None and old.row.seq != expect:
            raise VersionConflictError(
                f"sandbox {sandbox_id}: its version is {old.row.seq}, not {quote(expect)}; read it again, and"
                " decide anew"
            )
        before = row_to_sandbox_status(self._node, old.row)
        status = fn(before)
        if not isinstance(status, SandboxStatus):
            raise InvalidInputError(f"sandbox {sandbox_id}: expected a SandboxStatus, got {type(status).__name__}")
        require_namespaces(status.namespaces, before.namespaces)
        if old.row.stopped_at and not status.stopped_at:
            raise InvalidStateError(f"sandbox {sandbox_id} is NOTREADY, and never becomes READY again; make another")
        row = sandbox_status_to_row(self._node, sandbox_id, old.row.seq + 1, status)
        if sandbox_id in self.changes.new_sandbox_statuses:
            self.changes.new_sandbox_statuses[sandbox_id] = row
        else:
            staged = self.changes.sandbox_statuses.get(sandbox_id)
            self.changes.sandbox_statuses[sandbox_id] = (row, staged[1] if staged else old.row.seq)
        if row[2:-1] != old.row[2:-1]:
            self._note_sandbox(EventKind.SANDBOX_CHANGED, sandbox_name_row(old.metadata), row)
        self._set_deadlines(times_of_sandbox(old.row), times_of_sandbox(row))
        self.sandboxes[sandbox_id] = KeptSandbox(old.metadata, row)
        return status

    def delete_sandbox(self, sandbox_id: str) -> bool:
        """Remove a sandbox; return False if it is gone already. Raises InvalidStateError while it has containers."""
        if self._find_sandbox(sandbox_id) is None and sandbox_id not in self._memory.sandboxes.damaged:
            return False
        self.require_empty(sandbox_id)
        self._note_deleted_sandbox(sandbox_id)
        self.changes.deadlines[DeadlineKind.SANDBOX_EXPIRY, sandbox_id] = None
        if sandbox_id in self._memory.sandboxes.ids:
            self.changes.deleted_sandboxes.append(sandbox_id)
        self.changes.sandbox_statuses.pop(sandbox_id, None)
        self.changes.new_sandbox_statuses.pop(sandbox_id, None)
        self.changes.new_sandboxes.pop(sandbox_id, None)
        self.sandboxes[sandbox_id] = None
        return True

    def containers_of(self, sandbox_id: str) -> set[str]:
        """Return the ids of the containers that the sandbox with exactly this id has in this draft."""
        found = {row.id for row in self.changes.new_containers.values() if row.sandbox_id == sandbox_id}
        found.update(key for key in self._journal.load_ids_of_sandbox(sandbox_id) if self._find(key) is not None)
        return found

    def require_empty(self, sandbox_id: str) -> None:
        """Raise InvalidStateError if the sandbox with exactly this id has containers."""
        left = self.containers_of(sandbox_id)
        if left:
            raise InvalidStateError(
                f"cannot delete sandbox {sandbox_id}: it still has containers ({name_some(left)}); delete them first,"
                " or remove it with them"
            )

    def put(self, kind: str, key: str, value: Any, expect: int | None = None) -> Item:
        """Put a JSON value of the runtime's own in place of what is there, and return it with its version.

        Raises VersionConflictError if the present version is not `expect`, where 0 means that there is none;
        InvalidInputError for a value that JSON cannot hold or that is too long, or for a kind or key that is none.
        """
        kind, key = require_item_name("kind", kind), require_item_name("key", key)
        old = self._find_item_row(kind, key)
        version = 0 if old is None else old.version
        _require_version(kind, key, version, expect)
        # Each put has an event of its own, so that no version is ahead of the log: a new item's was never in use here.
        following = version + 1 if version else self._next_revision
        item = Item(kind=kind, key=key, value=value, version=following, updated_at=now())
        row = item_to_row(self._node, item)
        self.changes.items[kind, key] = row
        self._note_item(EventKind.ITEM_PUT, row)
        return row_to_item(self._node, row)

    def find(self, kind: str, key: str) -> Item | None:
        """Return an item as this draft has it, None if there is none. Raises StoreDamagedError."""
        row = self._find_item_row(kind, key)
        return None if row is None else row_to_item(self._node, row)

    def delete_item(self, kind: str, key: str, expect: int | None = None) -> None:
        """Delete an item; one that is not there is fine. Raises VersionConflictError, see `put`."""
        old = self._find_item_row(kind, key)
        _require_version(kind, key, 0 if old is None else old.version, expect)
        self.changes.items.pop((kind, key), None)
        if old is not None:
            self._note_item(EventKind.ITEM_DELETED, old)
            if (kind, key) not in self.changes.deleted_items:
                self.changes.deleted_items.append((kind, key))

    def doubt(self, container_id: str, doubt: Doubt | None) -> None:
        """Flag a container Unknown, or take the flag away; nothing of it is written. Raises NotFoundError."""
        self._require_under_way()
        self._require(container_id)
        self.doubts[container_id] = doubt

    def carry_expiry(self, of: str, to: str) -> None:
        """Let one container, which is added here, expire when another does, whatever clocks have been set to since."""
        deadlines, name = self._memory.deadlines, (DeadlineKind.EXPIRY, to)
        known = deadlines.find((DeadlineKind.EXPIRY, of), self.status(to).expires_at)
        if known is not None:
            self.changes.deadlines[name] = deadlines.make_row(name, known)

    def begin_deadlines(self, times: Mapping[Of, int]) -> None:
        """Write down by the clock of this boot when times are reached that were set in another one."""
        self._set_deadlines({}, times)

    def cancel_restart(self, metadata: Metadata, status: Status) -> None:
        """Stop one that waits for its restart, or for its start by a policy; `status` is what it has now."""
        if status.released or status.stop_requested_at or (status.started_at and not status.finished_at):
            return
        following = (metadata.sandbox_id, metadata.name, metadata.config.metadata.attempt + 1)
        if self.find_attempt(*following) is None if status.finished_at else metadata.restart_count > 0:
            self.mark_stopped(metadata.id, status)

    def mark_stopped(self, container_id: str, status: Status) -> None:
        """Write down that somebody has stopped a container that does not run: nothing restarts it, nor makes it."""
        stopped_at = now()
        stopped = replace(status, stop_requested_at=stopped_at, stop_deadline=stopped_at)
        if not status.created_at and not status.finished_at:
            stopped = end_never_run(stopped, "it was stopped before it was made", finished_at=stopped_at)
        self.replace(container_id, stopped)

    def declare_gone(self, container_id: str, why: str) -> Status:
        """Settle an Unknown container on a person's word: see `Store.declare_gone`, also for what is raised."""
        _require_kind(str, why)
        if not why.strip():
            raise InvalidInputError(f"container {quote(container_id)}: say why you know that it is gone")
        status, checkpoint = self.status(container_id), self.checkpoint(container_id)
        if checkpoint is None:
            raise StoreDamagedError(f"container {container_id}: {status.message}")
        if not status.unknown:
            is_new = status.state is ContainerState.UNKNOWN
            state = (
                "was never created, and has no process; delete it" if is_new else f"is {status.state.name}, not Unknown"
            )
            raise InvalidStateError(f"cannot declare container {container_id} gone: it {state}")
        settled = self.replace(container_id, declare_gone(checkpoint, why, finished_at=now()))
        self.doubt(container_id, None)
        return settled

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Take back all that the block has put into the draft, if it raises."""
        before = (
            self.changes.copy(),
            dict(self.rows),
            dict(self.doubts),
            dict(self.sandboxes),
            dict(self._names),
        )
        events, names = list(self._open_events), dict(self._event_names)
        try:
            yield
        except BaseException:
            self.changes, self.rows, self.doubts, self.sandboxes, self._names = before
            self._open_events, self._event_names = events, names
            raise

    @property
    def revision(self) -> int:
        """The revision of the newest event, once this is on disk."""
        return self.changes.events[-1].revision if self.changes.events else self._revision

    @property
    def _next_revision(self) -> int:
        return self.revision + len(self._open_events) + 1

    def _first_version(self, key: str) -> int:
        """Return the version of a container or sandbox that is added: one that none before it of this id has had."""
        before = self._last_versions.get(key) or self._journal.last_version(key)
        return max(self._next_revision, before + 1)

    def end_transaction(self) -> None:
        """Give the events since the last call their numbers and seals: they are what one caller has changed, whole."""
        if not self._open_events:
            return
        first = self.revision + 1
        last = first + len(self._open_events) - 1
        sealed = [seal_event(self._node, number, last, each) for number, each in enumerate(self._open_events, first)]
        self._open_events = []
        self.changes.events += sealed

    def add_report(self, number: int, at: int, report: str) -> None:
        """Keep the report of a recovery pass. Raises InvalidInputError for what no row can hold."""
        fits = all(type(each) is int and -(2**63) <= each < 2**63 for each in (number, at))  # a clock may be anywhere
        if not fits or not is_text(report):
            raise InvalidInputError(f"report {quote(number)}: its number, its time and its text cannot be stored")
        self.changes.reports.append(ReportRow(number, at, report))

    def close(self) -> None:
        """Refuse what is still to be changed: the block that it was for has ended, and nobody would write it."""
        self._is_over = True

    def _require_under_way(self) -> None:
        if self._is_over:
            raise InvalidStateError("this transaction is over, and nothing has changed; begin another one")

    def _set_deadlines(self, old: Mapping[Of, int], new: Mapping[Of, int]) -> None:
        """Note by which clock a time was set, where it is another one than before."""
        self.changes.deadlines.update(self._memory.deadlines.find_changed(old, new))

    def _stage(self, container_id: str, row: StatusRow, status: Status) -> None:
        self._require_under_way()
        self.rows[container_id] = row
        self.doubts[container_id] = (status.reason or Reason.UNVERIFIED, status.message) if status.unknown else None

    def _note(self, kind: EventKind, container_id: str, row: StatusRow | None, status: Status) -> None:
        """Note a change of a container, whose new row and status are given; without a row they cannot be read."""
        state, released = state_of(status)
        reason = "Released" if released and kind in STATE_CHANGES else str(status.reason)
        self._append(
            OpenEvent(
                at=time.time_ns(),
                kind=kind.value,
                names=self._name(container_id),
                seq=row.seq if row else 0,
                number=row.transitions if row else 0,
                state=state.value,
                exit_code=status.exit_code,
                reason=reason,
                message=status.message,
                body=status_to_text(status, with_extra=kind is EventKind.DELETED) if row else None,
            )
        )

    def _note_sandbox(self, kind: EventKind, names: NameRow, row: SandboxStatusRow | None) -> None:
        """Note a change of a sandbox, whose new row is given; None if it cannot be read."""
        event = OpenEvent(time.time_ns(), kind.value, names)
        if row is not None:
            status = row_to_sandbox_status(self._node, row)
            event = event._replace(
                seq=row.seq,
                state=status.state.value,
                reason=row.reason,
                message=row.message,
                body=status_to_text(status, with_extra=kind is EventKind.SANDBOX_DELETED),
            )
        self._append(event)

    def _append(self, event: OpenEvent) -> None:
        self._require_under_way()
        self._open_events.append(event)

    def _note_deleted_sandbox(self, sandbox_id: str) -> None:
        kept = self._find_sandbox(sandbox_id)
        names = NameRow(sandbox_id, sandbox_id, "", "{}") if kept is None else sandbox_name_row(kept.metadata)
        if kept is not None:
            self._last_versions[sandbox_id] = kept.row.seq
        self._note_sandbox(EventKind.SANDBOX_DELETED, names, kept and kept.row)

    def _note_item(self, kind: EventKind, row: ItemRow) -> None:
        self._append(OpenEvent(time.time_ns(), kind.value, NameRow(row.key, "", row.kind, "{}"), row.version))

    def _name(self, container_id: str) -> NameRow:
        """Return what events say of a container; nothing where damage has taken its row."""
        names = self._event_names.get(container_id) or self._memory.names.get(container_id)
        if names is None:
            found: AnyRow = self._journal.load_name(container_id) or ("", "", "", "{}")
            sandbox_id, name, labels = (each if isinstance(each, str) else "" for each in found[1:4])
            names = self._memory.names[container_id] = NameRow(container_id, sandbox_id, name, labels)
        return names

    def _require_free_name(self, metadata: Metadata) -> None:
        attempt = metadata.config.metadata.attempt
        taken = self.find_attempt(metadata.sandbox_id, metadata.name, attempt)
        if taken is not None:
            raise AlreadyExistsError(
                f"name {metadata.name!r} (attempt {attempt}) is taken in sandbox {metadata.sandbox_id}"
                f" by container {taken}; raise the attempt or choose another name"
            )

    def _find(self, container_id: str) -> Kept | None:
        if require_text("container", container_id) in self.rows:
            return self.rows[container_id]
        return self._memory.rows.find(container_id, self._journal.load_status)

    def _require_free_sandbox_name(self, metadata: SandboxMetadata) -> None:
        wanted = name_of(metadata)
        taken = self._memory.sandboxes.find_by_name(wanted)
        if taken is None or self.sandboxes.get(taken, ()) is None:
            staged = self.sandboxes.items()
            taken = next((key for key, kept in staged if kept is not None and name_of(kept.metadata) == wanted), None)
        if taken is not None:
            name, namespace, uid, attempt = wanted
            raise AlreadyExistsError(
                f"sandbox {taken} has the name {name!r} already (namespace {namespace!r}, uid {uid!r},"
                f" attempt {attempt}); raise the attempt or choose another name"
            )

    def _find_item_row(self, kind: str, key: str) -> ItemRow | None:
        kind, key = require_item_name("kind", kind), require_item_name("key", key)
        if (kind, key) in self.changes.items:
            return self.changes.items[kind, key]
        return None if (kind, key) in self.changes.deleted_items else self._journal.load_item(kind, key)

    def _find_sandbox(self, sandbox_id: str) -> KeptSandbox | None:
        if require_text("sandbox", sandbox_id) in self.sandboxes:
            return self.sandboxes[sandbox_id]
        return self._memory.sandboxes.kept.get(sandbox_id)

    def _sandbox(self, sandbox_id: str) -> KeptSandbox:
        found = self._find_sandbox(sandbox_id)
        if found is not None:
            return found
        if sandbox_id in self._memory.sandboxes.damaged and sandbox_id not in self.sandboxes:
            raise StoreDamagedError(self._memory.sandboxes.damaged[sandbox_id])
        raise NotFoundError(f"sandbox {quote(sandbox_id)} does not exist")

    def _require(self, container_id: str) -> None:
        self._row(container_id)

    def _row(self, container_id: str) -> Kept:
        row = self._find(container_id)
        if row is None:
            raise NotFoundError(f"container {quote(container_id)} does not exist")
        return row


def _tell_apart(old: StatusRow, new: StatusRow, *, has_new_state: bool) -> Iterator[EventKind]:
    """Yield the kind of each event by which a container's new status differs from the old one."""
    if has_new_state:
        yield EventKind.STATE
    if new.paused != old.paused:
        yield EventKind.PAUSED
    if _intent(new) != _intent(old):
        yield EventKind.INTENT
    if new.extra != old.extra:
        yield EventKind.EXTRA


def _intent(row: StatusRow) -> tuple[int, int, int]:
    return row.stop_requested_at, row.stop_deadline, row.expires_at


def _require_ready(sandbox_id: str, sandbox: KeptSandbox, refused: str) -> None:
    if sandbox.row.stopped_at:
        why = f" ({sandbox.row.reason})" if sandbox.row.reason else ""
        raise InvalidStateError(f"{refused}: its sandbox {sandbox_id} is NOTREADY{why}; make another")


def _require_version(kind: str, key: str, version: int, expect: int | None) -> None:
    if expect is not None and version != expect:
        found = f"its version is {version}" if version else "it is not there"
        raise VersionConflictError(
            f"item {kind} {quote(key)}: {found}, and version {quote(expect)} was expected; read it again, and decide"
            " anew"
        )


def _leave_restart_to_original(old: StatusRow, status: Status) -> Status:
    """Where what runs in the original of a copied directory ends: nobody gets two of it, by its restart policy here."""
    if old.reason == Reason.COPIED and status.finished_at and not status.stop_requested_at:
        return replace(status, stop_requested_at=status.finished_at, stop_deadline=status.finished_at)
    return status


def _require_kind(kind: type, value: object) -> None:
    """Raise InvalidInputError, with the type of what was given, unless it is of this kind."""
    if not isinstance(value, kind):
        raise InvalidInputError(f"give a {kind.__name__}, not {type(value).__name__}")
