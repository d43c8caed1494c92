"""What the drill holds against an engine, case by case; and what it must not."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from limpet.engine.drill.disasters import Scene, find_harm, prepare
from limpet.engine.drill.judge import Kind, find_leaks, judge
from limpet.engine.drill.messages import Returned, Told
from limpet.engine.drill.script import Kill, Planned, Program, Round, Step, Verb
from limpet.engine.drill.truth import Truth
from limpet.engine.drill.world import Process, Subreaper, World
from limpet.schema.identity import ProcessIdentity
from limpet.schema.status import Reason, Status

BUNDLES = "/state/containers"
WHO = ProcessIdentity(pid=50, start_ticks=1, boot_id="b", pidfd_inode=9, pid_namespace=1)
NEW = Status()
CREATED = Status(created_at=1)
BUNDLELESS = Status(created_at=1, reason=Reason.BUNDLE_LOST, unknown=True)
RUNNING = Status(created_at=1, started_at=2, pid=50, identity=WHO)
DOUBTED = Status(created_at=1, started_at=2, pid=50, identity=WHO, unknown=True)
ENDED_3 = Status(created_at=1, started_at=2, finished_at=3, exit_code=3, reason=Reason.ERROR, identity=WHO)
ENDED_0 = Status(created_at=1, started_at=2, finished_at=3, exit_code=0, reason=Reason.COMPLETED, identity=WHO)
UNSEEN = Status(created_at=1, started_at=2, finished_at=3, exit_code=255, reason=Reason.UNKNOWN, identity=WHO)
NEVER_RAN = Status(created_at=1, started_at=2, finished_at=3, exit_code=128, reason=Reason.START_ERROR, identity=WHO)
GIVEN_UP = Status(created_at=1, finished_at=3, exit_code=255, reason=Reason.UNKNOWN)
ALIVE = {50: Process(pid=50, group=50, session=50, bundle=f"{BUNDLES}/a", start_ticks=1)}
CHILD = {51: Process(pid=51, group=50, session=50, bundle=f"{BUNDLES}/a")}
GONE: dict[int, Process] = {}

# What was acknowledged of container "a", what is said of it, its processes, its code if the drill reaped it; the fault.
CASES = [
    ("nothing was promised", None, None, GONE, None, None),
    ("made, not acknowledged", None, CREATED, GONE, None, None),
    ("as acknowledged", CREATED, CREATED, GONE, None, None),
    ("newer than acknowledged", CREATED, RUNNING, ALIVE, None, None),
    ("gone", CREATED, None, GONE, None, Kind.LOST),
    ("older", RUNNING, CREATED, GONE, None, Kind.LOST),
    ("its end forgotten", ENDED_3, RUNNING, ALIVE, None, Kind.LOST),
    ("damaged", CREATED, Status(reason=Reason.DAMAGED, unknown=True), GONE, None, Kind.LOST),
    ("running and alive", RUNNING, RUNNING, ALIVE, None, None),
    ("running and gone", RUNNING, RUNNING, GONE, None, Kind.FALSE_RUNNING),
    ("ended and alive", RUNNING, ENDED_3, ALIVE, None, Kind.FALSE_EXITED),
    ("in doubt and alive", RUNNING, DOUBTED, ALIVE, None, None),
    ("in doubt and gone", RUNNING, DOUBTED, GONE, 3, None),
    ("its code, reaped here", RUNNING, ENDED_3, GONE, 3, None),
    ("another code, reaped here", RUNNING, ENDED_3, GONE, 137, Kind.WRONG_EXIT_CODE),
    ("a code that it can have", RUNNING, ENDED_3, GONE, None, None),
    ("a code that it cannot have", RUNNING, ENDED_0, GONE, None, Kind.WRONG_EXIT_CODE),
    ("a code that changes", ENDED_0, ENDED_3, GONE, None, Kind.WRONG_EXIT_CODE),
    ("unseen, though there was a keeper", RUNNING, UNSEEN, GONE, 137, Kind.WRONG_EXIT_CODE),
    ("never ran, though its start had returned", RUNNING, NEVER_RAN, GONE, None, Kind.WRONG_EXIT_CODE),
    ("in doubt, and given up before it ran", CREATED, GIVEN_UP, GONE, None, None),
    ("a child left running", RUNNING, ENDED_3, CHILD, None, Kind.LEAKED),
    ("not started, but alive", CREATED, CREATED, ALIVE, None, Kind.LEAKED),
    ("never recorded, but alive", CREATED, Status(created_at=1, unknown=True), ALIVE, None, Kind.LEAKED),
    ("not there, but alive", None, None, ALIVE, None, Kind.LEAKED),
    ("bundle gone, though nobody touched it", CREATED, BUNDLELESS, GONE, None, Kind.HARMED),
]


def knowing(steps: list[Step], names: str = "a") -> Truth:
    program = Program(argv=("sh", "-c", "exit 3"), codes=frozenset({3}))
    truth = Truth()
    containers = tuple(Planned(name, program) for name in names)
    truth.expect(Round(number=1, containers=containers, lanes=(tuple(steps),), kill=Kill(1, False, 0)))
    return truth


@pytest.mark.parametrize(
    ("acknowledged", "said", "alive", "code", "fault"), [row[1:] for row in CASES], ids=[row[0] for row in CASES]
)
def test_one_container(
    acknowledged: Status | None, said: Status | None, alive: dict[int, Process], code: int | None, fault: Kind | None
) -> None:
    """Each way to be false is called by its name, and nothing that may be so is held against the engine."""
    truth = knowing([Step(1, Verb.START, "a")])
    truth.begin(1)
    if acknowledged is not None:
        truth.end(Returned(1, acknowledged))
    world = World(alive, {} if code is None else {(50, 1, 9): code}, frozenset())
    told = Told({} if said is None else {"a": said}, [])
    found = judge(truth, told, BUNDLES, world, world) + find_leaks(told, BUNDLES, world)
    assert {each.kind for each in found} == ({fault} if fault else set())


def test_an_end_may_be_unseen_only_where_all_keepers_were_killed() -> None:
    """With a keeper the code is known; without one "nobody saw it" is true. A start that is under way may fail."""
    truth = knowing([Step(1, Verb.START, "a")])
    world = World(GONE, {}, frozenset())

    def faults(said: Status) -> list[Kind]:
        return [each.kind for each in judge(truth, Told({"a": said}, []), BUNDLES, world, world)]

    truth.begin(1)
    assert faults(UNSEEN) == [Kind.WRONG_EXIT_CODE]
    assert faults(NEVER_RAN) == []
    truth.lose_witnesses()
    assert faults(UNSEEN) == []
    truth.end(Returned(1, RUNNING))
    assert faults(NEVER_RAN) == [Kind.WRONG_EXIT_CODE]


def test_what_is_reaped_of_a_program_that_cannot_be_executed_is_its_gate() -> None:
    """It is a StartError, however the gate ended: killed, where its keeper was. Any other end is false."""
    truth = Truth()
    program = Program(argv=("/nonexistent/program",), codes=frozenset({128}), starts=False)
    step = Step(1, Verb.START, "a")
    truth.expect(Round(number=1, containers=(Planned("a", program),), lanes=((step,),), kill=Kill(1, False, 0)))
    truth.begin(1)
    world = World(GONE, {(50, 1, 9): 137}, frozenset())
    killed = msgspec.structs.replace(ENDED_3, exit_code=137)
    for said, faults in ((NEVER_RAN, []), (killed, [Kind.WRONG_EXIT_CODE])):
        found = judge(truth, Told({"a": said}, []), BUNDLES, world, world)
        assert [each.kind for each in found] == faults


def test_a_gate_that_stays_is_a_leak() -> None:
    """A process that was to become a container's, and that no container has, is held against the engine."""
    gate = World({50: Process(50, 50, 50, "", "limpet-gate", start_ticks=1)}, {}, frozenset())
    assert [each.kind for each in find_leaks(Told({}, []), BUNDLES, gate)] == [Kind.LEAKED]
    assert not find_leaks(Told({"a": RUNNING}, []), BUNDLES, gate)


