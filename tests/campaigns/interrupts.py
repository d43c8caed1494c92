"""Interrupts at every place, and allocations that fail: `python -m tests.campaigns.interrupts`.

A life is a script of calls. It is run again and again, each time in a process of its own, and each time a signal
handler raises at another place: once, or there and soon again. Then the life is left as a program would leave it:
closed, and closed again while that is interrupted, or not closed. It is opened anew, in the same process or in another,
and what is found is compared with what was acknowledged. With `memory` the n-th allocation fails instead (it needs
CPython's _testcapi).

The places are those where Python really runs a signal handler: the handler trips its own signal again each time it
returns, so it is called at each of them. That holds for any version of Python.

What is tried is a `Life`; tests/campaigns/interrupted_lives.py has those of the store.
"""

import _thread
import argparse
import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from limpet.schema.errors import LimpetError
from tests.campaigns.interrupted_lives import CONTROLS, LIVES

HANG_SECONDS = 30
_CANARIES = 20
_MORE_DESCRIPTORS = 12
"""What an interrupted life may leave open in its process: its connections, of which each has three."""
_ALLOCATIONS = 20_000
"""About so many are tried of a life; they come at random, but the first more often."""


class Life(Protocol):
    """A script of calls of limpet, in a directory. Each trial makes a new one, in a process of its own."""

    def live(self) -> None:
        """Make the calls, in the main thread, and note what was acknowledged. What strikes a call is raised."""

    def leave(self) -> None:
        """Close everything, as a `finally` would. May be struck, and is called again then."""

    def forget(self) -> None:
        """Drop everything without closing it, as an exit does."""

    def find_lies(self) -> Iterator[str]:
        """Open anew, use it, and close; yield what is not as it was acknowledged, and threads that were not answered.

        What was being changed when the life was struck may be changed or not, as a whole.
        """


class _Trip:
    """Trips SIGINT when it goes: by C code alone, so that the handler that leaves it behind is over by then."""

    __del__ = _thread.interrupt_main


class Storm:
    """Raises KeyboardInterrupt in the main thread at the places with the numbers `strikes`, while the block runs."""

    def __init__(self, strikes: Sequence[int]) -> None:
        self._strikes = frozenset(strikes)
        self.places = 0
        self.struck: list[str] = []
        self._is_on = False

    def __enter__(self) -> "Storm":
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
        if frame is None or "limpet" not in frame.f_code.co_filename:
            return
        self.places += 1
        if self.places in self._strikes:
            name = os.path.basename(frame.f_code.co_filename)
            self.struck.append(f"{name}:{frame.f_lineno} {frame.f_code.co_qualname}")
            interrupt = KeyboardInterrupt()
            del trip
            raise interrupt


class Famine:
    """The n-th allocation fails, for each n in `strikes`, while the block runs."""

    def __init__(self, strikes: Sequence[int]) -> None:
        self._first, self._last = min(strikes), max(strikes)
        self.places = 0
        self.struck: list[str] = []

    def __enter__(self) -> "Famine":
        import _testcapi

        self.struck = [f"allocations {self._first} to {self._last}"]
        _testcapi.set_nomemory(self._first, self._last + 1)
        return self

    def __exit__(self, *_: object) -> None:
        import _testcapi

        _testcapi.remove_mem_hooks()


KINDS = {"interrupt": Storm, "memory": Famine}


@dataclass(frozen=True)
class Trial:
    """One run of a life. `python -m tests.campaigns.interrupts --point` repeats it."""

    life: str
    kind: str
    strikes: tuple[int, ...]
    is_closed: bool
    control: str = ""

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
        found = _in_fork(lambda: _live(trial, life, directory))
        if not trial.is_closed and not found:
            noted = LIVES[trial.life](f"{directory}/state")
            noted.read_notes()
            found = _in_fork(lambda: [f"after its exit: {lie}" for lie in noted.find_lies()])
        return found
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def count_places(life: str) -> int:
    """Return how many places a life has."""
    (line,) = run(Trial(life, "interrupt", (0,), is_closed=True))
    return int(line.removeprefix("places "))


