"""The plan of a drill, drawn from its seed: pure, so that the same seed gives the same plan anywhere.

A round is one life of an engine: steps in parallel lanes, the moment of its kill, and what happens to its containers
while it is down. What the steps encounter when they run depends on timing and is not planned.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum

import msgspec

LANES = 4
GROUP_SIZE = 3
OLDEST_ROUNDS = 3
"""A container of this age in rounds is stopped, released and deleted, so that a long drill stays small."""
RECOVERY_KILLED_EVERY = 3
KEEPER_KILLED_EVERY = 2


class Verb(StrEnum):
    """A call that a life makes on its engine."""

    SANDBOX = "sandbox"
    CREATE = "create"
    START = "start"
    WAIT = "wait"
    STOP = "stop"
    RELEASE = "release"
    DELETE = "delete"
    TRANSACT = "transact"
    """Write `value` into each member's message, in one transaction."""
    DROP = "drop"
    """Delete all members, in one transaction."""


class Disaster(StrEnum):
    """A change made while the engine is down."""

    KILL = "kill"
    """A container's process dies."""
    REPLACE = "replace"
    """The same, and another process gets its pid, if the drill can choose pids."""
    REPLACE_UNSEEN = "replace unseen"
    """The same, after all keepers were killed: nobody has seen the end."""
    REMOVE_BUNDLE = "remove bundle"
    HALVE_BUNDLE = "halve bundle"
    """config.json is removed."""
    SWAP_BUNDLE = "swap bundle"
    """It is replaced by a link to a directory outside."""
    PLANT_UNMARKED = "plant unmarked"
    PLANT_MARKED = "plant marked"
    """A directory with limpet's marker that no container owns."""
    PLANT_EMPTY = "plant empty"
    PLANT_LINK = "plant link"
    """A link to a directory outside that no container owns."""

    REBOOT = "reboot"
    """Every process ends, and the boot id changes, if the drill has its own namespaces."""


class Scenario(StrEnum):
    """The kinds of disaster that a drill plans."""

    MIXED = "mixed"
    REUSE = "reuse"
    """Other processes get the pids of containers."""
    REBOOT = "reboot"
    """The machine restarts, and other processes may have the pids of containers afterwards."""
    KEEPER = "keeper"
    """The keeper's processes are killed in every round."""


class Victims(StrEnum):
    """Which processes of the keeper are killed."""

    KEEPER = "keeper"
    COPIER = "copier"
    ALL = "all"
    """Anchor, keeper and copier: nobody is left who sees how containers end."""


class Moment(StrEnum):
    """When the keeper's processes are killed."""

    AMID = "amid"
    """While the engine works."""
    WITH = "with"
    """Together with the engine."""
    DOWN = "down"
    """While no engine is there."""


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """A container's program, and its possible exit codes."""

    argv: tuple[str, ...]
    codes: frozenset[int] = frozenset()
    """The exit codes if it ends by itself; empty if it outlives any drill."""
    stop_codes: frozenset[int] = frozenset({137, 143})
    """The exit codes after its stop signal and SIGKILL."""
    starts: bool = True


class Planned(msgspec.Struct, frozen=True):
    """A container that a round creates."""

    id: str
    program: Program


class Step(msgspec.Struct, frozen=True):
    """A call: on `target`, or on all `members`."""

    number: int
    verb: Verb
    target: str
    value: float = 0.0
    """A timeout in seconds for wait and stop, the number for transact."""
    members: tuple[str, ...] = ()


class Kill(msgspec.Struct, frozen=True):
    """When the engine is killed: `delay_seconds` after `count` calls have begun, or have returned."""

    count: int
    in_flight: bool
    delay_seconds: float


class Disturbance(msgspec.Struct, frozen=True):
    """One disaster; `choice`, from 0 to 1, picks its victim among those available then."""

    disaster: Disaster
    choice: float


