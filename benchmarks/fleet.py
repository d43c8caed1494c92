"""What a fleet costs a node, how much one node sends, how soon a new one is there, and how long a look at many takes.

It works in a schema of its own in the user's PostgreSQL, which is removed again. Beside it is what a node would get
that wrote straight to PostgreSQL instead of its own disk.
"""

import asyncio
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, get_args, get_type_hints

import psycopg
from msgspec.structs import replace

from limpet.benchmarks.contenders import RUNNING, Contender, Limpet, UnavailableError, container_id, fill_store
from limpet.benchmarks.figures import Cell, Figures
from limpet.benchmarks.load import Load, run_tasks, run_threads
from limpet.engine import fleet
from limpet.engine.aio import AsyncStore
from limpet.engine.store import Store
from limpet.schema.codec import status_to_row
from limpet.schema.rows import ContainerRow, StatusRow
from limpet.schema.seal import seal

CONTAINERS = 1024
CONTAINERS_OF_A_NODE = 100
_BATCH = 64
_WARM_UP_CALLS = 20
_CHANGES, _AT_ONCE = 20_000, 500
_TIMEOUT_SECONDS = 60.0


class InAFleet(Limpet):
    """limpet's store, with a fleet behind it."""

    ack: ClassVar[str] = "async"

    def __init__(self, directory: str, url: str) -> None:
        super().__init__(directory)
        self.url = url

    def open(self, count: int) -> None:
        """Make a store, and wait until the fleet has all of it."""
        self.store = Store.open(self.state_dir, fleet=self.url, fleet_ack=self.ack, fleet_timeout=_TIMEOUT_SECONDS)
        fill_store(self.store, count, RUNNING)
        wait_until_sent(self.store)


class InASyncFleet(InAFleet):
    """The same, and each call waits for the fleet."""

    ack = "sync"


class TasksInASyncFleet(InASyncFleet):
    """The same, called by tasks of one loop."""


class Alone(InAFleet):
    """limpet's store without a fleet."""

    def open(self, count: int) -> None:
        """Make a store."""
        Limpet.open(self, count)


class Direct(Contender):
    """No disk of the node's own: each caller has a connection, and writes each status in a transaction of its own."""

    _STATEMENT = "INSERT INTO direct AS old (id, pid) VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET pid = excluded.pid"

    def __init__(self, directory: str, url: str) -> None:
        super().__init__(directory)
        self._url = url
        self._mine = threading.local()
        self._all: list[psycopg.Connection[Any]] = []

    def _connection(self) -> "psycopg.Connection[Any]":
        found: psycopg.Connection[Any] | None = getattr(self._mine, "connection", None)
        if found is None:
            found = self._mine.connection = connect(self._url)
            self._all.append(found)
        return found

    def open(self, count: int) -> None:
        """Make the table, and a row for each."""
        connection = self._connection()
        connection.execute("CREATE TABLE direct (id text PRIMARY KEY, pid bigint NOT NULL)")
        connection.execute(
            "INSERT INTO direct SELECT *, 0 FROM unnest(%s::text[])", ([container_id(each) for each in range(count)],)
        )

    def checkpoint(self, number: int, turn: int) -> None:
        """Write a row, and commit."""
        self._connection().execute(self._STATEMENT, (container_id(number), turn))

    def close(self) -> None:
        """Close all connections."""
        for connection in self._all:
            connection.close()

    def read_back(self, numbers: Iterable[int]) -> dict[int, int]:
        """Ask the table."""
        with connect(self._url) as connection:
            found = dict(connection.execute("SELECT id, pid FROM direct").fetchall())
        return {number: found[container_id(number)] for number in numbers}


