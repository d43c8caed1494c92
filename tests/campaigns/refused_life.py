"""A life over of an engine with real processes, for system calls that fail, and the judgement of what each has left.

Whatever call the system refuses: who calls limpet gets an error of its own or none, and what was refused works when it
is asked for again. Of each program the next engine says what became of it, the exact exit code included; that it never
ran is said only if it has left no mark. Nothing is left behind: no process, no descriptor, nothing for a person to do.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import msgspec

from limpet.engine import Engine
from limpet.engine.drill import controls
from limpet.engine.logs import read_log
from limpet.schema.errors import (
    AlreadyExistsError,
    InvalidStateError,
    LimpetError,
    NotFoundError,
    StartError,
)
from limpet.schema.identity import ProcessIdentity
from limpet.schema.status import ContainerState, Reason, Status
from limpet.testing import CALL_FAILURES, Violation, open_descriptors
from limpet.testing.calls import KILLED, STOPPED
from limpet.testing.roles import LIFE

_PATIENCE_SECONDS = 20.0
_SANDBOX = "jobs"
_SAID = b"said"
IMPATIENT_KEEPER = """
import sys
sys.path.insert(0, sys.argv[1])
from keeper import ends, keeper, main

keeper._IDLE_SECONDS, keeper._TICK_SECONDS, ends._FLUSH_AGAIN_SECONDS = 0.1, 0.05, 0.05
main.main()
"""
"""The keeper itself, which does not stay as long when nothing is left for it."""
_FORGETFUL = """
from keeper import kernel

kernel._read_reaped_status = lambda pidfd: None
main.main()
"""
"""On a kernel that tells nothing of a process once it was reaped."""
_NEGLECTFUL = """
keeper.Keeper._let_ours_go_on = lambda self: None
main.main()
"""
ROLES = {
    "limpet-anchor": "anchor",
    "limpet-keeper": "keeper",
    "limpet-copier": "copier",
    "limpet-spare": "spare",
    "limpet-gate": "gate",
    "limpet-memory": "memory",
    os.path.basename(os.path.realpath(sys.executable))[:15]: "beginning",
    os.path.basename(sys.executable)[:15]: "beginning",
}
"""By the names of processes. The programs of containers have none, and nothing is refused to them."""


class _Program(NamedTuple):
    script: str
    codes: frozenset[int]
    is_stopped: bool = False


_PROGRAMS: Mapping[str, _Program] = {
    "brief": _Program("exit 3", frozenset({3})),
    "lasting": _Program("exec sleep 3000", frozenset({128 + 15, 128 + 9}), is_stopped=True),
    "wrong": _Program("", frozenset({128})),
    "next": _Program("exit 4", frozenset({4})),
}


_KILLING = ("write", "sendmsg", "recvmsg", "clone", "waitid", "fchmod", "execve", "epoll_ctl", "openat", "tee")
FAILURES: Mapping[str, Sequence[str]] = {
    **{call: (*errors, KILLED) if call in _KILLING else errors for call, errors in CALL_FAILURES.items()},
    "life/fcntl": (),
}
"""What is tried: at some calls the process is killed, too, for want of memory.

The engine's own process is not refused fcntl(2): after an unlock of its -shm that failed, SQLite tries each lock for
ten seconds.
"""


STOPS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(CALL_FAILURES, (STOPPED,)),
    **{f"{LIFE}/{call}": () for call in CALL_FAILURES},
    **dict.fromkeys(("beginning/setsid", "beginning/dup2", "gate/execve"), ()),
}
"""Each process of the keeper is stopped at its calls.

