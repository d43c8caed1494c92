"""Connections that read one database: each read has one to itself.

A finalizer of the host program's may come amid a read, on the same thread, and write: it waits for whoever is writing,
who may be about to read. So no read waits until another has ended. Where some are under way, one more waits a moment,
as that is faster than to open another connection, and then opens its own.
"""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from weakref import WeakSet

from limpet.engine.database.sqlite.connection import (
    BUSY_TIMEOUT_SECONDS,
    ReadConnection,
    connect_reader,
    keep_open,
    translate,
)
from limpet.engine.database.sqlite.file_identity import look_at
from limpet.engine.database.sqlite.shared_memory import SharedMemory
from limpet.recovery.queues import Empty, Queue
from limpet.schema.errors import ClosedError, LimpetError, StoreError

_KEPT = 4
"""So many connections stay open at most. Each takes two descriptors."""
_PATIENCE_SECONDS = 0.05
"""So long a read waits for another to end, where as many are under way."""
_CLOSING_SECONDS, _PAUSE_SECONDS = 1.0, 0.01
"""So long reads that are under way are waited for at the end, and how often it is looked: the WAL can be removed then.

A finalizer that closes amid a read waits in vain.
"""


class Pool:
    """Lends connections to one database. Thread-safe; whoever is amid a read may ask for another.

    A connection that is lost, as an interrupt came before it was given back, is closed when it is collected.
    """

    def __init__(self, path: str, *, immutable: bool) -> None:
        """Open the first. Raises StoreError."""
        self._path = path
        self._is_immutable = immutable
        self._memory = None if immutable else SharedMemory(path)
        self._open: WeakSet[ReadConnection] = WeakSet()
        self._idle: Queue[ReadConnection] = Queue()  # which a finalizer may use amid any use of it
        self._is_closed = False
        first = self._connect()
        self._file = self._identify()
        self._idle.put(first)

    def lend(self) -> "Loan":
        """Lend a connection for a `with` block. Raises StoreError; SQLite's errors in the block become such."""
        return Loan(self, self._path)

    @contextmanager
    def lend_for_an_instant(self) -> Iterator[ReadConnection]:
        """Do the same, and let all that the block reads be of one instant."""
        with self.lend() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("COMMIT")

    def close(self) -> None:
        """Close all. One that is lent is closed when it is given back, which is waited for a moment."""
        self._is_closed = True
        deadline = time.monotonic() + _CLOSING_SECONDS
        while self._open and time.monotonic() < deadline:
            with suppress(Empty):
                self._drop(self._idle.get(timeout=_PAUSE_SECONDS))

    def abandon(self) -> None:
        """In a fork: never touch them again, not even to close them; they are the parent's."""
        for connection in self._open:
            keep_open(connection)

    def take(self) -> ReadConnection:
        """Return a connection, which is to be given back. Raises StoreError."""
        if self._memory is not None:
            self._memory.require_whole()
        try:
            return self._idle.get_nowait()
        except Empty:
            if self._is_closed:
                raise ClosedError("the store is closed; open it again") from None
        if len(self._open) >= _KEPT:
            try:
                return self._idle.get(timeout=_PATIENCE_SECONDS)
            except Empty:
                pass
        try:
            return self._connect_another()
        except LimpetError:  # no descriptors, or the directory has another name now: there are those that are open
            try:
                return self._idle.get(timeout=BUSY_TIMEOUT_SECONDS)
            except Empty:
                pass
            raise

    def give_back(self, connection: ReadConnection) -> None:
        """Take a connection back."""
        if self._is_closed or connection.in_transaction or self._idle.qsize() >= _KEPT:  # an interrupt left it in one
            self._drop(connection)
        else:
            self._idle.put(connection)

    def _drop(self, connection: ReadConnection) -> None:
        connection.close()
        self._open.discard(connection)

    def _connect(self) -> ReadConnection:
        if self._memory is not None:
            self._memory.require_room()
            self._memory.require_whole()  # others in this process may have it open
        try:
            connection = connect_reader(self._path, immutable=self._is_immutable)
        except sqlite3.Error as error:
            raise translate(self._path, error) from error
        self._open.add(connection)
        return connection

    def _connect_another(self) -> ReadConnection:
        """Open one more, to the very file that the first was opened to."""
        connection = self._connect()
        try:
            connection.execute("PRAGMA schema_version").fetchone()  # this opens the WAL, too
            if self._identify() != self._file:
                raise StoreError(f"{self._path}: another file is there now; close this store and open it again")
        except sqlite3.Error as error:
            self._drop(connection)
            raise translate(self._path, error) from error
        except StoreError:
            self._drop(connection)
            raise
        return connection

    def _identify(self) -> tuple[int, int, int]:
        try:
            return look_at(os.fsencode(self._path)).identity
        except OSError as error:
            raise StoreError(f"{self._path}: {error.strerror}") from error


class Loan:
    """A connection that is lent for a `with` block. As a class of its own it takes half as long as a generator."""

    __slots__ = ("_connection", "_path", "_pool")

    def __init__(self, pool: Pool, path: str) -> None:
        """Lend none yet."""
        self._pool = pool
        self._path = path

    def __enter__(self) -> ReadConnection:
        self._connection = self._pool.take()
        return self._connection

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.give_back(self._connection)
        if error is not None and isinstance(error, sqlite3.Error | UnicodeDecodeError):
            raise translate(self._path, error) from error
