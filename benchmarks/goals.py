"""The goals, as a table, and the check whether a run reached them. Pure."""

from collections.abc import Callable, Mapping
from operator import sub, truediv
from typing import Literal, NamedTuple

from limpet.benchmarks.figures import Case, GoalResult, Series, Spread, pair


class Figure(NamedTuple):
    """The figure that a goal refers to."""

    experiment: str
    contender: str
    size: int
    metric: str

    @property
    def case(self) -> Case:
        """The case in which it is measured."""
        return Case(self.experiment, self.contender, self.size)


class Goal(NamedTuple):
    """A bound on a figure, or on its relation to another figure of the same turn."""

    text: str
    bound: Literal["at most", "at least"]
    limit: float
    figure: Figure
    beside: Figure | None = None
    relation: Literal["times", "more than"] = "times"
    unit: str = ""


_RELATIONS: Mapping[str, Callable[[float, float], float]] = {"times": truediv, "more than": sub}


def _limpet(experiment: str, size: int, metric: str, contender: str = "limpet") -> Figure:
    return Figure(experiment, contender, size, metric)


_ONE = _limpet("threads", 1, "p50_us")
_MANY = _limpet("threads", 64, "per_second")
_OPENING = _limpet("opening", 100_000, "total_ms")
_STEADY = _limpet("growth", 100, "p50_us")

GOALS: tuple[Goal, ...] = (
    Goal("1 thread: p50, vs the bare disk", "at most", 1.5, _ONE, _ONE._replace(contender="floor")),
    Goal("1 thread: p50, vs sqlite3 by hand", "at most", 1.25, _ONE, _ONE._replace(contender="sqlite3")),
    Goal(
        "1 thread: CPU, more than sqlite3 by hand",
        "at most",
        20,
        _ONE._replace(metric="cpu_us"),
        _ONE._replace(metric="cpu_us", contender="sqlite3"),
        "more than",
        "us",
    ),
    Goal(
        "64 threads: throughput, vs file per container",
        "at least",
        8,
        _MANY,
        _MANY._replace(contender="files"),
    ),
    Goal("64 threads: throughput, vs shared sqlite3", "at least", 8, _MANY, _MANY._replace(contender="sqlite3")),
    Goal(
        "64 threads: p99, vs p50",
        "at most",
        10,
        _MANY._replace(metric="p99_us"),
        _MANY._replace(metric="p50_us"),
    ),
    Goal("64 threads: fewest calls of any thread", "at least", 1, _MANY._replace(metric="fewest")),
    Goal(
        "64 tasks: throughput, vs file per container from 64 threads",
        "at least",
        12,
        _limpet("tasks", 64, "per_second"),
        _limpet("threads", 64, "per_second", "files"),
    ),
    Goal(
        "256 tasks: throughput, vs file per container from 256 threads",
        "at least",
        18,
        _limpet("tasks", 256, "per_second"),
        _limpet("threads", 256, "per_second", "files"),
    ),
    Goal(
        "bytes written per checkpoint, vs sqlite3 by hand",
        "at most",
        1.25,
        _limpet("bytes", 1, "written_bytes"),
        _limpet("bytes", 1, "written_bytes", "sqlite3"),
    ),
    Goal("100,000 containers: p50, vs 100", "at most", 1.2, _STEADY._replace(size=100_000), _STEADY),
    Goal("1,000,000 containers: p50, vs 100", "at most", 1.2, _STEADY._replace(size=1_000_000), _STEADY),
    Goal(
        "WAL under continuous writes: peak of the 2nd half, vs the 1st",
        "at most",
        1.2,
        _limpet("wal", 1000, "growth"),
    ),
    Goal(
        "100,000 containers: memory per container",
        "at most",
        1300,
        _limpet("memory", 100_000, "bytes_each"),
        unit="bytes",
    ),
    Goal(
        "100,000: open and recover, less 40 us per running one, vs a bare SELECT",
        "at most",
        1.5,
        _OPENING._replace(metric="beyond_ms"),
        _OPENING._replace(contender="select"),
    ),
    Goal("1,000,000: open and recover, vs 100,000", "at most", 11, _OPENING._replace(size=1_000_000), _OPENING),
    Goal(
        "100,000: open and recover, file per container vs limpet",
        "at least",
        4,
        _OPENING._replace(contender="files"),
        _OPENING,
    ),
    Goal(
        "100,000, caches dropped: file per container vs limpet",
        "at least",
        20,
        _OPENING._replace(contender="files-cold"),
        _OPENING._replace(contender="limpet-cold"),
    ),
    Goal("liveness: per process", "at most", 25, _limpet("liveness", 1000, "each_us"), unit="us"),
    Goal("waiting for exits: CPU per process and second", "at most", 1, _limpet("waiting", 1000, "each_us"), unit="us"),
    Goal("limpet --help: CPU", "at most", 250, _limpet("command", 10_000, "cpu_ms", "help"), unit="ms"),
    Goal("limpet ps, 10,000 containers: CPU", "at most", 500, _limpet("command", 10_000, "cpu_ms", "ps"), unit="ms"),
)


def judge(goal: Goal, series: Mapping[Case, Series]) -> GoalResult:
    """Return what a run measured for a goal, and whether the median reaches it."""
    measured = _measure(goal, series)
    reached = None
    if measured is not None:
        reached = measured.median <= goal.limit if goal.bound == "at most" else measured.median >= goal.limit
    return GoalResult(
        goal=goal.text,
        bound=f"{goal.bound} {goal.limit:g}{f' {goal.unit}' if goal.unit else ' times' if goal.beside else ''}",
        measured=measured,
        unit=goal.unit or ("times" if goal.beside else ""),
        reached=reached,
    )


def _measure(goal: Goal, series: Mapping[Case, Series]) -> Spread | None:
    one = series.get(goal.figure.case)
    if one is None:
        return None
    if goal.beside is None:
        return one.spreads.get(goal.figure.metric)
    other = series.get(goal.beside.case)
    if other is None:
        return None
    relate = _RELATIONS[goal.relation]
    values = [relate(a, b) for a, b in pair(one, goal.figure.metric, other, goal.beside.metric) if b]
    return Spread.of(values) if values else None
