"""Durable checkpoints: callers in a closed loop, each calling again at once; what each call took is kept."""

import asyncio
import threading
import time
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from limpet.engine.aio import AsyncStore
from limpet.engine.bench.contenders import RUNNING, Contender, container_id, fill_store
from limpet.schema.errors import StoreError

CONTAINERS = 1000


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One contender with one number of callers, once."""

    name: str
    callers: int
    per_second: float
    p50_us: float
    p99_us: float
    cpu_us: float
    """Processor time for each call, of the whole process."""
    least: int
    """Calls of the caller that got the fewest through; with `most`, how fair it was."""
    most: int


def time_threads(kind: type[Contender], callers: int, seconds: float, directory: str) -> Cell:
    """Let threads checkpoint for some time. Raises StoreError if what was acknowledged is not there afterwards."""
    contender = kind()
    contender.open(directory, CONTAINERS)
    times: list[list[float]] = [[] for _ in range(callers)]
    ready = threading.Barrier(callers + 1)
    last = dict.fromkeys(range(callers), 0)

    def call(caller: int) -> None:
        mine, turn = times[caller], 0
        ready.wait()
        deadline = time.perf_counter() + seconds
        while (begun := time.perf_counter()) < deadline:
            turn += 1
            contender.checkpoint(caller + callers * (turn % (CONTAINERS // callers)), turn)
            mine.append(time.perf_counter() - begun)
        last[caller] = turn

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    ready.wait()
    begun, cpu = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.join()
    took, cpu = time.perf_counter() - begun, time.process_time() - cpu
    for caller, turn in last.items():
        found = contender.read(caller + callers * (turn % (CONTAINERS // callers)))
        if turn and found != turn:
            raise StoreError(f"{kind.name}: caller {caller} was told of {turn}, but {found} is kept")
    contender.close()
    return _cell(kind.name, times, took, cpu)


def time_tasks(callers: int, seconds: float, directory: str) -> Cell:
    """Let asyncio tasks checkpoint for some time."""
    return asyncio.run(_time_tasks(callers, seconds, directory))


async def _time_tasks(callers: int, seconds: float, directory: str) -> Cell:
    times: list[list[float]] = [[] for _ in range(callers)]
    async with await AsyncStore.open(f"{directory}/state") as store:
        await asyncio.to_thread(fill_store, store.store, CONTAINERS, RUNNING)
        deadline = time.perf_counter() + seconds

        async def call(caller: int) -> None:
            mine, turn = times[caller], 0
            while (begun := time.perf_counter()) < deadline:
                turn += 1
                status = replace(RUNNING, pid=turn)
                await store.checkpoint(container_id((caller * 37 + turn) % CONTAINERS), status)
                mine.append(time.perf_counter() - begun)

        begun, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(call(caller) for caller in range(callers)))
        took, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return _cell("limpet, asyncio", times, took, cpu)


def _cell(name: str, times: Sequence[Sequence[float]], took: float, cpu: float) -> Cell:
    calls = sorted(each for mine in times for each in mine)
    counts = [len(mine) for mine in times]
    return Cell(
        name=name,
        callers=len(times),
        per_second=len(calls) / took,
        p50_us=calls[len(calls) // 2] * 1e6,
        p99_us=calls[len(calls) * 99 // 100] * 1e6,
        cpu_us=cpu / len(calls) * 1e6,
        least=min(counts),
        most=max(counts),
    )
