"""Failing disks: each operation is made to fail once, the life continues, and what it leaves is checked.

A fault is named fault:KIND:N:ERROR: the N-th operation of this kind (from 0) gets this errno, or SHORT, a write of
half its bytes. ERROR+ is permanent: a disk that no longer flushes, is full, or has become read-only. After the life
its directory is checked as it is, and then as power cuts after the fault leave it. The name of such an image consists
of the fault's, how much data had landed if a flush failed, and the image's:
fault:flush:3:EIO:partial>SEED:CUT:KIND:MODEL.

The workload decides how to handle the error: it may raise, retry or go on. It must not acknowledge what does not
survive, and must not die by a signal.
"""

import errno
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from limpet.schema.errors import InvalidInputError
from limpet.testing.disk import Fate, Model
from limpet.testing.life import Life, LifeFailedError, NotReachedError, Step, require_success
from limpet.testing.operations import (
    Chmod,
    Create,
    Link,
    MakeDirectory,
    Open,
    Rename,
    Symlink,
    Sync,
    SyncAll,
    SyncFailed,
    Trace,
    Truncate,
    Unlink,
    Write,
)
from limpet.testing.pool import Mark
from limpet.testing.powercut import ALL_MODELS, Place, Selection, check_cuts
from limpet.testing.run import run_jobs
from limpet.testing.supervisor import HungError
from limpet.testing.tree import empty, scratch
from limpet.testing.workload import Checker, NothingToTestError, Progress, Report, Workload, require_positive

SHORT: Final = "SHORT"
FAILURES: Final[Mapping[str, Sequence[str]]] = {
    "write": ("EIO", "ENOSPC", "ENOSPC+", "EDQUOT", "EROFS+", SHORT),
    "flush": ("EIO", "ENOSPC", "EIO+"),
    "open": ("EIO", "EMFILE", "ENOSPC", "EROFS+"),
    "truncate": ("EIO", "ENOSPC"),
    "rename": ("EIO", "ENOSPC", "EROFS+"),
    "unlink": ("EIO", "EROFS+"),
    "mkdir": ("EIO", "ENOSPC", "EDQUOT"),
    "link": ("EIO", "ENOSPC"),
    "symlink": ("EIO", "ENOSPC"),
    "chmod": ("EIO", "EROFS+"),
}
"""The errors tried for each kind of operation: those that Linux file systems return."""

_KINDS: Final[dict[type, str]] = {
    Write: "write",
    Sync: "flush",
    SyncAll: "flush",
    Create: "open",
    Open: "open",
    Truncate: "truncate",
    Rename: "rename",
    Unlink: "unlink",
    MakeDirectory: "mkdir",
    Link: "link",
    Symlink: "symlink",
    Chmod: "chmod",
}

_REACH: Final = {
    "EIO+": {"flush"},
    "ENOSPC+": {"write", "open", "mkdir", "link", "symlink"},
    "EROFS+": set(FAILURES) - {"flush"},
}
"""The operations that a permanent error makes fail from then on."""


