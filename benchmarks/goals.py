"""The goals, as a table; and whether a run has reached them. Pure."""

from collections.abc import Callable, Mapping
from operator import sub, truediv
from typing import Literal, NamedTuple

from limpet.benchmarks.figures import Case, GoalResult, Series, Spread, pair


class Figure(NamedTuple):
    """A figure that a goal is about."""

    experiment: str
    contender: str
    size: int
    metric: str

    @property
    def case(self) -> Case:
        """The case that it is measured in."""
        return Case(self.experiment, self.contender, self.size)


class Goal(NamedTuple):
    """A bound on a figure, or on how it relates to another one of the same turn."""

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
_LIFE = _limpet("life", 10, "life_ms")
_START = _LIFE._replace(metric="start_p50_us")
_POPEN = _LIFE._replace(contender="popen", metric="life_us")
_RUNC, _CRUN = (_LIFE._replace(contender=f"limpet-{name}", metric="beyond_us") for name in ("runc", "crun"))
_RUNC_LIFE, _CRUN_LIFE = (each._replace(metric="life_beyond_us") for each in (_RUNC, _CRUN))
_TURNS_START, _TURNS_LIFE = (_LIFE._replace(metric=f"turns_{name}_us") for name in ("start", "life"))
_RELEASE, _DELETE = _LIFE._replace(metric="release_us"), _LIFE._replace(metric="delete_us")

_CHANGE = _limpet("changes", 1, "p50_us", "change")
_HISTORY, _SAME = _CHANGE._replace(contender="change-history"), _CHANGE._replace(contender="same")


def _list(key: str) -> Goal:
    ours = _limpet("lists", 100_000, f"{key}_us")
    text = f"100,000 containers: list by {key}, of a bare SELECT with an index"
    return Goal(text, "at most", 3, ours, ours._replace(contender="select"))


