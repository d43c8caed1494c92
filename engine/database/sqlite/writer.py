"""The one writing connection of a store: it loads the rows, commits batches, and settles what went wrong."""

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

from limpet.engine.database.changes import KEPT_RECOVERIES, Changes
from limpet.engine.database.sqlite import statements as sql
from limpet.engine.database.sqlite.connection import (
    WAL_BYTES,
    WRITER_PRAGMAS,
    Pragmas,
    close_writer,
    connect_writer,
    fetch_all,
    give_back_space,
    keep_open,
    move_wal,
    require_integer,
    restart_wal,
    translate,
    truncate_wal,
)
from limpet.engine.database.sqlite.event_log import EventLog
from limpet.engine.database.sqlite.file_identity import look_at
from limpet.engine.database.sqlite.labels import delete_labels, insert_labels
from limpet.engine.database.sqlite.shared_memory import SharedMemory
from limpet.schema.errors import (
    ClosedError,
    LimpetError,
    OutcomeUnknownError,
    StoreError,
    StoreFencedError,
    StoreReplacedError,
)
from limpet.schema.rows import AnyRow, DeadlineRow, ItemRow, NameRow, SandboxRow, SandboxStatusRow, StatusRow

_Change = tuple[StatusRow, int]
_MAX_ROWS = 512  # of 18 values each: below the 32,766 parameters that SQLite takes by default
_SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)  # damaged text surfaces as the second


