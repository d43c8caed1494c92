"""Interrupts at every place, and allocations that fail: `python -m tests.campaigns.interrupts`.

A life is a script of calls. It is run again and again, each time in a process of its own, and each time a signal
handler raises at another place: once, or there and soon again. Then the life is left as a program would leave it:
closed, and closed again while that is interrupted, or not closed. It is opened anew, in the same process or in another,
and what is found is compared with what was acknowledged. With `memory` the n-th allocation fails instead (it needs
CPython's _testcapi).

The places are those where Python really runs a signal handler: the handler trips its own signal again each time it
returns, so it is called at each of them. That holds for any version of Python.

What is tried is a `Life`; tests/campaigns/interrupted_lives.py has those of the store, interrupted_engine.py that of an
engine, interrupted_served.py that of one whose threads do what nobody calls for.
"""

import _thread
import argparse
import ctypes
import faulthandler
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Self

import limpet.engine
from limpet.engine.state import steps
from limpet.schema.errors import LimpetError
from tests.campaigns import interrupted_engine, interrupted_lives, interrupted_served
from tests.campaigns.interrupted_lives import Life

LIVES: Mapping[str, Callable[[str], Life]] = {
    **interrupted_lives.LIVES,
    **interrupted_engine.LIVES,
    **interrupted_served.LIVES,
}
CONTROLS = {**interrupted_lives.CONTROLS, **interrupted_engine.CONTROLS}
ROOT = Path(__file__).parents[2]
HANG_SECONDS = 30
_LOST_MEMORY_ERRORS = (SystemError, ctypes.ArgumentError)
"""What CPython's own code makes of a MemoryError at times; limpet raises neither."""
_NO_LOCK = ("can't allocate lock", "can't allocate read lock")
"""What a RuntimeError of CPython's says where there is no memory for a lock, or that of a file."""
_CRASHES = {signal.SIGSEGV, signal.SIGABRT}
_CANARIES = 20
_CONNECTIONS = 12
"""How many descriptors an interrupted life may leave open in its process: its connections, of which each has three."""
_ALLOCATIONS = 20_000
"""About so many has a life."""


class _Trip:
    """Trips SIGINT when it goes: by C code alone, so that the handler that leaves it behind is over by then."""

    __del__ = _thread.interrupt_main


_OURS = os.path.dirname(limpet.engine.__path__[0])
"""Where limpet's own code is, installed: a checkout may have that name as well."""


class Storm:
    """Raises KeyboardInterrupt in the main thread at the places with the numbers `strikes`, while the block runs.

    `within` is the qualified name of a function: then only places in it, and in what it calls, have a number.
    """

    def __init__(self, strikes: Sequence[int], within: str = "") -> None:
        self._strikes = frozenset(strikes)
        self._within = within
        self.places = 0
        self.struck: list[str] = []
        self._is_on = False

    def __enter__(self) -> Self:
        # As with Python's own handler, which raises and does no more.
        setattr(steps, "_has_handlers", lambda: False)  # noqa: B010
        signal.signal(signal.SIGINT, self._handle)
        self._is_on = True
        _thread.interrupt_main()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_on = False
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _handle(self, _: int, frame: FrameType | None) -> None:
        if not self._is_on:
            return
        trip = _Trip()
        if frame is None or not frame.f_code.co_filename.startswith(_OURS):
            return
        if self._within and self._within not in _name_callers(frame):
            return
        self.places += 1
        if self.places in self._strikes:
            name = os.path.basename(frame.f_code.co_filename)
            self.struck.append(f"{name}:{frame.f_lineno} {frame.f_code.co_qualname}")
            interrupt = KeyboardInterrupt()
            del trip
            raise interrupt


