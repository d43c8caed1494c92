"""Two deaths at once, and three: what is told of programs then, against what they have left themselves.

A tree of processes of its own for each trial: engines, one after the other, that start, stop and restart containers and
are killed amid it, with some of the keeper's processes, gates and programs, at once or a moment apart. Everything in it
is slow at random, so that what takes microseconds is hit, too. Each program writes into a file when it begins, and ends
with a code of its own; then one more engine says what became of each:

- a code is the program's own, and it has begun; 137 also where one that had begun was killed;
- "never ran" is said only of what has not begun;
- what is said to run does so;
- that nobody saw the end is said only where keeper and anchor had been killed;
- what it has said is in its log once, if there was a keeper all the time;
- the next start works, and in the end no process is left, and no descriptor in the engine.

Run it as `python -m tests.campaigns.deaths FIRST_SEED COUNT [credulous]`; the last are engines that take the end of
a gate for that of a program.
"""

import ctypes
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from limpet.engine import Engine
from limpet.engine.lifecycle.container import Container
from limpet.schema.errors import AlreadyExistsError, LimpetError
from limpet.schema.status import ContainerState, Reason
from limpet.testing import open_descriptors
from tests.campaigns.slow import slow_down

_SANDBOX = "jobs"
_MARK = "began"
_PATIENCE_SECONDS = 25.0
_LEFT_SECONDS = 20.0
_PR_SET_CHILD_SUBREAPER = 36
_SLOW_KEEPER = """
import sys
sys.path.insert(0, sys.argv[1])
sys.path.append(HERE)
from keeper import adoption, connections, ends, gate, journal, keeper, main, starts
from slow import slow_down

keeper._IDLE_SECONDS, keeper._TICK_SECONDS, ends._FLUSH_AGAIN_SECONDS = 0.2, 0.05, 0.05

for owner, names in {
    adoption: ("read_stat_of", "kill", "has_ended"),
    gate: ("_say_ready", "become_user", "_execute"),
    journal.Journal: ("append", "load"),
    keeper: ("find_again", "settle_executed"),
    keeper.Keeper: ("_adopt", "_note_end", "_prepare", "_acknowledge", "_release"),
    ends.Ends: ("reap",),
    connections.Connections: ("close",),
    starts.Starts: ("_open_gate", "_hand_over", "read_report"),
    main: ("_has_finished",),
}.items():
    for name in names:
        slow_down(owner, name, SHARE)
main.main()
"""


class _Kind(NamedTuple):
    script: str
    codes: frozenset[int]
    restart: str = "no"


_KINDS: Mapping[str, _Kind] = {
    "brief": _Kind("exit 3", frozenset({3})),
    "short": _Kind("sleep 0.05; exit 4", frozenset({4})),
    "kind": _Kind("trap 'exit 5' TERM; while :; do sleep 0.01; done", frozenset({5, 143, 137})),
    "deaf": _Kind("trap '' TERM; while :; do sleep 0.01; done", frozenset({137, 143})),
    "again": _Kind("exit 6", frozenset({6}), restart="on-failure:2"),
}


class Report(NamedTuple):
    """What trials have found."""

    trials: int
    told: Counter[str]
    """How often each kind of end was told."""
    violations: list[str]
    """Those of the first trial that has any."""


def run(first_seed: int, count: int, *, is_credulous: bool = False) -> Report:
    """Do that many trials, or up to the first in which something is found."""
    told: Counter[str] = Counter()
    for seed in range(first_seed, first_seed + count):
        found = _try(seed, is_credulous)
        told.update(found["told"])
        if found["violations"]:
            return Report(seed - first_seed + 1, told, [f"seed {seed}: {found['did']}", *found["violations"]])
    return Report(count, told, [])


def _try(seed: int, is_credulous: bool) -> dict[str, Any]:
    """Do a trial in processes of its own, below one that reaps what comes to it, as process 1 does."""
    directory = tempfile.mkdtemp(prefix="limpet-deaths-")
    try:
        top = os.fork()
        if not top:
            _run_and_exit(lambda: _be_first(directory, seed, is_credulous))
        os.waitpid(top, 0)
        with open(f"{directory}/found.json", encoding="utf-8") as file:
            found: dict[str, Any] = json.load(file)
        return found
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _run_and_exit(call: Callable[[], object]) -> NoReturn:
    try:
        call()
        os._exit(0)
    except BaseException:  # noqa: BLE001  # a fork must not go on in the caller's code
        traceback.print_exc()
    finally:
        os._exit(1)


# The first process


