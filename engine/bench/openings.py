"""Opening and recovering a store of many containers that have ended, and some that run."""

import gc
import os
import shutil
import sqlite3
import subprocess
import time
from contextlib import ExitStack

import msgspec

from limpet.engine.bench.contenders import ENDED, RUNNING, container_id, fill_store
from limpet.engine.recovery_pass import recover
from limpet.engine.store import Store
from limpet.recovery.host import identify, open_pidfd
from limpet.schema.codec import row_to_status

_SLEEP = shutil.which("sleep") or "/bin/sleep"


class Opening(msgspec.Struct, frozen=True, kw_only=True):
    """What it took to open and recover a store of this size, once; and what a bare SELECT of the same rows takes."""

    containers: int
    running: int
    """How many of them run, each a real process that is recognized."""
    open_ms: float
    recover_ms: float
    select_ms: float
    """Reading and decoding every status with sqlite3, and nothing else."""
    bytes_each: float
    """Resident memory that the open store takes, for each container."""


def time_openings(containers: int, running: int, repeat: int, directory: str) -> list[Opening]:
    """Make a store, then open and recover it `repeat` times."""
    path = f"{directory}/state"
    with ExitStack() as stack:
        processes = [stack.enter_context(subprocess.Popen([_SLEEP, "1000"])) for _ in range(running)]
        for process in processes:
            stack.callback(process.kill)
        with Store.open(path) as store:
            fill_store(store, containers, ENDED)
            with store.transaction() as draft:
                for number, process in enumerate(processes):
                    with open_pidfd(process.pid) as pidfd:
                        identity = identify(process.pid, pidfd)
                    status = msgspec.structs.replace(RUNNING, pid=process.pid, identity=identity)
                    draft.replace(container_id(number), status)
        return [_open_once(path, containers, running) for _ in range(repeat)]


def _open_once(path: str, containers: int, running: int) -> Opening:
    gc.collect()
    memory = _resident_bytes()
    begun = time.perf_counter()
    with Store.open(path) as store:
        opened = time.perf_counter()
        report = recover(store)
        recovered = time.perf_counter()
        grown = _resident_bytes() - memory
    assert report.totals["RUNNING"] == running, report.totals
    return Opening(
        containers=containers,
        running=running,
        open_ms=(opened - begun) * 1e3,
        recover_ms=(recovered - opened) * 1e3,
        select_ms=_time_select(path) * 1e3,
        bytes_each=grown / containers,
    )


def _time_select(path: str) -> float:
    gc.collect()
    begun = time.perf_counter()
    connection = sqlite3.connect(f"{path}/store.db")
    columns = "id, seq, transitions, pid, created_at, started_at, finished_at, exit_code, reason, message, released"
    columns += ", resources, process_pid, start_ticks, boot_id, pidfd_inode, pid_namespace"
    rows = connection.execute(f"SELECT {columns} FROM container_status")  # noqa: S608  # our own names
    statuses = {row[0]: row_to_status(row) for row in rows}
    took = time.perf_counter() - begun
    connection.close()
    assert statuses
    return took


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
