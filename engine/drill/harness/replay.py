"""Repeats a single point: the state named by a finding is made again, kept, and checked."""

from collections.abc import Iterator, Mapping, Sequence

from limpet.testing.disk import Fate
from limpet.testing.faults import Fault, live_with
from limpet.testing.kills import KillPoint, kill_at
from limpet.testing.life import NotReachedError
from limpet.testing.operations import Trace, acknowledged_before
from limpet.testing.pool import Mark
from limpet.testing.powercut import Images, Point, record_in
from limpet.testing.recovery import record_recovery
from limpet.testing.refusals import CallFault, CallTrial
from limpet.testing.run import run_jobs
from limpet.testing.tree import copy, empty, materialise
from limpet.testing.workload import Checker, Report, Workload


def replay(
    workload: Workload,
    point: str,
    directory: str,
    *,
    roles: Mapping[str, str] | None = None,
    deadline_seconds: float = 60.0,
) -> Report:
    """Make the state named by `point`, a Finding's name, and check it. `roles` are those that `call_faults` was given.

    `directory` is created or emptied, and then holds two trees: `found` is the state as the crash left it, `checked`
    what the check made of it. Raises InvalidInputError if the name is invalid or this life does not reach the point,
    and what that kind of test raises.
    """

    def check(name: str, mark: Mark) -> Iterator[Report]:
        mark(name)
        place = f"{directory}/checked"
        acknowledged = _reach(workload, name, place, deadline_seconds)
        copy(place, f"{directory}/found")
        checker = Checker(workload)
        checker.check(name, place, acknowledged)
        yield checker.report(points=1)

    def refuse(name: str, mark: Mark) -> Iterator[Report]:
        trial = CallTrial(workload, roles, deadline_seconds)
        for report in trial.check(CallFault.parse(name), f"{directory}/checked", mark, keep=f"{directory}/found"):
            if report.unreached:
                raise NotReachedError(f"the workload's life did not reach {name}")
            yield report

    is_call = point.startswith("call:")
    CallFault.parse(point) if is_call else _parse(point)
    empty(directory)
    return run_jobs(
        lambda _: refuse if is_call else check,
        [point],
        counted=Report(points=1),
        workers=1,
        deadline_seconds=deadline_seconds,
        progress=None,
    )


def _parse(name: str) -> tuple[KillPoint | Fault | Point, Point | None]:
    """Return the parts of the name. Raises InvalidInputError."""
    outer, _, inner = name.partition(">")
    way = outer.partition(":")[0]
    first: KillPoint | Fault | Point
    if way == "fault":
        first = Fault.parse(outer)
    else:
        first = KillPoint.parse(outer) if way in {"kill", "snapshot"} else Point.parse(outer)
    return first, Point.parse(inner) if inner else None


def _reach(workload: Workload, name: str, place: str, deadline_seconds: float) -> Sequence[bytes]:
    """Bring the directory `place` into the state named by `name`; return what was acknowledged by then."""
    first, second = _parse(name)
    if isinstance(first, KillPoint):
        return kill_at(workload, first, place, deadline_seconds)
    if isinstance(first, Fault):
        trace = live_with(workload, first, place, deadline_seconds).trace
        return trace.acknowledged if second is None else _make(trace, second, place, first.fate or Fate.DROPPED)
    trace = record_in(workload, place, deadline_seconds)
    acknowledged = _make(trace, first, place)
    if second is None:
        return acknowledged
    recovery, _ = record_recovery(workload, place, acknowledged, deadline_seconds)
    return [*acknowledged, *_make(recovery, second, place)]


def _make(trace: Trace, point: Point, place: str, fate: Fate = Fate.DROPPED) -> list[bytes]:
    materialise(Images(trace, point.model, seed=point.seed, fate=fate).one(point), place)
    return acknowledged_before(trace.operations, point.cut)
