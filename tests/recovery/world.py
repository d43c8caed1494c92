"""A world in which an engine is killed: its containers' real processes and directories, and the truth about them.

For the first process of a pid namespace and a mount namespace of its own: orphans become its children, pids are
given out as it likes, and it says which boot this is.
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

from limpet.engine import Engine, errors
from limpet.recovery.evidence import Bundle
from limpet.schema import ContainerState, Reason, Status

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _NEW_PIDS = 0x20000, 0x20000000  # CLONE_NEWNS, CLONE_NEWPID
_PRECIOUS = "precious"
_KEEPERS = "limpet-"
"""What the names of the keeper's processes begin with."""


class Surroundings(StrEnum):
    """Where an engine is opened."""

    HOME = "home"
    ELSEWHERE = "another pid namespace"
    BLIND = "without a boot id"


@dataclass
class Truth:
    """What is true of one container, known without the engine."""

    told: Status
    """What the engine has acknowledged last."""
    pid: int = 0
    """Its process, until that is reaped."""
    code: int | None = None
    """How the process ended, while it is not reaped."""
    witnessed: int | None = None
    """How the process ended, as the keeper saw it while no engine was there."""
    perhaps_witnessed: int | None = None
    """The same, if the keeper was killed while it saw that: it may have written it down."""
    bundle: Bundle = Bundle.WHOLE
    has_rebooted: bool = False
    """True if the machine has been rebooted since it was started."""
    has_sandbox: bool = True
    """False if the machine has been rebooted since it was created: its sandbox is NOTREADY."""


class Expected(NamedTuple):
    """What a recovery must say of a container; None where anything will do."""

    state: ContainerState
    exit_code: int | None = None
    reason: str | None = None


def expect(truth: Truth, where: Surroundings, *, has_witness: bool = True) -> Expected:
    """Return what a recovery must say; `has_witness` tells whether it can ask the keeper, or read its journal."""
    told = truth.told
    if told.released or told.finished_at:
        return Expected(told.state, told.exit_code, told.reason)
    if not told.started_at:
        lost = truth.bundle is not Bundle.WHOLE
        return Expected(ContainerState.UNKNOWN, None, Reason.BUNDLE_LOST) if lost else Expected(ContainerState.CREATED)
    if truth.witnessed is not None and has_witness:
        return Expected(ContainerState.EXITED, truth.witnessed, Reason.ERROR)
    if where is Surroundings.BLIND:
        return Expected(ContainerState.UNKNOWN, None, Reason.UNVERIFIED)
    if truth.has_rebooted:
        return Expected(ContainerState.EXITED, 255, Reason.REBOOTED)
    if where is Surroundings.ELSEWHERE:
        return Expected(ContainerState.UNKNOWN, None, Reason.UNVERIFIED)
    if truth.code is not None:
        return Expected(ContainerState.EXITED, truth.code, Reason.ERROR)
    if not truth.pid:
        return Expected(ContainerState.EXITED, 255, Reason.UNKNOWN)
    return Expected(ContainerState.RUNNING, None, "" if truth.bundle is Bundle.WHOLE else Reason.BUNDLE_LOST)


