"""The timeline of one container: its state changes, and whether its present state could be verified."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from limpet.engine.cli.output import recorded_state
from limpet.engine.cli.timeline import Lane, Line, Mark, Phase, Sign, Span, Stroke, Timeline
from limpet.schema.history import Transition
from limpet.schema.status import EXIT_CODE_UNKNOWN, ContainerState, Reason, Status

_PHASES = {
    ContainerState.CREATED: Phase.CREATED,
    ContainerState.RUNNING: Phase.RAN,
    ContainerState.EXITED: Phase.RECORDED,
    ContainerState.UNKNOWN: Phase.RECORDED,  # the CRI has no state for one that was never created
}
_UNSEEN = frozenset({Reason.UNKNOWN, Reason.REBOOTED, Reason.DECLARED_GONE})
_MARGIN = 0.05
"""What is shown beyond the last change, as a share of the time before, if the container has ended."""
_LONGEST_REASON = 24


def make_history_timeline(container_id: str, transitions: Sequence[Transition], status: Status, now: int) -> Timeline:
    """Return what the transitions of a container show, of which there is at least one; `status` is that of `now`."""
    start, last = transitions[0].at, transitions[-1].at
    has_ended = status.state is ContainerState.EXITED
    end = last + max(int((last - start) * _MARGIN), 1) if has_ended else max(now, last + 1)
    edges = [*((one.at, one) for one in transitions), (end, transitions[-1])]
    spans = [Span(_choose_phase(one, later), at, until) for (at, one), (until, later) in pairwise(edges)]
    if status.unknown:
        spans[-1] = spans[-1]._replace(phase=Phase.UNKNOWN)
    first = "" if transitions[0].number == 1 else f"Changes 1 to {transitions[0].number - 1} are no longer kept. "
    doubt = status.message if status.unknown else ""
    return Timeline(
        title=f"container {container_id}: {_name(transitions[-1], status)}",
        start=start,
        end=end,
        lanes=(Lane(container_id[:12], tuple(spans), tuple(_find_marks(transitions, status, end))),),
        lines=tuple(Line(Stroke.CHANGE, one.at, _describe(one)) for one in transitions),
        note=(first + doubt).strip(),
    )


def _choose_phase(one: Transition, later: Transition) -> Phase:
    ran = one.state is ContainerState.RUNNING
    return Phase.UNKNOWN if ran and later is not one and _is_unseen(later) else _PHASES[one.state]


def _is_unseen(one: Transition) -> bool:
    ended = one.state is ContainerState.EXITED
    return ended and one.exit_code == EXIT_CODE_UNKNOWN and one.reason in _UNSEEN


def _find_marks(transitions: Sequence[Transition], status: Status, end: int) -> Iterator[Mark]:
    for one in transitions:
        if _is_unseen(one):
            yield Mark(Sign.UNSEEN, one.at, "?")
        elif one.state is ContainerState.EXITED:
            yield Mark(Sign.FAILED if one.exit_code else Sign.COMPLETED, one.at, str(one.exit_code))
    if status.unknown:
        yield Mark(Sign.UNKNOWN_NOW, end, status.reason)


def _describe(one: Transition) -> str:
    name = recorded_state(one.state)
    return f"{one.number} {name} {one.reason[:_LONGEST_REASON]}".strip()


def _name(last: Transition, status: Status) -> str:
    return "UNKNOWN" if status.unknown else recorded_state(last.state)
