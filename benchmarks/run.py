"""The run: what is asked for as cells, turn by turn in shuffled order, contenders side by side; then the report."""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import msgspec

from limpet.benchmarks.experiments import EXPERIMENTS, PER_SECOND, Experiment, Extent
from limpet.benchmarks.figures import (
    BenchReport,
    Case,
    Cell,
    Metric,
    Outcome,
    Ratio,
    Run,
    Series,
    Spread,
    times_as_good,
)
from limpet.benchmarks.goals import GOALS, judge
from limpet.benchmarks.machine import describe_machine, describe_versions
from limpet.benchmarks.population import MAX_FILES, Population
from limpet.benchmarks.processes import CellRunner, populate
from limpet.engine.state.entries import require_utf8

_DEFAULTS: Mapping[Extent, tuple[int, float]] = {"quick": (1, 0.15), "normal": (5, 0.8), "full": (5, 1.0)}
"""How many turns, and how many seconds a cell takes."""
LIMPET = "limpet"
ONE_FLUSH = "one-flush"
_ONE_FLUSH = Case("threads", ONE_FLUSH, 1)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be run."""

    directory: str
    """Where: a directory on the disk in question."""
    extent: Extent = "normal"
    only: Sequence[str] = ()
    """Names of experiments; none for all. "fleet" also means those whose names begin so."""
    fleet: str = ""
    """The URL of a PostgreSQL; without one its experiments are left out."""
    repeat: int = 0
    """How many turns; 0 for as many as befit the extent."""
    seconds: float = 0.0
    """How long a cell takes; 0 for as long as befits the extent."""
    seed: int = 0
    """Decides on the order."""
    sizes: Mapping[str, Sequence[int]] = {}
    """Other sizes than the table's, by experiment."""

    @property
    def turns(self) -> int:
        """How many turns there are."""
        return self.repeat or _DEFAULTS[self.extent][0]

    @property
    def cell_seconds(self) -> float:
        """How long a cell takes."""
        return self.seconds or _DEFAULTS[self.extent][1]

    @property
    def experiments(self) -> dict[str, Experiment]:
        """The experiments that are asked for."""
        return {
            name: experiment
            for name, experiment in EXPERIMENTS.items()
            if (not self.only or name in self.only or name.partition("-")[0] in self.only)
            and (self.fleet or not experiment.needs_fleet)
        }

    def sizes_of(self, name: str) -> Sequence[int]:
        """Return the sizes of one experiment."""
        return self.sizes.get(name) or EXPERIMENTS[name].sizes[self.extent]


class Progress(msgspec.Struct, frozen=True):
    """How far a run is."""

    done: int
    total: int
    doing: str


def run_bench(settings: Settings, on_progress: Callable[[Progress], object] = lambda _: None) -> BenchReport:
    """Measure in a new directory below `settings.directory`, which is removed again, and return the report.

    A cell that fails is in the report, and stops nobody. Raises OSError, StoreError.
    """
    at, began = time.time(), time.monotonic()
    outcomes: dict[Case, dict[int, Outcome]] = {case: {} for case in choose_cases(settings)}
    total, done = settings.turns * len(outcomes), 0
    with _work_directory(settings.directory) as work, CellRunner() as runner:
        for staged in (False, True):
            cases = [case for case in outcomes if EXPERIMENTS[case.experiment].staged is staged]
            stage = f"{work}/stage" if staged else ""
            on_progress(Progress(done, total, "making the population" if staged and cases else ""))
            with populate(_population(stage, cases)) if staged and cases else nullcontext():
                for turn, case in order_cells(cases, settings):
                    on_progress(Progress(done, total, f"{case.experiment}: {case.contender}, {case.size:,}"))
                    outcomes[case][turn] = _run_case(runner, case, settings, work, stage)
                    done += 1
    on_progress(Progress(done, total, ""))
    return _report(settings, outcomes, at, time.monotonic() - began)


def choose_cases(settings: Settings) -> Iterator[Case]:
    """Yield what is to be measured in each turn."""
    for name, experiment in settings.experiments.items():
        for size in settings.sizes_of(name):
            for contender, entry in experiment.contenders.items():
                if entry.least <= size <= entry.most and settings.extent in entry.extents:
                    yield Case(name, contender, size)


