"""A load: callers in a closed loop, each calling again at once, and the time of each call."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from math import inf
from typing import NamedTuple

from limpet.benchmarks.figures import Figures


class Load(NamedTuple):
    """The number of callers and containers, and the end: a time limit, or `calls` per caller.

    Each caller has its own containers, so that it is known afterwards what must be on disk.
    """

    callers: int
    containers: int
    seconds: float = inf
    calls: float = inf

    def number(self, caller: int, turn: int) -> int:
        """Return the container that a caller checkpoints in a turn: in sequence, but not neighbours."""
        own = self.containers // self.callers
        return caller + self.callers * (turn * 7919 % own)


class Finished(NamedTuple):
    """The result of a load."""

    load: Load
    times: list[list[float]]
    """The duration of each call, in seconds, for each caller."""
    took: float
    cpu: float
    """CPU seconds of the whole process."""

    @property
    def calls(self) -> int:
        """The number of calls."""
        return sum(map(len, self.times))

    @property
    def kept(self) -> dict[int, int]:
        """The turn that must be on disk for each container: turns count a caller's calls, from 1."""
        return {
            self.load.number(caller, turn): turn
            for caller, mine in enumerate(self.times)
            for turn in range(1, len(mine) + 1)
        }

    @property
    def figures(self) -> Figures:
        """Throughput, percentiles, CPU time and fairness."""
        calls = sorted(each for mine in self.times for each in mine)
        fewest, most = min(map(len, self.times)), max(map(len, self.times))
        return {
            "per_second": len(calls) / self.took,
            "p50_us": percentile(calls, 50) * 1e6,
            "p99_us": percentile(calls, 99) * 1e6,
            "cpu_us": self.cpu / len(calls) * 1e6,
            "fairness": fewest / most,
            "fewest": fewest,
            "calls": len(calls),
        }


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Return a percentile of ascending values, by the nearest rank."""
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)]


def run_threads(load: Load, call: Callable[[int, int], object]) -> Finished:
    """Let threads `call(number, turn)`. Raises what a call raises."""
    times: list[list[float]] = [[] for _ in range(load.callers)]
    began = cpu_began = 0.0

    def begin() -> None:
        nonlocal began, cpu_began
        began, cpu_began = time.perf_counter(), time.process_time()

    barrier = threading.Barrier(load.callers, action=begin)

    def loop(caller: int) -> None:
        mine, clock = times[caller], time.perf_counter
        barrier.wait()
        deadline = began + load.seconds
        for turn in count(1):
            before = clock()
            if before >= deadline or turn > load.calls:
                return
            call(load.number(caller, turn), turn)
            mine.append(clock() - before)

    with ThreadPoolExecutor(load.callers) as pool:
        for future in [pool.submit(loop, caller) for caller in range(load.callers)]:
            future.result()
    return Finished(load, times, time.perf_counter() - began, time.process_time() - cpu_began)


async def run_tasks(load: Load, call: Callable[[int, int], Awaitable[object]]) -> Finished:
    """Let asyncio tasks `await call(number, turn)`. Raises what a call raises."""
    times: list[list[float]] = [[] for _ in range(load.callers)]

    async def loop(caller: int) -> None:
        mine, clock = times[caller], time.perf_counter
        for turn in count(1):
            before = clock()
            if before >= deadline or turn > load.calls:
                return
            await call(load.number(caller, turn), turn)
            mine.append(clock() - before)

    cpu_began, began = time.process_time(), time.perf_counter()
    deadline = began + load.seconds
    await asyncio.gather(*(loop(caller) for caller in range(load.callers)))
    return Finished(load, times, time.perf_counter() - began, time.process_time() - cpu_began)