class KeeperKill(msgspec.Struct, frozen=True):
    """A kill of the keeper's processes; `share`, from 0 to 1, of the round's calls have been made before it."""

    victims: Victims
    moment: Moment
    share: float = 0.0


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One life of an engine, its end, and what happens until the next life."""

    number: int
    containers: tuple[Planned, ...] = ()
    first: tuple[Step, ...] = ()
    """Steps done before the lanes begin."""
    lanes: tuple[tuple[Step, ...], ...] = ()
    kill: Kill | None = None
    """None for the last life, which cleans up and is closed cleanly."""
    disturbances: tuple[Disturbance, ...] = ()
    keeper_kills: tuple[KeeperKill, ...] = ()
    down_seconds: float = 0.0
    """How long no engine is there; containers may end meanwhile."""
    recovery_kills: tuple[float, ...] = ()
    """The following recovery is killed this many times, these seconds after it begins."""
    reaped_late: bool = False
    """Ended processes stay zombies until the following recovery is over."""


def _sh(script: str, *codes: int, stop_codes: frozenset[int] = frozenset({137, 143})) -> Program:
    return Program(argv=("sh", "-c", script), codes=frozenset(codes), stop_codes=stop_codes)


_BRIEF = (
    *(_sh(f"exit {code}", code) for code in (0, 0, 1, 3, 42, 255)),
    _sh("kill -KILL $$", 137),
    _sh("kill -USR1 $$", 138),
    _sh("sleep 300 & sleep 300 & exit 4", 4),
    _sh("sleep 0.3; exit 5", 5),
    _sh("sleep 0.9 & wait; exit 6", 6),
    Program(
        argv=(sys.executable, "-I", "-S", "-c", "import sys, time; time.sleep(0.1); sys.exit(17)"),
        codes=frozenset({17}),
    ),
)
_LASTING = (
    Program(argv=("sleep", "3000")),
    _sh("sleep 3000; exit 7"),
    _sh("sleep 3000 & sleep 3000 & wait"),
    _sh("sh -c 'sleep 3000 & sleep 3000' & exec sleep 3000"),
    _sh("trap 'exit 9' TERM; sleep 3000 & wait", stop_codes=frozenset({9, 137, 143})),
    _sh("trap '' TERM; sleep 3000 & wait; sleep 3000"),
    # These usually end in a later life: adopted by then, and not a child of the engine that sees it.
    *(_sh(f"sleep {seconds}; exit {code}", code) for seconds, code in ((2, 11), (3, 12), (4, 0), (6, 13))),
)
_CANNOT_START = Program(argv=("/nonexistent/program",), codes=frozenset({128}), starts=False)

_TIDY = ((Verb.STOP, 0.3), (Verb.RELEASE, 0.0), (Verb.DELETE, 0.0))
_BRIEF_LIVES: tuple[tuple[tuple[Verb, float], ...], ...] = (
    ((Verb.START, 0.0),),
    ((Verb.START, 0.0), (Verb.WAIT, 3.0)),
    ((Verb.START, 0.0), (Verb.WAIT, 3.0), (Verb.RELEASE, 0.0)),
    ((Verb.START, 0.0), (Verb.WAIT, 3.0), (Verb.RELEASE, 0.0), (Verb.DELETE, 0.0)),
)
_LASTING_LIVES: tuple[tuple[tuple[Verb, float], ...], ...] = (
    (),
    ((Verb.START, 0.0),),
    ((Verb.START, 0.0),),
    ((Verb.START, 0.0),),
    ((Verb.START, 0.0), (Verb.STOP, 0.1)),
    ((Verb.START, 0.0), *_TIDY[:2]),
    ((Verb.START, 0.0), *_TIDY),
)
_LATER_LIVES: tuple[tuple[tuple[Verb, float], ...], ...] = (
    (),
    (),
    ((Verb.START, 0.0),),
    ((Verb.STOP, 0.2),),
    _TIDY[:2],
    _TIDY,
)

_Call = tuple[Verb, str, float, tuple[str, ...]]
_Script = list[_Call]


def draw_rounds(rounds: int, containers: int, seed: int, scenario: Scenario = Scenario.MIXED) -> Iterator[Round]:
    """Yield the rounds of a drill, finally the one that cleans up; each round creates `containers` containers."""
    left: dict[str, int] = {}  # containers not yet planned to be deleted, and the round that creates them
    groups: dict[str, tuple[str, ...]] = {}
    for number in range(1, rounds + 1):
        # Not used for secrets: a plan must be repeatable.
        rng = random.Random(f"limpet drill {seed} {containers} {number}")  # noqa: S311
        yield _plan_round(rng, number, containers, left, groups, scenario)
    last: list[_Script] = [[(verb, key, value, ()) for verb, value in _TIDY] for key in left]
    last += [[(Verb.DROP, name, 0.0, members)] for name, members in groups.items()]
    yield Round(number=rounds + 1, lanes=_deal(random.Random(seed), last, 1))  # noqa: S311


def _plan_round(
    rng: random.Random,
    number: int,
    containers: int,
    left: dict[str, int],
    groups: dict[str, tuple[str, ...]],
    scenario: Scenario,
) -> Round:
    scripts = [_tend(rng, key, number - made, left) for key, made in list(left.items())]
    planned, members = [], []
    for index in range(containers):
        key = f"r{number:02}-c{index:03}"
        left[key] = number
        if index < GROUP_SIZE <= containers - 1:
            members.append(key)
            planned.append(Planned(key, _LASTING[0]))
            left.pop(key)
            continue
        program, calls = _choose_life(rng)
        planned.append(Planned(key, program))
        scripts.append([(Verb.CREATE, key, 0.0, ()), *((verb, key, value, ()) for verb, value in calls)])
    if members:
        scripts.append([(Verb.CREATE, key, 0.0, ()) for key in members] + _transact(rng, f"r{number:02}", 1, members))
        groups[f"r{number:02}"] = tuple(members)
    for name, old in list(groups.items()):
        age = number - int(name[1:])
        if age == 1:
            scripts.append(_transact(rng, name, 100, old))
        elif age > 1:
            del groups[name]
            scripts.append([(Verb.DROP, name, 0.0, old)])
    sandbox = Step(0, Verb.SANDBOX, f"r{number:02}")
    lanes = _deal(rng, scripts, 1)
    count = sum(map(len, lanes))
    disturbances = tuple(Disturbance(disaster, rng.random()) for disaster in _DISTURBANCES[scenario](rng))
    all_reaped = any(each.disaster in {*_REPLACEMENTS, Disaster.REBOOT} for each in disturbances)
    return Round(
        number=number,
        containers=tuple(planned),
        first=(sandbox,),
        lanes=lanes,
        kill=Kill(rng.randint(count // 5, count), rng.random() < 0.5, rng.choice((0.0, rng.uniform(0, 0.03)))),
        disturbances=disturbances,
        recovery_kills=_plan_recovery_kills(rng, number),
        reaped_late=number % RECOVERY_KILLED_EVERY == 1 and not all_reaped,  # a zombie's pid is not reusable
        keeper_kills=_plan_keeper_kills(rng, number, scenario),
        down_seconds=rng.choice((0.0, rng.uniform(0, 0.6))),
    )


def _choose_life(rng: random.Random) -> tuple[Program, Sequence[tuple[Verb, float]]]:
    kind = rng.random()
    if kind < 0.08:
        return _CANNOT_START, ((Verb.START, 0.0),)
    if kind < 0.45:
        return rng.choice(_BRIEF), rng.choice(_BRIEF_LIVES)
    return rng.choice(_LASTING), rng.choice(_LASTING_LIVES)


def _tend(rng: random.Random, key: str, age: int, left: dict[str, int]) -> _Script:
    calls = _TIDY if age >= OLDEST_ROUNDS else rng.choice(_LATER_LIVES)
    if age > OLDEST_ROUNDS:
        del left[key]
    return [(verb, key, value, ()) for verb, value in calls]


def _transact(rng: random.Random, name: str, start: int, members: Sequence[str]) -> _Script:
    return [(Verb.TRANSACT, name, float(start + n), tuple(members)) for n in range(rng.randint(1, 8))]


def _deal(rng: random.Random, scripts: list[_Script], first_number: int) -> tuple[tuple[Step, ...], ...]:
    """Distribute scripts over lanes, and interleave those of a lane, each in its own order."""
    rng.shuffle(scripts)
    lanes = []
    for lane in range(LANES):
        mixed: _Script = []
        waiting = [list(script) for script in scripts[lane::LANES] if script]
        while waiting:
            script = rng.choice(waiting)
            mixed.append(script.pop(0))
            if not script:
                waiting.remove(script)
        lanes.append(tuple(Step(first_number + n, *call) for n, call in enumerate(mixed)))
        first_number += len(mixed)
    return tuple(lanes)


_REPLACEMENTS = (Disaster.REPLACE, Disaster.REPLACE_UNSEEN)


def _mix(rng: random.Random) -> Sequence[Disaster]:
    kills = [Disaster.KILL] * rng.randint(0, 3) + [rng.choice(_REPLACEMENTS)] * rng.randint(0, 1)
    others = [one for one in Disaster if one not in {Disaster.KILL, *_REPLACEMENTS, Disaster.REBOOT}]
    return kills + rng.sample(others, rng.randint(1, 4))


def _reuse(rng: random.Random) -> Sequence[Disaster]:
    return [Disaster.REPLACE] + [Disaster.REPLACE_UNSEEN] * rng.randint(1, 4) + [Disaster.KILL] * rng.randint(0, 2)


def _reboot(rng: random.Random) -> Sequence[Disaster]:
    return [Disaster.REPLACE] * rng.randint(0, 2) + [Disaster.REBOOT]


def _disturb_little(rng: random.Random) -> Sequence[Disaster]:
    return [Disaster.KILL] * rng.randint(0, 3)


_DISTURBANCES: dict[Scenario, Callable[[random.Random], Sequence[Disaster]]] = {
    Scenario.MIXED: _mix,
    Scenario.REUSE: _reuse,
    Scenario.REBOOT: _reboot,
    Scenario.KEEPER: _disturb_little,
}


def _plan_keeper_kills(rng: random.Random, number: int, scenario: Scenario) -> tuple[KeeperKill, ...]:
    """In most rounds the anchor takes over; where all are killed, a code may be unknown, which proves less."""
    if scenario is not Scenario.KEEPER and (scenario is not Scenario.MIXED or number % KEEPER_KILLED_EVERY):
        return ()
    victims = rng.choice((Victims.KEEPER, Victims.KEEPER, Victims.COPIER, Victims.ALL))
    first = KeeperKill(victims, rng.choice(list(Moment)), rng.random())
    again = KeeperKill(rng.choice(list(Victims)), rng.choice(list(Moment)), rng.random())
    return (first, again) if scenario is Scenario.KEEPER and rng.random() < 0.3 else (first,)


def _plan_recovery_kills(rng: random.Random, number: int) -> tuple[float, ...]:
    if number % RECOVERY_KILLED_EVERY:
        return ()
    return tuple(rng.uniform(0, 0.06) for _ in range(rng.randint(1, 3)))