def order_cells(cases: Sequence[Case], settings: Settings) -> Iterator[tuple[int, Case]]:
    """Yield each case once in each turn, in an order of the turn's own.

    What is compared is measured close together, because disk speed may change within seconds.
    """
    groups: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        key = ("", case.size) if EXPERIMENTS[case.experiment].by_callers else (case.experiment, 0)
        groups.setdefault(key, []).append(case)
    for turn in range(settings.turns):
        random_order = random.Random(f"{settings.seed}/{turn}")  # noqa: S311  # an order, not a secret
        for group in random_order.sample(list(groups.values()), len(groups)):
            yield from ((turn, case) for case in random_order.sample(group, len(group)))


@contextmanager
def _work_directory(parent: str) -> Iterator[str]:
    require_utf8(os.path.realpath(parent))
    directory = tempfile.mkdtemp(prefix="limpet-bench-", dir=parent)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _population(stage: str, cases: Iterable[Case]) -> Population:
    os.mkdir(stage)
    # Looks at processes need no more than those who live in a population ten times their number.
    lists = {case.size for case in cases if case.experiment == "lists"}
    others = [case for case in cases if case.experiment != "lists"]
    sizes = {case.size * (10 if EXPERIMENTS[case.experiment].size_title == "processes" else 1) for case in others}
    files = {case.size for case in cases if case.contender.startswith("files") and case.size <= MAX_FILES}
    return Population(directory=stage, sizes=sorted(sizes), file_sizes=sorted(files), list_sizes=sorted(lists))


def _run_case(runner: CellRunner, case: Case, settings: Settings, work: str, stage: str) -> Outcome:
    package = EXPERIMENTS[case.experiment].contenders[case.contender].package
    if package and find_spec(package) is None:
        return Outcome(missing=f"{package} is not installed")
    with _work_directory(work) as directory:
        return runner.run(
            Cell(
                experiment=case.experiment,
                contender=case.contender,
                size=case.size,
                seconds=settings.cell_seconds,
                directory=directory,
                stage=stage,
                fleet=settings.fleet,
            )
        )


def _report(
    settings: Settings, outcomes: Mapping[Case, Mapping[int, Outcome]], at: float, took_seconds: float
) -> BenchReport:
    series = {case: make_series(case, runs) for case, runs in outcomes.items()}
    return BenchReport(
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)),
        took_seconds=took_seconds,
        machine=describe_machine(settings.directory),
        versions=describe_versions(),
        settings=_describe_settings(settings),
        series=list(series.values()),
        ratios=list(make_ratios(series)),
        goals=[judge(goal, series) for goal in GOALS],
    )


def _describe_settings(settings: Settings) -> dict[str, Any]:
    return {
        "extent": settings.extent,
        "only": list(settings.only),
        "turns": settings.turns,
        "seconds": settings.cell_seconds,
        "seed": settings.seed,
        "directory": os.path.abspath(settings.directory),
    }


def make_series(case: Case, outcomes: Mapping[int, Outcome]) -> Series:
    """Gather the turns of one case."""
    entry = EXPERIMENTS[case.experiment].contenders[case.contender]
    runs = [Run(turn=turn, figures=outcome.figures) for turn, outcome in outcomes.items() if outcome.figures]
    keys = dict.fromkeys(key for run in runs for key in run.figures)
    return Series(
        experiment=case.experiment,
        contender=case.contender,
        label=entry.label,
        size=case.size,
        caveat=entry.caveat,
        missing=next((outcome.missing for outcome in outcomes.values() if outcome.missing), ""),
        failed=next((outcome.failed for outcome in outcomes.values() if outcome.failed), ""),
        runs=runs,
        spreads={key: Spread.of([run.figures[key] for run in runs if key in run.figures]) for key in keys},
    )


def make_ratios(series: Mapping[Case, Series]) -> Iterator[Ratio]:
    """Yield how many times as good limpet was as each other at the same size, and each as one flush."""
    one_flush = series.get(_ONE_FLUSH)
    for case, one in series.items():
        metrics = EXPERIMENTS[case.experiment].metrics
        limpet = case._replace(contender=LIMPET)
        if case != limpet and limpet in series:
            yield from _ratios(metrics, series[limpet], one)
        # limpet beside one flush, with one thread, is yielded above already
        is_pair = case.contender != ONE_FLUSH and case != _ONE_FLUSH._replace(contender=LIMPET)
        if one_flush is not None and is_pair and metrics[0] is PER_SECOND:
            yield from _ratios(metrics, one, one_flush)


def _ratios(metrics: Iterable[Metric], one: Series, beside: Series) -> Iterator[Ratio]:
    for metric in metrics:
        times = times_as_good(metric, one, beside)
        if times is not None:
            yield Ratio(
                experiment=one.experiment,
                metric=metric.key,
                size=one.size,
                contender=one.contender,
                beside=beside.contender,
                beside_size=beside.size,
                times=times,
            )
