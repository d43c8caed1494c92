"""Crashes during recovery: the power is cut once, the check recovers, and the power is cut again during that.

The name of such an image consists of the names of both cuts: SEED:CUT:KIND:MODEL>SEED:CUT:KIND:MODEL.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from limpet.testing.disk import Image, Model
from limpet.testing.life import Life
from limpet.testing.operations import Trace, acknowledged_before
from limpet.testing.pool import Mark
from limpet.testing.powercut import ALL_MODELS, Place, Point, Selection, check_cuts, record_in
from limpet.testing.run import run_jobs
from limpet.testing.supervisor import HungError
from limpet.testing.tree import materialise, scratch
from limpet.testing.workload import Checker, Progress, Report, Workload, require_positive


def recovery_cuts(
    workload: Workload,
    *,
    crashes: int = 100,
    seed: int = 0,
    models: Sequence[Model] = ALL_MODELS,
    samples: int = 1,
    every: int = 1,
    workers: int = 1,
    deadline_seconds: float = 60.0,
    progress: Progress | None = None,
) -> Report:
    """Cut the power again at every operation of the recovery from `crashes` randomly chosen power cuts.

    The recovery is what the workload's check does in the directory; each `every`-th cut within it is tried. Raises what
    power_cuts raises.
    """
    require_positive(crashes=crashes, every=every, workers=workers)
    selection = Selection(seed, models, samples)
    with scratch() as directory:
        trace = record_in(workload, f"{directory}/0", deadline_seconds)
        points = _choose(trace, selection, crashes)

        test = _RecoveryTest(workload, trace, selection, every, deadline_seconds)

        def worker(index: int) -> Callable[[Point, Mark], Iterator[Report]]:
            images = selection.images(trace)
            place = f"{directory}/{index}"
            return lambda point, mark: test.crash_again(point, images[point.model].one(point), place, mark)

        return run_jobs(
            worker,
            points,
            counted=Report(images=1),
            workers=workers,
            deadline_seconds=deadline_seconds,
            progress=progress,
        )


def _choose(trace: Trace, selection: Selection, crashes: int) -> list[Point]:
    rng = random.Random(f"{selection.seed}:recovery")  # noqa: S311 - repeatable by its seed
    cuts = sorted(rng.choices(range(1, len(trace.operations) + 1), k=crashes))
    images = selection.images(trace)
    return [rng.choice(images[rng.choice(selection.models)].points(cut)) for cut in cuts]


def record_recovery(
    workload: Workload, place: str, acknowledged: Sequence[bytes], deadline_seconds: float
) -> tuple[Trace, str]:
    """Return the trace of a check in `place`, and the last line of the exception it raised, if any."""
    with Life(
        lambda directory, _: workload.check(directory, acknowledged), place, deadline_seconds=deadline_seconds
    ) as life:
        for _ in life:
            pass
        failure = life.failure().strip().rpartition("\n")[2] or f"status {life.status}"
        return life.trace, failure if life.status else ""


@dataclass(frozen=True)
class _RecoveryTest:
    workload: Workload
    trace: Trace
    selection: Selection
    every: int
    deadline_seconds: float

    def crash_again(self, point: Point, image: Image, place: str, mark: Mark) -> Iterator[Report]:
        """Recover from the image, record that, and check every image that a cut during it can leave."""
        checker = Checker(self.workload)
        acknowledged = acknowledged_before(self.trace.operations, point.cut)
        mark(str(point))
        materialise(image, place)
        try:
            recovery, failure = record_recovery(self.workload, place, acknowledged, self.deadline_seconds)
        except HungError as error:
            checker.add(str(point), "other", str(error))
            yield checker.report(images=1)
            return
        if failure:  # its kind is lost with the recorded process: check again, here
            materialise(image, place)
            checker.check(str(point), place, acknowledged)
        found = checker.report(images=1)
        if failure and found.clean:
            checker.add(str(point), "other", failure)
            found += checker.report()
        yield found
        images = self.selection.images(recovery)
        cuts = range(point.cut % self.every, len(recovery.operations) + 1, self.every)
        yield from check_cuts(checker, recovery, images, cuts, Place(place, mark, f"{point}>", acknowledged))