Not the engine itself: who stops it waits for it; nor what is yet to execute the keeper's program, for which the engine
waits in posix_spawn(3); nor a gate that is about to be the program: that is stopped, then, as its user may have it.
"""


class Told(msgspec.Struct, frozen=True):
    """What the life has seen: a step has returned, with the status of its container, or was refused."""

    step: str
    key: str = ""
    status: Status | None = None
    refused: str = ""
    stuck: str = ""
    """Refused again and again though nothing fails any more."""


class RefusedLife:
    """An engine is opened, runs containers, recovers, is closed and opened again; what is refused is tried again."""

    open_engine: ClassVar[Callable[[str], Engine]] = Engine.open
    programs: ClassVar[Sequence[str]] = ("brief", "lasting", "wrong")

    def prepare(self) -> None:
        """Choose the keepers of this process, at the beginning of life and of check."""
        use_impatient_keepers()

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        """Do every step, again where it was refused."""
        self.prepare()
        before = open_descriptors()
        os.mkdir(f"{directory}/marks")
        life = _Life(f"{directory}/state", f"{directory}/marks", type(self).open_engine, acknowledge)
        life.run(self.programs)
        left = {number: target for number, target in open_descriptors().items() if number not in before}
        for number in [number for number, target in left.items() if "/state/store.db" in target]:
            del left[number]  # a store keeps its connection where the WAL cannot be emptied, or a commit's outcome seen
        acknowledge(msgspec.json.encode(Told("descriptors", stuck=f"left open: {left}" if left else "")))

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        """Judge what the next engine says, run one more container, and end everything. Raises Violation."""
        self.prepare()
        told = [msgspec.json.decode(each, type=Told) for each in acknowledged]
        for each in told:
            if each.stuck:
                raise Violation("other", f"{each.step} {each.key}: {each.stuck}")
        state_dir, marks = f"{directory}/state", f"{directory}/marks"
        with Engine.open(state_dir) as engine:
            _judge_told(told, marks)
            for record in engine.store.list():
                _wait_for_end(engine, record.id)
            for record in engine.store.list():
                _judge(record.id, record.status, [each for each in told if each.key == record.id], marks)
            run_next(engine, state_dir, marks)
            _clear(engine)
            _require_no_leaks_in_keeper(state_dir)
        _require_nothing_left(state_dir)


class StoppedLife(RefusedLife):
    """A process of the keeper is stopped: who calls limpet sees nothing of that, it only takes longer."""

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        """Judge the same, and that nothing was refused. Raises Violation."""
        for each in [msgspec.json.decode(each, type=Told) for each in acknowledged]:
            if each.refused and (each.step, each.key) != ("start", "wrong"):
                raise Violation("other", f"{each.step} {each.key} was refused: {each.refused}")
        super().check(directory, acknowledged)


class NeglectedLife(StoppedLife):
    """Its keeper has nothing go on."""

    programs = ("brief", "lasting")

    def prepare(self) -> None:
        """Choose such keepers."""
        use_impatient_keepers(IMPATIENT_KEEPER.replace("main.main()\n", _NEGLECTFUL))


class RefusedLifeOfTakers(RefusedLife):
    """Takes a dead gate for a start."""

    programs = ("brief", "lasting")
    open_engine = controls.open_taking_gates_for_starts


class RefusedLifeBefore615(RefusedLife):
    """The kernel tells nothing of a process once it was reaped: how one ended, the keeper alone knows."""

    programs = ("brief", "lasting")
    keeper: ClassVar[str] = ""

    def prepare(self) -> None:
        """Choose such keepers, and do not ask the kernel here, either."""
        use_impatient_keepers(IMPATIENT_KEEPER.replace("main.main()\n", self.keeper + _FORGETFUL))
        host = import_module("limpet.recovery.host")
        setattr(host, "_read_reaped_status", lambda _: None)  # noqa: B010


class RefusedLifeOfHastyKeepers(RefusedLifeBefore615):
    """Its keeper reaps a process before it has written down how that ended."""

    keeper = controls.HASTY_KEEPER


def use_impatient_keepers(program: str = IMPATIENT_KEEPER) -> None:
    """Have keepers that this process begins end soon after nothing is left for them."""
    client = import_module("limpet.engine.starters.process.client")
    setattr(client, "_PROGRAM", program)  # noqa: B010


class _Life:
    def __init__(
        self,
        state_dir: str,
        marks: str,
        open_engine: Callable[[str], Engine],
        acknowledge: Callable[[bytes], None],
    ) -> None:
        self._state_dir, self._marks = state_dir, marks
        self._open_engine, self._acknowledge = open_engine, acknowledge
        self._engine: Engine | None = None

    def run(self, programs: Sequence[str]) -> None:
        self._try("open", "", self._open)
        self._try("sandbox", "", lambda: self.engine.create_sandbox(_sandbox(self._state_dir), id=_SANDBOX))
        brief, lasting, *wrong = (self._start(key) for key in programs)
        self._try("wait", brief, lambda: self.engine.get(brief).wait(_PATIENCE_SECONDS))
        self._try("recover", "", self._recover)
        self._try("transaction", "", self._transact)
        self._kill_keeper()
        self._try("look", lasting, self._recover)
        self._try("release", brief, lambda: self.engine.get(brief).release())
        self._try("close", "", self._close)
        self._try("open", "", self._open)
        self._try("look", lasting, lambda: None)
        self._try("stop", lasting, lambda: self.engine.get(lasting).stop(5.0))
        for key in (brief, *wrong):
            self._try("delete", "", lambda key=key: self._delete(key))  # type: ignore[misc] # bound at once
        self._try("close", "", self._close)

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            self._open()
        assert self._engine is not None
        return self._engine

    def _try(self, step: str, key: str, call: Callable[[], object]) -> None:
        """Call, and again if it is refused, the last time with an engine that is opened anew."""
        for turn in range(3):
            try:
                call()
            except (AlreadyExistsError, InvalidStateError, NotFoundError) as error:
                if turn:  # it was done before it was refused
                    self._tell(Told(step, key, self._status(key), refused=f"{error}"))
                    return
                self._tell(Told(step, key, refused=f"{type(error).__name__}: {error}"))
            except (LimpetError, MemoryError) as error:
                self._tell(Told(step, key, refused=f"{type(error).__name__}: {error}"))
                if turn == 2:
                    self._tell(Told(step, key, stuck=f"{type(error).__name__}: {error}"))
                elif turn == 1 and step != "close":
                    self._reopen()
            else:
                self._tell(Told(step, key, self._status(key)))
                return

    def _start(self, key: str) -> str:
        """Start a program; once more, in another container, if that one's start was refused."""
        for again in (key, f"{key}-again"):
            self._try("create", again, lambda again=again: create(self.engine, again, self._marks))  # type: ignore[misc] # bound at once
            try:
                self.engine.get(again).start()
            except StartError as error:
                self._tell(Told("start", again, self._status(again), refused=f"{error}"))
                if key == "wrong":
                    return again
            except (LimpetError, MemoryError) as error:
                self._tell(Told("start", again, self._status(again), refused=f"{type(error).__name__}: {error}"))
                self._reopen()
            else:
                self._tell(Told("start", again, self._status(again)))
                return again
        self._tell(Told("start", key, stuck="it cannot be started, twice"))
        return key

    def _open(self) -> None:
        if self._engine is None:
            self._engine = self._open_engine(self._state_dir)

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def _reopen(self) -> None:
        with suppress(LimpetError, MemoryError):
            self._close()
        self._engine = None
        with suppress(LimpetError, MemoryError):
            self._open()

    def _kill_keeper(self) -> None:
        """Have the anchor take over, which adopts what runs."""
        starter: Any = self.engine.starter
        if starter._keeper.keeper_pid:
            with suppress(OSError):
                os.kill(starter._keeper.keeper_pid, signal.SIGKILL)

    def _recover(self) -> None:
        self.engine.recover()

    def _transact(self) -> None:
        with self.engine.store.transaction() as draft:
            for record in self.engine.store.list():
                draft.update(record.id, lambda old: old)

    def _delete(self, key: str) -> None:
        container = self.engine.get(key)
        container.release()
        container.delete()

    def _status(self, key: str) -> Status | None:
        with suppress(LimpetError, MemoryError):
            return self.engine.store.status(key) if key else None
        return None

    def _tell(self, told: Told) -> None:
        self._acknowledge(msgspec.json.encode(told))


