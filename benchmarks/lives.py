"""Lives: what it takes to start a container, to have it live from create to delete, and to clear many away.

A cell of limpet first counts flushes, then has `size` containers run, measures single lives beside them and lives from
many threads, and removes those that run with their sandbox. Of the others those that keep what they have started live
beside as many, and are asked for them anew.
"""

import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from statistics import median

from limpet.benchmarks.conmon import CrunUnderConmon, RuncUnderConmon
from limpet.benchmarks.contenders import UnavailableError
from limpet.benchmarks.figures import Cell, Figures
from limpet.benchmarks.kinds import KINDS, Kind
from limpet.benchmarks.load import Load, percentile, run_threads
from limpet.benchmarks.runtimes import OTHERS, PROGRAM, Other
from limpet.engine import Engine
from limpet.engine.lifecycle.container import Container
from limpet.schema import ContainerState
from limpet.schema.errors import StoreError, UnsupportedError
from limpet.testing.supervisor import Supervisor

THREADS = 16
"""How many have containers live at a time."""
_LEAST_LIVES = 5
_LEAST_PAIRS = 60
"""How many lives of limpet's are compared with bare ones: a quarter of both takes 8 ms more, a quarter 8 ms less."""
_FLUSHES = frozenset({"fsync", "fdatasync", "sync", "syncfs"})
_END_TIMEOUT_SECONDS = 60.0
_REST_SECONDS = 0.03
"""How long nothing is done before a start that is compared: longer than the kernel's readers (RCU) are waited for."""
_OTHERS: Mapping[str, type[Other]] = {**OTHERS, "runc-conmon": RuncUnderConmon, "crun-conmon": CrunUnderConmon}
_IN_TURNS = ("popen", "crun")
_BARE: Mapping[str, type[Other]] = {"limpet-runc": RuncUnderConmon, "limpet-crun": CrunUnderConmon}


def measure_life(cell: Cell) -> Figures:
    """Measure lives, of limpet beside as many running containers as the cell's size says."""
    kind = KINDS.get(cell.contender)
    if kind is None:
        return _measure_other(cell)
    flushes = {} if kind.runtime else _count_flushes(cell.directory)  # first: it forks, which threads forbid
    kind.require()
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    state = f"{cell.directory}/state"
    try:
        with kind.open(state) as engine, ThreadPoolExecutor(THREADS) as pool:
            kind.make_sandbox(engine)
            list(pool.map(lambda _: kind.create(engine, "sleep", "100000").start(), range(cell.size)))
            with _open_bare(cell) as bare:
                alone = _measure_single_lives(kind, engine, cell.seconds, bare)
            many = _measure_threads(lambda: _live(kind, engine), cell.seconds)
            turns = {} if kind.runtime else _measure_in_turns(kind, engine, cell)
        began = time.perf_counter()
        with kind.open(state) as engine:
            opened = time.perf_counter()
            running = engine.list(state=ContainerState.RUNNING)
            if len(running) != cell.size:
                raise StoreError(f"{cell.size} containers were running, and {len(running)} were found again")
            clearing = time.perf_counter()
            kind.clear(engine)
            cleared = time.perf_counter() - clearing
    except BaseException:
        with kind.open(state) as engine:
            kind.clear(engine)
        raise
    found = {"reopen_ms": (opened - began) * 1e3, "cleared_per_second": cell.size / cleared}
    return {**alone, **many, **turns, **flushes, **found}


def _measure_other(cell: Cell) -> Figures:
    starts: list[float] = []
    lives: list[float] = []
    reopened = {}
    with closing(_OTHERS[cell.contender](cell.directory)) as other:
        other.hold(cell.size)
        began = time.perf_counter()
        running = other.reopen()
        if running is not None:
            reopened["reopen_ms"] = (time.perf_counter() - began) * 1e3
            if running != cell.size:
                raise UnavailableError(f"of {cell.size} that were started {running} are said to run")
        deadline = time.perf_counter() + cell.seconds
        while len(lives) < _LEAST_LIVES or time.perf_counter() < deadline:
            began = time.perf_counter()
            start = other.live()
            lives.append(time.perf_counter() - began)
            if start is not None:
                starts.append(start)
        many = _measure_threads(other.live, cell.seconds)
    took = median(lives)
    figures = {"life_ms": took * 1e3, "life_us": took * 1e6, **many, **reopened}
    return {**figures, **_describe_starts(starts)} if starts else figures


@contextmanager
def _open_bare(cell: Cell) -> Iterator[Other | None]:
    """Yield what runs containers of the same runtime without limpet, if there is such a thing."""
    if cell.contender not in _BARE:
        yield None
        return
    directory = f"{cell.directory}/bare"
    os.mkdir(directory)
    with closing(_BARE[cell.contender](directory)) as bare:
        yield bare


