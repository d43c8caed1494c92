"""Judges what became of one hostile input: accepted, refused as promised, or a finding."""

import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from random import Random
from types import FrameType
from typing import NamedTuple, Protocol

from limpet.schema.errors import LimpetError

SECONDS = 45.0
"""One input may take so long. Generous: what hangs, hangs for good, and the machine may be busy."""
MEBIBYTES = 200
"""One input may make the process grow by so much."""
MESSAGE_CHARACTERS = 20_000


class Fate(Enum):
    """What became of an input."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    FINDING = "finding"


class Verdict(NamedTuple):
    """The fate, and for a finding what is wrong."""

    fate: Fate
    words: str = ""


class Attempt(NamedTuple):
    """One input, drawn and ready."""

    shown: str
    """What it is, for whoever reads the finding."""
    run: Callable[[], object]
    named: tuple[str, ...] = ()
    """One of these must stand in the message of a refusal."""


class World(Protocol):
    """Where inputs of one kind are tried. Made anew now and then, and for each finding."""

    def draw(self, random: Random) -> Attempt:
        """Draw the next input."""
        ...

    def inspect(self) -> str:
        """Look at the world after an input: "" if all is as promised, else what is wrong."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


class TooSlowError(BaseException):
    """The input took longer than any may; no Exception, so that nobody swallows it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooSlowError in the block after `seconds`; it breaks into system calls, too."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again and again: the first may be caught on the way
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(world: World, attempt: Attempt) -> Verdict:
    """Try one input, then look at the world. Whatever is raised by anything but a refusal is a finding."""
    with suppress(FileNotFoundError):  # a kernel without it: only what grows beyond an earlier peak is seen
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): the peak is now what there is now
    before = _peak_mebibytes()
    begun = time.monotonic()
    try:
        with time_limit(SECONDS):
            verdict = _try(attempt)
    except TooSlowError:
        return Verdict(Fate.FINDING, f"it took longer than {SECONDS:.0f} s: {_where()}")
    grown = _peak_mebibytes() - before
    if verdict.fate is not Fate.FINDING and grown > MEBIBYTES:
        verdict = Verdict(Fate.FINDING, f"the process grew by {grown} MiB")
    if verdict.fate is Fate.FINDING:
        return verdict
    try:
        with time_limit(SECONDS):
            wrong = world.inspect()
    except TooSlowError:
        wrong = f"looking at it afterwards took longer than {SECONDS:.0f} s"
    except Exception:  # noqa: BLE001  # whatever it is, it came of this input
        wrong = f"afterwards: {_where()}"
    if wrong:
        return Verdict(Fate.FINDING, f"{wrong} ({verdict.fate.value} after {time.monotonic() - begun:.1f} s)")
    return verdict


def _try(attempt: Attempt) -> Verdict:
    try:
        attempt.run()
    except LimpetError as error:
        return _judge_message(str(error), attempt.named)
    except Exception:  # noqa: BLE001  # that is what is looked for
        return Verdict(Fate.FINDING, _where())
    return Verdict(Fate.ACCEPTED)


def _judge_message(message: str, named: tuple[str, ...]) -> Verdict:
    if not message.strip():
        return Verdict(Fate.FINDING, "it was refused without a word")
    if len(message) > MESSAGE_CHARACTERS:
        return Verdict(Fate.FINDING, f"a message of {len(message)} characters")
    if named and not any(each in message for each in named):
        return Verdict(Fate.FINDING, f"the message names none of {named}: {message[:300]}")
    return Verdict(Fate.REFUSED, message)


def _where() -> str:
    """Return the exception under way, and the innermost places of ours that it came through."""
    kind, error, trace = sys.exc_info()
    assert kind is not None
    frames = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in traceback.extract_tb(trace)[-6:]]
    return f"{kind.__name__}: {str(error)[:200]} [{' > '.join(frames)}]"


def _peak_mebibytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024