class Batched:
    """One connection, which writes 64 statuses in each transaction, with all their columns, as arrays."""

    def __init__(self, connection: "psycopg.Connection[Any]") -> None:
        self._connection = connection
        self._rows = [status_to_row("n", container_id(number), 1, 0, RUNNING) for number in range(CONTAINERS)]
        names = ", ".join(StatusRow._fields)
        types = get_type_hints(StatusRow)
        arrays = ", ".join(
            f"%s::{'text' if str in (types[name], *get_args(types[name])) else 'bigint'}[]"
            for name in StatusRow._fields
        )
        changed = ", ".join(f"{name} = excluded.{name}" for name in StatusRow._fields)
        self._statement = (
            f"INSERT INTO container_status AS old (node, {names}, fleet_epoch, fleet_as_of)"  # noqa: S608  # ours
            f" SELECT 'n', new.*, 1, 1 FROM unnest({arrays}) AS new"
            f" ON CONFLICT (node, id) DO UPDATE SET {changed} WHERE excluded.seq > old.seq"
        )

    def write(self, turn: int) -> None:
        """Write a batch, and commit."""
        first = turn * _BATCH % CONTAINERS
        rows = [row._replace(pid=turn, seq=turn) for row in self._rows[first : first + _BATCH]]
        self._connection.execute(self._statement, [list(column) for column in zip(*rows, strict=True)])


_KINDS: "dict[str, type[InAFleet | Direct]]" = {
    "limpet": InAFleet,
    "limpet-sync": InASyncFleet,
    "limpet-sync-tasks": TasksInASyncFleet,
    "limpet-alone": Alone,
    "direct": Direct,
}


def measure_fleet(cell: Cell) -> Figures:
    """Let threads, or tasks, checkpoint for a given time."""
    with own_schema(cell) as url:
        if cell.contender == "batched":
            return _measure_batches(url, cell)
        contender = _KINDS[cell.contender](cell.directory, url)
        contender.open(max(CONTAINERS, cell.size))
        for turn in range(1, _WARM_UP_CALLS + 1):
            contender.checkpoint(0, turn)
        load = Load(cell.size, CONTAINERS, seconds=cell.seconds)
        if isinstance(contender, TasksInASyncFleet):
            tasks = AsyncStore(contender.store)
            finished = asyncio.run(
                run_tasks(load, lambda number, turn: tasks.checkpoint(container_id(number), replace(RUNNING, pid=turn)))
            )
        else:
            finished = run_threads(load, contender.checkpoint)
        if isinstance(contender, InAFleet):
            wait_until_sent(contender.store)
        contender.close()
        return finished.figures


def _measure_batches(url: str, cell: Cell) -> Figures:
    with connect(url) as connection:
        contender = Batched(connection)
        finished = run_threads(Load(1, 1, seconds=cell.seconds), lambda _, turn: contender.write(turn))
    figures = finished.figures
    return {**figures, "per_second": _BATCH * figures["per_second"], "cpu_us": figures["cpu_us"] / _BATCH}


