"""The run: every cell in a process of its own, in shuffled order, contenders side by side; then medians and ratios."""

import os
import platform
import random
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import msgspec

from limpet.engine.bench.checkpoints import Cell, time_tasks, time_threads
from limpet.engine.bench.contenders import CONTENDERS, Floor
from limpet.engine.bench.openings import Opening, time_openings
from limpet.engine.directory import file_system_type

THREADS = (1, 16, 64)
TASKS = (64, 256)
SIZES = (1_000, 10_000, 100_000)


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured. Cells and openings are in the order in which they ran."""

    machine: dict[str, str]
    directory: str
    seconds: float
    cells: list[Cell]
    openings: list[Opening]

    def median(self, name: str, callers: int, field: str) -> float | None:
        """Return the median of a field over the repetitions of a cell, None if it was not measured."""
        values = [getattr(cell, field) for cell in self.cells if (cell.name, cell.callers) == (name, callers)]
        return statistics.median(values) if values else None


def run_bench(
    *, directory: str, quick: bool = False, on_cell: Callable[[int, int], object] = lambda *_: None
) -> BenchReport:
    """Measure in a new directory below `directory`, which should be on a disk. `on_cell(done, all)` tells progress.

    Everything that was made is removed again. Raises OSError, LimpetError.
    """
    repeat, seconds = (1, 0.2) if quick else (5, 1.0)
    jobs: list[tuple[Callable[..., object], tuple[object, ...]]] = []
    for _ in range(repeat):
        turn: list[tuple[Callable[..., object], tuple[object, ...]]] = [
            (time_threads, (kind, threads, seconds))
            for threads in THREADS
            for kind in CONTENDERS
            if threads == 1 or kind is not Floor
        ]
        turn += [(time_tasks, (tasks, seconds)) for tasks in TASKS]
        random.shuffle(turn)
        jobs += turn
    sizes = SIZES[:2] if quick else SIZES
    jobs += [(time_openings, (size, min(size, 100), repeat)) for size in sizes]
    results: list[object] = []
    place = tempfile.mkdtemp(prefix="limpet-bench-", dir=directory)
    try:
        for number, (measure, arguments) in enumerate(jobs):
            on_cell(number, len(jobs))
            results.append(_in_process(measure, (*arguments, tempfile.mkdtemp(dir=place))))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return BenchReport(
        machine=describe_machine(directory),
        directory=directory,
        seconds=seconds,
        cells=[result for result in results if isinstance(result, Cell)],
        openings=[one for result in results if isinstance(result, list) for one in result],
    )


def _in_process(measure: Callable[..., object], arguments: tuple[object, ...]) -> object:
    """Measure in a fresh process, so that no cell leaves anything to the next."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def describe_machine(directory: str) -> dict[str, str]:
    """Return what the figures depend on."""
    from importlib.metadata import version  # noqa: PLC0415  # it takes a while to load

    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "file system": file_system_type(os.stat(directory).st_dev),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "limpet": version("limpet"),
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
    }