def test_a_stranger_with_the_pid_is_no_container() -> None:
    """Whoever has the pid now is not the container, and not its leak either."""
    truth = knowing([])
    world = World({50: Process(50, 50, 50, "")}, {}, frozenset({50}))
    told = Told({"a": RUNNING}, [])
    assert [each.kind for each in judge(truth, told, BUNDLES, world, world)] == [Kind.FALSE_RUNNING]
    assert not find_leaks(Told({"a": UNSEEN}, []), BUNDLES, world)


def test_a_process_of_the_engine_with_the_pid_is_no_container() -> None:
    """A keeper, or a gate, that got the pid of a process that was reaped does not make its end false, nor is a leak."""
    truth = knowing([Step(1, Verb.START, "a")])
    truth.begin(1)
    keepers = {
        50: Process(50, 50, 50, "", "limpet-anchor", start_ticks=7),
        51: Process(51, 50, 50, "", "limpet-keeper"),
    }
    for processes, faults in ((keepers, set()), ({50: Process(50, 50, 50, "", start_ticks=1)}, {Kind.FALSE_EXITED})):
        world, told = World(processes, {}, frozenset()), Told({"a": NEVER_RAN}, [])
        assert {each.kind for each in judge(truth, told, BUNDLES, world, world)} == faults
        assert not find_leaks(told, BUNDLES, world)