def _sandbox(state_dir: str) -> dict[str, Any]:
    return {"metadata": {"name": _SANDBOX}, "log_directory": f"{state_dir}-logs"}


def create(engine: Engine, key: str, marks: str) -> None:
    """Create the container of a program, which leaves a mark, and says something, before anything else."""
    program = _PROGRAMS[key.removesuffix("-again")]
    script = f": > {marks}/{key}; echo {_SAID.decode()}; {program.script}"
    config = {
        "metadata": {"name": key},
        "image": {"image": "host"},
        "command": ["sh", "-c", script] if program.script else ["/nonexistent"],
        "log_path": f"{key}.log",
    }
    engine.create_container(config, _SANDBOX, id=key)


def run_next(engine: Engine, state_dir: str, marks: str) -> None:
    """Run one more container, as if nothing had been. Raises Violation, LimpetError."""
    with suppress(AlreadyExistsError):
        engine.create_sandbox(_sandbox(state_dir), id=_SANDBOX)
    create(engine, "next", marks)
    container = engine.get("next")
    container.start()
    status = container.wait(_PATIENCE_SECONDS)
    _judge("next", status, [], marks)
    container.release()
    said = [entry.text.strip() for entry in read_log(f"{state_dir}-logs", container.metadata.log_path)]
    if said != [_SAID]:
        raise Violation("lost", f"the log of the next container has {said}")
    container.delete()