def measure_sending(cell: Cell) -> Figures:
    """Change states while the fleet is held up, then wait until it has them all: how much one node sends."""
    with own_schema(cell) as url:
        contender = InAFleet(cell.directory, url)
        contender.open(CONTAINERS)
        store, before = contender.store, contender.store.revision
        with connect(url) as connection:
            connection.execute("BEGIN")
            connection.execute("SELECT FROM fleet_node FOR UPDATE")
            for turn in range(_CHANGES // _AT_ONCE):
                with store.transaction() as draft:
                    for each in range(_AT_ONCE):
                        key = container_id((turn * _AT_ONCE + each) % CONTAINERS)
                        draft.update(key, partial(replace, extra={"turn": turn}))
            connection.execute("COMMIT")
        began, cpu = time.monotonic(), time.process_time()
        wait_until_sent(store)
        took, used = time.monotonic() - began, time.process_time() - cpu
        changes = store.revision - before
        contender.close()
        return {"per_second": changes / took, "cpu_us": 1e6 * used / changes, "calls": changes}


def measure_joining(cell: Cell) -> Figures:
    """Open a store of a given size with a fleet that does not know it, and wait until all of it is there."""
    with Store.open(f"{cell.directory}/state") as store:
        fill_store(store, cell.size, RUNNING)
    with own_schema(cell) as url:
        began, cpu = time.monotonic(), time.process_time()
        with Store.open(f"{cell.directory}/state", fleet=url) as store:
            wait_until_sent(store)
            took, used = time.monotonic() - began, time.process_time() - cpu
    return {"took_ms": 1000 * took, "cpu_ms": 1000 * used}


def measure_looking(cell: Cell) -> Figures:
    """List the containers of many nodes, 100 of each, or SELECT the same columns into tuples."""
    with own_schema(cell) as url:
        _fill_nodes(cell, url)
        if cell.contender == "select":
            query = f"SELECT {_LOOKED_AT} FROM container LEFT JOIN container_status AS status USING (node, id)"  # noqa: S608  # ours
            with connect(url) as connection:
                began = time.monotonic()
                count = len(connection.execute(query).fetchall())
                took = time.monotonic() - began
        else:
            with fleet.Fleet.open(url) as view:
                began = time.monotonic()
                count = len(view.list())
                took = time.monotonic() - began
    if count != cell.size * CONTAINERS_OF_A_NODE:
        raise AssertionError(f"{count} containers are there")
    return {"took_ms": 1000 * took}


_LOOKED_AT = ", ".join(
    [
        *("container.node", "container.id", "container.name", "container.sandbox_id", "container.labels"),
        *(f"status.{name}" for name in StatusRow._fields),
    ]
)


def _fill_nodes(cell: Cell, url: str) -> None:
    """Give the fleet many nodes, each with the records of one that has joined; sealed as theirs."""
    state_dir = f"{cell.directory}/state"
    with Store.open(state_dir, node="n0", fleet=url) as store:
        fill_store(store, CONTAINERS_OF_A_NODE, RUNNING)
        wait_until_sent(store)
    with connect(url) as connection:
        for row_class, table in ((ContainerRow, "container"), (StatusRow, "container_status")):
            names = ", ".join((*row_class._fields, "fleet_epoch", "fleet_as_of"))
            rows = connection.execute(f"SELECT {names} FROM {table}").fetchall()  # noqa: S608
            place = len(row_class._fields) - 1
            with connection.cursor() as cursor, cursor.copy(f"COPY {table} (node, {names}) FROM STDIN") as copy:
                for number in range(1, cell.size):
                    node = f"n{number}"
                    for row in rows:
                        checksum = seal((node, *row[:place]))
                        copy.write_row((node, *row[:place], checksum, *row[place + 1 :]))
        connection.execute(
            "INSERT INTO fleet_node SELECT 'n' || number, epoch, directory, host, pid, path, claimed_at,"
            " clock_timestamp(), 3600, as_of, revision, is_whole, doubts"
            " FROM fleet_node, generate_series(1, %s) AS number",
            (cell.size - 1,),
        )
        connection.execute("ANALYZE")


def wait_until_sent(store: Store) -> None:
    """Return once the fleet has all. Raises UnavailableError if it cannot be reached."""
    deadline = time.monotonic() + 4 * _TIMEOUT_SECONDS
    while store.fleet_lag is not None and store.fleet_lag.seconds:
        if time.monotonic() > deadline:
            raise UnavailableError(f"not sent: {store.fleet_lag.error or 'too slow'}")
        time.sleep(0.001)


def connect(url: str) -> "psycopg.Connection[Any]":
    """Return a connection that sees the cell's own schema, and commits each statement."""
    connection = fleet.Address(url).open()
    connection.autocommit = True
    connection.execute("SET idle_in_transaction_session_timeout = 0")
    return connection


@contextmanager
def own_schema(cell: Cell) -> Iterator[str]:
    """Make a fleet's tables in a schema of the cell's own; remove them afterwards."""
    if not cell.fleet:
        raise UnavailableError("give --fleet URL")
    url = f"{cell.fleet}{'&' if '?' in cell.fleet else '?'}schema=limpet_bench_{os.getpid()}"
    fleet.make_tables(url)
    try:
        yield url
    finally:
        fleet.remove_tables(url)