def _measure_single_lives(kind: Kind, engine: Engine, seconds: float, bare: Other | None) -> Figures:
    """Let one container after the other live, and time each step.

    The bare ones take turns with them, and each is compared with the bare one of its turn: disk and kernel are slow at
    times. Each start comes after a rest. Moving a process to other cgroups waits for the kernel's readers (RCU), for 1
    to 25 ms, and less if another was moved just before: without the rest, those that do the least between two starts
    would be spared what all others wait for. Who is first changes with each turn.
    """
    steps: dict[str, list[float]] = {"create": [], "start": [], "wait": [], "release": [], "delete": []}
    bare_starts: list[float] = []
    bare_lives: list[float] = []

    def live() -> None:
        for name, took in _live(kind, engine, _REST_SECONDS if bare is not None else 0).items():
            steps[name].append(took)

    def live_bare(other: Other) -> None:
        start, life = _rest_and_live(other)
        bare_starts.append(start or 0.0)
        bare_lives.append(life)

    turn: list[Callable[[], None]] = [live]
    if bare is not None:
        turn.append(lambda: live_bare(bare))
    deadline = time.perf_counter() + seconds
    least = _LEAST_LIVES if bare is None else _LEAST_PAIRS
    while len(steps["start"]) < least or time.perf_counter() < deadline:
        for each in turn:
            each()
        turn.reverse()
    lives = [sum(life) for life in zip(*steps.values(), strict=True)]
    beyond = {}
    if bare is not None:
        beyond["beyond_us"] = _median_beyond(steps["start"], bare_starts) * 1e6
        beyond["life_beyond_us"] = _median_beyond(lives, bare_lives) * 1e6
    return {
        "life_ms": median(lives) * 1e3,
        **beyond,
        **_describe_starts(steps["start"]),
        **{f"{name}_us": median(steps[name]) * 1e6 for name in ("create", "wait", "release", "delete")},
    }


def _median_beyond(took: Sequence[float], bare: Sequence[float]) -> float:
    """Return by how much each took longer than the bare one of its turn: the median of that."""
    return median(one - other for one, other in zip(took, bare, strict=True))


def _measure_in_turns(kind: Kind, engine: Engine, cell: Cell) -> Figures:
    """Let containers live in turns with other ways to run a program, each start after a rest; compare what they took.

    In a cell of its own each has warm caches and the processors to itself, and crun is spared waits for the kernel. A
    program that starts containers now and then finds what this finds.
    """
    lives: dict[str, list[float]] = {}
    starts: list[float] = []
    with ExitStack() as stack:
        others: dict[str, Other] = {}
        for name in _IN_TURNS:
            directory = f"{cell.directory}/{name}"
            os.mkdir(directory)
            with suppress(UnavailableError):
                others[name] = stack.enter_context(closing(OTHERS[name](directory)))
                others[name].live()
        deadline = time.perf_counter() + cell.seconds
        while len(starts) < _LEAST_LIVES or time.perf_counter() < deadline:
            for name, other in others.items():
                lives.setdefault(name, []).append(_rest_and_live(other)[1])
            took = _live(kind, engine, _REST_SECONDS)
            starts.append(took["start"])
            lives.setdefault("limpet", []).append(sum(took.values()))
    figures = {"turns_start_us": median(starts) * 1e6, "turns_life_us": median(lives["limpet"]) * 1e6}
    for name in others:
        figures[f"turns_{name}_us"] = median(lives[name]) * 1e6
    return figures


def _rest_and_live(other: Other) -> tuple[float | None, float]:
    """Let one of another kind live after a rest; return how long its start took, if that is told, and its life."""
    time.sleep(_REST_SECONDS)
    began = time.perf_counter()
    start = other.live()
    return start, time.perf_counter() - began


def _describe_starts(starts: Sequence[float]) -> Figures:
    ordered = sorted(starts)
    return {"start_p50_us": percentile(ordered, 50) * 1e6, "start_p99_us": percentile(ordered, 99) * 1e6}


def _measure_threads(live: Callable[[], object], seconds: float) -> Figures:
    """Measure lives from many threads. A thread has no containers of its own: each call has a new one."""
    finished = run_threads(Load(THREADS, THREADS, seconds=seconds), lambda *_: live())
    return {"per_second": finished.calls / finished.took}


def _live(kind: Kind, engine: Engine, rest: float = 0) -> dict[str, float]:
    """Let a container live from create to delete; return how many seconds each step took.

    Before its start it rests for so many seconds, which are not counted.
    """
    began = time.perf_counter()
    container = kind.create(engine, PROGRAM)
    took = {"create": time.perf_counter() - began}
    time.sleep(rest)
    steps: dict[str, Callable[[], object]] = {
        "start": container.start,
        "wait": lambda: _wait(container),
        "release": container.release,
        "delete": container.delete,
    }
    for name, step in steps.items():
        began = time.perf_counter()
        step()
        took[name] = time.perf_counter() - began
    return took


def _wait(container: Container) -> None:
    status = container.wait(_END_TIMEOUT_SECONDS)
    if status.exit_code != 0:
        raise StoreError(f"{PROGRAM} ended with {status}")


def _count_flushes(directory: str) -> Figures:
    """Count the flushes of one life, of all processes that take part; nothing if the kernel does not let us.

    The difference between a process with four lives and one with a single life: opening has flushes, too.
    """
    with suppress(UnsupportedError):
        counts = [_count(f"{directory}/counted-{lives}", lives) for lives in (1, 4)]
        return {"flushes": (counts[1] - counts[0]) / 3}
    return {}


def _count(state_dir: str, lives: int) -> int:
    with Supervisor(lambda: _live_apart(state_dir, lives)) as supervisor:
        found = 0
        for event in supervisor.events():
            found += event.name in _FLUSHES
            supervisor.let_go(event)
        if supervisor.status != 0:
            raise StoreError(f"the process whose flushes were counted has failed: {supervisor.failure()}")
    return found


def _live_apart(state_dir: str, lives: int) -> None:
    kind = Kind()
    with kind.open(state_dir) as engine:
        kind.make_sandbox(engine)
        for _ in range(lives):
            _live(kind, engine)
