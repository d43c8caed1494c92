"""The experiments, as a table: each with its sizes, its contenders and its metrics."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Literal, NamedTuple

from limpet.benchmarks.checkpoints import (
    CONTENDERS,
    measure_bytes,
    measure_growth,
    measure_tasks,
    measure_threads,
    measure_wal,
)
from limpet.benchmarks.command_line import measure_command
from limpet.benchmarks.event_log import measure_changes
from limpet.benchmarks.figures import Cell, Figures, Metric
from limpet.benchmarks.lists import FILTERS, measure_lists
from limpet.benchmarks.liveness import measure_liveness, measure_waiting
from limpet.benchmarks.lives import measure_life
from limpet.benchmarks.openings import measure_memory, measure_opening
from limpet.benchmarks.population import MAX_FILES

Extent = Literal["quick", "normal", "full"]


class Entry(NamedTuple):
    """A contender of an experiment. `sizes` limits it: elsewhere some would take minutes."""

    label: str
    caveat: str = ""
    package: str = ""
    """The package that it needs and limpet does not."""
    least: int = 0
    most: int = 1 << 62
    extents: tuple[Extent, ...] = ("quick", "normal", "full")


class Experiment(NamedTuple):
    """An experiment. The first metric is the one that is compared and plotted."""

    title: str
    size_title: str
    sizes: Mapping[Extent, tuple[int, ...]]
    metrics: tuple[Metric, ...]
    contenders: Mapping[str, Entry]
    measure: Callable[[Cell], Figures]
    staged: bool = False
    """It uses the population."""
    needs_fleet: bool = False
    """It is run only where a PostgreSQL is given."""
    by_callers: bool = False
    """Its sizes are numbers of callers: equal ones, also of other experiments, are measured one after the other."""


def _ways(*keys: str, **most: int) -> dict[str, Entry]:
    """Return entries for contenders that make checkpoints."""
    return {
        key: Entry(kind.label, kind.caveat, kind.package, most=most.get(key.replace("-", "_"), 1 << 62))
        for key, kind in CONTENDERS.items()
        if key in keys
    }


def _sizes(
    quick: tuple[int, ...], normal: tuple[int, ...], full: tuple[int, ...] = ()
) -> dict[Extent, tuple[int, ...]]:
    return {"quick": quick, "normal": normal, "full": full or normal}


PER_SECOND = Metric("per_second", "per second", "", more_is_better=True)
_LATENCIES = (Metric("p50_us", "p50", "us"), Metric("p99_us", "p99", "us"), Metric("cpu_us", "CPU each", "us"))
_LOAD_METRICS = (PER_SECOND, *_LATENCIES, Metric("fairness", "fairness", "", more_is_better=True))
_LONGER: tuple[Extent, ...] = ("normal", "full")
"""For what a quick run has no time for."""

_EXPERIMENTS: Mapping[str, Experiment] = {
    "threads": Experiment(
        "durable checkpoints from threads",
        "threads",
        _sizes((1, 64), (1, 16, 64, 256)),
        _LOAD_METRICS,
        _ways(*CONTENDERS, one_flush=1, diskcache=64, sqlalchemy_core=16, sqlalchemy_orm=16),
        measure_threads,
        by_callers=True,
    ),
    "tasks": Experiment(
        "durable checkpoints from asyncio tasks",
        "tasks",
        _sizes((64,), (1, 16, 64, 256, 1024)),
        _LOAD_METRICS,
        {
            key: entry._replace(label=f"{entry.label}, asyncio" if key == "limpet" else f"{entry.label}, to_thread")
            for key, entry in _ways("limpet", "files", "sqlite3").items()
        },
        measure_tasks,
        by_callers=True,
    ),
    "bytes": Experiment(
        "bytes written per checkpoint",
        "threads",
        _sizes((1,), (1, 64)),
        (Metric("written_bytes", "written", "bytes"), Metric("stored_bytes", "to the disk", "bytes")),
        _ways("limpet", "sqlite3", "files", "lmdb", "sqlalchemy-core", sqlalchemy_core=1),
        measure_bytes,
    ),
    "growth": Experiment(
        "a checkpoint in stores of different sizes",
        "containers",
        _sizes((100, 1000), (100, 10_000, 100_000), (100, 10_000, 100_000, 1_000_000)),
        (_LATENCIES[0], PER_SECOND, *_LATENCIES[1:]),
        _ways("limpet", "sqlite3"),
        measure_growth,
        staged=True,
    ),
    "changes": Experiment(
        "checkpoints beside the log of changes",
        "threads",
        _sizes((1,), (1,)),
        (_LATENCIES[0], PER_SECOND, *_LATENCIES[1:]),
        {
            "change": Entry("limpet: the state changes"),
            "change-history": Entry("the same, a row of history instead of an event", "cannot be watched"),
            "change-unlogged": Entry("the same, neither", "cannot be watched, has no history"),
            "same": Entry("limpet: the state stays"),
            "same-unlogged": Entry("the same, without the log", "cannot be watched, has no history"),
        },
        measure_changes,
    ),
    "lists": Experiment(
        "lists of few containers among many",
        "containers",
        _sizes((1000,), (100_000,)),
        tuple(Metric(f"{key}_us", f"by {key}", "us") for key in FILTERS),
        {"limpet": Entry("limpet"), "select": Entry("a bare SELECT with an index into tuples", "checks nothing")},
        measure_lists,
        staged=True,
    ),
    "wal": Experiment(
        "the WAL under continuous writes, with readers",
        "containers",
        _sizes((1000,), (1000,)),
        (Metric("peak_bytes", "peak", "bytes"), Metric("growth", "2nd half / 1st", ""), Metric("reads", "reads", "")),
        _ways("limpet", "sqlite3"),
        measure_wal,
    ),
    "opening": Experiment(
        "open and recover",
        "containers",
        _sizes((1000,), (1000, 10_000, 100_000), (1000, 10_000, 100_000, 1_000_000)),
        (
            Metric("total_ms", "took", "ms"),
            Metric("open_ms", "open", "ms"),
            Metric("recover_ms", "recover", "ms"),
        ),
        {
            "limpet": Entry("limpet: open and recover"),
            "select": Entry("a bare SELECT into structs", "does not check processes"),
            "sqlalchemy-core": Entry("SQLAlchemy Core into structs", "does not check processes"),
            "sqlalchemy-orm": Entry("SQLAlchemy ORM objects", "does not check processes", most=100_000),
            "files": Entry("file per container", "does not check processes", most=MAX_FILES),
            "limpet-cold": Entry("limpet, caches dropped", least=100_000, extents=_LONGER),
            "files-cold": Entry(
                "file per container, caches dropped",
                "does not check processes",
                least=100_000,
                most=MAX_FILES,
                extents=_LONGER,
            ),
        },
        measure_opening,
        staged=True,
    ),
    "memory": Experiment(
        "memory of an open store",
        "containers",
        _sizes((1000,), (10_000, 100_000), (10_000, 100_000, 1_000_000)),
        (Metric("bytes_each", "each", "bytes"),),
        {
            "limpet": Entry("limpet"),
            "select": Entry("flat structs in a dict"),
            "statuses": Entry("Status structs in a dict"),
            "dicts": Entry("dicts in a dict", most=100_000),
            "sqlalchemy-orm": Entry("SQLAlchemy ORM objects", most=100_000),
        },
        measure_memory,
        staged=True,
    ),
    "liveness": Experiment(
        "check that a process is the one that was started",
        "processes",
        _sizes((100,), (10, 1000)),
        (Metric("each_us", "each", "us"),),
        {
            "limpet": Entry("limpet"),
            "start-time": Entry("start time in /proc", "may accept another process with a reused pid"),
            "proc": Entry("/proc/PID exists", "accepts any process with the pid"),
            "kill-0": Entry("kill with signal 0", "accepts any process with the pid"),
        },
        measure_liveness,
        staged=True,
    ),
    "waiting": Experiment(
        "waiting for processes to end, CPU time per second",
        "processes",
        _sizes((100,), (10, 1000)),
        (Metric("each_us", "each", "us/s"),),
        {
            "limpet": Entry("limpet: one epoll set"),
            "kill-0": Entry("kill with signal 0, ten times a second", "accepts any process with the pid"),
        },
        measure_waiting,
        staged=True,
    ),
    "life": Experiment(
        "a container's life, create to delete",
        "running",
        _sizes((10,), (10, 100, 1000)),
        (
            Metric("life_ms", "took", "ms"),
            Metric("start_p50_us", "start p50", "us"),
            Metric("start_p99_us", "start p99", "us"),
            Metric("release_us", "release", "us"),
            Metric("delete_us", "delete", "us"),
            Metric("flushes", "flushes", ""),
            Metric("per_second", "lives/s, 16 threads", "", more_is_better=True),
            Metric("cleared_per_second", "cleared/s", "", more_is_better=True),
            Metric("reopen_ms", "reopen", "ms"),
        ),
        {
            "limpet": Entry("limpet"),
            "popen": Entry("subprocess.Popen", "keeps no state", most=10),
            "bwrap": Entry("bwrap", "keeps no state", most=10),
            "runc": Entry("runc", "state not durable", most=100),
            "crun": Entry("crun", "state not durable", most=100),
            "podman-runc": Entry("runc under Podman", "state not durable", most=100, extents=_LONGER),
            "podman-crun": Entry("crun under Podman", "state not durable", most=100, extents=_LONGER),
            "limpet-runc": Entry("limpet with runc", most=100, extents=_LONGER),
            "runc-conmon": Entry("runc under conmon", "state not durable", most=10, extents=_LONGER),
            "limpet-crun": Entry("limpet with crun", most=100, extents=_LONGER),
            "crun-conmon": Entry("crun under conmon", "state not durable", most=10, extents=_LONGER),
        },
        measure_life,
    ),
    "command": Experiment(
        "CPU time of commands",
        "containers",
        _sizes((1000,), (10_000,)),
        (Metric("cpu_ms", "CPU", "ms"),),
        {
            "help": Entry("limpet --help"),
            "ps": Entry("limpet ps"),
            "ps-all": Entry("limpet ps --all"),
            "python": Entry("python -c pass"),
        },
        measure_command,
        staged=True,
    ),
}

_PSYCOPG = "psycopg"


def _of_fleet(name: str) -> Callable[[Cell], Figures]:
    def measure(cell: Cell) -> Figures:
        # Imported here: its driver is an extra.
        module = import_module("limpet.benchmarks.fleet")
        figures: Figures = getattr(module, name)(cell)
        return figures

    return measure


_FLEET = {
    "limpet": Entry("limpet, fleet_ack=async", package=_PSYCOPG),
    "limpet-sync": Entry("limpet, fleet_ack=sync", package=_PSYCOPG),
    "limpet-sync-tasks": Entry("limpet, fleet_ack=sync, tasks of one loop", package=_PSYCOPG),
    "limpet-alone": Entry("limpet without a fleet", package=_PSYCOPG),
    "direct": Entry("PostgreSQL alone, a connection and a transaction each", "down while it is away", _PSYCOPG),
    "batched": Entry("PostgreSQL alone, one connection, 64 rows at once", "down while it is away", _PSYCOPG, least=64),
}
_TOOK = Metric("took_ms", "took", "ms")
_FLEET_EXPERIMENTS = {
    "fleet": Experiment(
        "durable checkpoints from threads, or tasks, of a node in a fleet",
        "callers",
        _sizes((1, 64), (1, 64)),
        (PER_SECOND, *_LATENCIES),
        _FLEET,
        _of_fleet("measure_fleet"),
        needs_fleet=True,
    ),
    "fleet-sending": Experiment(
        "changes that were held up, until the fleet has them",
        "nodes",
        _sizes((1,), (1,)),
        (PER_SECOND, Metric("cpu_us", "CPU each", "us")),
        {"limpet": _FLEET["limpet"]},
        _of_fleet("measure_sending"),
        needs_fleet=True,
    ),
    "fleet-joining": Experiment(
        "a node that is new to the fleet, until it has all of it",
        "containers",
        _sizes((1000,), (100_000,)),
        (_TOOK, Metric("cpu_ms", "CPU", "ms")),
        {"limpet": _FLEET["limpet"]},
        _of_fleet("measure_joining"),
        needs_fleet=True,
    ),
    "fleet-looking": Experiment(
        "all containers of a fleet, 100 on each node",
        "nodes",
        _sizes((10,), (1000,)),
        (_TOOK,),
        {
            "limpet": Entry("limpet: Fleet.list", package=_PSYCOPG),
            "select": Entry("a bare SELECT into tuples", "checks nothing", _PSYCOPG),
        },
        _of_fleet("measure_looking"),
        needs_fleet=True,
    ),
}
EXPERIMENTS: Mapping[str, Experiment] = {**_EXPERIMENTS, **_FLEET_EXPERIMENTS}

METRICS: Mapping[str, Metric] = {name: experiment.metrics[0] for name, experiment in EXPERIMENTS.items()}
"""The metric that each experiment is compared and plotted by."""