def _be_first(directory: str, seed: int, is_credulous: bool) -> None:
    """Have the trial run in a child; reap all that comes to us, at once; in the end nothing may be left."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if not child:
        _run_and_exit(lambda: _be_killer(directory, seed, is_credulous))
    deadline = time.monotonic() + 300
    is_over = False
    try:
        while time.monotonic() < deadline:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == child:
                is_over = True
                deadline = time.monotonic() + _LEFT_SECONDS
            elif not pid:
                time.sleep(0.0005)
        left = [f"{pid} ({_read_name(pid)})" for pid in _find_descendants(os.getpid())]
        violations = [] if is_over else ["the trial hangs"]
        if left:
            violations.append(f"processes are left: {', '.join(left)}")
        _tell(directory, violations=violations)
    finally:
        while below := _find_descendants(os.getpid()):
            for pid in below:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _tell(directory: str, **fields: Any) -> None:
    """Add to what is found; one process does so at a time."""
    path = f"{directory}/found.json"
    found: dict[str, Any] = {"told": {}, "violations": [], "did": []}
    with suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        found = json.load(file)
    for name, value in fields.items():
        if isinstance(found[name], list):
            found[name] += value
        else:
            found[name] |= value
    with open(path, "w", encoding="utf-8") as file:
        json.dump(found, file)


# Who kills


class _Killed(NamedTuple):
    did: list[str]
    programs: dict[str, set[int]]
    """Programs and gates that were killed."""
    keepers: set[int]
    """Keepers and anchors that were: where it is one of them alone, the other knows."""


def _be_killer(directory: str, seed: int, is_credulous: bool) -> None:
    by_chance = random.Random(seed)
    share = by_chance.choice((0.0, 0.1, 0.3, 0.5))
    killed = _Killed([f"share {share}"], {"gate": set(), "program": set()}, set())
    ours = os.getppid()
    for number in range(by_chance.choice((1, 1, 2, 3))):
        engine = os.fork()
        if not engine:
            _run_and_exit(lambda number=number: _be_engine(directory, seed * 10 + number, share, is_credulous))  # type: ignore[misc] # bound at once
        time.sleep(by_chance.random() * by_chance.choice((0.1, 0.5, 1.0)))
        roles: Sequence[str] = by_chance.choices(_ROLES, _WEIGHTS, k=by_chance.choice((1, 2, 2, 3, 3, 4)))
        gate = 0
        if by_chance.random() < 0.6:
            gate = _wait_for_gate(ours)
            roles = ("gate", "keepers") if is_credulous else by_chance.choice((*_AMID_START, roles))
        for role in roles:
            if role == "successor":
                _wait_for_end(gate)
            _kill_one(by_chance, role.replace("successor", "keeper"), ours, engine, killed)
            time.sleep(by_chance.choice((0, 0, by_chance.random() * 0.003, by_chance.random() * 0.05)))
        is_left_to_end = by_chance.random() < 0.3
        if is_left_to_end:
            os.kill(engine, signal.SIGCONT)
            deadline = time.monotonic() + 60
            while not (done := os.waitpid(engine, os.WNOHANG))[0] and time.monotonic() < deadline:
                time.sleep(0.005)
            if not done[0]:
                _tell(directory, violations=["an engine hangs"])
        with suppress(ProcessLookupError):
            os.kill(engine, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(engine, 0)
        killed.did.append("next engine")
    _tell(directory, did=killed.did)
    judge = os.fork()
    if not judge:
        _run_and_exit(lambda: _judge_all(directory, share, is_credulous, killed))
    _, status = os.waitpid(judge, 0)
    if status:
        _tell(directory, violations=[f"the last engine ended with {status}"])


_ROLES = ("engine", "keeper", "anchor", "copier", "gate", "spare", "program", "keepers")
_WEIGHTS = (3, 5, 4, 1, 3, 1, 1, 3)
_AMID_START = (
    ("keeper", "keeper"),
    ("keeper", "successor"),
    ("keeper", "successor", "engine"),
    ("keeper", "engine", "successor"),
    ("engine", "keeper", "successor"),
    ("gate", "keeper", "successor"),
    ("keeper", "anchor"),
    ("engine", "keepers"),
    ("keepers", "engine"),
    ("gate", "keepers"),
)
"""What is killed once there is a gate; the successor is the keeper that takes over, once it has ended the gate."""


def _wait_for_gate(top: int) -> int:
    """Return the pid of a gate that holds a container, 0 if none comes in time."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        for pid in _find_descendants(top):
            if _read_name(pid) == "limpet-gate":
                return pid
    return 0


def _wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline and _read_state(pid)[:1] not in {"Z", "g"}:
        pass