def _live(trial: Trial, life: "Life", directory: str) -> list[str]:
    with CONTROLS[trial.control]():
        before = len(os.listdir("/proc/self/fd"))
        strike = KINDS[trial.kind](trial.strikes)
        wrong: list[str] = []
        canaries: list[int] = []
        with strike:
            _call(life.live, wrong)
            if strike.struck:
                canaries = _make_canaries(directory)
            for _ in range(4):
                if not trial.is_closed or _call(life.leave, wrong):
                    break
        if trial.strikes == (0,):
            return [f"places {strike.places}"]
        if not strike.struck:
            return []
        if trial.is_closed:
            wrong += life.find_lies()
        else:
            life.forget()
        wrong += _find_hurt(canaries, directory)
        if len(os.listdir("/proc/self/fd")) > before + len(canaries) + _MORE_DESCRIPTORS:
            wrong.append("descriptors are left open")
        return [f"{line} (struck at {', '.join(strike.struck)})" for line in wrong]


def _call(call: "object", wrong: list[str]) -> bool:
    """Call; return whether it came to its end. What strikes or limpet refuses is fine; anything else is noted."""
    try:
        call()  # type: ignore[operator]
    except (KeyboardInterrupt, MemoryError, LimpetError):
        return False
    except BaseException as error:
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


def _in_fork(call: "object") -> list[str]:
    """Call in a fork; return the lines that it returns, or how it ended."""
    read, write = os.pipe()
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if pid == 0:
            code = 1
            with suppress(BaseException):
                os.dup2(said.fileno(), 2)
                faulthandler.dump_traceback_later(HANG_SECONDS - 1, exit=True, file=said.fileno())
                try:
                    lines = call()  # type: ignore[operator]
                except BaseException as error:
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
        said.seek(0)
        return [f"it hangs, or ends with {status}: {said.read()[-2000:]}"]


def draw(life: str, kind: str, every: int, seed: int, *, control: str = "") -> Iterator[Trial]:
    """Yield trials: each `every`-th place or allocation, once and twice, left in both ways in turn."""
    chance = random.Random(seed)
    last = count_places(life) if kind == "interrupt" else _ALLOCATIONS
    for number, place in enumerate(range(1 + chance.randrange(every), last + 1, every)):
        again = place + chance.choice((1, 2, 3, chance.randrange(1, 60)))
        yield Trial(life, kind, (place,), number % 2 == 0, control)
        yield Trial(life, kind, (place, again), number % 4 != 3, control)


def campaign(life: str, kind: str, every: int, seed: int = 1, *, control: str = "", workers: int = 0) -> Result:
    """Try each `every`-th place of a life."""
    result = Result()
    # Forks of a process with threads would be forks of a locked one: each worker is a process.
    workers = workers or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        for part in pool.map(lambda n: _run_part(life, kind, every, seed, control, n, workers), range(workers)):
            result.trials += part.trials
            result.findings += part.findings
    return result


def _run_part(life: str, kind: str, every: int, seed: int, control: str, part: int, parts: int) -> Result:
    import subprocess

    command = [sys.executable, "-m", __spec__.name if __spec__ else "tests.campaigns.interrupts"]
    command += ["--life", life, "--kind", kind, "--every", str(every), "--seed", str(seed), "--control", control]
    done = subprocess.run(
        [*command, "--part", f"{part}/{parts}"], capture_output=True, text=True, check=False, timeout=3600
    )
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


def _try_part(options: argparse.Namespace) -> Result:
    part, parts = map(int, options.part.split("/"))
    result = Result()
    _load_all(options.life)
    for number, trial in enumerate(draw(options.life, options.kind, options.every, options.seed, control=options.control)):
        if number % parts == part:
            result.trials += 1
            result.findings += [f"{trial.point}: {line}" for line in run(trial)]
    return result


def main() -> int:
    """Run the campaign; 0 if nothing was found, 1 otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--life", choices=list(LIVES), default="store")
    parser.add_argument("--kind", choices=list(KINDS), default="interrupt")
    parser.add_argument("--every", type=int, default=1, help="try each so many-th place (default: 1)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--control", choices=list(CONTROLS), default="", help="break the store on purpose")
    parser.add_argument("--part", default="", help="N/M: only that part of the trials, and a result as JSON")
    parser.add_argument("--point", default="", help="repeat one trial, as a finding names it")
    options = parser.parse_args()
    if options.point:
        life, kind, strikes, end = options.point.split(":")
        _load_all(life)
        lines = run(Trial(life, kind, tuple(map(int, strikes.split(","))), end == "close", options.control))
        print("\n".join(lines))
        return 1 if lines else 0
    if options.part:
        result = _try_part(options)
        print(json.dumps(vars(result)))
    else:
        begun = time.monotonic()
        result = campaign(options.life, options.kind, options.every, options.seed, control=options.control)
        print("\n".join(result.findings[:50]))
        print(f"{result.trials} trials, {len(result.findings)} findings, {time.monotonic() - begun:.0f} s")
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())
