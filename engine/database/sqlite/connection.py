"""All that is particular to SQLite: how it is opened, made durable, examined and copied.

Every connection is opened here, with the same settings read back: nothing may be acknowledged on a
connection whose commits are not flushed. Writers are opened by the owner of the state directory alone;
readers are opened with `mode=ro`, so that they cannot checkpoint: before SQLite 3.51.3 two checkpointers at
once can destroy a database (https://sqlite.org/wal.html, "the WAL-reset bug").
"""

import ctypes
import os
import resource
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from limpet.engine.database.sqlite.shared_memory import SharedMemory
from limpet.engine.state.durable import open_made
from limpet.schema.errors import (
    ClosedError,
    DiskFullError,
    LimpetError,
    StoreDamagedError,
    StoreError,
    UnsupportedError,
)
from limpet.schema.rows import AnyRow

APPLICATION_ID = 0x6C696D70  # "limp", in the database's header
WAL_PAGES = 250  # small, because commits slow down as the WAL grows
WAL_BYTES = 4 << 20  # beyond it the writer waits for readers, so that the WAL can begin anew
BUSY_TIMEOUT_SECONDS = 5.0
_KEPT_BYTES = 1 << 20  # unused space that is not worth giving back
_READERS_TIMEOUT_SECONDS = 0.1
_READERS_PAUSE_SECONDS = 0.001
_WRITE_FORMAT_BYTE, _NEWEST_WRITE_FORMAT = 18, 2  # https://sqlite.org/fileformat2.html, 1.3.3
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/")  # RFC 3986, 2.3
_Connection = TypeVar("_Connection", bound=sqlite3.Connection)
_kept: set[int] = set()
"""The ids of the connections that are kept open."""
_NOT_UTF8 = "Could not decode to UTF-8"  # Python's words; there is no code for it

Pragmas = Sequence[tuple[str, str, object]]
"""Settings of a connection: name, value to set, value that must be read back."""

WRITER_PRAGMAS: Pragmas = (
    ("journal_mode", "wal", "wal"),
    ("synchronous", "full", 2),
    ("foreign_keys", "on", 1),
    ("mmap_size", "0", 0),
    ("wal_autocheckpoint", str(WAL_PAGES), WAL_PAGES),
    ("journal_size_limit", str(WAL_BYTES), WAL_BYTES),  # what it is cut to when it begins anew
    ("trusted_schema", "off", 0),
)
"""Those of every connection that writes."""


def sqlite_version() -> tuple[int, int, int]:
    """Return the version of the SQLite library."""
    return sqlite3.sqlite_version_info


def connect_writer(path: str, pragmas: Pragmas = WRITER_PRAGMAS) -> sqlite3.Connection:
    """Open the database for writing, every commit flushed. The caller holds the state directory's lock.

    Only `close_writer` closes it: one that was closed because nobody had it any more, amid an interrupt, by the garbage
    collector or at the interpreter's end, would remove the WAL, and nobody would have noted that.

    Raises UnsupportedError where SQLite or the file system does not give these settings, DiskFullError where its
    shared memory has no room, StoreError otherwise.
    """
    memory = SharedMemory(path)
    memory.require_room()
    memory.require_whole()  # others in this process may have it open
    connection = _connect(path, "rw", sqlite3.Connection)  # which has no WAL open before it was asked something
    keep_open(connection)
    try:
        for name, value, expected in pragmas:
            connection.execute(f"PRAGMA {name} = {value}")
            found = connection.execute(f"PRAGMA {name}").fetchone()
            if found is None or found[0] != expected:
                raise UnsupportedError(
                    f"{path}: SQLite {sqlite3.sqlite_version} answers {name} = {found and found[0]!r},"
                    f" not {expected!r}; commits would not be durable here"
                )
        memory.take_room()
    except BaseException:
        close_writer(connection)
        raise
    return connection


def close_writer(connection: sqlite3.Connection) -> None:
    """Close a connection that writes. The last one to a database moves the WAL and removes it: see `Writer.close`."""
    connection.close()
    if id(connection) in _kept:  # whoever was interrupted closes it twice, and it would be freed too early
        _kept.discard(id(connection))
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(connection))


@contextmanager
def writing(path: str, pragmas: Pragmas) -> Iterator[sqlite3.Connection]:
    """Open the database for writing while the block runs, where its WAL may be removed, or a reader keeps it."""
    connection = connect_writer(path, pragmas)
    try:
        yield connection
    finally:
        close_writer(connection)


class ReadConnection(sqlite3.Connection):
    """One that reads. Unlike SQLite's own it can be referred to weakly."""


