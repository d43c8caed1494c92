"""Power cuts: from one recorded life, every kind of disk that can result from a cut, each recovered and checked.

An image is named SEED:CUT:KIND:MODEL and can be made again from that name alone: the cut comes after the first CUT
operations of the trace, MODEL says how names become durable (see `disk`), and KIND says what landed:

    none, all          nothing pending, or everything, as processes saw it
    data, names        all data and no name, or all names and no data
    prefix.K           the first K writes
    drop.K, only.K     all writes but one, or only one
    subset.R           a random subset of the writes; without writes, of the names
    torn.R, page.R     sectors of 512 bytes, or pages of 4096, a random subset; files have their full size
    zeros.R            the same with most sectors missing: new ones read as zeros
    garbage.R          the same, with random bytes in some; beyond the model, so only on request
    name-prefix.K, name-drop.K, name-only.K    all data, and these of the pending names

If KIND does not say, names land at random, in the journaled model in order.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Final, NamedTuple

from limpet.schema.errors import InvalidInputError
from limpet.testing.disk import (
    GARBAGE,
    LANDED,
    MISSING,
    PAGE,
    SECTOR,
    Change,
    Disk,
    Fate,
    Image,
    Landing,
    Model,
)
from limpet.testing.life import record
from limpet.testing.nodes import VOLATILE_SUFFIXES
from limpet.testing.operations import (
    Acknowledge,
    Sync,
    SyncAll,
    SyncFailed,
    Trace,
    Truncate,
    acknowledged_before,
)
from limpet.testing.pool import Mark
from limpet.testing.run import run_jobs
from limpet.testing.tree import empty, materialise, scratch
from limpet.testing.workload import Checker, NothingToTestError, Progress, Report, Workload, require_positive

ALL_MODELS: Final = (Model.JOURNALED, Model.POSIX)
_NEWEST: Final = 5
"""How many of the pending operations, counted from the last, are dropped or kept one by one."""
_CUTS_PER_JOB: Final = 16
_IMAGES_PER_REPORT: Final = 16
"""For checks without a finding; reporting each would take a tenth of the time."""
_UNNUMBERED: Final = ("none", "all", "data", "names")


class Point(NamedTuple):
    """The name of an image."""

    seed: int
    cut: int
    kind: str
    model: Model

    def __str__(self) -> str:
        return f"{self.seed}:{self.cut}:{self.kind}:{self.model}"

    @classmethod
    def parse(cls, text: str) -> "Point":
        """Return the point named by `text`. Raises InvalidInputError."""
        try:
            seed, cut, kind, model = text.split(":")
            point = cls(int(seed), int(cut), kind, Model(model))
        except ValueError:
            raise InvalidInputError(f"{text!r}: expected SEED:CUT:KIND:MODEL") from None
        base, _, number = kind.partition(".")
        is_whole = kind == base if base in _UNNUMBERED else number.isdecimal()
        if point.cut < 0 or base not in _CHANGES or not is_whole:
            raise InvalidInputError(f"{text!r}: unknown cut or kind")
        return point


class Images:
    """The images of one trace in one model, in order of the cuts, none repeated.

    Images that differ only in volatile content count as one, which is tried with one such content. Images of the same
    trace in another model with the same `seen` are not repeated either.
    """

    def __init__(
        self,
        trace: Trace,
        model: Model,
        *,
        seed: int = 0,
        samples: int = 4,
        garbage: bool = False,
        fate: Fate = Fate.DROPPED,
        seen: set[int] | None = None,
    ) -> None:
        self._trace, self._model, self._seed, self._fate = trace, model, seed, fate
        self._samples, self._garbage = samples, garbage
        self._seen: set[int] = set() if seen is None else seen
        self._rewind()

    def at(self, cut: int) -> Iterator[tuple[Point, Image]]:
        """Yield the new images among those that a cut after the first `cut` operations can leave."""
        for point in self.points(cut):
            rng, landing = self._choose(point)
            if self._is_known(landing):
                continue
            image = self._disk.image(landing, rng)
            key = hash((self._acknowledged, *(file for file in image if not file.path.endswith(VOLATILE_SUFFIXES))))
            if key not in self._seen:
                self._seen.add(key)
                yield point, image

    def points(self, cut: int) -> list[Point]:
        """Return the names of all images of this cut; some may be the same image."""
        self._move(cut)
        return [Point(self._seed, cut, kind, self._model) for kind in self._kinds()]

    def one(self, point: Point) -> Image:
        """Return the image with this name. Raises InvalidInputError if the trace has no such cut."""
        if point.cut > len(self._trace.operations):
            raise InvalidInputError(f"{point} is beyond the life's {len(self._trace.operations)} operations")
        self._move(point.cut)
        rng, landing = self._choose(point)
        return self._disk.image(landing, rng)

    def _rewind(self) -> None:
        self._disk = Disk(self._trace.start, self._model, fate=self._fate, seed=self._seed)
        self._position = self._acknowledged = self._flushes = 0

    def _move(self, cut: int) -> None:
        if cut < self._position:
            self._rewind()
        for operation in self._trace.operations[self._position : cut]:
            self._disk.step(operation)
            self._acknowledged += isinstance(operation, Acknowledge)
            self._flushes += isinstance(operation, Sync | SyncFailed | SyncAll)
        self._position = cut

    def _kinds(self) -> Iterator[str]:
        changes, namings = len(self._disk.changes), len(self._disk.namings)
        yield from ("none", "all")
        if changes and namings:
            yield from ("data", "names")
        if changes:
            newest = range(max(0, changes - _NEWEST), changes)
            yield from (f"{kind}.{k}" for kind in ("prefix", "drop", "only") for k in newest if changes > 1)
            random_kinds = ("subset", "torn", "page", *(("garbage",) if self._garbage else ()))
            yield from (f"{kind}.{k}" for kind in random_kinds for k in range(self._samples))
            yield "zeros.0"
        if namings > 1 and not changes and self._model is Model.POSIX:
            yield from (f"subset.{k}" for k in range(self._samples))
        if namings > 1:
            newest = range(max(0, namings - _NEWEST), namings)
            kinds = ("name-prefix", "name-drop", "name-only") if self._model is Model.POSIX else ("name-prefix",)
            yield from (f"{kind}.{k}" for kind in kinds for k in newest)

    def _choose(self, point: Point) -> tuple[random.Random, Landing]:
        rng = random.Random(str(point))  # noqa: S311 - repeatable by its name
        return rng, _landing(point, self._disk, rng)

    def _is_known(self, landing: Landing) -> bool:
        """Return whether the same pending operations have landed on the same disk before: the image is not new then.

        Most are recognized without being made: only a flush, done or failed, changes what they land on. If all names
        are durable, the models have the same disk.
        """
        if any(isinstance(lands, bytes) and GARBAGE in lands for lands in landing.changes):
            return False
        changes = tuple(
            (id(change), lands) for change, lands in zip(self._disk.changes, landing.changes, strict=True) if lands
        )
        namings = tuple(map(id, compress(self._disk.namings, landing.namings)))
        model = self._model if self._disk.namings else None
        key = hash((self._flushes, self._acknowledged, changes, landing.unit, namings, model))
        is_known = key in self._seen
        self._seen.add(key)
        return is_known


def _some(count: int, rng: random.Random) -> list[bool]:
    return [rng.random() < 0.5 for _ in range(count)]


def _one(count: int, k: int, *, kept: bool) -> list[bool]:
    return [(index == k) is kept for index in range(count)]


def _first(count: int, k: int) -> list[bool]:
    return [index < k for index in range(count)]


_Choice = Callable[[int, int, random.Random], list[bool]]  # count, the kind's number, random source: which of them land


def _none(count: int, _k: int, _rng: random.Random) -> list[bool]:
    return [False] * count


def _all(count: int, _k: int, _rng: random.Random) -> list[bool]:
    return [True] * count


_CHANGES: Final[dict[str, _Choice]] = {
    "none": _none,
    "all": _all,
    "data": _all,
    "names": _none,
    "prefix": lambda count, k, _: _first(count, k),
    "drop": lambda count, k, _: _one(count, k, kept=False),
    "only": lambda count, k, _: _one(count, k, kept=True),
    "subset": lambda count, _, rng: _some(count, rng),
    "torn": _all,
    "page": _all,
    "zeros": _all,
    "garbage": _all,
    "name-prefix": _all,
    "name-drop": _all,
    "name-only": _all,
}
_NAMINGS: Final[dict[str, _Choice]] = {
    "none": _none,
    "all": _all,
    "data": _none,
    "names": _all,
    "name-prefix": lambda count, k, _: _first(count, k),
    "name-drop": lambda count, k, _: _one(count, k, kept=False),
    "name-only": lambda count, k, _: _one(count, k, kept=True),
}
_AT_RANDOM: Final[dict[Model, _Choice]] = {
    Model.JOURNALED: lambda count, _, rng: _first(count, rng.randint(0, count)),
    Model.POSIX: lambda count, _, rng: _some(count, rng),
}
_PARTS: Final = {  # unit, chance that it lands, chance that it is garbage
    "torn": (SECTOR, 0.5, 0.0),
    "page": (PAGE, 0.5, 0.0),
    "zeros": (SECTOR, 0.1, 0.0),
    "garbage": (SECTOR, 0.5, 0.35),
}


def _landing(point: Point, disk: Disk, rng: random.Random) -> Landing:
    base, _, number = point.kind.partition(".")
    k = int(number or 0)
    changes: Sequence[bool | bytes] = _CHANGES[base](len(disk.changes), k, rng)
    namings = _NAMINGS.get(base, _AT_RANDOM[point.model])(len(disk.namings), k, rng)
    unit, chance, garbage = _PARTS.get(base, (0, 0.0, 0.0))
    if unit:
        changes = [_in_parts(change, unit, chance, garbage, rng) for change in disk.changes]
        if all(lands is True for lands in changes):
            unit = 0
    return Landing(changes, namings, unit)


def _in_parts(change: Change, unit: int, chance: float, garbage: float, rng: random.Random) -> bool | bytes:
    """Choose for each part of a change whether it lands; return True if all do."""
    if isinstance(change, Truncate):
        return True
    count = -(-(change.offset + len(change.data)) // unit) - change.offset // unit
    draws = (rng.random() for _ in range(count))
    fates = bytes(LANDED if draw < chance else GARBAGE if draw < chance + garbage else MISSING for draw in draws)
    return fates.count(LANDED) == count or fates


class Selection(NamedTuple):
    """Which images of a trace are made."""

    seed: int = 0
    models: Sequence[Model] = ALL_MODELS
    samples: int = 4
    garbage: bool = False

    def images(self, trace: Trace, fate: Fate = Fate.DROPPED) -> dict[Model, Images]:
        """Return the images of a trace in each model, none repeated in another."""
        seen: set[int] = set()
        return {
            model: Images(
                trace, model, seed=self.seed, samples=self.samples, garbage=self.garbage, fate=fate, seen=seen
            )
            for model in self.models
        }


def power_cuts(
    workload: Workload,
    *,
    seed: int = 0,
    models: Sequence[Model] = ALL_MODELS,
    samples: int = 4,
    garbage: bool = False,
    every: int = 1,
    workers: int = 1,
    deadline_seconds: float = 60.0,
    progress: Progress | None = None,
) -> Report:
    """Record the workload's life once, cut the power after every operation (or every k-th), and check every image.

    `samples` is the number of images of each random kind tried at each cut. With one worker an image is at the same
    path as the life was. `deadline_seconds` is for the life, and for each check.
    Raises LifeFailedError, BlindSpotError, HungError (the life), UnsupportedError, NothingToTestError.
    """
    require_positive(every=every, workers=workers)
    selection = Selection(seed, models, samples, garbage)
    with scratch() as directory:
        trace = record_in(workload, f"{directory}/0", deadline_seconds)
        cuts = range(seed % every, len(trace.operations) + 1, every)
        jobs = [cuts[first : first + _CUTS_PER_JOB] for first in range(0, len(cuts), _CUTS_PER_JOB)]

        def worker(index: int) -> Callable[[range, Mark], Iterator[Report]]:
            def check(cuts: range, mark: Mark) -> Iterator[Report]:
                images = selection.images(trace)
                _pass_by(images, cuts.start - every)
                return check_cuts(Checker(workload), trace, images, cuts, Place(f"{directory}/{index}", mark))

            return check

        return run_jobs(
            worker,
            jobs,
            counted=Report(images=1),
            workers=workers,
            deadline_seconds=deadline_seconds,
            progress=progress,
        )


def record_in(workload: Workload, place: str, deadline_seconds: float) -> Trace:
    """Return the trace of the workload's life in the new directory `place`.

    Raises what `record` raises, and NothingToTestError.
    """
    empty(place)
    trace = record(workload.live, place, deadline_seconds=deadline_seconds)
    if not trace.operations:
        raise NothingToTestError("the workload's life changed no file in its directory, and acknowledged nothing")
    return trace


class Place(NamedTuple):
    """Where images are checked, and their origin."""

    directory: str
    mark: Mark
    prefix: str = ""
    """The prefix of the images' names."""
    acknowledged: Sequence[bytes] = ()
    """What had been acknowledged before the trace began."""


def _pass_by(images: Mapping[Model, Images], cut: int) -> None:
    """Skip the images of a cut that another job checks; the next cut may leave the same images."""
    if cut >= 0:
        for one in images.values():
            for _ in one.at(cut):
                pass


def check_cuts(
    checker: Checker, trace: Trace, images: Mapping[Model, Images], cuts: Iterable[int], place: Place
) -> Iterator[Report]:
    """Check every new image of these cuts, and yield each finding at once, because the next check may not end."""
    tried = 0
    for cut in cuts:
        acknowledged = [*place.acknowledged, *acknowledged_before(trace.operations, cut)]
        for point, image in (found for one in images.values() for found in one.at(cut)):
            name = f"{place.prefix}{point}"
            place.mark(name)
            materialise(image, place.directory)
            checker.check(name, place.directory, acknowledged)
            tried += 1
            if checker.has_found or tried == _IMAGES_PER_REPORT:
                yield checker.report(images=tried)
                tried = 0
    if tried:
        yield checker.report(images=tried)
