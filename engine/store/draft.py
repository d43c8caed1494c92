"""The working copy of one commit: what memory will hold if the commit succeeds, and the rows that make it so.

Everything is checked here, before anything is written, so that a request that is refused fails alone and
the database sees only what it will accept.
"""

import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager

from msgspec.structs import replace

from limpet.engine.database import Changes, Journal
from limpet.engine.store.rows import Kept, Rows
from limpet.schema.codec import (
    metadata_to_row,
    row_state,
    row_to_status,
    sandbox_to_row,
    state_of,
    status_to_row,
)
from limpet.schema.errors import (
    AlreadyExistsError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    StoreDamagedError,
    quote,
)
from limpet.schema.metadata import Metadata, SandboxMetadata, require_id, require_name
from limpet.schema.rows import ReportRow, StatusRow, TransitionRow
from limpet.schema.status import Reason, Status, declare_gone

Doubt = tuple[str, str]
"""Why a container is Unknown: a word and a sentence. Kept in memory only."""
DAMAGED: Doubt = (
    Reason.DAMAGED,
    "its status on disk is missing, or does not match its checksum",
)


class Draft:
    """Changes on top of the store's memory, which is read here and never written."""

    def __init__(
        self,
        node: str,
        journal: Journal,
        rows: Rows,
        doubts: Mapping[str, Doubt],
        sandboxes: Mapping[str, SandboxMetadata],
        damaged_sandboxes: Container[str],
    ) -> None:
        self._node = node
        self._journal = journal
        self._rows = rows
        self._old_doubts = doubts
        self._old_sandboxes = sandboxes
        self._damaged_sandboxes = damaged_sandboxes
        self.changes = Changes()
        self.rows: dict[str, Kept | None] = {}
        """New status rows; None for a container that is deleted."""
        self.doubts: dict[str, Doubt | None] = {}
        """Doubts that come, and None for those that go."""
        self.sandboxes: dict[str, SandboxMetadata | None] = {}
        self._names: dict[tuple[str, str, int], str] = {}
        """The ids of the containers that are added here, by sandbox, name and attempt."""

    def __contains__(self, container_id: str) -> bool:
        return self._find(container_id) is not None

    def status(self, container_id: str) -> Status:
        """Return a container's status as this draft has it. Raises NotFoundError."""
        doubt = self.doubts.get(container_id, self._old_doubts.get(container_id))
        return status_with_doubt(self._row(container_id), doubt)

    def checkpoint(self, container_id: str) -> Status | None:
        """Return a container's status as it is on disk, without any doubt; None if it is gone or damaged."""
        row = self._find(container_id)
        return row_to_status(row) if row else None

    def add(self, metadata: Metadata, status: Status) -> None:
        """Add a container. Raises AlreadyExistsError, NotFoundError for its sandbox, InvalidInputError."""
        key = require_id(metadata.id)
        require_name(metadata.name)
        if self._find(key) is not None:
            raise AlreadyExistsError(f"container {key} exists already; delete it first, or use another id")
        if self._find_sandbox(metadata.sandbox_id) is None:
            raise NotFoundError(f"sandbox {quote(metadata.sandbox_id)} does not exist; create it first")
        row = metadata_to_row(self._node, metadata)
        self._require_free_name(metadata)
        status_row = status_to_row(self._node, key, 1, 1, status)
        self.changes.new_containers[key] = row
        self._names[row.sandbox_id, row.name, row.attempt] = key
        self.changes.new_statuses[key] = status_row
        self._note_transition(key, status_row, status)
        self._stage(key, status_row, status)

    def update(self, container_id: str, fn: Callable[[Status], Status]) -> Status:
        """Replace a container's status by `fn` of it, and return the new one. What `fn` raises passes through."""
        return self.replace(container_id, fn(self.status(container_id)))

    def replace(self, container_id: str, status: Status) -> Status:
        """Replace a container's status, and return it. Raises NotFoundError, InvalidInputError, StoreDamagedError."""
        old_row = self._row(container_id)
        if not isinstance(status, Status):
            raise InvalidInputError(f"container {container_id}: expected a Status, got {type(status).__name__}")
        if not old_row:
            message = self.status(container_id).message
            raise StoreDamagedError(f"container {container_id}: {message}; delete it, or restore a backup")
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
        if changed:
            self._note_transition(container_id, row, written)
        self._stage(container_id, row, status)
        return status

    def delete(self, container_id: str) -> bool:
        """Remove a container and its history; return False if it is gone already."""
        if self._find(container_id) is None:
            return False
        self.changes.statuses.pop(container_id, None)
        self.changes.transitions.pop(container_id, None)
        self.changes.new_statuses.pop(container_id, None)
        row = self.changes.new_containers.pop(container_id, None)
        if row is not None:
            del self._names[row.sandbox_id, row.name, row.attempt]
        if container_id in self._rows:
            self.changes.deleted_containers.append(container_id)
        self.rows[container_id] = None
        self.doubts[container_id] = None
        return True

    def add_sandbox(self, metadata: SandboxMetadata) -> None:
        """Add a sandbox. Raises AlreadyExistsError, InvalidInputError."""
        key = require_id(metadata.id)
        require_name(metadata.name)
        if self._find_sandbox(key) is not None:
            raise AlreadyExistsError(f"sandbox {key} exists already; delete it first, or use another id")
        self.changes.new_sandboxes[key] = sandbox_to_row(self._node, metadata)
        self.sandboxes[key] = metadata

    def delete_sandbox(self, sandbox_id: str) -> bool:
        """Remove a sandbox; return False if it is gone already. Raises InvalidStateError while it has containers."""
        damaged = sandbox_id in self._damaged_sandboxes
        if self._find_sandbox(sandbox_id) is None and not damaged:
            return False
        left = {row.id for row in self.changes.new_containers.values() if row.sandbox_id == sandbox_id}
        left.update(key for key in self._journal.load_ids_of_sandbox(sandbox_id) if self._find(key) is not None)
        if left:
            raise InvalidStateError(f"sandbox {sandbox_id} still has {len(left)} containers; delete them first")
        if sandbox_id in self._old_sandboxes or damaged:
            self.changes.deleted_sandboxes.append(sandbox_id)
        self.changes.new_sandboxes.pop(sandbox_id, None)
        self.sandboxes[sandbox_id] = None
        return True

    def doubt(self, container_id: str, doubt: Doubt | None) -> None:
        """Flag a container Unknown, or take the flag away; nothing of it is written. Raises NotFoundError."""
        self._require(container_id)
        self.doubts[container_id] = doubt

    def declare_gone(self, container_id: str, why: str) -> Status:
        """Settle an Unknown container on a person's word: see `Store.declare_gone`, also for what is raised."""
        if not why.strip():
            raise InvalidInputError(f"container {quote(container_id)}: say why you know that it is gone")
        status, checkpoint = self.status(container_id), self.checkpoint(container_id)
        if checkpoint is None:
            raise StoreDamagedError(f"container {container_id}: {status.message}")
        if not status.unknown:
            raise InvalidStateError(
                f"cannot declare container {container_id} gone: it is {status.state.name}, not Unknown"
            )
        settled = self.replace(container_id, declare_gone(checkpoint, why, finished_at=max(time.time_ns(), 1)))
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
        try:
            yield
        except BaseException:
            self.changes, self.rows, self.doubts, self.sandboxes, self._names = before
            raise

    def add_report(self, number: int, at: int, report: str) -> None:
        """Keep the report of a recovery pass."""
        self.changes.reports.append(ReportRow(number, at, report))

    def _stage(self, container_id: str, row: StatusRow, status: Status) -> None:
        self.rows[container_id] = row
        self.doubts[container_id] = (status.reason or Reason.UNVERIFIED, status.message) if status.unknown else None

    def _note_transition(self, container_id: str, row: StatusRow, status: Status) -> None:
        state, released = state_of(status)
        reason = "Released" if released else status.reason
        self.changes.transitions.setdefault(container_id, []).append(
            TransitionRow(
                id=container_id,
                number=row.transitions,
                seq=row.seq,
                at=time.time_ns(),
                state=state,
                exit_code=status.exit_code,
                reason=reason,
                message=status.message,
            )
        )

    def _require_free_name(self, metadata: Metadata) -> None:
        attempt = metadata.config.metadata.attempt
        wanted = (metadata.sandbox_id, metadata.name, attempt)
        taken = self._journal.find_container_by_name(*wanted)
        if taken is None or self.rows.get(taken, ()) is None:
            taken = self._names.get(wanted)
        if taken is not None:
            raise AlreadyExistsError(
                f"name {metadata.name!r} (attempt {attempt}) is taken in sandbox {metadata.sandbox_id}"
                f" by container {taken}; raise the attempt or choose another name"
            )

    def _find(self, container_id: str) -> Kept | None:
        if container_id in self.rows:
            return self.rows[container_id]
        return self._rows.find(container_id, self._journal.load_status)

    def _find_sandbox(self, sandbox_id: str) -> SandboxMetadata | None:
        if sandbox_id in self.sandboxes:
            return self.sandboxes[sandbox_id]
        return self._old_sandboxes.get(sandbox_id)

    def _require(self, container_id: str) -> None:
        self._row(container_id)

    def _row(self, container_id: str) -> Kept:
        row = self._find(container_id)
        if row is None:
            raise NotFoundError(f"container {quote(container_id)} does not exist")
        return row


def status_with_doubt(row: Kept, doubt: Doubt | None) -> Status:
    """Return the Status in `row`, flagged Unknown with reason and message if there is a doubt.

    An empty row stands for a container whose status on disk is damaged: all that is known is the doubt.
    """
    if not row:
        status, doubt = Status(), doubt or DAMAGED
    else:
        status = row_to_status(row)
    if doubt is None:
        return status
    return replace(status, reason=doubt[0], message=doubt[1], unknown=True)
