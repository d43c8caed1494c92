"""The store: every container's record, durable on disk, and in memory for reading.

A call that changes something returns when the change is durable; memory is changed only after that, so a
reader never sees what could still be lost. The store knows nothing of processes: `Engine` adds that, and a
runtime that manages its own processes uses the store as it is.
"""

import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar
from weakref import WeakSet

from limpet.engine.database import Changes, Database, EventPage
from limpet.engine.database.sqlite import open_database
from limpet.engine.state.descriptors import system_errors_told
from limpet.engine.state.directory import StateDirectory
from limpet.engine.state.fleet_choice import FLEET_TIMEOUT_SECONDS, FleetChoice
from limpet.engine.state.process_bound import ProcessBound
from limpet.engine.state.steps import may_be_called_again, run_whole, whole
from limpet.engine.state.turn import open_in_parts, require_wait
from limpet.engine.store.commit import Committer, Request
from limpet.engine.store.doubt import NOT_VERIFIED, Doubt, require_doubt
from limpet.engine.store.draft import Draft
from limpet.engine.store.feed import Bells, StoreFeed
from limpet.engine.store.fleet import FleetLink
from limpet.engine.store.listing import Listing
from limpet.engine.store.match import Filter
from limpet.engine.store.memory import Memory
from limpet.engine.store.record import Record, Unsettled
from limpet.engine.store.watch import Wanted, Watch
from limpet.recovery.host import read_boot_id
from limpet.recovery.sandbox_rules import decide_sandbox
from limpet.schema.codec import read_identity, row_to_item
from limpet.schema.deadline import DeadlineKind
from limpet.schema.errors import (
    ClosedError,
    LimpetError,
    NotFoundError,
    StateDirectoryError,
    StoreDamagedError,
    StoreError,
    quote_path,
)
from limpet.schema.history import Transition
from limpet.schema.identity import ProcessIdentity, has_sound_types
from limpet.schema.item import Item, require_item_name
from limpet.schema.metadata import DEFAULT_NODE, Metadata, SandboxMetadata, require_node, require_text
from limpet.schema.restart import RestartKind
from limpet.schema.sandbox_status import SandboxStatus
from limpet.schema.status import ContainerState, Status, mark_copied, read_state
from limpet.schema.telling import get_log

if TYPE_CHECKING:
    from limpet.engine.fleet import FleetLag

_log = get_log("limpet.store")
_T = TypeVar("_T")
_TRIES = 3
_APPLY_TRIES, _TRIES_AT_ONCE, _APPLY_PAUSE_SECONDS = 1000, 10, 0.005
"""How often memory is changed as the disk was, and when to pause: memory that is short may be free again soon."""