def _kill_one(by_chance: random.Random, role: str, top: int, engine: int, killed: _Killed) -> None:
    number = signal.SIGSTOP if role in {"keeper", "anchor", "gate", "spare"} and by_chance.random() < 0.15 else 0
    number = number or signal.SIGKILL
    victims = _find_victims(role, by_chance, top, engine)
    deadline = time.monotonic() + 0.2  # a gate is there for a moment only
    while not victims and role in {"gate", "keepers", "keeper"} and time.monotonic() < deadline:
        victims = _find_victims(role, by_chance, top, engine)
    if not victims:
        return
    if role == "gate" and number == signal.SIGKILL and not _stop_at_gate(victims[0]):
        role = "program"
    if number == signal.SIGKILL and role in {"gate", "program"}:  # the former may have become the latter just now
        killed.programs[role].update(victims)
    if number == signal.SIGKILL and role in {"keeper", "keepers", "anchor"}:
        killed.keepers.update(victims)
    for victim in victims:
        with suppress(ProcessLookupError):
            os.kill(victim, number)
        killed.did.append(f"{signal.Signals(number).name} {role} {victim}")


def _stop_at_gate(pid: int) -> bool:
    """Stop a process; say whether it is a gate still: between a look and a kill it may become the program."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 0.1
    while _read_state(pid)[:1] not in {"T", "Z", "g"} and time.monotonic() < deadline:
        pass
    return _read_name(pid) == "limpet-gate"


def _find_victims(role: str, by_chance: random.Random, top: int, engine: int) -> list[int]:
    if role == "engine":
        return [engine]
    names = {pid: _read_name(pid) for pid in _find_descendants(top)}
    if role == "keepers":
        order = by_chance.choice((("limpet-anchor", "limpet-keeper"), ("limpet-keeper", "limpet-anchor")))
        return [pid for each in order for pid, name in names.items() if name == each]
    if role == "program":
        return [pid for pid, name in names.items() if name == "sh" and _is_leader(pid)][:1]
    return [pid for pid, name in names.items() if name == f"limpet-{role}"][:1]


def _is_leader(pid: int) -> bool:
    with suppress(ProcessLookupError):
        return os.getsid(pid) == pid
    return False


def _find_descendants(top: int) -> list[int]:
    """Return what descends from a process, zombies included: those that stay are left, too."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            children.setdefault(int(file.read().rpartition(b")")[2].split()[1]), []).append(int(name))
    found: list[int] = []
    pending = [top]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def _read_name(pid: int) -> str:
    with suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        return file.read().strip()
    return ""


# The engines


def _prepare(share: float, is_credulous: bool) -> None:
    """Have this process, and the keepers that it begins, be slow at random."""
    program = _SLOW_KEEPER.replace("SHARE", str(share)).replace(
        "HERE", repr(os.path.dirname(os.path.abspath(__file__)))
    )
    client = import_module("limpet.engine.starters.process.client")
    setattr(client, "_PROGRAM", program)  # noqa: B010
    starts: Any = import_module("limpet.engine.starters.process.starts")
    ends: Any = import_module("limpet.engine.starters.process.ends")
    if is_credulous:
        starts.Held.is_left_at_gate = False
        ends.is_of_program = lambda _: True
    for owner, names in (
        (starts.Starts, ("prepare", "go", "_settle")),
        (ends.Ends, ("witness", "read", "ask_about")),
        (starts, ("_settle_without_keeper", "_has_executed", "_has_gone_on")),
    ):
        for name in names:
            slow_down(owner, name, share)


def _be_engine(directory: str, seed: int, share: float, is_credulous: bool) -> None:
    """Open an engine, and have containers live, until we are killed or all is done."""
    _prepare(share, is_credulous)
    by_chance = random.Random(seed)
    before = open_descriptors()
    with Engine.open(f"{directory}/state") as engine:
        with suppress(AlreadyExistsError):
            engine.create_sandbox(_describe_sandbox(directory), id=_SANDBOX)
        for number in range(6):
            kind = by_chance.choice([*_KINDS])
            try:
                container = _make(engine, f"{kind}-{seed}-{number}", kind)
                container.start()
                if kind in {"kind", "deaf"}:
                    if by_chance.random() < 0.6:
                        _wait_for_mark(container)
                        container.stop(by_chance.choice((0.05, 0.3)))
                elif by_chance.random() < 0.7:
                    container.wait(5)
            except LimpetError:
                continue
    left = {number: what for number, what in open_descriptors().items() if number not in before}
    if left:
        _tell(directory, violations=[f"descriptors are left: {left}"])


def _describe_sandbox(directory: str) -> dict[str, Any]:
    return {"metadata": {"name": _SANDBOX}, "log_directory": f"{directory}/logs"}


def _make(engine: Engine, key: str, kind: str) -> Container:
    config = {
        "metadata": {"name": key},
        "image": {"image": "host"},
        "command": ["sh", "-c", f"echo $$ >> {_MARK}; echo said; {_KINDS[kind].script}"],
        "log_path": f"{key}.log",
    }
    return engine.create_container(config, _SANDBOX, id=key, restart=_KINDS[kind].restart)