GOALS: tuple[Goal, ...] = (
    Goal("1 thread: p50, of that of 512 bytes + fdatasync", "at most", 1.5, _ONE, _ONE._replace(contender="one-flush")),
    Goal("1 thread: p50, of sqlite3's by hand", "at most", 1.25, _ONE, _ONE._replace(contender="sqlite3")),
    Goal(
        "1 thread: CPU beyond sqlite3's by hand",
        "at most",
        20,
        _ONE._replace(metric="cpu_us"),
        _ONE._replace(metric="cpu_us", contender="sqlite3"),
        "more than",
        "us",
    ),
    Goal("64 threads: throughput, of file per container's", "at least", 8, _MANY, _MANY._replace(contender="files")),
    Goal("64 threads: throughput, of shared sqlite3's", "at least", 8, _MANY, _MANY._replace(contender="sqlite3")),
    Goal("64 threads: p99, of p50", "at most", 10, _MANY._replace(metric="p99_us"), _MANY._replace(metric="p50_us")),
    Goal("64 threads: calls of the one with the fewest", "at least", 1, _MANY._replace(metric="fewest")),
    Goal(
        "64 tasks: throughput, of file per container's from 64 threads",
        "at least",
        12,
        _limpet("tasks", 64, "per_second"),
        _limpet("threads", 64, "per_second", "files"),
    ),
    Goal(
        "256 tasks: throughput, of file per container's from 256 threads",
        "at least",
        18,
        _limpet("tasks", 256, "per_second"),
        _limpet("threads", 256, "per_second", "files"),
    ),
    Goal(
        "bytes written for a checkpoint, of sqlite3's by hand",
        "at most",
        1.25,
        _limpet("bytes", 1, "written_bytes"),
        _limpet("bytes", 1, "written_bytes", "sqlite3"),
    ),
    Goal("100,000 containers: p50, of that with 100", "at most", 1.2, _STEADY._replace(size=100_000), _STEADY),
    Goal("1,000,000 containers: p50, of that with 100", "at most", 1.2, _STEADY._replace(size=1_000_000), _STEADY),
    Goal("state changes: p50, of that with a row of history instead of an event", "at most", 1.2, _CHANGE, _HISTORY),
    Goal(
        "state stays: p50, of that without the log", "at most", 1.05, _SAME, _SAME._replace(contender="same-unlogged")
    ),
    *(_list(key) for key in ("name", "sandbox", "prefix", "state", "label")),
    Goal("WAL under a stream: peak of the 2nd half, of the 1st's", "at most", 1.2, _limpet("wal", 1000, "growth")),
    Goal(
        "100,000 containers: memory for each", "at most", 1300, _limpet("memory", 100_000, "bytes_each"), unit="bytes"
    ),
    Goal(
        "100,000: open and recover, less 40 us for each that runs, of a bare SELECT",
        "at most",
        1.5,
        _OPENING._replace(metric="beyond_ms"),
        _OPENING._replace(contender="select"),
    ),
    Goal("1,000,000: open and recover, of 100,000", "at most", 11, _OPENING._replace(size=1_000_000), _OPENING),
    Goal(
        "100,000: open and recover, file per container's, of it",
        "at least",
        4,
        _OPENING._replace(contender="files"),
        _OPENING,
    ),
    Goal(
        "100,000, caches dropped: file per container's, of it",
        "at least",
        20,
        _OPENING._replace(contender="files-cold"),
        _OPENING._replace(contender="limpet-cold"),
    ),
    Goal("liveness: for each process", "at most", 25, _limpet("liveness", 1000, "each_us"), unit="us"),
    Goal("waiting for exits: CPU for each and second", "at most", 1, _limpet("waiting", 1000, "each_us"), unit="us"),
    Goal("start: p50, of Popen and its wait", "at most", 3, _START, _POPEN),
    Goal(
        "in turns, after rests: start p50, of Popen and its wait",
        "at most",
        3,
        _TURNS_START,
        _LIFE._replace(metric="turns_popen_us"),
    ),
    Goal("create to delete, of crun's", "at most", 0.5, _LIFE, _LIFE._replace(contender="crun")),
    Goal(
        "in turns, after rests: create to delete, of crun's",
        "at most",
        0.5,
        _TURNS_LIFE,
        _LIFE._replace(metric="turns_crun_us"),
    ),
    Goal("16 threads: lives a second", "at least", 150, _LIFE._replace(metric="per_second")),
    Goal("1,000 running: release, of that with 10", "at most", 1.2, _RELEASE._replace(size=1000), _RELEASE),
    Goal("1,000 running: delete, of that with 10", "at most", 1.2, _DELETE._replace(size=1000), _DELETE),
    Goal("flushes of a life", "at most", 9, _LIFE._replace(metric="flushes")),
    Goal(
        "1,000 running: removed a second, with their sandbox",
        "at least",
        500,
        _LIFE._replace(size=1000, metric="cleared_per_second"),
    ),
    Goal("runc: start p50, beyond runc's under conmon", "at most", 5000, _RUNC, unit="us"),
    Goal("crun: start p50, beyond crun's under conmon", "at most", 5000, _CRUN, unit="us"),
    Goal("runc: create to delete, beyond runc's under conmon", "at most", 5000, _RUNC_LIFE, unit="us"),
    Goal("crun: create to delete, beyond crun's under conmon", "at most", 5000, _CRUN_LIFE, unit="us"),
    Goal("limpet --help: CPU", "at most", 250, _limpet("command", 10_000, "cpu_ms", "help"), unit="ms"),
    Goal(
        "1 thread, fleet_ack=async: p50, of that without a fleet",
        "at most",
        1.05,
        _limpet("fleet", 1, "p50_us"),
        _limpet("fleet", 1, "p50_us", "limpet-alone"),
    ),
    Goal(
        "64 threads, fleet_ack=sync: throughput, of PostgreSQL's with one connection and 64 rows at once",
        "at least",
        0.5,
        _limpet("fleet", 64, "per_second", "limpet-sync"),
        _limpet("fleet", 64, "per_second", "batched"),
    ),
    Goal(
        "64 tasks, fleet_ack=sync: throughput, of the same",
        "at least",
        0.5,
        _limpet("fleet", 64, "per_second", "limpet-sync-tasks"),
        _limpet("fleet", 64, "per_second", "batched"),
    ),
    Goal("one node sends changes, a second", "at least", 10_000, _limpet("fleet-sending", 1, "per_second")),
    Goal(
        "100,000 containers of a new node: in the fleet after",
        "at most",
        15_000,
        _limpet("fleet-joining", 100_000, "took_ms"),
        unit="ms",
    ),
    Goal(
        "1,000 nodes: list of all containers, of a bare SELECT",
        "at most",
        3,
        _limpet("fleet-looking", 1000, "took_ms"),
        _limpet("fleet-looking", 1000, "took_ms", "select"),
    ),
    Goal("limpet ps, 10,000 containers: CPU", "at most", 500, _limpet("command", 10_000, "cpu_ms", "ps"), unit="ms"),
)


def judge(goal: Goal, series: Mapping[Case, Series]) -> GoalResult:
    """Say what a run measured for a goal, and whether the median reaches it."""
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
