"""What a timeline shows of what happened, and that many containers stay readable."""

import random
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from limpet.engine.cli.drawing import find_room, render, stack
from limpet.engine.cli.drill_timeline import make_drill_timeline
from limpet.engine.cli.history_timeline import make_history_timeline
from limpet.engine.cli.timeline import MOST_LANES, Lane, Mark, Phase, Sign, Span, Stroke, Timeline, choose_lanes
from limpet.engine.drill import DrillReport, Failure, Happened, Happening
from limpet.engine.drill.judge import Kind
from limpet.engine.drill.report import RecoveryTime, count_kinds
from limpet.schema.history import Transition
from limpet.schema.status import ContainerState, Reason, Status
from tests.cli.conftest import Jobs, Limpet

NEW = Status()
CREATED = Status(created_at=10)
RUNNING = Status(created_at=10, started_at=20, pid=5)
ENDED = Status(created_at=10, started_at=20, finished_at=30, exit_code=3, reason=Reason.ERROR)
UNSEEN = Status(created_at=10, started_at=20, finished_at=65, exit_code=255, reason=Reason.UNKNOWN)
REAL_255 = Status(created_at=10, started_at=20, finished_at=65, exit_code=255, reason=Reason.ERROR)
DOUBTED = Status(created_at=10, started_at=20, pid=5, reason=Reason.UNVERIFIED, unknown=True)


def seen(at: int, status: Status, key: str = "a") -> Happening:
    return Happening(Happened.SEEN, at, key, status)


def said(at: int, status: Status, key: str = "a") -> Happening:
    return Happening(Happened.SAID, at, key, status)


def event(kind: Happened, at: int, container: str = "", words: str = "") -> Happening:
    return Happening(kind, at, container, None, words)


KILL, RECOVERED, CLOSED = event(Happened.ENGINE_KILLED, 40), event(Happened.RECOVERED, 70), event(Happened.CLOSED, 100)
START = event(Happened.RECOVERED, 0)

CREATED_SPAN, RAN_ON = Span(Phase.CREATED, 10, 20), Span(Phase.RAN, 20, 40)
LIVES = [
    ("ended and kept", [seen(31, ENDED)], [CREATED_SPAN, Span(Phase.RAN, 20, 30), Span(Phase.RECORDED, 30, 100)]),
    (
        "deleted",
        [seen(31, ENDED), event(Happened.GONE, 35, "a")],
        [CREATED_SPAN, Span(Phase.RAN, 20, 30), Span(Phase.RECORDED, 30, 35)],
    ),
    (
        "still running",
        [seen(21, RUNNING), KILL, RECOVERED, said(71, RUNNING)],
        [CREATED_SPAN, Span(Phase.RAN, 20, 100)],
    ),
    ("never started", [seen(11, CREATED)], [Span(Phase.CREATED, 10, 100)]),
    ("never created", [KILL, RECOVERED, said(71, NEW)], [Span(Phase.RECORDED, 71, 100)]),
    (
        "its end unseen",
        [seen(21, RUNNING), KILL, RECOVERED, said(71, UNSEEN)],
        [CREATED_SPAN, RAN_ON, Span(Phase.UNKNOWN, 40, 65), Span(Phase.RECORDED, 65, 100)],
    ),
    (
        "ended with a 255 of its own",
        [seen(21, RUNNING), KILL, RECOVERED, said(71, REAL_255)],
        [CREATED_SPAN, Span(Phase.RAN, 20, 65), Span(Phase.RECORDED, 65, 100)],
    ),
    (
        "in doubt after a restart, then certain",
        [seen(21, RUNNING), KILL, RECOVERED, said(71, DOUBTED), seen(80, RUNNING)],
        [CREATED_SPAN, Span(Phase.RAN, 20, 100), Span(Phase.UNKNOWN, 40, 80)],
    ),
    (
        "in doubt beside a living engine",
        [KILL, RECOVERED, said(71, RUNNING), seen(80, DOUBTED)],
        [CREATED_SPAN, Span(Phase.RAN, 20, 100), Span(Phase.UNKNOWN, 80, 100)],
    ),
    (
        "said before the kill, and read after it",
        [KILL, seen(42, RUNNING), RECOVERED, said(71, DOUBTED)],
        [CREATED_SPAN, Span(Phase.RAN, 20, 100), Span(Phase.UNKNOWN, 40, 100)],
    ),
]


def make_report(*failures: Failure) -> DrillReport:
    return DrillReport(
        seed=1,
        rounds=1,
        kills=1,
        containers=1,
        acknowledged=1,
        unknown=0,
        recovery_ms=RecoveryTime(),
        failures=failures,
        repeat="limpet drill --seed 1",
        **count_kinds(failures),
    )