class Writer:
    """Writes for one node. Not thread-safe: the store lets one thread at a time in.

    After a failed commit the connection is dropped, the database opened anew and asked what became of the
    commit. Only if that cannot be found out is the writer broken; it then refuses everything.
    """

    def __init__(
        self, path: str, node: str, pragmas: Pragmas = WRITER_PRAGMAS, *, ring: Callable[[], None] | None = None
    ) -> None:
        """Open the database. `ring` is called after each commit with events, to wake other processes."""
        self._path = path
        self._pragmas = pragmas
        self._node = node
        self._ring = ring
        self._log = EventLog(path, node)
        self._memory = SharedMemory(path)
        self._epoch = 0
        self._broken: StoreError | None = None
        self._is_closing = False
        self._is_noted = False
        """True once it is noted that all is in the database."""
        self._is_closed = False
        try:
            self._connection = connect_writer(path, pragmas)
        except _SQLITE_ERRORS as error:
            raise translate(path, error) from error
        self._files: list[tuple[bytes, tuple[int, int, int]]] = []
        self._wal_bytes = 0
        self._allowed_wal_bytes = WAL_BYTES

    def claim(self) -> int:
        """Begin a new epoch, so that earlier writers can no longer write, and return it. Raises StoreError.

        Whoever calls it holds the lock of the state directory, so nobody writes between two statements. No transaction
        is open between them: an interrupt here, and another that keeps this from being closed, would leave it open.
        """
        try:
            row = self._connection.execute(sql.SELECT_EPOCH, (self._node,)).fetchone()
            epoch = 1 if row is None else require_integer(self._path, row[0]) + 1
            self._log.load(self._connection)  # before anything is written: it may be damaged
            now = time.time_ns()
            if row is None:
                self._connection.execute(sql.INSERT_NODE, (self._node, epoch, now))
            else:
                self._connection.execute(sql.UPDATE_NODE, (epoch, now, self._node))
            self._epoch = epoch
        except _SQLITE_ERRORS as error:
            raise translate(self._path, error) from error
        self._note_files()
        return self._epoch

    def load_status(self, container_id: str) -> StatusRow | None:
        """Return the status row of one container, None if it has none. It is about to be changed: its page is read."""
        rows = self._read_all(sql.SELECT_STATUS, container_id)
        return StatusRow._make(rows[0]) if rows else None

    def load_container_ids(self) -> list[str]:
        """Return the id of every container of this node, also of those that have no status row."""
        return [row[0] for row in self._read_all(sql.SELECT_CONTAINER_IDS)]

    def load_sandboxes(self) -> list[SandboxRow]:
        """Return the row of every sandbox of this node."""
        return list(map(SandboxRow._make, self._read_all(sql.SELECT_SANDBOXES)))

    def load_sandbox_status(self, sandbox_id: str) -> SandboxStatusRow | None:
        """Return the status row of one sandbox, None if it has none."""
        rows = self._read_all(sql.SELECT_SANDBOX_STATUS, sandbox_id)
        return SandboxStatusRow._make(rows[0]) if rows else None

    def load_item(self, kind: str, key: str) -> ItemRow | None:
        """Return an item's row, None if there is none."""
        rows = self._read_all(sql.SELECT_ITEM, kind, key)
        return ItemRow._make(rows[0]) if rows else None

    def load_name(self, container_id: str) -> NameRow | None:
        """Return what lists are filtered by, of one container; None if it has no row."""
        rows = self._read_all(sql.SELECT_CONTAINER_NAME, container_id)
        return NameRow._make(rows[0]) if rows else None

    def last_revision(self) -> int:
        """Return the revision of the newest event, 0 if there was none yet."""
        return self._log.newest

    def last_version(self, key: str) -> int:
        """Return the last version of what was deleted of this id, 0 where none is known."""
        row = self._read_one(sql.SELECT_LAST_VERSION, (self._node, key))
        return require_integer(self._path, row[0]) if row and row[0] is not None else 0

    def find_container_by_name(self, sandbox_id: str, name: str, attempt: int) -> str | None:
        """Return the id of the container that has this name, if there is one."""
        row = self._read_one(sql.SELECT_CONTAINER_BY_NAME, (self._node, sandbox_id, name, attempt))
        return None if row is None else str(row[0])

    def load_ids_of_sandbox(self, sandbox_id: str) -> list[str]:
        """Return the ids of the sandbox's containers."""
        return [row[0] for row in self._read_all(sql.SELECT_IDS_OF_SANDBOX, sandbox_id)]

    def last_recovery(self) -> int:
        """Return the number of the newest recovery report, 0 if there is none."""
        row = self._read_one(sql.SELECT_LAST_RECOVERY, (self._node,))
        return require_integer(self._path, row[0]) if row and row[0] is not None else 0

    def commit(self, changes: Changes) -> None:
        """Write `changes` in one transaction; durable when this returns.

        Raises OutcomeUnknownError if it cannot be found out whether they are on disk, StoreReplacedError or
        StoreFencedError if this is not our database any more: after that the writer refuses everything. After any other
        StoreError nothing was written, and the writer goes on.
        """
        if self._is_closing:
            raise ClosedError("the store is closed; open it again")
        if self._broken is not None:
            raise self._refuse(self._broken)
        self._memory.require_whole()
        try:
            self._execute(changes)
        except _SQLITE_ERRORS as error:
            if not self.has_landed(changes, error):
                raise translate(self._path, error) from error
        except StoreFencedError as error:
            self._broken = error
            raise
        self._require_same_files()
        if changes.events:
            self._log.confirm()
            if self._ring is not None:
                self._ring()
        self._bound_wal()

    def has_landed(self, changes: Changes, error: BaseException) -> bool:
        """After `error` broke into a commit: open the database anew and see whether the commit is in it.

        Raises OutcomeUnknownError if that fails, or is itself interrupted; after that the writer refuses everything.
        """
        self._broken = OutcomeUnknownError(f"{self._path}: the commit failed ({error!r}) and was not read back")
        try:
            self._require_same_files()
            self._memory.require_whole()
            close_writer(self._connection)
            self._connection = connect_writer(self._path, self._pragmas)
            landed = self._find(changes)
            self._log.load(self._connection)
            self._note_files()
            # What was read back may have been in memory only: a failed flush leaves pages that look clean.
            # Moving the WAL into the database writes and flushes them once more, by another way.
            if landed and not move_wal(self._connection):
                raise StoreError(f"{self._path}: a reader keeps the WAL from being flushed anew")
            if landed and changes.events and self._ring is not None:
                self._ring()
            if not landed:
                restart_wal(self._connection)  # so that its remains are not taken for a damaged commit
        except StoreReplacedError:
            raise
        except (*_SQLITE_ERRORS, StoreError, OSError, MemoryError) as cause:
            self._broken = OutcomeUnknownError(
                f"{self._path}: the commit failed ({error}), and so did reading it back ({cause})"
            )
            raise self._broken from error
        self._broken = None
        return landed

    def close(self, before_unlink: Callable[[], None] | None = None) -> None:
        """Move the WAL into the database and close it, after which SQLite removes the WAL.

        `before_unlink` is called once the WAL holds nothing: a kill before it leaves a WAL, a
        kill after it a note that none is needed. Where it cannot be called, because a reader is in the way or the
        outcome of a commit is not known, the WAL stays, and the connection with it: nothing else keeps it from being
        removed. Repeating it goes on where an interrupt ended it. Raises StoreError, or what `before_unlink` raises:
        the WAL stays then, too, and nothing is lost.
        """
        self._is_closing = True
        if self._is_closed:
            return
        self._memory.require_whole()
        try:
            if before_unlink is not None and self._broken is None and not self._is_noted:
                if self._connection.in_transaction:  # an interrupt cut its end off
                    self._connection.rollback()
                give_back_space(self._connection)
                if truncate_wal(self._connection):
                    before_unlink()
                    self._is_noted = True
        except _SQLITE_ERRORS as error:
            raise translate(self._path, error) from error
        if before_unlink is None or self._is_noted:
            close_writer(self._connection)
        self._is_closed = True

    def abandon(self) -> None:
        """In a fork: never touch the connection again, not even to close it; it is the parent's."""
        keep_open(self._connection)

    def _execute(self, changes: Changes) -> None:
        if changes.only_statuses and len(changes.statuses) <= _MAX_ROWS:
            if len(changes.statuses) == 1:
                self._update_status(changes)
            else:
                self._update_statuses(changes)
            return
        with self._transaction() as connection:
            if changes.is_one_change:
                self._update_status(changes)  # which asks for the epoch
            else:
                self._write_rows(connection, changes)
            if changes.events:
                self._log.append(connection, changes)
            for of, deadline in changes.deadlines.items():
                if deadline is None:
                    connection.execute(sql.DELETE_DEADLINE, (self._node, *of))
                else:
                    connection.execute(sql.PUT_DEADLINE, (self._node, *deadline))
            for report in changes.reports:
                connection.execute(sql.INSERT_RECOVERY, (self._node, *report))
                connection.execute(sql.PRUNE_RECOVERIES, (self._node, report.number - KEPT_RECOVERIES))

    def _write_rows(self, connection: sqlite3.Connection, changes: Changes) -> None:
        found = connection.execute(sql.SELECT_EPOCH, (self._node,)).fetchone()
        self._require_count(found[0] if found else 0, self._epoch)
        node = (self._node,)
        delete_labels(connection, self._node, changes.deleted_containers)
        for statement, rows in (
            # Deletions first: a transaction may free a name and take it again.
            (sql.DELETE_CONTAINER, [(key,) for key in changes.deleted_containers]),
            # It went with its container, unless that row was missing.
            (sql.DELETE_STATUS, [(key,) for key in changes.deleted_containers]),
            (sql.DELETE_SANDBOX, [(key,) for key in changes.deleted_sandboxes]),
            (sql.DELETE_SANDBOX_STATUS, [(key,) for key in changes.deleted_sandboxes]),
            (sql.DELETE_ITEM, changes.deleted_items),
            (sql.INSERT_SANDBOX, changes.new_sandboxes.values()),
            (sql.INSERT_SANDBOX_STATUS, changes.new_sandbox_statuses.values()),
            (sql.PUT_ITEM, changes.items.values()),
            (sql.INSERT_CONTAINER, changes.new_containers.values()),
            (sql.INSERT_STATUS, changes.new_statuses.values()),
        ):
            if rows:  # for none, SQLite would compile the statement all the same
                connection.executemany(statement, [node + row for row in rows])
        insert_labels(connection, self._node, changes.new_containers.values())
        if changes.statuses:
            self._update_statuses(changes)
        for sandbox, before in changes.sandbox_statuses.values():
            keys = (self._node, sandbox.id, before)
            self._require_count(connection.execute(sql.UPDATE_SANDBOX_STATUS, (*sandbox[1:], *keys)).rowcount, 1)

    def _update_status(self, changes: Changes) -> None:
        ((row, before),) = changes.statuses.values()
        parameters = (*row[1:], self._node, row.id, before, self._epoch)
        self._require_count(self._connection.execute(sql.UPDATE_STATUS, parameters).rowcount, 1)

    def _update_statuses(self, changes: Changes) -> None:
        for batch in _batched(changes.statuses.values(), _MAX_ROWS):
            # Sizes are powers of two, so that few statements are ever compiled; a row that is repeated changes nothing.
            size = 1 << (len(batch) - 1).bit_length()
            rows = [(*row, before) for row, before in batch]
            rows += rows[-1:] * (size - len(batch))
            parameters = (*chain.from_iterable(rows), self._node, self._epoch)
            self._require_count(self._connection.execute(sql.update_statuses(size), parameters).rowcount, len(batch))

    def _require_count(self, found: int, expected: int) -> None:
        if found != expected:
            raise StoreFencedError(
                f"{self._path}: another writer has changed it since epoch {self._epoch} began; close this store"
            )

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._connection)

    def _find(self, changes: Changes) -> bool:
        """Say whether a commit is in the database. It went in whole or not at all, so one row of it tells."""
        return next(self._look_for_rows(changes))

    def _look_for_rows(self, changes: Changes) -> Iterator[bool]:
        for event in changes.events:
            yield self._read_one(sql.SELECT_EVENT, (self._node, event.revision)) == event
        statuses = [row for row, _ in changes.statuses.values()] or list(changes.new_statuses.values())
        if statuses:
            status = statuses[0]
            yield self.load_status(status.id) == status
        for report in changes.reports:
            yield self.last_recovery() >= report.number
        for sandbox in changes.new_sandboxes.values():
            yield sandbox in self.load_sandboxes()
        for row, _ in changes.sandbox_statuses.values():
            yield self.load_sandbox_status(row.id) == row
        for item in changes.items.values():
            yield self.load_item(item.kind, item.key) == item
        yield from map(self._has_deadline, changes.deadlines.items())
        for name in changes.deleted_items:
            yield self.load_item(*name) is None
        for key in changes.deleted_containers:
            yield key not in self.load_container_ids() and self.load_status(key) is None
        for key in changes.deleted_sandboxes:
            yield key not in {row.id for row in self.load_sandboxes()}

    def _has_deadline(self, expected: tuple[tuple[str, str], DeadlineRow | None]) -> bool:
        of, row = expected
        return self._read_one(sql.SELECT_DEADLINE, (self._node, *of)) == row

    def _note_files(self) -> None:
        """Remember which files are open. Once the database was read or written its WAL is there, and stays."""
        paths = (os.fsencode(self._path), os.fsencode(self._path + "-wal"))
        self._files = [(path, look_at(path).identity) for path in paths]

    def _require_same_files(self) -> None:
        for path, identity in self._files:
            found, why = None, "was removed or replaced while it was open"
            try:
                found = look_at(path)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:  # such as one that this process has no right to any more
                why = f"cannot be seen any more ({error.strerror}), so whether it is still the open one is not known"
            if found is None or found.identity != identity:
                self._broken = StoreReplacedError(f"{os.fsdecode(path)} {why}; this store acknowledges nothing more")
                raise self._broken
            self._wal_bytes = found.size  # the WAL comes last

    def _bound_wal(self) -> None:
        """Begin the WAL anew if it has grown beyond what is allowed.

        SQLite does so by itself once all of it is in the database and nobody reads, a moment that readers who
        overlap never leave. Where one of them reads for too long, the WAL may double before the next try.
        """
        if self._wal_bytes > self._allowed_wal_bytes:
            if restart_wal(self._connection):
                self._allowed_wal_bytes = WAL_BYTES
            else:
                self._allowed_wal_bytes = 2 * self._wal_bytes

    def _read_all(self, statement: str, *parameters: object) -> list[AnyRow]:
        self._memory.require_whole()
        try:
            return fetch_all(self._connection, statement, (self._node, *parameters))
        except (UnicodeEncodeError, OverflowError):  # what cannot be written is in no row
            return []
        except _SQLITE_ERRORS as error:
            raise self._translate(error) from error

    def _read_one(self, statement: str, parameters: AnyRow) -> AnyRow | None:
        self._memory.require_whole()
        try:
            row: AnyRow | None = self._connection.execute(statement, parameters).fetchone()
        except (UnicodeEncodeError, OverflowError):  # as in `_read_all`
            return None
        except _SQLITE_ERRORS as error:
            raise self._translate(error) from error
        return row

    def _translate(self, error: Exception) -> LimpetError:
        """Return what to raise for SQLite's error: that the writer is broken, where it has no connection any more."""
        told = translate(self._path, error)
        return self._refuse(self._broken) if self._broken is not None and isinstance(told, ClosedError) else told

    @staticmethod
    def _refuse(broken: StoreError) -> StoreError:
        return type(broken)(f"{broken}; nothing is written until the store is opened again")


class _Transaction:
    """BEGIN IMMEDIATE ... COMMIT; an exception inside rolls back, one from COMMIT is settled by reading back."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> sqlite3.Connection:
        self._connection.execute("BEGIN IMMEDIATE")
        return self._connection

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._connection.execute("COMMIT")
        elif self._connection.in_transaction:
            self._connection.execute("ROLLBACK")


def _batched(rows: Iterable[_Change], size: int) -> Iterator[list[_Change]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