def _wait_for_end(engine: Engine, key: str) -> None:
    """Give the engine the time to see an end: a stop that it goes on with may have come just now."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (status := engine.store.status(key)).state is ContainerState.RUNNING and time.monotonic() < deadline:
        if status.identity is not None and not status.stop_requested_at and _runs(status.identity):
            return
        time.sleep(0.01)


def _judge_told(told: Sequence[Told], marks: str) -> None:
    """Raise Violation unless all that the life was told of ends is true."""
    for number, each in enumerate(told):
        if each.status is not None and each.status.state is ContainerState.EXITED:
            _judge(each.key, each.status, [one for one in told[:number] if one.key == each.key], marks)


def _judge(key: str, status: Status, told: Sequence[Told], marks: str) -> None:
    """Raise Violation unless what is said of a container is true."""
    program = _PROGRAMS[key.removesuffix("-again")]
    has_mark = os.path.exists(f"{marks}/{key}")
    was_started = any(each.step == "start" and not each.refused for each in told)
    was_stopped = any(each.step in {"look", "stop"} for each in told)  # the step before it, or itself
    match status.state:
        case ContainerState.RUNNING:
            if status.identity is None or not _runs(status.identity):
                raise Violation("false_verdict", f"{key} is said to run: {status}")
        case ContainerState.EXITED if status.reason == Reason.START_ERROR:
            if has_mark or was_started:
                raise Violation("false_verdict", f"{key} is said to have never run, and it has: {status}")
        case ContainerState.EXITED:
            if status.exit_code not in program.codes or (program.is_stopped and not was_stopped):
                raise Violation("false_verdict", f"{key} is said to have ended, which it has not, or not so: {status}")
        case ContainerState.UNKNOWN if status.created_at or status.finished_at:
            raise Violation("other", f"{key} is Unknown: {status}")
    for each in told:
        seen = each.status
        if seen is not None and seen.finished_at and (seen.exit_code, seen.reason) != (status.exit_code, status.reason):
            raise Violation("false_verdict", f"{key} was said to have ended with {seen}, and then with {status}")


def _runs(identity: ProcessIdentity) -> bool:
    with suppress(OSError), open(f"/proc/{identity.pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
        return int(fields[19]) == identity.start_ticks and fields[0] not in {b"Z", b"X"}
    return False


def _clear(engine: Engine) -> None:
    """End, release and delete everything: work can go on, and nobody has to help. Raises Violation, LimpetError."""
    for container in engine.list():
        status = container.status
        if status.state is ContainerState.RUNNING:
            container.stop(5.0)
        if status.state is ContainerState.UNKNOWN and not status.created_at:
            container.create()
        container.release()
        container.delete()
    for sandbox in engine.list_sandboxes():
        sandbox.delete()
    state_dir = engine.store.directory.path
    left = [f"{name}/{each}" for name in ("containers", "sandboxes") for each in os.listdir(f"{state_dir}/{name}")]
    _wait_for_copier(f"{state_dir}/keeper/fifo")
    if os.path.exists(f"{state_dir}/quarantine"):
        left.append("quarantine")
    if left:
        raise Violation("other", f"left after everything was deleted: {left}")


def _wait_for_copier(folder: str) -> None:
    """Wait until all output is copied: a copier tries again each second what was refused."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while left := os.listdir(folder):
        if time.monotonic() > deadline:
            raise Violation("other", f"the output of deleted containers is still to be copied: {left}")
        time.sleep(0.01)


