"""Kill points: the workload is killed at every operation on its files, and what it leaves is checked.

There are two ways. `kill_points` runs one life and copies the directory at every operation: this is what a SIGKILL
leaves, because the kernel keeps what was written. `true_kills` runs and kills one life for each point, which takes ten
times as long but includes what a copy cannot show: locks, shared memory, other processes.

A point is named snapshot:WHEN:N or kill:WHEN:N: before, after, or half-way through the N-th operation (half of a
write's bytes are written).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Literal, NamedTuple, get_args

from limpet.schema.errors import InvalidInputError
from limpet.testing.disk import SECTOR
from limpet.testing.life import Life, LifeFailedError, NotReachedError, Step, require_success
from limpet.testing.operations import Write
from limpet.testing.pool import Mark
from limpet.testing.run import run_jobs
from limpet.testing.supervisor import HungError
from limpet.testing.tree import copy, empty, scratch
from limpet.testing.workload import Checker, NothingToTestError, Progress, Report, Workload, require_positive

When = Literal["before", "half", "after"]
Way = Literal["snapshot", "kill"]
_TRIES = 5


class KillPoint(NamedTuple):
    """The name of a kill point. Operations are counted from 0."""

    way: Way
    when: When
    number: int

    def __str__(self) -> str:
        return f"{self.way}:{self.when}:{self.number}"

    @classmethod
    def parse(cls, text: str) -> "KillPoint":
        """Return the point named by `text`. Raises InvalidInputError."""
        way, _, rest = text.partition(":")
        when, _, number = rest.partition(":")
        for known_way in get_args(Way):
            for known_when in get_args(When):
                if (way, when) == (known_way, known_when) and number.isdigit():
                    return cls(known_way, known_when, int(number))
        raise InvalidInputError(f"{text!r}: expected snapshot:WHEN:N or kill:WHEN:N")


class _Snapshot(NamedTuple):
    point: KillPoint
    directory: str
    acknowledged: tuple[bytes, ...]


def kill_points(
    workload: Workload,
    *,
    every: int = 1,
    workers: int = 1,
    deadline_seconds: float = 60.0,
    progress: Progress | None = None,
) -> Report:
    """Check what a SIGKILL leaves before each operation of one life, half-way through each write, and at the end.

    Of the operations each `every`-th is tried. Each check gets a copy of the directory, at another path.
    Raises LifeFailedError, BlindSpotError, HungError (the life), UnsupportedError, NothingToTestError.
    """
    require_positive(every=every, workers=workers)
    with (
        scratch() as directory,
        Life(workload.live, _made(f"{directory}/live"), deadline_seconds=deadline_seconds) as life,
    ):
        report = run_jobs(
            lambda _index: lambda snapshot, mark: _check_snapshot(workload, snapshot, mark),
            _snapshots(life, directory, every),
            counted=Report(points=1),
            workers=workers,
            deadline_seconds=deadline_seconds,
            progress=progress,
        )
        require_success(life)
    if not report.points:
        raise NothingToTestError("the workload's life did nothing to the files in its directory")
    return report


def _snapshots(life: Life, directory: str, every: int) -> Iterator[_Snapshot]:
    number = 0

    def take(when: When, number: int) -> _Snapshot:
        target = f"{directory}/{when}-{number}"
        copy(life.directory, target)
        return _Snapshot(KillPoint("snapshot", when, number), target, tuple(life.acknowledged))

    for step in life:
        if number % every == 0:
            yield take("before", number)
            if _half(step):
                step.perform(_half(step))
                yield take("half", number)
                step.perform()
        number += 1
    if number:
        yield take("after", number - 1)


def _half(step: Step) -> int:
    """Return about half of the number of bytes of a write; 0 if it has no half.

    It ends at a sector boundary of the file: the kernel copies page by page, and writes each page as a whole.
    """
    if not isinstance(step.operation, Write):
        return 0
    offset, size = step.operation.offset, len(step.operation.data)
    half = -(-(offset + size // 2) // SECTOR) * SECTOR - offset
    return half if half < size else 0


def _check_snapshot(workload: Workload, snapshot: _Snapshot, mark: Mark) -> Iterator[Report]:
    checker, point = Checker(workload), str(snapshot.point)
    mark(point)
    checker.check(point, snapshot.directory, snapshot.acknowledged)
    empty(snapshot.directory)
    os.rmdir(snapshot.directory)
    yield checker.report(points=1)


def true_kills(
    workload: Workload,
    *,
    every: int = 1,
    first: int = 0,
    workers: int = 1,
    deadline_seconds: float = 60.0,
    progress: Progress | None = None,
) -> Report:
    """Kill one life before, one after and one half-way through every operation (or every k-th), and check.

    The operations before the `first`, counted from 0, are left out.

    Each life and its check use the same directory. Descendants that outlive the killed process may go on until the
    check begins; they are ended with it. Raises what kill_points raises.
    """
    require_positive(every=every, workers=workers)
    with scratch() as directory:
        halves = _count(workload, _made(f"{directory}/0"), deadline_seconds)
        points = [
            KillPoint("kill", when, number)
            for number in range(first, len(halves), every)
            for when in get_args(When)
            if when != "half" or halves[number]
        ]

        def worker(index: int) -> Callable[[KillPoint, Mark], Iterator[Report]]:
            place = f"{directory}/{index}"
            return lambda point, mark: _kill_and_check(workload, point, place, deadline_seconds, mark)

        return run_jobs(
            worker,
            points,
            counted=Report(points=1),
            workers=workers,
            deadline_seconds=deadline_seconds,
            progress=progress,
        )


def _count(workload: Workload, directory: str, deadline_seconds: float) -> list[bool]:
    """Run one life without interference; return for each of its operations whether it can be cut in half."""
    with Life(workload.live, directory, deadline_seconds=deadline_seconds) as life:
        halves = [bool(_half(step)) for step in life]
        require_success(life)
    if not halves:
        raise NothingToTestError("the workload's life did nothing to the files in its directory")
    return halves


def _kill_and_check(
    workload: Workload, point: KillPoint, place: str, deadline_seconds: float, mark: Mark
) -> Iterator[Report]:
    """Kill a life at `point` and check what it leaves in the directory `place`."""
    mark(str(point))
    checker = Checker(workload)
    try:
        acknowledged = _kill_at(workload, point, place, deadline_seconds)
    except (HungError, LifeFailedError, NotReachedError) as error:
        checker.add(str(point), "other", str(error))
    else:
        checker.check(str(point), place, acknowledged)
    yield checker.report(points=1)


def kill_at(workload: Workload, point: KillPoint, place: str, deadline_seconds: float) -> list[bytes]:
    """Run a life in the directory `place`, which is emptied first, and kill it at `point`; return what it acknowledged.

    Raises NotReachedError or LifeFailedError if it ends before that, and what Life raises.
    """
    empty(place)
    with Life(workload.live, place, deadline_seconds=deadline_seconds) as life:
        for number, step in enumerate(life):
            if number == point.number:
                if point.when != "before":
                    step.perform(_half(step) if point.when == "half" else None)
                life.kill()
                return life.acknowledged
        require_success(life)
        raise NotReachedError(f"the workload's life did not reach {point}")


def _kill_at(workload: Workload, point: KillPoint, place: str, deadline_seconds: float) -> list[bytes]:
    """Do the same as `kill_at`, and again if the life ends before that: one with threads may have a few steps less."""
    for _ in range(_TRIES - 1):
        with suppress(NotReachedError):
            return kill_at(workload, point, place, deadline_seconds)
    return kill_at(workload, point, place, deadline_seconds)


def _made(directory: str) -> str:
    empty(directory)
    return directory