def _name_callers(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        yield frame.f_code.co_qualname
        frame = frame.f_back


class Famine:
    """The n-th allocation fails, for each n in `strikes`, while the block runs."""

    def __init__(self, strikes: Sequence[int], _: str = "") -> None:
        self._first, self._last = min(strikes), max(strikes)
        self.places = 0
        self.struck: list[str] = []

    def __enter__(self) -> Self:
        import _testcapi  # type: ignore[import-not-found]

        self.struck = [f"allocations {self._first} to {self._last}"]
        _testcapi.set_nomemory(self._first, self._last + 1)
        return self

    def __exit__(self, *_: object) -> None:
        import _testcapi

        _testcapi.remove_mem_hooks()


KINDS: Mapping[str, type[Storm] | type[Famine]] = {"interrupt": Storm, "memory": Famine}


@dataclass(frozen=True)
class Trial:
    """One run of a life. `python -m tests.campaigns.interrupts --point` repeats it."""

    life: str
    kind: str
    strikes: tuple[int, ...]
    is_closed: bool
    control: str = ""
    within: str = ""

    @property
    def point(self) -> str:
        end = "close" if self.is_closed else "exit"
        return ":".join([self.life, self.kind, ",".join(map(str, self.strikes)), end])


@dataclass
class Result:
    """How many trials there were, and what was found."""

    trials: int = 0
    findings: list[str] = field(default_factory=list)


def run(trial: Trial) -> list[str]:
    """Run one trial, in forks of this process, and return what is wrong."""
    # Where it is fast: of the disk only what a process sees matters here.
    directory = tempfile.mkdtemp(prefix="limpet-interrupts-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        life = LIVES[trial.life](f"{directory}/state")
        # Libraries in C may crash for want of memory, which is no lie: a kill is another campaign's.
        found = _in_fork(lambda: _live(trial, life, directory), may_crash=trial.kind == "memory")
        if not trial.is_closed and not found and os.path.exists(f"{directory}/state.notes"):
            noted = LIVES[trial.life](f"{directory}/state")
            noted.read_notes()
            found = _in_fork(lambda: [f"after its exit: {lie}" for lie in noted.find_lies()])
        return found
    finally:
        interrupted_engine.end_processes(directory)
        shutil.rmtree(directory, ignore_errors=True)


def count_places(order: "Order") -> int:
    """Return how many places a life has."""
    (line,) = run(Trial(order.life, "interrupt", (0,), is_closed=True, control=order.control, within=order.within))
    return int(line.removeprefix("places "))


def _live(trial: Trial, life: Life, directory: str) -> list[str]:
    with CONTROLS[trial.control]():
        before = len(os.listdir("/proc/self/fd"))
        strike = KINDS[trial.kind](trial.strikes, trial.within)
        wrong: list[str] = []
        canaries: list[int] = []
        with suppress(MemoryError), strike:  # it may be this program's own allocation that fails
            _call(life.live, wrong)
            if strike.struck:
                canaries += _make_canaries(directory)
            for _ in range(4):
                if not trial.is_closed or _call(life.leave, wrong):
                    break
        if trial.is_closed:
            _call(life.leave, wrong)
        if trial.strikes == (0,):
            return [f"places {strike.places}"]
        if not strike.struck:
            return []
        life.strikes = len(strike.struck)
        if trial.is_closed:
            wrong += life.find_lies()
        else:
            life.forget()
        wrong += _find_hurt(canaries, directory)
        kept = 0 if trial.is_closed else life.keeps_unclosed
        if len(os.listdir("/proc/self/fd")) > before + len(canaries) + _CONNECTIONS + kept:
            wrong.append("descriptors are left open")
        return [f"{line} (struck at {', '.join(strike.struck)})" for line in wrong]


def _call(call: Callable[[], object], wrong: list[str]) -> bool:
    """Call; return whether it came to its end. What strikes or limpet refuses is fine; anything else is noted."""
    try:
        call()
    except (KeyboardInterrupt, MemoryError, LimpetError, *_LOST_MEMORY_ERRORS):
        return False
    except BaseException as error:  # noqa: BLE001
        if not (isinstance(error, RuntimeError) and str(error) in _NO_LOCK):
            wrong.append(f"a caller gets a bare {type(error).__name__}: {error}")
        return False
    return True


def _make_canaries(directory: str) -> list[int]:
    """Open files of the host program's own, which get the numbers of what was closed."""
    return [
        os.open(f"{directory}/canary-{number}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        for number in range(_CANARIES)
    ]


def _find_hurt(canaries: list[int], directory: str) -> Iterator[str]:
    for number, descriptor in enumerate(canaries):
        try:
            found = os.fstat(descriptor)
        except OSError:
            yield f"descriptor {descriptor} of the host program was closed"
            continue
        if found.st_size or not os.path.samestat(found, os.stat(f"{directory}/canary-{number}")):
            yield f"descriptor {descriptor} of the host program was written to, or replaced"


def _in_fork(call: Callable[[], list[str]], *, may_crash: bool = False) -> list[str]:
    """Call in a fork; return the lines that it returns, or how it ended."""
    read, write = os.pipe()
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if pid == 0:
            code = 1
            with suppress(BaseException):
                os.dup2(said.fileno(), 2)
                faulthandler.enable(said.fileno())
                faulthandler.dump_traceback_later(HANG_SECONDS - 1, exit=True, file=said.fileno())
                try:
                    lines = call()
                except BaseException as error:  # noqa: BLE001
                    lines = [f"{type(error).__name__}: {error}"]
                os.write(write, json.dumps(lines).encode())
                code = 0
            os._exit(code)
        os.close(write)
        with os.fdopen(read, "rb") as answer:
            data = answer.read()
        _, status = os.waitpid(pid, 0)
        if data:
            return list(json.loads(data))
        if -os.waitstatus_to_exitcode(status) in _CRASHES and may_crash:
            return []
        said.seek(0)
        return [f"it hangs, or ends with {status}: {said.read()[-2000:]}"]


def draw(order: "Order") -> Iterator[Trial]:
    """Yield trials: each so many-th place or allocation, once and twice, left in both ways in turn."""
    chance = random.Random(order.seed)
    last = count_places(order) if order.kind == "interrupt" else _ALLOCATIONS
    for number, place in enumerate(range(1 + chance.randrange(order.every), last + 1, order.every)):
        again = place + (1 if order.kind == "memory" else chance.choice((1, 2, 3, chance.randrange(1, 60))))
        yield Trial(order.life, order.kind, (place,), number % 2 == 0, order.control, order.within)
        yield Trial(order.life, order.kind, (place, again), number % 4 != 3, order.control, order.within)


@dataclass(frozen=True)
class Order:
    """What a campaign is to try."""

    life: str = "store"
    kind: str = "interrupt"
    every: int = 1
    """Each so many-th place."""
    within: str = ""
    """Only places within calls of this function, by its qualified name."""
    seed: int = 1
    control: str = ""


def campaign(order: Order) -> Result:
    """Try the places of a life, on all processors."""
    parts = os.cpu_count() or 1
    result = Result()
    # In processes of their own: a fork of a process with threads may find its locks taken.
    with ThreadPoolExecutor(parts) as pool:
        for part in pool.map(lambda number: _run_part(order, f"{number}/{parts}"), range(parts)):
            result.trials += part.trials
            result.findings += part.findings
    return result


def _run_part(order: Order, part: str) -> Result:
    command = [sys.executable, "-m", "tests.campaigns.interrupts", "--part", part]
    command += [f"--{name}={value}" for name, value in vars(order).items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not done.stdout:
        return Result(0, [f"part {part}: {done.stderr[-2000:]}"])
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def _load_all(life: str) -> None:
    """Live a life, so that what is struck is not the loading of modules."""
    with tempfile.TemporaryDirectory() as directory:
        warm = LIVES[life](f"{directory}/state")
        warm.live()
        warm.leave()
        assert not (lies := list(warm.find_lies())), lies


def _try_part(order: Order, part: str) -> Result:
    number, parts = map(int, part.split("/"))
    result = Result()
    _load_all(order.life)
    for turn, trial in enumerate(draw(order)):
        if turn % parts == number:
            result.trials += 1
            found = run(trial)
            if found and trial.kind == "memory":
                # Which thread's allocation is the n-th is chance, and CPython's own threads do not outlive every one.
                found = run(trial)
            result.findings += [f"{trial.point}: {line}" for line in found]
    return result


def main() -> int:
    """Run the campaign; 0 if nothing was found, 1 otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--life", choices=list(LIVES), default="store")
    parser.add_argument("--kind", choices=list(KINDS), default="interrupt")
    parser.add_argument("--every", type=int, default=1, help="try each so many-th place (default: 1)")
    parser.add_argument("--within", default="", help="only places within calls of this function, as Container.start")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--control", choices=list(CONTROLS), default="", help="break the store on purpose")
    parser.add_argument("--part", default="", help="N/M: only that part of the trials, and a result as JSON")
    parser.add_argument("--point", default="", help="repeat one trial, as a finding names it")
    options = parser.parse_args()
    order = Order(options.life, options.kind, options.every, options.within, options.seed, options.control)
    if options.part:
        print(json.dumps(vars(_try_part(order, options.part))))
        return 0
    if options.point:
        life, kind, strikes, end = options.point.split(":")
        _load_all(life)
        trial = Trial(life, kind, tuple(map(int, strikes.split(","))), end == "close", order.control, order.within)
        result = Result(1, run(trial))
    else:
        result = campaign(order)
    print(*result.findings[:50], f"{result.trials} trials, {len(result.findings)} findings", sep="\n")
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())