def _require_no_leaks_in_keeper(state_dir: str) -> None:
    """Raise Violation if a keeper goes on holding anything of a container, and all are deleted."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while held := _find_held(state_dir):
        if time.monotonic() > deadline:
            raise Violation("other", f"the keeper has open what belongs to nothing: {held}")
        time.sleep(0.01)


def _find_held(state_dir: str) -> dict[int, str]:
    """Return what keepers have open of containers, by its number; pipes are all beyond those of the loop itself."""
    found: dict[int, str] = {}
    for pid in _find_keepers(state_dir):
        if _read_name(pid) == "limpet-keeper":
            held = open_descriptors(pid)
            pipes = sorted(number for number, target in held.items() if target.startswith("pipe:"))
            found |= {number: held[number] for number in pipes[2:]}
            for number, target in held.items():
                if target.startswith(("uts:", "anon_inode:[pidfd]", "/memfd:")) or "/fifo/" in target:
                    found[number] = target
                if target.startswith("anon_inode:[pidfd]") and _is_pidfd_of_us(pid, number):
                    del found[number]  # it watches who is connected
    return found


def _is_pidfd_of_us(pid: int, number: int) -> bool:
    with suppress(OSError), open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii") as file:
        return f"\nPid:\t{os.getpid()}\n" in file.read()
    return False


def _require_nothing_left(state_dir: str) -> None:
    """Raise Violation if a keeper, a gate or a program is left after its time."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while left := {pid: _read_name(pid) for pid in {*_find_keepers(state_dir), *_find_orphans()}}:
        if time.monotonic() > deadline:
            raise Violation("other", f"processes are left: {left}")
        time.sleep(0.01)


def _find_keepers(state_dir: str) -> list[int]:
    """Return the processes that have the keeper's directory open."""
    place = f"{os.path.realpath(state_dir)}/keeper"
    return [int(pid) for pid in filter(str.isdigit, os.listdir("/proc")) if _read_link(f"/proc/{pid}/fd/3") == place]


def _find_orphans() -> list[int]:
    """Return what came to the process that runs the trial, other than ourselves: nobody looks after it any more."""
    found: list[int] = []
    with suppress(OSError):
        parent = os.getppid()
        for thread in os.listdir(f"/proc/{parent}/task"):
            with open(f"/proc/{parent}/task/{thread}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
    return [pid for pid in found if pid != os.getpid() and _read_name(pid)]


def _read_name(pid: int) -> str:
    with suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        name, _, rest = file.read().partition("(")[2].rpartition(")")
        return "" if rest.split()[0] in {"Z", "X"} else name
    return ""


def _read_link(link: str) -> str:
    with suppress(OSError):
        return os.readlink(link)
    return ""