@pytest.mark.parametrize(("happenings", "spans"), [row[1:] for row in LIVES], ids=[row[0] for row in LIVES])
def test_a_lane_shows_a_life(happenings: list[Happening], spans: list[Span]) -> None:
    """A container's spans are what was acknowledged; where nobody could know, from the kill on, it is unknown."""
    timeline = make_drill_timeline([START, *happenings, CLOSED], make_report())
    (lane,) = timeline.lanes
    assert sorted(lane.spans) == sorted(spans)


def test_marks_and_lines_show_what_was_done_and_said() -> None:
    """Ends with their codes, what each restart said, disturbances, faults, and each kill by its number."""
    happenings = [
        START, seen(11, RUNNING), seen(31, ENDED), KILL, event(Happened.DISTURBED, 45, "a", "halve bundle"),
        event(Happened.KEEPERS_KILLED, 46, words="copier"), event(Happened.DISTURBED, 47, "a", "replace unseen"),
        event(Happened.RECOVERY_KILLED, 50), said(51, ENDED),
        event(Happened.RECOVERY_KILLED, 55), RECOVERED, said(70, ENDED),
        event(Happened.FAULT, 72, "a", "false_running"), event(Happened.FAULT, 73, "a group", "torn"),
        event(Happened.ENGINE_KILLED, 80), CLOSED,
    ]  # fmt: skip
    failure = Failure(round=1, container="a", kind=Kind.FALSE_RUNNING, expected="x", said="y")
    timeline = make_drill_timeline(happenings, make_report(failure))
    assert set(timeline.lanes[0].marks) == {
        Mark(Sign.FAILED, 30, "3"),
        Mark(Sign.DISTURBED, 45, "config.json removed"),
        Mark(Sign.DISTURBED, 47, "killed"),
        Mark(Sign.SAID_EXITED, 51),
        Mark(Sign.SAID_EXITED, 70),
        Mark(Sign.FAULT, 72, "false running"),
    }
    assert sorted((line.at, line.stroke, line.label) for line in timeline.lines) == [
        (40, Stroke.ENGINE, "kills 1-3"),
        (46, Stroke.KEEPER, "copier"),
        (47, Stroke.KEEPER, "all keepers"),
        (50, Stroke.ENGINE, ""),
        (55, Stroke.ENGINE, ""),
        (73, Stroke.FAULT, "torn"),
        (80, Stroke.ENGINE, "kill 4"),
    ]
    assert timeline.outages == ((40, 70), (80, 100))
    assert "1 FAULT" in timeline.title


def test_many_containers_stay_readable() -> None:
    """Of hundreds some are shown, from all over the time, all that were false or in doubt; and it says how many not."""
    happenings = [START, *(seen(11, RUNNING, f"c{number:03}") for number in range(300))]
    happenings += [KILL, RECOVERED, said(71, DOUBTED, "c123"), event(Happened.FAULT, 72, "c250", "lost")]
    happenings += [said(71, RUNNING, f"c{number:03}") for number in range(10, 20)]
    timeline = make_drill_timeline([*happenings, CLOSED], make_report())
    names = [lane.name for lane in timeline.lanes]
    assert len(names) == MOST_LANES
    assert names == sorted(names)
    assert {"c123", "c250", *(f"c{number:03}" for number in range(10, 20))} <= set(names)
    others = [int(name[1:]) for name in names]
    assert max(later - one for one, later in pairwise(others)) < 30
    assert timeline.note.startswith("260 of 300 containers left out")
    drawing = render(timeline, "svg").decode()
    assert len(re.findall(r">c\d{3}</text>", drawing)) == MOST_LANES


@pytest.mark.parametrize("count", [0, 1, MOST_LANES, MOST_LANES + 1])
def test_lanes_are_left_out_only_for_want_of_room(count: int) -> None:
    """All are shown as long as there is room."""
    lanes = [(place % 3, Lane(str(place), (), ())) for place in range(count)]
    assert len(choose_lanes(lanes)) == min(count, MOST_LANES)


@pytest.mark.parametrize("seed", range(5))
def test_labels_never_overlap(seed: int) -> None:
    """Labels of lines are stacked, or left out; a text in a lane covers nothing that is there."""
    rng = random.Random(seed)
    labels = [(rng.uniform(0, 100), "x" * rng.randint(1, 9)) for _ in range(60)]
    rows = list(stack(labels, 1.0))
    placed = [(row, at, at + len(text)) for (at, text), row in zip(labels, rows, strict=True) if row is not None]
    assert 10 < len(placed) < 60
    for (row, _, end), (other, start, _) in pairwise(sorted(placed)):
        assert row != other or end < start
    taken = [(at, at + len(text)) for at, text in labels[:10]]
    left = find_room(taken[0][0], 3.0, taken)
    assert left >= taken[0][1]
    assert all(left + 3.0 <= low or high <= left for low, high in taken)