class Fault(NamedTuple):
    """The name of a fault, and after a failed flush how much of the data had landed."""

    kind: str
    number: int
    error: str
    fate: Fate | None = None

    def __str__(self) -> str:
        return f"fault:{self.kind}:{self.number}:{self.error}" + (f":{self.fate}" if self.fate else "")

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Return the fault named by `text`. Raises InvalidInputError."""
        try:
            _, kind, number, error, *fate = text.split(":")
            fault = cls(kind, int(number), error, Fate(fate[0]) if fate else None)
        except ValueError:
            raise InvalidInputError(f"{text!r}: expected fault:KIND:N:ERROR") from None
        known = error == SHORT or error in _REACH or hasattr(errno, error)
        if kind not in FAILURES or not known or fault.number < 0:
            raise InvalidInputError(f"{text!r}: unknown kind of operation or error")
        return fault


class _Injector:
    """Lets the steps of one life fail according to a fault."""

    def __init__(self, fault: Fault) -> None:
        self._fault, self._count = fault, 0
        self.struck_at: int | None = None
        """How many operations had happened when the fault struck."""

    def treat(self, step: Step, happened: int) -> None:
        kind = _KINDS.get(type(step.operation))
        if kind == self._fault.kind:
            self._count += 1
            if self._count == self._fault.number + 1:
                self.struck_at = happened
                self._strike(step)
                return
        if self.struck_at is not None and kind in _REACH.get(self._fault.error, ()):
            self._strike(step)

    def _strike(self, step: Step) -> None:
        if self._fault.error != SHORT:
            step.fail(getattr(errno, self._fault.error.rstrip("+")))
        elif isinstance(step.operation, Write):
            step.perform(len(step.operation.data) // 2)


class Aftermath(NamedTuple):
    """What a life with a fault left: its trace, how it ended, and where in the trace the fault struck."""

    trace: Trace
    status: int | None
    struck_at: int


def fault_points(
    workload: Workload,
    *,
    failures: Mapping[str, Sequence[str]] = FAILURES,
    seed: int = 0,
    cuts: int = 3,
    models: Sequence[Model] = ALL_MODELS,
    samples: int = 1,
    every: int = 1,
    workers: int = 1,
    deadline_seconds: float = 60.0,
    progress: Progress | None = None,
) -> Report:
    """Let each operation of a life (or every k-th) fail with each error, and check what every such life leaves.

    After each, the power is cut at the fault, at the end, and at `cuts` other moments in between.
    Raises LifeFailedError, BlindSpotError, HungError (the life without a fault), UnsupportedError,
    NothingToTestError, and InvalidInputError if `failures` are invalid.
    """
    require_positive(every=every, workers=workers)
    for kind, errors in failures.items():
        for error in errors:
            Fault.parse(str(Fault(kind, 0, error)))
    test = _FaultTest(workload, Selection(seed, models, samples), cuts, deadline_seconds)
    with scratch() as directory:
        faults = _faults(workload, failures, f"{directory}/0", deadline_seconds)[seed % every :: every]

        def worker(index: int) -> Callable[[Fault, Mark], Iterator[Report]]:
            return lambda fault, mark: test.check(fault, f"{directory}/{index}", mark)

        return run_jobs(
            worker,
            faults,
            counted=Report(faults=1),
            workers=workers,
            deadline_seconds=deadline_seconds,
            progress=progress,
        )


def _faults(
    workload: Workload, failures: Mapping[str, Sequence[str]], place: str, deadline_seconds: float
) -> list[Fault]:
    """Run one life without a fault, and return all faults that are possible in it."""
    empty(place)
    with Life(workload.live, place, deadline_seconds=deadline_seconds) as life:
        counts = Counter(_KINDS[type(step.operation)] for step in life if type(step.operation) in _KINDS)
        require_success(life)
    faults = [
        Fault(kind, number, error)
        for kind, errors in failures.items()
        for number in range(counts[kind])
        for error in errors
    ]
    if not faults:
        raise NothingToTestError("the workload's life has no file operations that could fail")
    return faults


def live_with(workload: Workload, fault: Fault, place: str, deadline_seconds: float) -> Aftermath:
    """Run a life with this fault in the directory `place`, which is emptied first.

    Raises NotReachedError or LifeFailedError if it ends before the fault strikes, and what Life raises.
    """
    empty(place)
    injector = _Injector(fault)
    with Life(workload.live, place, deadline_seconds=deadline_seconds) as life:
        for step in life:
            injector.treat(step, len(life.operations))
        if injector.struck_at is None:
            require_success(life)
            raise NotReachedError(f"the workload's life did not reach {fault}")
        return Aftermath(life.trace, life.status, injector.struck_at)


@dataclass(frozen=True)
class _FaultTest:
    workload: Workload
    selection: Selection
    cuts: int
    deadline_seconds: float

    def check(self, fault: Fault, place: str, mark: Mark) -> Iterator[Report]:
        """Run a life with this fault, and check what it leaves, also after power cuts."""
        checker = Checker(self.workload)
        mark(str(fault))
        try:
            aftermath = live_with(self.workload, fault, place, self.deadline_seconds)
        except (HungError, LifeFailedError, NotReachedError) as error:
            checker.add(str(fault), "other", str(error))
            yield checker.report(faults=1)
            return
        if aftermath.status is not None and aftermath.status < 0:
            checker.add(str(fault), "other", f"the workload was killed by signal {-aftermath.status}")
        checker.check(str(fault), place, aftermath.trace.acknowledged)
        yield checker.report(faults=1)
        cuts = self._choose(fault, aftermath.struck_at, len(aftermath.trace.operations))
        yield from self._cut(checker, fault, aftermath.trace, cuts, Place(place, mark))

    def _cut(self, checker: Checker, fault: Fault, trace: Trace, cuts: list[int], place: Place) -> Iterator[Report]:
        failed = any(isinstance(operation, SyncFailed) for operation in trace.operations)
        for fate in Fate if failed else (Fate.DROPPED,):
            named = place._replace(prefix=f"{fault._replace(fate=fate if failed else None)}>")
            yield from check_cuts(checker, trace, self.selection.images(trace, fate), cuts, named)

    def _choose(self, fault: Fault, struck_at: int, end: int) -> list[int]:
        rng = random.Random(f"{self.selection.seed}:{fault}")  # noqa: S311 - repeatable by the fault's name
        between = range(struck_at + 2, end)
        return sorted({min(struck_at + 1, end), end, *rng.sample(between, min(self.cuts, len(between)))})
