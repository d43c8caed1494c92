"""The timeline of a drill: what happened, as lanes and lines."""

from collections.abc import Iterator, Sequence

from limpet.engine.cli.timeline import Lane, Line, Mark, Phase, Sign, Span, Stroke, Timeline, choose_lanes
from limpet.engine.drill import DrillReport, Happened, Happening
from limpet.schema.status import EXIT_CODE_UNKNOWN, ContainerState, Reason, Status

_SAID = {
    ContainerState.CREATED: Sign.SAID_CREATED,
    ContainerState.RUNNING: Sign.SAID_RUNNING,
    ContainerState.EXITED: Sign.SAID_EXITED,
    ContainerState.UNKNOWN: Sign.SAID_NEW,  # the CRI has no state for one whose bundle was never made
}
Outage = tuple[int, int]
_KILLS = frozenset({Happened.ENGINE_KILLED, Happened.RECOVERY_KILLED})
_KEEPERS = {"all": "all keepers"}
_UNSEEN = frozenset({Reason.UNKNOWN, Reason.REBOOTED})
_UNSEEN_REPLACEMENT = "replace unseen"
"""All keepers are killed before."""
_DISTURBED = {
    "kill": "killed",
    "replace": "killed",
    _UNSEEN_REPLACEMENT: "killed",
    "remove bundle": "bundle removed",
    "halve bundle": "config.json removed",
    "swap bundle": "bundle replaced",
}
_FALSE, _UNKNOWN, _RAN_ON, _SURVIVED, _OTHER = 4, 3, 2, 1, 0
"""How much there is to see in a lane."""


def make_drill_timeline(happenings: Sequence[Happening], report: DrillReport) -> Timeline:
    """Return what a drill's entries show; there is at least one."""
    start, end = happenings[0].at, happenings[-1].at
    outages = tuple(_find_outages(happenings))
    ranked = [_make_lane(key, own, outages, end) for key, own in _sort_by_container(happenings).items()]
    lanes = choose_lanes(ranked)
    left_out = len(ranked) - len(lanes)
    note = f"{left_out} of {len(ranked)} containers left out: they were less eventful, or alike. " if left_out else ""
    faults = len(report.failures)
    verdict = "every report was true" if not faults else f"{faults} FAULT{'S' if faults > 1 else ''}"
    return Timeline(
        title=f"{report.repeat}: {report.kills} kills, {report.containers} containers, {verdict}",
        start=start,
        end=end,
        lanes=lanes,
        lines=(*_draw_kills(happenings), *_draw_other_lines(happenings, {lane.name for lane in lanes})),
        outages=outages,
        note=note + "A bar is what the engine has acknowledged; the drill compared it with what it saw itself.",
    )


def _sort_by_container(happenings: Sequence[Happening]) -> dict[str, list[Happening]]:
    own: dict[str, list[Happening]] = {}
    for one in happenings:
        if one.status is not None:
            own.setdefault(one.container, []).append(one)
        elif one.container in own:  # else it is no container, such as a group of them
            own[one.container].append(one)
    return own


def _make_lane(key: str, own: Sequence[Happening], outages: Sequence[Outage], end: int) -> tuple[int, Lane]:
    """Return one container's lane, and how much there is to see in it."""
    gone = next((one.at for one in own if one.kind is Happened.GONE), end)
    told = [(_date(one, outages), one.status) for one in own if one.status is not None]
    doubts = list(_find_doubts(told, outages, gone))
    spans = [*_cut_life(told, outages, gone), *doubts]
    marks = tuple(_find_marks(told[-1][1], own))
    lane = Lane(key, tuple(span for span in spans if span.end > span.start), marks)
    return _weigh(lane, {one.kind for one in own}), lane


def _date(one: Happening, outages: Sequence[Outage]) -> int:
    """Return when a statement was made: what a killed engine had said before is read only after the kill."""
    if one.kind is not Happened.SEEN:
        return one.at
    return next((start for start, end in outages if start <= one.at < end), one.at)


def _weigh(lane: Lane, kinds: set[Happened]) -> int:
    if Happened.FAULT in kinds:
        return _FALSE
    if any(span.phase is Phase.UNKNOWN for span in lane.spans):
        return _UNKNOWN
    if any(mark.sign is Sign.SAID_RUNNING for mark in lane.marks):
        return _RAN_ON
    return _SURVIVED if Happened.SAID in kinds else _OTHER


