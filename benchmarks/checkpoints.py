"""Durable checkpoints: throughput and latency from threads and tasks, bytes written, growth, and the WAL's size.

After each load the contender is closed, and its content on disk is compared with what it acknowledged.
"""

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from msgspec.structs import replace

from limpet.benchmarks.contenders import (
    RUNNING,
    Contender,
    FilePerContainer,
    FileWithoutDirectoryFlush,
    Limpet,
    LimpetPopulation,
    OneFlush,
    container_id,
)
from limpet.benchmarks.databases import Diskcache, Lmdb, RawSqlite, SqlalchemyCore, SqlalchemyOrm
from limpet.benchmarks.figures import Cell, Figures
from limpet.benchmarks.load import Finished, Load, run_tasks, run_threads
from limpet.benchmarks.population import count_running, limpet_path
from limpet.engine.aio import AsyncStore
from limpet.engine.database.sqlite import Reader
from limpet.engine.state.names import DATABASE
from limpet.schema.errors import StoreError
from limpet.schema.metadata import DEFAULT_NODE

CONTAINERS = 1000
_WARM_UP_CALLS = 20
_CALLS_PER_SECOND = 4000
"""Checkpoints per second of cell time, if all contenders must make the same number."""
_LONG_CELLS = 4
"""How many times longer a cell may take if an effect shows late, or the disk is slow."""
_READERS = 2
_WAL_CALLERS = 16
_SAMPLE_SECONDS = 0.01

CONTENDERS: Mapping[str, type[Contender]] = {
    "limpet": Limpet,
    "one-flush": OneFlush,
    "files": FilePerContainer,
    "files-unflushed": FileWithoutDirectoryFlush,
    "sqlite3": RawSqlite,
    "lmdb": Lmdb,
    "diskcache": Diskcache,
    "sqlalchemy-core": SqlalchemyCore,
    "sqlalchemy-orm": SqlalchemyOrm,
}


def measure_threads(cell: Cell) -> Figures:
    """Let threads checkpoint for a given time."""
    contender = _open(cell)
    load = Load(cell.size, max(CONTAINERS, cell.size), seconds=cell.seconds)
    return _finish(contender, run_threads(load, contender.checkpoint)).figures


def measure_tasks(cell: Cell) -> Figures:
    """Let asyncio tasks checkpoint for a given time: limpet with its own async API, others with a thread per call."""
    contender = _open(cell)
    load = Load(cell.size, max(CONTAINERS, cell.size), seconds=cell.seconds)
    call: Callable[[int, int], Any]
    if cell.contender == "limpet" and isinstance(contender, Limpet):
        store = AsyncStore(contender.store)

        def call(number: int, turn: int) -> Any:
            return store.checkpoint(container_id(number), replace(RUNNING, pid=turn))

    else:

        def call(number: int, turn: int) -> Any:
            return asyncio.to_thread(contender.checkpoint, number, turn)

    return _finish(contender, asyncio.run(run_tasks(load, call))).figures


def measure_bytes(cell: Cell) -> Figures:
    """Count the bytes written for a number of checkpoints, until all of them are in the database."""
    contender = _open(cell)
    calls = max(1, round(cell.seconds * _CALLS_PER_SECOND / cell.size))
    load = Load(cell.size, CONTAINERS, _LONG_CELLS * cell.seconds, calls)
    before = _read_io()
    finished = run_threads(load, contender.checkpoint)
    contender.close()
    after = _read_io()
    require_kept(contender, finished.kept)
    return {
        "written_bytes": (after["wchar"] - before["wchar"]) / finished.calls,
        "stored_bytes": (after["write_bytes"] - before["write_bytes"]) / finished.calls,
        "calls": finished.calls,
    }


def measure_growth(cell: Cell) -> Figures:
    """Let one caller checkpoint containers throughout a store of a given size."""
    running = count_running(cell.size)
    contender = CONTENDERS[cell.contender](cell.directory)
    if cell.contender == "limpet":
        contender = LimpetPopulation(limpet_path(cell.stage, cell.size), running)
    contender.open(cell.size)
    load = Load(1, cell.size - running, seconds=cell.seconds)
    figures = _finish(contender, run_threads(load, contender.checkpoint)).figures
    return {key: figures[key] for key in ("p50_us", "p99_us", "per_second", "cpu_us", "calls")}


def measure_wal(cell: Cell) -> Figures:
    """Watch the WAL while threads write without pause, and at least one reader is always active."""
    contender = _open(cell)
    sizes: list[int] = []
    reads: list[int] = []
    read: Callable[[threading.Event], int]
    if isinstance(contender, Limpet):
        path = f"{contender.state_dir}/{DATABASE}"
        read = partial(_read_with_limpet, path)
    else:
        assert isinstance(contender, RawSqlite), f"{contender.label} has no WAL"
        path = contender.path
        read = partial(_read_by_hand, path)
    readers = [lambda stop: reads.append(read(stop))] * _READERS
    load = Load(_WAL_CALLERS, CONTAINERS, seconds=_LONG_CELLS * cell.seconds)
    with _beside(*readers, lambda stop: _watch_size(f"{path}-wal", sizes, stop)):
        finished = run_threads(load, contender.checkpoint)
    _finish(contender, finished)
    half = len(sizes) // 2
    first, second = max(sizes[:half], default=0), max(sizes[half:], default=0)
    return {
        "peak_bytes": max(first, second),
        "growth": second / first if first else 0.0,
        "per_second": finished.figures["per_second"],
        "reads": sum(reads),
    }


def _open(cell: Cell) -> Contender:
    contender = CONTENDERS[cell.contender](cell.directory)
    contender.open(max(CONTAINERS, cell.size))
    for turn in range(1, _WARM_UP_CALLS + 1):
        contender.checkpoint(0, turn)
    return contender


def _finish(contender: Contender, finished: Finished) -> Finished:
    contender.close()
    require_kept(contender, finished.kept)
    return finished


def require_kept(contender: Contender, expected: Mapping[int, int]) -> None:
    """Raise StoreError unless the closed contender has on disk what it acknowledged."""
    found = contender.read_back(expected)
    for number, turn in expected.items():
        if found[number] != turn:
            raise StoreError(f"{contender.label}: container {number}: acknowledged {turn}, on disk {found[number]}")


def _read_io() -> dict[str, int]:
    """Return this process's counters of bytes read and written (proc_pid_io(5))."""
    with open("/proc/self/io", encoding="ascii") as file:
        return {name: int(value) for name, _, value in (line.partition(":") for line in file)}


@contextmanager
def _beside(*loops: Callable[[threading.Event], object]) -> Iterator[None]:
    """Run loops, each on a separate thread, until the block ends."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(loops)) as pool:
        futures = [pool.submit(loop, stop) for loop in loops]
        try:
            yield
        finally:
            stop.set()
    for future in futures:
        future.result()


def _read_with_limpet(path: str, stop: threading.Event) -> int:
    reader, count = Reader(path, DEFAULT_NODE), 0
    while not stop.is_set():
        reader.load_statuses()
        count += 1
    reader.close()
    return count


def _read_by_hand(path: str, stop: threading.Event) -> int:
    connection, count = sqlite3.connect(f"file:{path}?mode=ro", uri=True), 0
    while not stop.is_set():
        connection.execute("SELECT * FROM status").fetchall()
        count += 1
    connection.close()
    return count


def _watch_size(path: str, sizes: list[int], stop: threading.Event) -> None:
    while not stop.wait(_SAMPLE_SECONDS):
        sizes.append(os.stat(path).st_size)