def test_a_code_is_that_of_one_process_not_of_its_pid() -> None:
    """How an earlier or a later owner of the pid ended, be it within a tick, says nothing about the container."""
    truth = knowing([Step(1, Verb.START, "a")])
    truth.begin(1)
    world = World(GONE, {(50, 0, 9): 137, (50, 7, 9): 143, (50, 1, 8): 137}, frozenset())
    assert not judge(truth, Told({"a": ENDED_3}, []), BUNDLES, world, world)


def act(truth: Truth, number: int, *, returned: bool) -> None:
    truth.begin(number)
    if returned:
        truth.end(Returned(number))


def numbered(**numbers: int | None) -> Told:
    members = {name: Status(created_at=1, message=str(n)) for name, n in numbers.items() if n is not None}
    return Told(members, [])


# Whether transactions 1 and 2, and the deletion, returned; None where it was not called. What members say; the fault.
GROUP_CASES: list[tuple[str, tuple[bool | None, ...], Told, set[Kind]]] = [
    ("acknowledged", (True, None, None), numbered(a=1, b=1), set()),
    ("older", (True, True, None), numbered(a=1, b=1), {Kind.LOST}),
    ("under way, not done", (True, False, None), numbered(a=1, b=1), set()),
    ("under way, done", (True, False, None), numbered(a=2, b=2), set()),
    ("under way, half done", (True, False, None), numbered(a=2, b=1), {Kind.TORN}),
    ("deleted", (True, None, True), numbered(a=None, b=None), set()),
    ("deleted, and there again", (True, None, True), numbered(a=1, b=1), {Kind.LOST}),
    ("deletion under way, half done", (True, None, False), numbered(a=None, b=1), {Kind.TORN}),
]


@pytest.mark.parametrize(
    ("returned", "told", "faults"), [row[1:] for row in GROUP_CASES], ids=[row[0] for row in GROUP_CASES]
)
def test_a_transaction_is_whole(returned: tuple[bool | None, ...], told: Told, faults: set[Kind]) -> None:
    """Members of a transaction show the last acknowledged one, or the one under way, and all of them the same."""
    members = ("a", "b")
    calls = [Step(n, Verb.TRANSACT, "group", float(n), members) for n in (1, 2)] + [
        Step(3, Verb.DROP, "group", 0, members)
    ]
    truth = knowing([*calls, Step(4, Verb.CREATE, "a"), Step(5, Verb.CREATE, "b")], "ab")
    for number in (4, 5):
        truth.begin(number)
        truth.end(Returned(number, CREATED))
    for number, ended in enumerate(returned, 1):
        if ended is not None:
            act(truth, number, returned=ended)
    world = World({}, {}, frozenset())
    assert {each.kind for each in judge(truth, told, BUNDLES, world, world)} == faults


def test_what_was_deleted_stays_deleted() -> None:
    """A deletion that was acknowledged is kept; one that was under way may go either way, and then stays so."""
    world = World({}, {}, frozenset())

    def faults(truth: Truth, told: Told) -> list[Kind]:
        return [each.kind for each in judge(truth, told, BUNDLES, world, world)]

    there, gone = Told({"a": CREATED}, []), Told({}, [])
    assert faults(deleted(returned=True), there) == [Kind.LOST]
    assert faults(deleted(returned=True), gone) == []
    assert faults(deleted(returned=False), there) == faults(deleted(returned=False), gone) == []
    truth = deleted(returned=False)
    truth.learn(gone)
    assert faults(truth, there) == [Kind.LOST]
    truth = deleted(returned=False)
    truth.learn(there)
    assert faults(truth, gone) == [Kind.LOST]


def deleted(*, returned: bool) -> Truth:
    truth = knowing([Step(1, Verb.CREATE, "a"), Step(2, Verb.DELETE, "a")])
    truth.begin(1)
    truth.end(Returned(1, CREATED))
    act(truth, 2, returned=returned)
    return truth


@pytest.mark.parametrize(
    "touch",
    [
        lambda path: path.write_text(""),
        lambda path: path.chmod(0),
        lambda path: path.unlink(),
        lambda path: (path.parent / "new").touch(),
    ],
    ids=["emptied", "closed", "gone", "joined by another"],
)
def test_what_is_outside_must_stay_as_it_is(tmp_path: Path, touch: Callable[[Path], object]) -> None:
    """Somebody else's file is harmed where it is gone, holds something else, or has another mode."""
    place = {name: str(tmp_path / name) for name in ("containers_dir", "quarantine_dir", "outside_dir")}
    scene = Scene(**place, truth=Truth(), subreaper=Subreaper(), planted={}, happened=Counter())
    world = World({}, {}, frozenset())
    prepare(scene)
    assert find_harm(scene, world) == []
    (precious,) = (tmp_path / "outside_dir").iterdir()
    touch(precious)
    assert {found.kind for found in find_harm(scene, world)} == {Kind.HARMED}
