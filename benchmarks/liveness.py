"""Liveness: the cost of checking that a process is the one that was started, and of waiting for its end."""

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from tempfile import TemporaryDirectory

from limpet.benchmarks.figures import Cell, Figures
from limpet.benchmarks.population import read_identities
from limpet.engine.lifecycle.watcher import Watcher
from limpet.engine.starters import Starters
from limpet.engine.store import Store
from limpet.recovery.evidence import Process
from limpet.recovery.host import observe_process, read_stat
from limpet.schema.errors import StoreError
from limpet.schema.identity import ProcessIdentity

_POLL_SECONDS = 0.1


def measure_liveness(cell: Cell) -> Figures:
    """Check each live process repeatedly; the median of the rounds."""
    look = LOOKS[cell.contender]
    identities = read_identities(cell.stage)[: cell.size]
    rounds: list[float] = []
    deadline = time.perf_counter() + cell.seconds
    while not rounds or time.perf_counter() < deadline:
        began = time.perf_counter()
        alive = sum(map(look, identities))
        rounds.append(time.perf_counter() - began)
        if alive != len(identities):
            raise StoreError(f"{cell.contender}: {alive} of {len(identities)} live processes were seen alive")
    return {"each_us": median(rounds) / len(identities) * 1e6, "rounds": len(rounds)}


def _look_with_limpet(identity: ProcessIdentity) -> bool:
    return observe_process(identity)[0] is Process.ALIVE


def _look_at_start_time(identity: ProcessIdentity) -> bool:
    return int(read_stat(identity.pid)[19]) == identity.start_ticks


def _look_at_proc(identity: ProcessIdentity) -> bool:
    return os.path.exists(f"/proc/{identity.pid}")


def _send_nothing(identity: ProcessIdentity) -> bool:
    os.kill(identity.pid, 0)
    return True


LOOKS: Mapping[str, Callable[[ProcessIdentity], bool]] = {
    "limpet": _look_with_limpet,
    "start-time": _look_at_start_time,
    "proc": _look_at_proc,
    "kill-0": _send_nothing,
}


def measure_waiting(cell: Cell) -> Figures:
    """Wait for the end of live processes for a given time, and measure the CPU time used."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    identities = read_identities(cell.stage)[: cell.size]
    wait = {"limpet": _watch, "kill-0": _poll}[cell.contender]
    cpu_seconds = wait(identities, cell.seconds)
    return {"each_us": cpu_seconds / cell.seconds / len(identities) * 1e6}


def _watch(identities: Sequence[ProcessIdentity], seconds: float) -> float:
    with TemporaryDirectory() as directory, Store.open(os.path.join(directory, "state")) as store:
        watcher, starter = Watcher(store, _be_surprised), Starters().default
        for identity in identities:
            watcher.watch(str(identity.pid), identity, os.pidfd_open(identity.pid), starter)
        began = time.process_time()
        time.sleep(seconds)
        took = time.process_time() - began
        watcher.close()
    return took


def _poll(identities: Sequence[ProcessIdentity], seconds: float) -> float:
    began = time.process_time()
    for _ in range(max(1, round(seconds / _POLL_SECONDS))):
        assert all(map(_send_nothing, identities))
        time.sleep(_POLL_SECONDS)
    return time.process_time() - began


def _be_surprised(container_id: str, *_: object) -> None:
    raise StoreError(f"process {container_id} ended while it was waited for")