@dataclass
class World:
    """One state directory, an engine on it from time to time, and all that is around it. `root` is empty at first."""

    root: str
    truths: dict[str, Truth] = field(default_factory=dict)
    strangers: dict[int, int] = field(default_factory=dict)
    """Processes that are nobody's container, by pid, with their start time in ticks."""
    engine: "ServedEngine | None" = None
    cases: int = 0
    """Containers of which a verdict was compared with the truth."""

    def __post_init__(self) -> None:
        if os.getpid() != 1:  # the end of a world is that of all processes that can be seen
            raise RuntimeError("a world is made by the first process of a pid namespace of its own alone")
        self.state_dir = f"{self.root}/state"
        self.containers = f"{self.state_dir}/containers"
        self.outside = f"{self.root}/outside"
        self._boot_file = f"{self.root}/boot_id"
        self._boots = self._planted = 0
        os.mkdir(self.outside)
        self._plant(self.outside)
        self._write_boot_id()
        _mount(self._boot_file, _BOOT_ID, "--bind")

    def open(self, where: Surroundings) -> dict[str, Status]:
        """Open an engine, and return what it says after its recovery."""
        self.engine = ServedEngine(self.state_dir, where, self._boot_file)
        return self.look()

    def look(self) -> dict[str, Status]:
        """Return what the engine says now."""
        assert self.engine is not None
        told = self.engine.ask("look")
        return {key: msgspec.convert(status, Status, strict=False) for key, status in told.items()}

    def crash(self, *, spares_keeper: bool = False) -> None:
        """SIGKILL the engine, and all processes of its keeper unless that is spared."""
        assert self.engine is not None
        self.engine.kill()
        self.engine = None
        if not spares_keeper:
            self.kill_keepers()

    def kill_keepers(self) -> None:
        """SIGKILL all processes of keepers; their children become the world's."""
        while pids := self._find_keepers():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in pids:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    def has_keeper(self) -> bool:
        """Say whether a keeper lives."""
        return bool(self._find_keepers())

    @staticmethod
    def _find_keepers() -> list[int]:
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError), open(f"/proc/{name}/comm", encoding="utf-8", errors="replace") as file:
                if file.read().startswith(_KEEPERS) and _stat(int(name))[0] not in "ZX":
                    found.append(int(name))
        return found

    def step(self, verb: str, container_id: str, *words: str) -> Status | None:
        """Have the engine do one step, and remember what it says then; None if the container is not there any more."""
        assert self.engine is not None
        said = self.engine.ask(verb, container_id, *words)
        if said is None:
            self.truths.pop(container_id, None)
            return None
        status = msgspec.convert(said, Status, strict=False)
        truth = self.truths.setdefault(container_id, Truth(status))
        truth.told, truth.pid = status, status.pid
        return status

    def end_process(self, container_id: str, number: int, *, reap: bool) -> None:
        """Let a container's process end by a signal, and wait for that."""
        truth = self.truths[container_id]
        is_ours = _parent_of(truth.pid) == os.getpid()
        os.kill(truth.pid, number)
        if not is_ours:
            if self.engine is None:  # the keeper reaps it, once its journal is flushed
                _wait_until(lambda: not os.path.exists(f"/proc/{truth.pid}"))
                truth.pid, truth.witnessed = 0, 128 + number
            return
        os.waitid(os.P_PID, truth.pid, os.WEXITED | os.WNOWAIT)
        truth.code = 128 + number
        if reap:
            self.reap(container_id)

    def end_with_keepers(self, container_id: str, number: int) -> None:
        """Let a container's process end by a signal, and kill the keepers while they see that.

        A keeper reaps only what it has written down; what is left is the world's child.
        """
        truth = self.truths[container_id]
        is_ours = _parent_of(truth.pid) == os.getpid()
        os.kill(truth.pid, number)
        self.kill_keepers()
        if os.path.exists(f"/proc/{truth.pid}"):
            os.waitid(os.P_PID, truth.pid, os.WEXITED | os.WNOWAIT)
            truth.code = 128 + number
            truth.perhaps_witnessed = None if is_ours else truth.code
        else:
            truth.pid, truth.witnessed = 0, 128 + number

    def reap(self, container_id: str) -> None:
        """Let the kernel forget a process that has ended."""
        truth = self.truths[container_id]
        os.waitpid(truth.pid, 0)
        truth.pid, truth.code = 0, None

    def give_pid_to_stranger(self, pid: int) -> None:
        """Start a process with this pid, which must be free."""
        with open("/proc/sys/kernel/ns_last_pid", "w", encoding="ascii") as file:
            file.write(str(pid - 1))
        stranger = subprocess.Popen(["sleep", "3000"], start_new_session=True)
        self.strangers[stranger.pid] = _start_ticks(stranger.pid)
        stranger.returncode = 0  # reaped by the world, not by the object

    def reboot(self) -> None:
        """End every process, and be another boot from now on."""
        self.kill_keepers()
        for truth in self.truths.values():
            if truth.pid:
                os.kill(truth.pid, signal.SIGKILL)
                os.waitpid(truth.pid, 0)
            truth.pid, truth.code = 0, None
            truth.has_rebooted = bool(truth.told.started_at)
            truth.has_sandbox = False
        self._write_boot_id()

    def harm_bundle(self, container_id: str, harm: Bundle, *, link: bool) -> None:
        """Do something to a bundle directory behind the engine's back."""
        path = f"{self.containers}/{container_id}"
        if harm is Bundle.PARTIAL:
            os.unlink(f"{path}/config.json")
        else:
            shutil.rmtree(path)
            if harm is Bundle.FOREIGN and link:
                os.symlink(self.outside, path)
            elif harm is Bundle.FOREIGN:
                os.mkdir(path)
                self._plant(path)
        self.truths[container_id].bundle = harm

    def plant_orphan(self, name: str, kind: str) -> None:
        """Put something into the containers' directory that no container owns."""
        path = f"{self.containers}/{name}"
        match kind:
            case "link":
                os.symlink(self.outside, path)
            case "file":
                with open(path, "x", encoding="ascii") as file:
                    file.write("?")
            case "copy" if self.truths:
                source = f"{self.containers}/{min(self.truths)}"
                if os.path.isdir(source) and not os.path.islink(source):
                    shutil.copytree(source, path, symlinks=True, ignore=shutil.ignore_patterns(f"{_PRECIOUS}*"))
            case "mounted":
                os.mkdir(path)
                _mount("none", path, "-t", "tmpfs")
                with open(f"{path}/mounted", "x", encoding="ascii"):
                    pass
            case _:
                os.mkdir(path)
                self._plant(path)

    def unmount_orphan(self, name: str) -> None:
        """Unmount what was planted, which must still be there as it was."""
        assert os.listdir(f"{self.containers}/{name}") == ["mounted"]
        subprocess.run(["umount", f"{self.containers}/{name}"], check=True)

    def require_no_harm(self) -> None:
        """Fail unless whatever is not the engine's is as it was."""
        for pid, ticks in self.strangers.items():
            assert _start_ticks(pid) == ticks, f"stranger {pid} was harmed"
        found = [name for _, _, names in os.walk(self.root) for name in names if name.startswith(_PRECIOUS)]
        assert len(found) == self._planted, f"of {self._planted} files that are not ours {sorted(found)} are left"

    def end(self) -> None:
        """End all processes."""
        if self.engine is not None:
            self.crash()
        while True:
            try:
                ended, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not ended:
                _kill_all()
        subprocess.run(["umount", _BOOT_ID], check=True)

    def _plant(self, directory: str) -> None:
        self._planted += 1
        with open(f"{directory}/{_PRECIOUS}-{self._planted}", "x", encoding="ascii") as file:
            file.write("not yours")

    def _write_boot_id(self) -> None:
        self._boots += 1
        with open(self._boot_file, "w", encoding="ascii") as file:
            file.write(f"11111111-2222-3333-4444-{self._boots:012}\n")