def _find_mark(container: Container) -> Path:
    return Path(container.metadata.root_dir, "working", _MARK)


def _wait_for_mark(container: Container) -> bool:
    deadline = time.monotonic() + 5
    while not _find_mark(container).exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    return _find_mark(container).exists()


# The judge


def _judge_all(directory: str, share: float, is_credulous: bool, killed: _Killed) -> None:
    """Open one more engine, and compare what it says with the marks; then one more start, and all is removed."""
    _prepare(share / 3, is_credulous)
    before = open_descriptors()
    told: Counter[str] = Counter()
    violations: list[str] = []
    with Engine.open(f"{directory}/state") as engine:
        with suppress(AlreadyExistsError):
            engine.create_sandbox(_describe_sandbox(directory), id=_SANDBOX)
        _wait_until_settled(engine)
        for container in engine.list():
            what, wrong = _judge(container, killed)
            told[what] += 1
            violations += [f"{container.id}: {wrong}: {container.status}"] if wrong else []
        next_one = _make(engine, "next", "brief")
        next_one.start()
        if next_one.wait(20).exit_code != 3:
            violations.append(f"the next one: {next_one.status}")
        for container in engine.list():
            with suppress(LimpetError):  # it does not run
                container.stop(0)
            container.remove(force=True)
        engine.get_sandbox(_SANDBOX).stop()
    left = {number: what for number, what in open_descriptors().items() if number not in before}
    if left:
        violations.append(f"descriptors are left: {left}")
    _tell(directory, told=told, violations=violations)


def _wait_until_settled(engine: Engine) -> None:
    """Wait until nothing is on its way: what is to end has, what is restarted is over, and nothing is Unknown."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if not any(_is_on_its_way(each) for each in engine.list()):
            return
        time.sleep(0.02)


def _is_on_its_way(container: Container) -> bool:
    with suppress(LimpetError):
        status = container.status
        kind = container.metadata.name.partition("-")[0]
        if status.state is ContainerState.UNKNOWN:
            return bool(status.created_at)
        if status.state is ContainerState.RUNNING and not _is_stopped(status.pid):
            return kind not in {"kind", "deaf"} or bool(status.stop_requested_at)
        if kind == "again" and status.finished_at:
            return False
    return False


def _is_stopped(pid: int) -> bool:
    return _read_state(pid)[:1] == "T" and not _read_name(pid).startswith("limpet-")


def _read_state(pid: int) -> str:
    with suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].strip()[:40]
    return "gone"


def _judge(container: Container, killed: _Killed) -> tuple[str, str]:
    """Return what is told of a container, and what is wrong about it, "" if nothing is."""
    status, kind = container.status, container.metadata.name.partition("-")[0]
    if kind == "again" and status.state is ContainerState.RUNNING:  # its policy has started it just now
        status = container.wait(_PATIENCE_SECONDS)
    has_begun = _find_mark(container).exists()
    if status.state is ContainerState.CREATED or (status.state is ContainerState.UNKNOWN and not status.created_at):
        return "created", "it has begun" if has_begun else ""
    if status.state is ContainerState.UNKNOWN:
        return "unknown", "it stays Unknown"
    if status.state is ContainerState.RUNNING:
        if _is_stopped(status.pid):  # as it became the program: then it is left as it is
            return "running", ""
        if not Path(f"/proc/{status.pid}").exists() or not _wait_for_mark(container):
            return "running", f"it does not run, or has not begun: {_read_state(status.pid)}"
        return "running", "" if kind in {"kind", "deaf"} else "it should have ended"
    if status.reason == Reason.START_ERROR:
        return "never ran", "it has begun" if has_begun else ""
    if status.exit_code == 255:
        return "unseen", "" if len(killed.keepers) > 1 else "a keeper was there"
    pid = status.identity.pid if status.identity else 0
    if not has_begun and not status.released and pid not in killed.programs["program"]:
        return "code", "it has never begun"
    is_killed = any(pid in each for each in killed.programs.values())
    if status.exit_code not in {*_KINDS[kind].codes, *((137,) if is_killed else ())}:
        return "code", f"it does not end with {status.exit_code}"
    if kind in {"brief", "short"} and status.exit_code in _KINDS[kind].codes:
        said = [each.text for each in container.read_log()]
        if said != [b"said\n"] and (said or len(killed.keepers) < 2):  # nobody holds a pipe when all are dead
            return "code", f"its log has {said}"
    return "code", ""


if __name__ == "__main__":
    report = run(int(sys.argv[1]), int(sys.argv[2]), is_credulous="credulous" in sys.argv)
    print(f"{report.trials} trials: {dict(report.told)}")
    print("\n".join(report.violations) or "nothing was found")
    sys.exit(bool(report.violations))
