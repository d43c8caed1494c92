"""Databases that one might use instead: sqlite3 by hand, SQLAlchemy, LMDB, diskcache. All flush each commit."""

import sqlite3
import threading
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import msgspec
import sqlalchemy as sa
from msgspec.structs import replace
from sqlalchemy import orm
from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateTable

from limpet.benchmarks.contenders import RUNNING, Contender, container_id
from limpet.schema.codec import status_to_row
from limpet.schema.decoders import make_decoder
from limpet.schema.metadata import DEFAULT_NODE
from limpet.schema.rows import AnyRow
from limpet.schema.status import Status
from limpet.schema.tables import container_status

_status = make_decoder(Status)
_PRAGMAS = ("journal_mode = wal", "synchronous = full")
_COLUMNS = [column.name for column in container_status.columns]
_tables = sa.MetaData()
STATUS = sa.Table(
    "status",
    _tables,
    *(sa.Column(column.name, column.type, primary_key=column.primary_key) for column in container_status.columns),
    sqlite_with_rowid=False,
)
"""limpet's own table of statuses, for the others: all write the same row."""


def status_row(number: int, turn: int) -> AnyRow:
    """Return the row of a status, as limpet keeps it."""
    return (DEFAULT_NODE, *status_to_row(DEFAULT_NODE, container_id(number), turn, 1, replace(RUNNING, pid=turn)))


class RawSqlite(Contender):
    """One UPDATE for each call, on one connection; a lock lets threads share it."""

    label = "sqlite3 by hand"
    UPDATE: ClassVar[str] = (
        f"UPDATE status SET {', '.join(f'{name} = ?' for name in _COLUMNS[2:])} WHERE node = ? AND id = ?"  # noqa: S608  # our own names
    )

    @property
    def path(self) -> str:
        """The database's."""
        return f"{self.directory}/raw.db"

    def open(self, count: int) -> None:
        """Make the table and its rows."""
        self._lock = threading.Lock()
        self._template = status_row(0, 0)
        self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        for pragma in _PRAGMAS:
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute(str(CreateTable(STATUS).compile(dialect=sqlite.dialect())))
        self._connection.execute("BEGIN")
        insert = f"INSERT INTO status VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608  # question marks
        self._connection.executemany(insert, (status_row(number, 0) for number in range(count)))
        self._connection.execute("COMMIT")

    def checkpoint(self, number: int, turn: int) -> None:
        """Update one row."""
        node, _, _, transitions, _, *rest = self._template
        with self._lock:
            self._connection.execute(self.UPDATE, (turn, transitions, turn, *rest, node, container_id(number)))

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def read_back(self, numbers: Iterable[int]) -> dict[int, int]:
        """Read the rows on a new connection."""
        connection = sqlite3.connect(self.path)
        found = dict(connection.execute("SELECT id, pid FROM status"))
        connection.close()
        return {number: found[container_id(number)] for number in numbers}


class _Sqlalchemy(RawSqlite):
    """What the two ways to use SQLAlchemy share: its engine, with a connection for each thread."""

    def open(self, count: int) -> None:
        """Make the table and its rows."""
        super().open(count)
        super().close()
        self._engine = sa.create_engine(f"sqlite:///{self.path}", connect_args={"timeout": 30.0})
        sa.event.listen(self._engine, "connect", _set_pragmas)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()


def _set_pragmas(connection: Any, _: object) -> None:
    for pragma in _PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


class SqlalchemyCore(_Sqlalchemy):
    """SQLAlchemy Core as its tutorial shows it: a statement is built for each call."""

    label = "SQLAlchemy Core, a statement per call"

    def checkpoint(self, number: int, turn: int) -> None:
        """Update one row."""
        statement = (
            sa.update(STATUS)
            .where(STATUS.c.node == DEFAULT_NODE, STATUS.c.id == container_id(number))
            .values(seq=turn, pid=turn, created_at=RUNNING.created_at, started_at=RUNNING.started_at, reason="")
        )
        with self._engine.begin() as connection:
            connection.execute(statement)


class SqlalchemyOrm(_Sqlalchemy):
    """SQLAlchemy's ORM: a session for each call."""

    label = "SQLAlchemy ORM, a session per call"

    def open(self, count: int) -> None:
        """Make the database, and map the table."""
        super().open(count)
        self._open_session, self._kind = map_objects(self._engine, STATUS)

    def checkpoint(self, number: int, turn: int) -> None:
        """Load an object, change it, commit."""
        with self._open_session() as session:
            status = session.get(self._kind, (DEFAULT_NODE, container_id(number)))
            status.seq = status.pid = turn
            session.commit()


def map_objects(engine: sa.Engine, table: sa.Table) -> tuple[Callable[[], Any], type[Any]]:
    """Return what opens a session of the ORM, and a class of its own for the rows of `table`."""
    kind = type("StatusObject", (), {})
    orm.registry().map_imperatively(kind, table)
    return partial(orm.Session, engine), kind


class Lmdb(Contender):
    """A B+ tree in a memory map, the status as JSON."""

    label = "LMDB"
    package = "lmdb"

    def open(self, count: int) -> None:
        """Make the tree."""
        self._lmdb = import_module("lmdb")
        self._environment = self._open()
        with self._environment.begin(write=True) as transaction:
            for number in range(count):
                transaction.put(container_id(number).encode(), msgspec.json.encode(RUNNING))

    def checkpoint(self, number: int, turn: int) -> None:
        """Put one value."""
        value = msgspec.json.encode(replace(RUNNING, pid=turn))
        with self._environment.begin(write=True) as transaction:
            transaction.put(container_id(number).encode(), value)

    def close(self) -> None:
        """Close the environment."""
        self._environment.close()

    def read_back(self, numbers: Iterable[int]) -> dict[int, int]:
        """Open it again and read the values."""
        environment = self._open()
        with environment.begin() as transaction:
            found = {number: _decode_pid(transaction.get(container_id(number).encode())) for number in numbers}
        environment.close()
        return found

    def _open(self) -> Any:
        return self._lmdb.open(f"{self.directory}/lmdb", map_size=1 << 28, sync=True, metasync=True)


class Diskcache(Contender):
    """A cache on SQLite that is popular for keeping state; its flushes are turned on."""

    label = "diskcache, flushed"
    package = "diskcache"

    def open(self, count: int) -> None:
        """Make the cache."""
        self._diskcache = import_module("diskcache")
        self._cache = self._open()
        with self._cache.transact():
            for number in range(count):
                self._cache[container_id(number)] = msgspec.json.encode(RUNNING)

    def checkpoint(self, number: int, turn: int) -> None:
        """Set one value."""
        self._cache[container_id(number)] = msgspec.json.encode(replace(RUNNING, pid=turn))

    def close(self) -> None:
        """Close the cache."""
        self._cache.close()

    def read_back(self, numbers: Iterable[int]) -> dict[int, int]:
        """Open it again and read the values."""
        cache = self._open()
        found = {number: _decode_pid(cache[container_id(number)]) for number in numbers}
        cache.close()
        return found

    def _open(self) -> Any:
        settings = {"sqlite_synchronous": 2, "eviction_policy": "none"}
        return self._diskcache.Cache(f"{self.directory}/cache", timeout=30, **settings)


def _decode_pid(value: bytes) -> int:
    return _status.decode(value).pid
