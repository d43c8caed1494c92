"""Opening: reading a store of many containers from disk into memory, and how much memory that keeps."""

import gc
import os
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import msgspec
import sqlalchemy as sa

from limpet.benchmarks.contenders import UnavailableError, read_status_files
from limpet.benchmarks.databases import map_objects
from limpet.benchmarks.figures import Cell, Figures
from limpet.benchmarks.population import count_running, files_path, limpet_path
from limpet.engine.reconcile import recover
from limpet.engine.state.names import DATABASE
from limpet.engine.store import Store
from limpet.schema.codec import row_to_status
from limpet.schema.rows import StatusRow
from limpet.schema.status import Status
from limpet.schema.tables import container_status

_DROP_CACHES = "/proc/sys/vm/drop_caches"
_ALLOWANCE_MS = 0.04
"""The allowance for checking each running container's process, which the SELECT does not do."""
_COLD = "-cold"


class _FlatStatus(msgspec.Struct, gc=False):
    """A status row as a struct: the minimum that any reader has to create."""

    id: str
    seq: int
    transitions: int
    pid: int
    created_at: int
    started_at: int
    finished_at: int
    exit_code: int
    reason: str
    message: str
    released: int
    resources: str | None
    process_pid: int | None
    start_ticks: int | None
    boot_id: str | None
    pidfd_inode: int | None
    pid_namespace: int | None
    unapplied: str | None
    stop_requested_at: int
    stop_deadline: int
    expires_at: int
    paused: int
    extra: str | None
    checksum: int


_SELECT = f"SELECT {', '.join(StatusRow._fields)} FROM container_status"  # noqa: S608  # our own names


def measure_opening(cell: Cell) -> Figures:
    """Open one population and recover it, or read the same rows with less work; the first time fills the caches."""
    kind = cell.contender.removesuffix(_COLD)
    _warm_up(cell.directory)
    if kind == cell.contender:
        _open(cell, kind)
    else:
        drop_caches()
    gc.collect()
    return _open(cell, kind)


def _open(cell: Cell, kind: str) -> Figures:
    if kind == "limpet":
        return _open_limpet(limpet_path(cell.stage, cell.size), cell.size)
    path = files_path(cell.stage, cell.size) if kind == "files" else f"{limpet_path(cell.stage, cell.size)}/{DATABASE}"
    began = time.perf_counter()
    found = _READINGS[kind](path)
    took = time.perf_counter() - began
    assert len(found) == cell.size, f"{len(found)} were read, not {cell.size}"
    return {"total_ms": took * 1e3, "beyond_ms": took * 1e3}


def _warm_up(directory: str) -> None:
    """Make everything happen that happens only once per process, such as imports."""
    with Store.open(f"{directory}/warm-up") as store:
        recover(store)
    with sa.create_engine("sqlite://").connect():
        pass


def _open_limpet(path: str, size: int) -> Figures:
    began = time.perf_counter()
    with Store.open(path) as store:
        opened = time.perf_counter()
        report = recover(store)
        recovered = time.perf_counter()
        running = count_running(size)
        assert report.totals["RUNNING"] == running, f"{report.totals}, not {running} RUNNING"
    total_ms = (recovered - began) * 1e3
    return {
        "total_ms": total_ms,
        "beyond_ms": total_ms - _ALLOWANCE_MS * running,
        "open_ms": (opened - began) * 1e3,
        "recover_ms": (recovered - opened) * 1e3,
    }


def _select_structs(path: str) -> dict[str, Any]:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    found = {row[0]: _FlatStatus(*row) for row in connection.execute(_SELECT)}
    connection.close()
    return found


def _select_core(path: str) -> dict[str, Any]:
    engine = sa.create_engine(f"sqlite:///{path}")
    columns = [container_status.c[name] for name in StatusRow._fields]
    with engine.connect() as connection:
        found = {row.id: _FlatStatus(*row) for row in connection.execute(sa.select(*columns))}
    engine.dispose()
    return found


def _select_objects(path: str) -> dict[str, Any]:
    engine = sa.create_engine(f"sqlite:///{path}")
    open_session, kind = map_objects(engine, container_status)
    with open_session() as session:
        found = {status.id: status for status in session.scalars(sa.select(kind))}
    engine.dispose()
    return found


_READINGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "select": _select_structs,
    "sqlalchemy-core": _select_core,
    "sqlalchemy-orm": _select_objects,
    "files": read_status_files,
}


def drop_caches() -> None:
    """Make the kernel drop its disk caches. Raises UnavailableError if only root may do that."""
    os.sync()
    try:
        with open(_DROP_CACHES, "w", encoding="ascii") as file:
            file.write("3")
    except OSError as error:
        raise UnavailableError(f"{_DROP_CACHES}: {error.strerror}; root may drop caches") from error


def measure_memory(cell: Cell) -> Figures:
    """Measure the memory per container of a population that is open and examined."""
    path = limpet_path(cell.stage, cell.size)
    _warm_up(cell.directory)
    before = _resident_bytes()
    if cell.contender == "limpet":
        with Store.open(path) as store:
            recover(store)
            grown = _resident_bytes() - before
    else:
        kept = _MEMORIES[cell.contender](f"{path}/{DATABASE}")
        grown = _resident_bytes() - before
        assert len(kept) == cell.size
    return {"bytes_each": grown / cell.size}


def _keep_statuses(path: str) -> dict[str, Status]:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    found = {row[0]: row_to_status(StatusRow._make(row)) for row in connection.execute(_SELECT)}
    connection.close()
    return found


def _keep_dicts(path: str) -> dict[str, Any]:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    found = {row[0]: dict(zip(StatusRow._fields, row, strict=True)) for row in connection.execute(_SELECT)}
    connection.close()
    return found


_MEMORIES: dict[str, Callable[[str], dict[str, Any]]] = {
    "select": _select_structs,
    "statuses": _keep_statuses,
    "dicts": _keep_dicts,
    "sqlalchemy-orm": _select_objects,
}


def _resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