def connect_reader(path: str, *, immutable: bool = False) -> ReadConnection:
    """Open the database for reading, beside a live writer or without one. Raises StoreError.

    Where nobody has it open and it has no WAL, `immutable` keeps SQLite from making one, and from locking
    anything; what was read is only worth something if the file has not changed meanwhile.
    """
    connection = _connect(path, "ro&immutable=1" if immutable else "ro", ReadConnection)
    connection.execute("PRAGMA mmap_size = 0")  # some SQLites map the database: who cuts that would end us by SIGBUS
    return connection


def _connect(path: str, mode: str, kind: type[_Connection]) -> _Connection:
    # Autocommit (isolation_level None): transactions begin and end where this package says so.
    return sqlite3.connect(
        f"file:{_quote(os.fsencode(path))}?mode={mode}",
        uri=True,
        isolation_level=None,
        timeout=BUSY_TIMEOUT_SECONDS,
        check_same_thread=False,
        factory=kind,
    )


def _quote(path: bytes) -> str:
    """Return a path as a URI has it; urllib.parse would take longer to load than all this takes."""
    return "".join(chr(byte) if chr(byte) in _UNRESERVED else f"%{byte:02X}" for byte in path)


def fetch_all(connection: sqlite3.Connection, statement: str, parameters: AnyRow = ()) -> list[AnyRow]:
    """Run a statement that reads, and return its rows.

    Text that is not UTF-8 any more is replaced: its row does not match its checksum then, and the others are read.
    """
    try:
        return connection.execute(statement, parameters).fetchall()
    except sqlite3.OperationalError as error:
        if _NOT_UTF8 not in str(error):
            raise
    try:
        connection.text_factory = _decode_what_can_be
        return connection.execute(statement, parameters).fetchall()
    finally:
        connection.text_factory = str


def _decode_what_can_be(text: bytes) -> str:
    return text.decode(errors="replace")


def create_file(path: str) -> None:
    """Make the empty file of a new database, private from the first moment. Raises OSError."""
    os.close(open_made(path, os.O_EXCL | os.O_WRONLY))


def finish_rollback(path: str) -> None:
    """Let SQLite undo the transaction whose journal lies beside the database. Raises StoreError."""
    connection = _connect(path, "rw", sqlite3.Connection)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise translate(path, error) from error
    finally:
        connection.close()


def read_revision(connection: sqlite3.Connection, path: str) -> str:
    """Return the schema revision of the database. Reads only.

    Raises StoreDamagedError if it is empty or not one of limpet's, sqlite3.Error if it is no database.
    """
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application_id == 0 and objects == 0:
        raise StoreDamagedError(f"{path} is empty: it was truncated or replaced. Restore a backup")
    if application_id != APPLICATION_ID:
        raise StoreDamagedError(
            f"{path} is a SQLite database, but not one of limpet's (application id {application_id:#x});"
            " it was left untouched"
        )
    try:
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError as error:
        raise StoreDamagedError(f"{path}: the table of its schema version is gone ({error})") from error
    if row is None:
        raise StoreDamagedError(f"{path}: its schema version is missing; restore a backup")
    return str(row[0])


def move_wal(connection: sqlite3.Connection) -> bool:
    """Move the whole WAL into the database and flush it; False where a reader stood in the way."""
    busy, in_wal, moved = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return not busy and in_wal == moved


def restart_wal(connection: sqlite3.Connection) -> bool:
    """Move the whole WAL into the database, and let the next commit begin it anew; False where that was not to be had.

    Readers are waited for, a moment. It is asked again and again because SQLite, when it waits by itself, waits
    for a place in its list of readers to become free, which others may take for ever. Where a reader or the disk
    stands in the way, what is in the WAL stays there, and is safe.
    """
    deadline = time.monotonic() + _READERS_TIMEOUT_SECONDS
    _set_busy_timeout(connection, 0)
    try:
        while connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0]:
            if time.monotonic() > deadline:
                return False
            time.sleep(_READERS_PAUSE_SECONDS)
    except sqlite3.Error:
        return False  # as with SQLite's own checkpoints; a failing disk fails the next commit as well
    finally:
        _set_busy_timeout(connection, BUSY_TIMEOUT_SECONDS)
    return True


def _set_busy_timeout(connection: sqlite3.Connection, seconds: float) -> None:
    connection.execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}")


def truncate_wal(connection: sqlite3.Connection) -> bool:
    """Move the whole WAL into the database and cut the file to nothing; False where a reader is in the way."""
    return not connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]


def give_back_space(connection: sqlite3.Connection) -> None:
    """Make the database smaller where most of it is unused. Where the disk is too full for that, it stays as it is."""
    free, pages, page_bytes = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_count", "page_size")
    )
    if free * page_bytes > _KEPT_BYTES and free > pages / 2:
        with suppress(sqlite3.Error):
            connection.execute("VACUUM")