def make_timeline() -> Timeline:
    happenings = [START, seen(11, RUNNING), KILL, RECOVERED, said(71, DOUBTED), event(Happened.FAULT, 72, "a", "lost")]
    return make_drill_timeline([*happenings, CLOSED], make_report())


def test_the_same_timeline_gives_the_same_drawing() -> None:
    """An SVG is well-formed and repeatable, has its text as text, and a legend of just what is in it."""
    drawing = render(make_timeline(), "svg")
    assert render(make_timeline(), "svg") == drawing
    texts = {node.text for node in ET.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")}
    assert {"a", "kill 1", "lost", Phase.RAN.value, Phase.UNKNOWN.value, Sign.FAULT.value} <= texts
    assert Sign.COMPLETED.value not in texts
    assert render(make_timeline(), "png").startswith(b"\x89PNG")


def test_every_kind_can_be_drawn() -> None:
    """There is a look for each phase, sign and stroke."""
    marks = tuple(Mark(sign, place, "text") for place, sign in enumerate(Sign))
    lane = Lane("a $name_", tuple(Span(phase, place, place + 1) for place, phase in enumerate(Phase)), marks)
    lines = make_timeline().lines
    lines = tuple(lines[0]._replace(stroke=stroke, label="$a_b$") for stroke in Stroke)
    drawing = render(Timeline("$x$ y", 0, 20, (lane,), lines, ((1, 2),), "a $note"), "svg")
    texts = {node.text for node in ET.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")}
    assert {each.value for each in (*Phase, *Sign, *Stroke)} | {"$a_b$", "$x$ y", "a $name_", "a $note"} <= texts


def change(number: int, at: int, state: ContainerState, code: int = 0, reason: str = "") -> Transition:
    return Transition(number=number, seq=number, at=at, state=state, exit_code=code, reason=reason, message="")


def test_a_history_shows_what_cannot_be_verified() -> None:
    """A container that is not known to run is hatched from its last change on; so is an end that nobody saw."""
    made = [change(1, 0, ContainerState.UNKNOWN), change(2, 10, ContainerState.CREATED)]
    runs = [*made, change(3, 20, ContainerState.RUNNING)]
    timeline = make_history_timeline("a", runs, RUNNING, 50)
    assert timeline.lanes[0].spans[-1] == Span(Phase.RAN, 20, 50)
    timeline = make_history_timeline("a", runs, DOUBTED, 50)
    assert timeline.lanes[0].spans[-1] == Span(Phase.UNKNOWN, 20, 50)
    assert timeline.lanes[0].marks == (Mark(Sign.UNKNOWN_NOW, 50, "Unverified"),)
    unseen = [*runs, change(4, 40, ContainerState.EXITED, 255, "Unknown")]
    timeline = make_history_timeline("a", unseen, UNSEEN, 50)
    assert Span(Phase.UNKNOWN, 20, 40) in timeline.lanes[0].spans
    assert timeline.lanes[0].marks == (Mark(Sign.UNSEEN, 40, "?"),)
    assert [line.label for line in timeline.lines] == ["1 NEW", "2 CREATED", "3 RUNNING", "4 EXITED Unknown"]
    assert "no longer kept" in make_history_timeline("a", unseen[2:], UNSEEN, 50).note
    one = make_history_timeline("a", made[:1], NEW, 0)
    assert render(one, "png")


@pytest.mark.parametrize("name", ["a.svg", "a.PNG"])
def test_history_draws_a_container(limpet: Limpet, jobs: Jobs, tmp_path: Path, name: str) -> None:
    """`limpet history --plot` prints what it always prints, and draws; one whose process is gone is hatched."""
    jobs.kill_engine_then_one()
    done = limpet("history", "dying", "--plot", str(tmp_path / name))
    assert (done.returncode, done.stdout) == (0, limpet.ok("history", "dying"))
    assert done.stderr == f"limpet: drew {tmp_path / name}\n"
    drawing = (tmp_path / name).read_bytes()
    if name == "a.svg":
        texts = {node.text for node in ET.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")}
        assert {"1 NEW", "2 CREATED", "3 RUNNING", Phase.UNKNOWN.value, Sign.UNKNOWN_NOW.value} <= texts
    else:
        assert drawing.startswith(b"\x89PNG")
    refused = limpet("history", "dying", "--plot", str(tmp_path / "a.gif"))
    assert (refused.returncode, refused.stdout) == (2, "")