class ServedEngine:
    """An engine in a process of its own that does what it is asked to, until it is killed."""

    def __init__(self, state_dir: str, where: Surroundings, boot_file: str) -> None:
        ours, theirs = socket.socketpair()
        self._lines = ours.makefile("rw")
        self.pid = os.fork()
        if not self.pid:
            ours.close()
            _serve_and_exit(theirs, state_dir, where, boot_file)
        ours.close()
        theirs.close()
        if where is Surroundings.ELSEWHERE:
            os.waitpid(self.pid, 0)
            self.pid = int(self._lines.readline())
        self.ask("wait until opened")

    def ask(self, *words: str) -> Any:  # JSON
        """Return the answer. Fails if the engine raised what is no LimpetError."""
        self._lines.write(json.dumps(words) + "\n")
        self._lines.flush()
        answer = self._lines.readline()
        assert answer, "the engine's process has ended"
        told = json.loads(answer)
        assert "traceback" not in told, told["traceback"]
        return told["answer"]

    def kill(self) -> None:
        """SIGKILL the process, and wait for its end."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._lines.close()


def _serve_and_exit(channel: socket.socket, state_dir: str, where: Surroundings, boot_file: str) -> None:
    lines = channel.makefile("rw")

    def say(**told: Any) -> None:  # JSON
        lines.write(json.dumps(told) + "\n")
        lines.flush()

    try:
        if where is not Surroundings.HOME:
            _enter(where, boot_file, lambda pid: (lines.write(f"{pid}\n"), lines.flush()))
        with Engine.open(state_dir) as engine:
            for line in lines:
                verb, *words = json.loads(line)
                say(answer=_VERBS[verb](engine, *words))
    except BaseException:  # noqa: BLE001  # it is told
        say(traceback=traceback.format_exc())
    finally:
        os._exit(0)


def _enter(where: Surroundings, boot_file: str, tell: Callable[[int], object]) -> None:
    if where is Surroundings.BLIND:
        _call(_LIBC.unshare(_NEW_MOUNTS))
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        _mount("/dev/null", _BOOT_ID, "--bind")
        return
    _call(_LIBC.unshare(_NEW_MOUNTS | _NEW_PIDS))
    pid = os.fork()  # the first process of the new namespace
    if pid:
        tell(pid)
        os._exit(0)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    _mount("none", "/proc", "-t", "proc")
    _mount(boot_file, _BOOT_ID, "--bind")


def _look(engine: Engine) -> dict[str, Any]:
    return {record.id: msgspec.to_builtins(record.status) for record in engine.store.list()}


def _create(engine: Engine, container_id: str, *command: str) -> Any:  # JSON
    sandbox = engine.get_or_create_sandbox({"metadata": {"name": "s"}})  # another one after a reboot
    config = {"metadata": {"name": container_id}, "image": {"image": "host"}, "command": list(command)}
    engine.create_container(config, sandbox.id, id=container_id)
    return _status(engine, container_id)


def _status(engine: Engine, container_id: str) -> Any:  # JSON
    return msgspec.to_builtins(engine.store.status(container_id)) if container_id in engine.store else None


def _act(name: str, *arguments: float) -> Callable[..., Any]:
    def act(engine: Engine, container_id: str) -> Any:  # JSON
        with suppress(errors.InvalidStateError):  # what is said afterwards is looked at
            getattr(engine.get(container_id), name)(*arguments)
        return _status(engine, container_id)

    return act


_VERBS: dict[str, Callable[..., Any]] = {
    "wait until opened": lambda engine: len(engine.store),
    "look": _look,
    "recover": lambda engine: engine.recover() and _look(engine),
    "create": _create,
    "start": _act("start"),
    "wait": _act("wait", 30.0),
    "stop": _act("stop", 30.0),
    "release": _act("release"),
    "delete": _act("delete"),
}


def _mount(source: str, target: str, *options: str) -> None:
    subprocess.run(["mount", *options, source, target], check=True)


def _call(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), "unshare")


def _stat(pid: int) -> list[str]:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def _start_ticks(pid: int) -> int:
    """Return when a process was started; 0 if it has ended."""
    try:
        fields = _stat(pid)
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _parent_of(pid: int) -> int:
    return int(_stat(pid)[1])


def _kill_all() -> None:
    for name in filter(str.isdigit, os.listdir("/proc")):
        if int(name) != os.getpid():
            os.kill(int(name), signal.SIGKILL)