def keep_open(connection: sqlite3.Connection) -> None:
    """Keep `connection` from being closed when it is collected.

    That could remove a WAL of which there is no note, or in a fork end what is going on over there
    (https://sqlite.org/howtocorrupt.html, 2.6).
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
    _kept.add(id(connection))


def find_damage(connection: sqlite3.Connection) -> list[str]:
    """Return what SQLite's integrity and foreign key checks find wrong, in words; none for a sound file."""
    found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
    found += [
        f"a row of {table} refers to a missing row of {parent}"
        for table, _, parent, _ in connection.execute("PRAGMA foreign_key_check")
    ]
    return found


def find_format_damage(connection: sqlite3.Connection) -> list[str]:
    """Return what is wrong with the number of the format that is to be written, which SQLite's checks pass over.

    Asking SQLite for it takes as much memory as the database is long. But to open the file ourselves, and close it,
    would drop the locks that this process has on it (https://sqlite.org/howtocorrupt.html, 2.2).
    """
    write_format = connection.serialize()[_WRITE_FORMAT_BYTE]
    if write_format <= _NEWEST_WRITE_FORMAT:
        return []
    return [f"its header asks for format {write_format}, so that SQLite takes it for read-only"]


def copy_database(source: sqlite3.Connection, target_path: str) -> None:
    """Copy the database into a new file at `target_path`, online. Flushing and naming it is the caller's."""
    create_file(target_path)
    target = _connect(target_path, "rw", sqlite3.Connection)
    try:
        source.backup(target)
        # The copy stands alone: without this it would ask for a WAL beside it.
        target.execute("PRAGMA journal_mode = delete")
    finally:
        target.close()


_MAX_INTEGER = 2**63 - 1
_LEAST_BYTES = 64 << 10
"""Twice the size by which SQLite's shared memory grows."""


def require_integer(path: str, value: object) -> int:
    """Return a number that was read; a damaged page may bring anything. Raises StoreDamagedError."""
    if not isinstance(value, int) or not 0 <= value < _MAX_INTEGER:  # the next number must fit as well
        raise StoreDamagedError(f"{path}: {value!r} stands where a number should; restore a backup")
    return value


# SQLite's primary result codes (https://sqlite.org/rescode.html), for the lowest byte of an extended one.
_ERRORS: dict[int, tuple[type[StoreError], str]] = {
    sqlite3.SQLITE_ERROR: (StoreError, "look at what limpet check finds"),
    sqlite3.SQLITE_FULL: (DiskFullError, "free some space, then call again"),
    sqlite3.SQLITE_IOERR: (StoreError, "the disk has failed; look at the kernel's messages"),
    sqlite3.SQLITE_BUSY: (StoreError, "another program holds the database; close it, then call again"),
    sqlite3.SQLITE_LOCKED: (StoreError, "another program holds the database; close it, then call again"),
    sqlite3.SQLITE_PROTOCOL: (
        StoreError,
        "another process holds a lock of it; let it go on, or end it, then call again",
    ),
    sqlite3.SQLITE_READONLY: (StoreError, "the file or the file system is read-only, unless limpet check finds damage"),
    sqlite3.SQLITE_CANTOPEN: (StoreError, "the file is missing or may not be opened"),
    sqlite3.SQLITE_PERM: (StoreError, "the file may not be opened"),
    sqlite3.SQLITE_CORRUPT: (StoreDamagedError, "copy the state directory away, then restore a backup"),
    sqlite3.SQLITE_NOTADB: (StoreDamagedError, "it is not a SQLite database; restore a backup"),
}


def translate(path: str, error: Exception) -> LimpetError:
    """Return the StoreError that says what `error`, from SQLite, means for the database at `path`.

    It is ClosedError where the connection was closed meanwhile.
    """
    if isinstance(error, sqlite3.ProgrammingError) and "closed database" in str(error):
        return ClosedError("the store is closed; open it again")
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if isinstance(error, UnicodeDecodeError):
        code = sqlite3.SQLITE_CORRUPT
    elif code == sqlite3.SQLITE_IOERR and _is_full(path):  # as it says of its shared memory, for example
        code = sqlite3.SQLITE_FULL
    kind, cure = _ERRORS.get(code, (StoreError, "look at what limpet check finds"))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if code == sqlite3.SQLITE_IOERR and limit != resource.RLIM_INFINITY:
        cure = f"this process may write files of {limit} bytes (RLIMIT_FSIZE), which is too little, or {cure}"
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    return kind(f"{path}: {error} ({name}); {cure}")


def _is_full(path: str) -> bool:
    """Say whether the file system has no block left for us."""
    try:
        found = os.statvfs(os.path.dirname(path))
    except (OSError, ValueError):
        return False
    return found.f_bavail * found.f_frsize < _LEAST_BYTES
