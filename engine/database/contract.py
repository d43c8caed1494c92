"""What the store asks of a database: a `Journal` to write to, and `Records` to read, for one node.

Behind it stands SQLite in `sqlite`, and `memory`, which keeps nothing and shows that the store needs no more than this.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from limpet.engine.database.changes import Changes
from limpet.engine.database.page import EventPage
from limpet.schema.history import Transition
from limpet.schema.metadata import Metadata
from limpet.schema.rows import DeadlineRow, ItemRow, NameRow, SandboxRow, SandboxStatusRow, StatusRow


class Journal(Protocol):
    """Writes for one node, and reads what a draft must know. One thread at a time calls it."""

    def commit(self, changes: Changes) -> None:
        """Write all of `changes` or nothing; durable when this returns.

        Raises OutcomeUnknownError if it cannot be found out which, StoreReplacedError or StoreFencedError if the
        database is not ours any more; the journal refuses everything then. After any other StoreError nothing was
        written, and it goes on.
        """

    def has_landed(self, changes: Changes, error: BaseException) -> bool:
        """Say whether a commit that `error` broke into is in the database. Raises OutcomeUnknownError."""

    def load_status(self, container_id: str) -> StatusRow | None:
        """Return the status row of one container, None if it has none."""

    def load_name(self, container_id: str) -> NameRow | None:
        """Return what lists are filtered by, of one container; None if it has no row."""

    def last_revision(self) -> int:
        """Return the revision of the newest event, 0 if there was none yet. Of a later commit it is greater."""

    def last_version(self, key: str) -> int:
        """Return the last version of the containers and sandboxes of this id that were deleted.

        0 where none is known, as of what was deleted long ago: no version was greater then than revisions are now.
        """

    def find_container_by_name(self, sandbox_id: str, name: str, attempt: int) -> str | None:
        """Return the id of the container that has this name, if there is one."""

    def load_ids_of_sandbox(self, sandbox_id: str) -> Sequence[str]:
        """Return the ids of the sandbox's containers."""

    def load_item(self, kind: str, key: str) -> ItemRow | None:
        """Return an item's row, None if there is none."""

    def last_recovery(self) -> int:
        """Return the number of the newest recovery report, 0 if there is none."""


class Records(Protocol):
    """Reads one node's records. Thread-safe. Its methods raise StoreError."""

    def load_container_ids(self) -> Sequence[str]:
        """Return the id of every container, in order."""

    def load_status_ids(self) -> Sequence[str]:
        """Return the id of every container that has a status row, in order."""

    def load_unsettled(self) -> Sequence[StatusRow]:
        """Return the status row of every container that has not ended, has a process, or expires yet."""

    def load_status(self, container_id: str) -> StatusRow | None:
        """Return the status row of one container, None if it has none."""

    def load_statuses(self) -> Sequence[StatusRow]:
        """Return the status row of every container."""

    def load_names(
        self, name: str = "", sandbox_ids: Collection[str] | None = None, labels: Mapping[str, str] | None = None
    ) -> Sequence[NameRow]:
        """Return what lists are filtered by, of every container.

        Or of those with this name and in these sandboxes. Of `labels` each has one of them at least.
        """

    def load_ids(self, beginning: str) -> Sequence[str]:
        """Return the ids that begin so, of all that has a row of either kind."""

    def load_restartable(self) -> Sequence[str]:
        """Return the id of every container that has a restart policy."""

    def find_container_by_name(self, sandbox_id: str, name: str, attempt: int) -> str | None:
        """Return the id of the container that has this name, if there is one."""

    def load_all_sandboxes(self) -> Sequence[tuple[str, SandboxRow]]:
        """Return node and row of every sandbox of every node."""

    def load_sandbox_statuses(self) -> Sequence[SandboxStatusRow]:
        """Return the status row of every sandbox."""

    def load_deadlines(self, boot_id: str, after: int) -> Sequence[DeadlineRow]:
        """Return the rows of a boot's deadlines, without those of stops that are over at a time of its clock."""

    def load_items(self, kind: str) -> Sequence[ItemRow]:
        """Return the row of every item of a kind, by key."""

    def load_item(self, kind: str, key: str) -> ItemRow | None:
        """Return an item's row, None if there is none."""

    def load_sandbox_ids_in_use(self) -> Sequence[str]:
        """Return the ids of the sandboxes that containers are in."""

    def metadata(self, container_id: str) -> Metadata:
        """Return a container's metadata. Raises NotFoundError, StoreDamagedError."""

    def forget_metadata(self) -> None:
        """Drop what is kept of metadata: a container was deleted."""

    def load_events(self, after: int, limit: int) -> EventPage:
        """Return at most `limit` events that follow the revision `after`, and how far the log goes, at one instant."""

    def history(self, container_id: str) -> Sequence[Transition]:
        """Return the state changes that are kept, oldest first. Raises StoreDamagedError."""

    def last_report(self) -> bytes | None:
        """Return the newest recovery report as JSON, None if there is none."""


class Database(Protocol):
    """One node's database, opened by the only process that may write to it."""

    @property
    def node(self) -> str:
        """The node's name."""

    @property
    def journal(self) -> Journal:
        """Its one writer."""

    @property
    def records(self) -> Records:
        """Its reader."""

    def back_up(self, target_path: str) -> None:
        """Copy everything to a new file; whole and verified, or not there. Raises AlreadyExistsError, StoreError."""

    def close(self) -> None:
        """Close it, so that the next opening finds everything in order. Raises StoreError."""

    def leave(self) -> None:
        """Close it as it is, without bringing anything in order: what it holds is damaged, and is not to be changed."""

    def abandon(self) -> None:
        """In a fork of the process that opened it: never touch it again."""