class Store(ProcessBound):
    """The records of one node's containers and sandboxes. Thread-safe. Open it with `Store.open`.

    Whatever is not finished is Unknown when the store is opened, until `recover` or a checkpoint says what is
    true. Of containers that had ended by then, and of metadata, names and history, only what is asked for is read
    from disk; everything else comes from memory.
    """

    def __init__(self, directory: StateDirectory, database: Database, fleet: FleetLink | None = None) -> None:
        """Load the records. The store owns all of these from now on, and gives them up in `close`."""
        self.fleet = fleet or FleetLink(FleetChoice())
        self.directory = directory
        self.node = database.node
        self._database = database
        self._journal = database.journal
        self._records = database.records
        self._committer = Committer(self._commit, self.fleet.answer)
        self._unsettled: Draft | None = None
        """What is being written, until memory has it too: an interrupt may leave it there."""
        self._closing = threading.RLock()  # a signal handler may close the store while it is being closed
        self._is_down = False
        self._memory = Memory(self.node, self._records, self._journal.last_revision(), self.metadata)
        self._closed = False
        self._pid = os.getpid()
        self._bells = Bells()
        _opened.add(self)

    @classmethod
    def open(
        cls,
        state_dir: str | os.PathLike[str],
        *,
        node: str = DEFAULT_NODE,
        wait: float = 0,
        fleet: str = "",
        fleet_ack: str = "async",
        fleet_timeout: float = FLEET_TIMEOUT_SECONDS,
    ) -> Self:
        """Lock the state directory, check the database, migrate it if it is older, and load its records.

        While another has it open, the lock is waited for, `wait` seconds at most.

        With `fleet`, the URL of a PostgreSQL (postgresql+psycopg://user@host/database), what is written is sent there
        too, behind the callers' backs: `fleet_lag` says how far that is. With `fleet_ack="sync"` a call returns when
        the fleet has its change, or raises FleetUnknownError after `fleet_timeout` seconds: it is durable here then.

        Raises StateDirectoryLockedError, StateDirectoryError, StoreDamagedError, StoreTooNewError or another
        StoreError, InvalidInputError for an invalid node's name or for what is no path, and leaves the state untouched.
        """
        node = require_node(node)
        require_wait(wait)
        choice = FleetChoice(fleet, fleet_ack, fleet_timeout)
        if not may_be_called_again():
            return cls._open(state_dir, node, choice, wait)
        return open_in_parts(lambda part: run_whole(lambda: cls._open(state_dir, node, choice, part), cls.close), wait)

    @classmethod
    def _open(cls, state_dir: str | os.PathLike[str], node: str, choice: FleetChoice, wait: float) -> Self:
        link = FleetLink(choice)
        directory = StateDirectory.acquire(state_dir, wait=wait)
        try:
            with system_errors_told(f"state directory {quote_path(directory.path)}"):
                database = open_database(directory, node)
            try:
                store = cls(directory, database, link)
            except BaseException:
                with suppress(LimpetError):  # what kept it from being read is raised
                    database.leave()  # closing in order would move the WAL into a database that may be damaged
                raise
        except BaseException:
            directory.release()
            raise
        try:
            store._settle_copy()
            store._begin_deadlines()
            link.join(directory, node, store._memory.copy_doubts)
        except BaseException:
            store.close()
            raise
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._memory.rows)} containers, {len(self._memory.doubts)} unknown"
        return f"<Store {self.directory.path}: {state}>"

    def add(self, metadata: Metadata, status: Status | None = None) -> Record:
        """Add a container. Raises AlreadyExistsError, NotFoundError for its sandbox, InvalidInputError."""
        return self._change(lambda draft: draft.add(metadata, status or Status()))

    @whole
    def get(self, container_id: str) -> Record:
        """Return the container with this id, else with this name, else the one whose id begins with it.

        Of several attempts of a name in one sandbox the newest is meant. Raises NotFoundError if there is none,
        AmbiguousError if several have the name, in different sandboxes, or ids that begin so.
        """
        self.require_open()
        return self._memory.get(container_id)

    @whole
    def status(self, container_id: str) -> Status:
        """Return the status of the container with exactly this id. Raises NotFoundError."""
        self.require_open()
        return self._memory.status(require_text("container", container_id))

    @whole
    def list(
        self,
        *,
        id: str = "",
        name: str = "",
        sandbox_id: str = "",
        state: ContainerState | str | None = None,
        labels: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> "Listing[Record]":
        """Return the containers that match all that is given, as they were at one instant, oldest id first.

        The list's `revision` is that of the newest event then: `watch` goes on from there. `id` is an id or the
        beginning of ids; `sandbox_id` a sandbox's id, else the name of sandboxes, else the beginning of ids; `state` a
        state or its name, in any case; `labels` must all be there with these values, and so must `extra`, among the
        top-level keys of theirs. Raises InvalidInputError for a state that is none, and for what is no text.
        """
        self.require_open()
        wanted_state = None if state is None else read_state(state)
        wanted = Filter.of(id, name, sandbox_id, labels, extra)
        records, revision = self._list(wanted, ended=wanted_state in {None, ContainerState.EXITED})
        if wanted_state is not None:
            records = [record for record in records if record.status.state is wanted_state]
        if extra:
            records = [record for record in records if wanted.accepts_extra(record.status.extra)]
        return Listing(sorted(records, key=lambda record: record.id), revision)

    @whole
    def find_attempt(self, sandbox_id: str, name: str, attempt: int) -> str | None:
        """Return the id of the container with this name and attempt in a sandbox, None if there is none."""
        self.require_open()
        return self._records.find_container_by_name(sandbox_id, name, attempt)

    @whole
    def list_intended(self) -> "Sequence[str]":
        """Return the ids of the containers that have a restart policy, expire and are not released, or are paused."""
        self.require_open()
        return sorted({*self._records.load_restartable(), *self._memory.find_expiring()})

    def time_left(self, kind: DeadlineKind, key: str, at: int) -> int:
        """Return how many nanoseconds are left until a time that was set of a container or sandbox; 0 if it is reached.

        `at` is what the status says. No less is left than there was when that was written, without the time that has
        passed in this boot, whatever the wall clock has been set to; see `schema.deadline`.
        """
        return self._memory.deadlines.left((kind, key), at)

    def watch(
        self,
        since: int | None = None,
        *,
        id: str = "",
        name: str = "",
        sandbox_id: str = "",
        labels: Mapping[str, str] | None = None,
        kinds: Iterable[str] = (),
    ) -> Watch:
        """Return an iterator of the events that follow the revision `since`: each once, in order, without a gap.

        It waits for more, and only gives what is durable and can be read here. `since` is the revision of a list or of
        an event, 0 for the first event of all; without it, only what happens from now on is given. Filters are those of
        `list`, by what containers and sandboxes were called then; `kinds` are of `EventKind`. While it waits it raises
        ClosedError once the store is closed. Not to be waited for within a transaction.

        Raises CursorTooOldError if events after `since` are not kept any more, InvalidInputError for a revision that is
        to come yet and for a kind that is none.
        """
        self.require_open()
        first = self.revision if since is None else since
        return Watch(self.feed(), first, Wanted(id, name, sandbox_id, labels, kinds))

    def feed(self) -> StoreFeed:
        """Return the log of changes, for a watch. For fronts such as `aio`."""
        return StoreFeed(self, self._bells)

    @property
    def revision(self) -> int:
        """That of the newest event, 0 if there was none yet."""
        return self._memory.revision

    @property
    @whole
    def fleet_lag(self) -> "FleetLag | None":
        """How far the fleet is behind this store: in events, in seconds, and why; None without a fleet."""
        return self.fleet.lag

    @whole
    def load_events(self, after: int, limit: int) -> EventPage:
        """Return up to `limit` events that follow the revision `after`, and whose changes are in memory, too."""
        self.require_open()
        recent = self.recent_events(after, limit)
        if recent is not None:
            return recent
        newest = self.revision
        page = self._records.load_events(after, limit)
        return page._replace(newest=newest, rows=[row for row in page.rows if row.revision <= newest])

    def delete(self, container_id: str) -> bool:
        """Remove the record and history of the container with exactly this id; return False if it is gone already."""
        return self._change(lambda draft: draft.delete(container_id))

    def checkpoint(self, container_id: str, status: Status, *, expect: int | None = None) -> Status:
        """Replace a container's status, durably, and return it.

        With `expect`, a version as `Record.version` has it, VersionConflictError is raised if somebody has changed it
        since. Raises NotFoundError, InvalidInputError, StoreError.
        """
        return self._change(lambda draft: draft.replace(container_id, status, expect))

    def update(self, container_id: str, fn: Callable[[Status], Status], *, ready_sandbox: str | None = None) -> Status:
        """Replace a container's status by `fn` of it, durably, and return the new one.

        `fn` should be quick and pure: it may run on another thread, together with other callers' changes. What
        it raises is raised here, and nothing has changed then. With `ready_sandbox`, the id of a sandbox,
        InvalidStateError is raised unless that is READY at the same instant: for a start, which a sandbox that is
        stopped beside it must not miss. Raises NotFoundError, InvalidInputError, StoreError.
        """
        return self._change(lambda draft: draft.update(container_id, fn, ready_sandbox=ready_sandbox))

    def add_sandbox(self, metadata: SandboxMetadata, status: SandboxStatus | None = None) -> None:
        """Add a sandbox, READY unless a status says otherwise.

        No two have the same name, namespace, uid and attempt. Raises AlreadyExistsError, InvalidInputError, StoreError.
        """
        self._change(lambda draft: draft.add_sandbox(metadata, status))

    @whole
    def get_sandbox(self, sandbox_id: str) -> SandboxMetadata:
        """Return the sandbox with this id, else with this name, else the one whose id begins with it.

        Of several attempts of a sandbox the newest is meant. Raises NotFoundError, AmbiguousError if several are meant,
        StoreDamagedError if its record cannot be read.
        """
        self.require_open()
        return self._memory.get_sandbox(require_text("sandbox", sandbox_id))

    @whole
    def sandbox_status(self, sandbox_id: str) -> SandboxStatus:
        """Return the status of the sandbox with exactly this id. Raises NotFoundError, StoreDamagedError."""
        self.require_open()
        return self._memory.sandbox_status(require_text("sandbox", sandbox_id))[0]

    @whole
    def sandbox_version(self, sandbox_id: str) -> int:
        """Return the version of that status, which grows by one with each change. Raises as `sandbox_status` does."""
        self.require_open()
        return self._memory.sandbox_status(require_text("sandbox", sandbox_id))[1]

    def update_sandbox(
        self, sandbox_id: str, fn: Callable[[SandboxStatus], SandboxStatus], *, expect: int | None = None
    ) -> SandboxStatus:
        """Replace a sandbox's status by `fn` of it, durably, and return the new one; see `update`.

        Raises VersionConflictError if its version is not the one that is expected.
        """
        return self._change(lambda draft: draft.update_sandbox(sandbox_id, fn, expect))

    @whole
    def list_sandboxes(self) -> "Sequence[SandboxMetadata]":
        """Return all sandboxes whose records can be read, oldest first."""
        self.require_open()
        return self._memory.list_sandboxes()

    @property
    def sandbox_ids(self) -> "Collection[str]":
        """The ids of all sandboxes, also of those whose records cannot be read."""
        return self._memory.sandboxes.ids

    @property
    def damaged_sandboxes(self) -> "Mapping[str, str]":
        """What is wrong with each sandbox whose record cannot be read, by its id."""
        return dict(self._memory.sandboxes.damaged)

    def delete_sandbox(self, sandbox_id: str) -> bool:
        """Remove the record of the sandbox with exactly this id; return False if it is gone already.

        Raises InvalidStateError while it has containers.
        """
        return self._change(lambda draft: draft.delete_sandbox(sandbox_id))

    def put(self, kind: str, key: str, value: Any, *, expect: int | None = None) -> Item:
        """Put a JSON value of the runtime's own, durably, in place of what is there; return it with its version.

        `kind` and `key` are yours: an exec, a volume, a lease. With `expect` the present version must be that one,
        where 0 means that there is none; VersionConflictError is raised otherwise. An item that is deleted and put
        again has no version that it had before. Raises InvalidInputError for a value that JSON cannot hold or that
        takes more than 64 KiB.
        """
        return self._change(lambda draft: draft.put(kind, key, value, expect))

    @whole
    def find(self, kind: str, key: str) -> Item | None:
        """Return the item that was put, None if there is none. Raises StoreDamagedError."""
        self.require_open()
        require_item_name("kind", kind)
        row = self._records.load_item(kind, require_item_name("key", key))
        return None if row is None else row_to_item(self.node, row)

    @whole
    def list_items(self, kind: str) -> "Sequence[Item]":
        """Return all items of a kind, by key, as they were at one instant. Raises StoreDamagedError."""
        self.require_open()
        return [row_to_item(self.node, row) for row in self._records.load_items(require_item_name("kind", kind))]

    def delete_item(self, kind: str, key: str, *, expect: int | None = None) -> None:
        """Delete an item, durably; one that is not there is fine. Raises VersionConflictError, see `put`."""
        self._change(lambda draft: draft.delete_item(kind, key, expect))

    def recent_events(self, after: int, limit: int) -> EventPage | None:
        """Return what `load_events` does, if that is in memory."""
        return self._memory.recent_events(after, limit)

    @contextmanager
    def transaction(self) -> Iterator[Draft]:
        """Change several containers at once: all of it becomes durable and visible together, or nothing does.

        The block works on a draft with `add`, `update`, `delete` and the like, and is the only writer while it
        runs, so keep it short. If it raises, nothing has changed. The commit happens at the end of the block, and
        after it the draft takes nothing.
        """
        self.require_open()
        with self._memory.view.giving_way(), self._committer.turn():
            draft = self._draft()
            try:
                yield draft
            finally:
                draft.close()
            self.finish(draft)
        self.fleet.wait()

    @whole
    def history(self, container_id: str) -> "Sequence[Transition]":
        """Return the container's state changes, oldest first; only the newest are kept.

        Raises NotFoundError, StoreDamagedError.
        """
        return self._records.history(self.get(container_id).id)

    @whole
    def metadata(self, container_id: str) -> Metadata:
        """Return a container's metadata. Raises NotFoundError, StoreDamagedError."""
        self.require_open()
        container_id = require_text("container", container_id)
        try:
            return self._records.metadata(container_id)
        except NotFoundError as error:
            if container_id not in self:
                raise
            raise StoreDamagedError(f"container {container_id}: its metadata is missing; restore a backup") from error

    @whole
    def last_report(self) -> bytes | None:
        """Return the newest recovery report as JSON, None if there is none yet."""
        self.require_open()
        return self._records.last_report()

    @whole
    def unsettled(self, leftovers: Iterable[str] = ()) -> "Sequence[Unsettled]":
        """Return what a recovery pass must look at: all that has not ended, is in doubt, or is in `leftovers`."""
        self.require_open()
        return self._memory.unsettled(set(leftovers))

    def __len__(self) -> int:
        return len(self._memory.rows)

    def __contains__(self, container_id: object) -> bool:
        return container_id in self._memory.rows

    @property
    def ids(self) -> "Collection[str]":
        """The ids of all containers, also of those whose records cannot be read."""
        return self._memory.rows.keys()

    @property
    def is_closed(self) -> bool:
        """True once `close` was called, and in a fork of the process that opened the store."""
        return self._closed or self.is_foreign

    @property
    def is_foreign(self) -> bool:
        """True in a fork of the process that opened the store, which it belongs to."""
        return os.getpid() != self._pid

    @whole
    def doubt(self, container_id: str, doubt: Doubt) -> None:
        """Flag a container Unknown, in memory alone: the next status that is written takes the flag away.

        One that has ended stays so. Raises InvalidInputError for what is no doubt.
        """
        container_id = require_text("container", container_id)
        require_doubt(container_id, doubt)
        self._memory.doubt(container_id, doubt)
        self.fleet.note(Changes(), self.revision)

    @whole
    def is_damaged(self, container_id: str) -> bool:
        """Say whether the container's status on disk cannot be read."""
        self.require_open()
        return self._memory.is_damaged(require_text("container", container_id))

    @whole
    def find_suspect(self, container_id: str) -> ProcessIdentity | None:
        """Return the process that a damaged record names, if that much can be read and no other record names it.

        It is no proof of anything: a flipped bit, or another container's row in its place, may have named it.
        """
        row = self._records.load_status(container_id)
        suspect = read_identity(row) if row else None
        if suspect is None or not has_sound_types(suspect):
            return None
        return None if suspect in self._memory.identities() else suspect

    def declare_gone(self, container_id: str, why: str) -> Status:
        """Record on a person's word that no process of an Unknown container is left, and return its status.

        It is then EXITED, 255, reason DeclaredGone, with `why` as its message; how one ended that has ended already is
        kept. Nothing is signalled. Raises InvalidStateError unless it is Unknown, InvalidInputError if `why` is empty,
        NotFoundError, StoreDamagedError for a damaged record, which can be deleted.
        """
        return self._change(lambda draft: draft.declare_gone(container_id, why))

    @whole
    def next_report_number(self) -> int:
        """Return the number for the next recovery report. Only to be called in a transaction."""
        return self._journal.last_recovery() + 1

    @whole
    def back_up(self, target_path: str) -> None:
        """Copy the database to a new file while the store is in use; whole and verified, or not there."""
        self.require_open()
        self._database.back_up(target_path)

    def close(self) -> None:
        """Let the commits that wait finish, close the database and give the lock up.

        Repeating it is fine: of two at once one waits for the other, and one that was interrupted is finished. Raises
        StoreError if the database cannot be closed in order; the next opening finds everything nevertheless.
        """
        if self.is_foreign:
            return
        with self._memory.view.giving_way(), self._closing:
            if self._is_down:
                return
            self._closed = True
            self._bells.ring()
            self._committer.close()
            self.fleet.leave()
            try:
                self._require_lock()
                self._database.close()
            except Exception:
                self._give_up()
                raise
            self._give_up()

    def _require_lock(self) -> None:
        """Raise StateDirectoryError if the lock is lost: the database's descriptors are left alone then, too."""
        try:
            self.directory.require_lock()
        except StateDirectoryError:
            self._database.abandon()
            raise

    def _give_up(self) -> None:
        self.directory.release()
        self._is_down = True

    def abandon(self) -> None:
        """In a fork: leave everything to the parent. What this store is asked from now on, it refuses."""
        self._database.abandon()
        self.fleet.abandon()

    def expect_requests(self) -> None:
        """Have the committer thread begin now, if one is to be had: a program that ends can start no more."""
        self._committer.begin()

    def submit(self, request: Request) -> None:
        """Hand a request to the committer thread; it is settled from there. For fronts such as `aio`."""
        self.require_open()
        self._committer.submit(request)

    def _change(self, apply: Callable[[Draft], _T]) -> _T:
        self.require_open()
        if may_be_called_again():
            made = run_whole(lambda: self._change_later(apply))
            self.fleet.wait()  # here, where an interrupt ends it
            return made
        request = Request(apply)
        self.fleet.expect(request)
        with self._memory.view.giving_way():
            result: _T = self._committer.run(request)
            self.fleet.wait_for(request)
        return result

    def _change_later(self, apply: Callable[[Draft], _T]) -> _T:
        with self.fleet.later():
            return self._change(apply)

    def begin(self) -> Draft:
        """Return a draft for who has the right to commit. For fronts such as `aio`; see `transaction`."""
        self.require_open()
        return self._draft()

    @whole
    def finish(self, draft: Draft) -> None:
        """Make what is in the draft durable and visible. For fronts such as `aio`; see `transaction`."""
        draft.end_transaction()
        self._write(draft)

    def _draft(self) -> Draft:
        self._settle()
        return Draft(self.node, self._journal, self._memory)

    def _commit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.error = None  # it may be tried again
        draft = self._draft()
        while not self._apply_all(draft, requests):
            draft = self._draft()
        if len(requests) == 1 and requests[0].error is not None:
            return  # if it was an interrupt, the draft may be half made
        try:
            self._write(draft)
        except (LimpetError, MemoryError) as error:
            if isinstance(error, MemoryError) and self._unsettled is None:
                raise  # nothing was written: it may be tried again
            for request in requests:
                request.error = request.error or error

    def _apply_all(self, draft: Draft, requests: Sequence[Request]) -> bool:
        """Apply the requests to the draft; False if it was spoilt by one for which there was no memory."""
        for request in requests:
            if isinstance(request.error, MemoryError):
                continue
            try:
                request.result = request.apply(draft)
            except BaseException as error:  # noqa: BLE001  # it goes to the caller whose change raised it
                request.error = error
                if isinstance(error, MemoryError):
                    return False
            draft.end_transaction()
        return True

    def _write(self, draft: Draft) -> None:
        """Commit, then change memory. An interrupt in between is held back until both are done.

        After a MemoryError nothing was written: one that comes when the change is made is nobody's.
        """
        interrupt: BaseException | None = None
        self._unsettled = draft
        if draft.changes:
            try:
                self._require_lock()
                self._journal.commit(draft.changes)
            except LimpetError:
                self._unsettled = None
                raise
            except BaseException as error:  # a signal handler raised: is it on disk, or not?
                if not self._has_landed(draft, error):
                    raise
                interrupt = error
        interrupt = self._apply_surely(draft, "this change") or interrupt
        if interrupt is not None and not isinstance(interrupt, MemoryError):
            raise interrupt

    def _settle(self) -> None:
        """Find out what became of a change in whose commit a caller was interrupted, and interrupted again."""
        draft = self._unsettled
        if draft is not None and (not draft.changes or self._has_landed(draft, InterruptedError("interrupted twice"))):
            interrupt = self._apply_surely(draft, "nothing of this change was written; the one before")
            if interrupt is not None and not isinstance(interrupt, MemoryError):
                raise interrupt

    def _apply_surely(self, draft: Draft, what: str) -> BaseException | None:
        """Change memory as the disk was changed; return what interrupted that, if anything did.

        Raises StoreError if it cannot be done: each later change tries it again first.
        """
        interrupt: BaseException | None = None
        for tries in range(_APPLY_TRIES):
            try:
                if tries > _TRIES_AT_ONCE:
                    time.sleep(_APPLY_PAUSE_SECONDS)
                self._apply(draft)
                self._unsettled = None
            except BaseException as error:  # noqa: BLE001  # applying twice is the same as once
                interrupt = error
            if self._unsettled is None:
                return interrupt
        raise StoreError(
            f"{what} is durable, but memory does not take it: {interrupt!r}; close the store and open it again"
        ) from interrupt

    def _has_landed(self, draft: Draft, error: BaseException) -> bool:
        try:
            self._require_lock()
            has_landed = self._journal.has_landed(draft.changes, error)
        except LimpetError:  # it cannot be found out
            self._unsettled = None
            raise
        if not has_landed:
            self._unsettled = None
        return has_landed

    def _apply(self, draft: Draft) -> None:
        self._memory.apply(draft)
        self.fleet.note(draft.changes, draft.revision)
        if draft.changes.events:
            self._bells.ring()

    def _settle_copy(self) -> None:
        """In a copy of a state directory: mark, durably, what runs as the original's, before it is one of its own.

        What the original is to restart is not restarted here.
        """
        original = self.directory.find_original(self.node)
        if original:
            boot_id = read_boot_id()
            with self.transaction() as draft:
                for key in self._memory.find_running():
                    status = draft.checkpoint(key)
                    if status is not None and status.identity is not None and status.identity.boot_id == boot_id:
                        draft.replace(key, mark_copied(status, original, self.directory.path))
                        draft.doubt(key, NOT_VERIFIED)
                for key in self._records.load_restartable():
                    self._leave_to_original(draft, key)
                for key in list(self._memory.sandboxes.kept):
                    if (marked := _mark_copied(draft.sandbox_status(key), boot_id)) is not None:
                        draft.update_sandbox(key, partial(_choose, marked))
            self.directory.forget_keeper()
        self.directory.settle_identity(self.node, original)

    def _leave_to_original(self, draft: Draft, key: str) -> None:
        """Stop what waits for its restart, or for its start by a policy: the original goes on with that."""
        try:
            metadata, status = self._records.metadata(key), draft.checkpoint(key)
        except (NotFoundError, StoreDamagedError):
            return  # nothing is restarted that cannot be read
        if metadata.restart_policy != RestartKind.NO and status is not None:
            draft.cancel_restart(metadata, status)

    def _begin_deadlines(self) -> None:
        """Write down by the clock of this boot when times are reached that were set in another one.

        They are not nearer, then, for an engine after this one when the wall clock is set forward. Where that cannot be
        written, they are by the wall clock that there is when it comes.
        """
        new = self._memory.find_unwritten_times()
        if new:
            try:
                with self.transaction() as draft:
                    draft.begin_deadlines(new)
            except StoreError as error:
                _log.warning("when what was decided is due is not written down by this boot's clock: %s", error)

    def _list(self, wanted: Filter, *, ended: bool) -> "tuple[Sequence[Record], int]":
        """Return the containers that are wanted, and the revision, at an instant."""
        for _ in range(_TRIES):
            records, revision, is_whole = self._memory.list(wanted, ended=ended, is_populating=self._is_populating)
            if is_whole:
                return records, revision
        # So many come and go that only a pause shows them whole.
        with self._memory.view.giving_way(), self._committer.turn():
            return self._memory.list(wanted, ended=ended, is_populating=self._is_populating)[:2]

    def _is_populating(self) -> bool:
        """Say whether containers that come or go may be on disk by now, and are not in memory yet."""
        draft = self._unsettled
        return draft is not None and bool(draft.changes.new_containers or draft.changes.deleted_containers)

    @whole
    def name_sandboxes(self) -> Mapping[str, str]:
        """Return the name of each sandbox by its id, none of those whose records cannot be read."""
        return self._memory.name_sandboxes()

    def require_open(self) -> None:
        """Raise ClosedError if nothing can be asked any more."""
        if self.is_foreign:
            raise ClosedError(
                f"this store was opened by process {self._pid}; a fork cannot use it: open one in the child,"
                " in another state directory"
            )
        if self._closed:
            raise ClosedError("the store is closed; open it again")


def _mark_copied(status: SandboxStatus, boot_id: str | None) -> SandboxStatus | None:
    """Return the status that a sandbox has in a copy of a state directory; None if it is the same."""
    marked = decide_sandbox(status, boot_id=boot_id, now=time.time_ns(), is_copied=True).status
    return None if marked == status else marked


def _choose(new: SandboxStatus, _: SandboxStatus) -> SandboxStatus:
    return new


_opened: WeakSet[Store] = WeakSet()


def _abandon_after_fork() -> None:
    for store in list(_opened):
        store.abandon()


os.register_at_fork(after_in_child=_abandon_after_fork)