def _cut_life(told: Sequence[tuple[int, Status]], outages: Sequence[Outage], gone: int) -> Iterator[Span]:
    (first, _), (_, last) = told[0], told[-1]
    ended = last.finished_at or gone
    if not first >= last.created_at > 0:
        yield Span(Phase.RECORDED, first, last.created_at or gone)
    if last.created_at:
        yield Span(Phase.CREATED, last.created_at, last.started_at or ended)
    if last.started_at:
        # Of an end that nobody saw it is known only when it was last known to run, and when that was over.
        known = ended
        if _is_unseen(last):
            known = max((at for at, status in told if status.state is ContainerState.RUNNING), default=last.started_at)
            known = max(known, _find_last_kill(outages, ended))
        yield Span(Phase.RAN, last.started_at, min(known, ended))
        yield Span(Phase.UNKNOWN, known, ended)
    if last.finished_at:
        yield Span(Phase.RECORDED, ended, gone)


def _find_last_kill(outages: Sequence[Outage], at: int) -> int:
    """Return when the newest outage before `at` began, 0 if there is none."""
    return max((start for start, _ in outages if start <= at), default=0)


def _is_unseen(status: Status) -> bool:
    return bool(status.finished_at) and status.exit_code == EXIT_CODE_UNKNOWN and status.reason in _UNSEEN


def _find_doubts(told: Sequence[tuple[int, Status]], outages: Sequence[Outage], gone: int) -> Iterator[Span]:
    """Return when nobody could say what was so: from the kill after the last certain statement until the next one."""
    certain = since = 0
    for at, status in told:
        if status.unknown and not since:
            kill = _find_last_kill(outages, at)
            since = kill if kill >= certain else at
        elif not status.unknown:
            if since:
                yield Span(Phase.UNKNOWN, since, at)
            certain, since = at, 0
    if since:
        yield Span(Phase.UNKNOWN, since, gone)


def _find_marks(last: Status, own: Sequence[Happening]) -> Iterator[Mark]:
    if _is_unseen(last):
        yield Mark(Sign.UNSEEN, last.finished_at, "?")
    elif last.finished_at:
        yield Mark(Sign.FAILED if last.exit_code else Sign.COMPLETED, last.finished_at, str(last.exit_code))
    was_unknown = False
    for one in own:
        if one.kind is Happened.SAID and one.status is not None:
            is_unknown = one.status.unknown
            sign = Sign.SAID_UNKNOWN if is_unknown else _SAID[one.status.state]
            yield Mark(sign, one.at, one.status.reason if is_unknown and not was_unknown else "")
            was_unknown = is_unknown
        elif one.kind is Happened.DISTURBED:
            yield Mark(Sign.DISTURBED, one.at, _DISTURBED.get(one.words, one.words))
        elif one.kind is Happened.FAULT:
            yield Mark(Sign.FAULT, one.at, one.words.replace("_", " "))


def _draw_kills(happenings: Sequence[Happening]) -> Iterator[Line]:
    """Yield the kills, numbered; those of a recovery share a label with the kill before it."""
    number, pending = 0, list[Happening]()
    for one in happenings:
        if one.kind in _KILLS:
            pending.append(one)
        if pending and (one.kind is Happened.RECOVERED or one is happenings[-1]):
            first, number = number + 1, number + len(pending)
            label = f"kill {first}" if first == number else f"kills {first}-{number}"
            for kill in pending:
                yield Line(Stroke.ENGINE, kill.at, label if kill is pending[0] else "")
            pending.clear()


def _draw_other_lines(happenings: Sequence[Happening], shown: set[str]) -> Iterator[Line]:
    for one in happenings:
        if one.kind is Happened.KEEPERS_KILLED:
            yield Line(Stroke.KEEPER, one.at, _KEEPERS.get(one.words, one.words))
        elif one.kind is Happened.DISTURBED and one.words == _UNSEEN_REPLACEMENT:
            yield Line(Stroke.KEEPER, one.at, _KEEPERS["all"])
        elif one.kind is Happened.FAULT and one.container not in shown:
            yield Line(Stroke.FAULT, one.at, one.words.replace("_", " "))


def _find_outages(happenings: Sequence[Happening]) -> Iterator[tuple[int, int]]:
    since = 0
    for one in happenings:
        if one.kind in _KILLS:
            since = since or one.at
        elif one.kind is Happened.RECOVERED and since:
            yield since, one.at
            since = 0
    if since:
        yield since, happenings[-1].at
