"""What the drill sees for itself: processes in /proc, and how they ended. It asks neither engine nor keeper.

It holds a pidfd of each container's first process that it has seen, which tells the exit code once somebody has reaped
it (PIDFD_GET_INFO, Linux 6.15). And as child subreaper (prctl(2)) the drill becomes the parent of all processes that
nobody else is the parent of any more, and gets their exit codes from wait. What it learns in neither way, the plan
tells: which codes a program can end with. Run it in a process without other children: it reaps, and in the end kills,
all children.
"""

import ctypes
import fcntl
import os
import select
import signal
import struct
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from limpet.recovery.host import has_pidfs, open_pidfd
from limpet.schema.errors import InvalidStateError
from limpet.schema.identity import ProcessIdentity

VARIABLE = "LIMPET_DRILL"
"""In the environment of each container of a drill: the path of its bundle."""
_PR_SET_CHILD_SUBREAPER = 36
_PIDFD_GET_INFO, _PIDFD_INFO_EXIT = 0xC040FF0B, 1 << 3
_LOOK_EVERY_SECONDS = 0.03
"""How often it looks for processes whose end it is to see."""


Birth = tuple[int, int]
"""A pid and its start, in clock ticks since boot: pids come around."""
Mark = tuple[int, int, int]
"""The same, and the inode number of its pidfd (0 before Linux 6.9): where pids are given out by hand, as here, two
processes have one within a tick."""


@dataclass(frozen=True)
class Process:
    """A process, not a zombie, that descends from the drill, as seen in /proc."""

    pid: int
    group: int
    session: int
    bundle: str
    """The bundle path in its environment, "" if there is none or it cannot be read."""
    command: str = ""
    """Its name as /proc/PID/comm has it."""
    parent: int = 0
    start_ticks: int = 0
    """Clock ticks between boot and its start."""

    @property
    def birth(self) -> Birth:
        """What tells it from others that have, or had, its pid."""
        return self.pid, self.start_ticks


@dataclass(frozen=True)
class World:
    """The processes at one moment, and the exit codes known by then."""

    processes: Mapping[int, Process]
    codes: Mapping[Mark, int]
    strangers: frozenset[int]
    """The drill's own processes, which belong to no container whatever their pid."""

    def leads(self, identity: ProcessIdentity | None, bundle: str) -> bool:
        """Return whether this process is alive and is the first process of the container with this bundle."""
        process = self.processes.get(identity.pid) if identity else None
        if identity is None or process is None or process.pid in self.strangers or process.session != process.pid:
            return False
        # Before it executes the program, its environment lacks the path; so does that of who got its pid later.
        return process.bundle == bundle or (not process.bundle and not self.is_reused(identity))

    def is_reused(self, identity: ProcessIdentity) -> bool:
        """Return whether another process has its pid now."""
        process = self.processes.get(identity.pid)
        return process is not None and process.start_ticks != identity.start_ticks

    def find_leader(self, bundle: str) -> int:
        """Return the pid of the first process of the container with this bundle, 0 if there is none."""
        for process in self.processes.values():
            if process.bundle == bundle and process.session == process.pid:
                return process.pid
        return 0


class Subreaper:
    """Reaps, in its own thread, the processes that come to this one, and remembers the exit codes of containers."""

    def __init__(self) -> None:
        self._codes: dict[Mark, int] = {}
        self._strangers: set[int] = set()
        self._may_reap = threading.Event()
        self._may_reap.set()
        self._watched: dict[Birth, int] = {}  # a pidfd of each container's first process
        self._looking = threading.Lock()
        self._stopping = False
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for run, name in ((self._run, "limpet-drill-reaper"), (self._watch, "limpet-drill-watcher"))
        ]

    def start(self) -> None:
        """Become the parent of all descendants.

        Raises InvalidStateError in a process that already has children.
        """
        if _has_children():
            raise InvalidStateError(
                f"process {os.getpid()} has children, which a drill would end; run it in a separate process"
            )
        _set_subreaper(on=True)
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.end_all()
            raise

    def hold(self) -> None:
        """Leave ended processes as zombies until `resume`."""
        self._may_reap.clear()

    def resume(self) -> None:
        """Reap again."""
        self._may_reap.set()

    def look(self) -> World:
        """Return the current state. What ended earlier in the drill's own hands is reaped, unless that is on hold."""
        while self._may_reap.is_set() and _has_zombies():
            time.sleep(0.001)
        stats = _read_stats()
        processes = {
            pid: Process(pid, stat.group, stat.session, _read_bundle(pid), stat.command, stat.parent, stat.start_ticks)
            for pid, stat in stats.items()
            if stat.state not in "ZX" and _descends(pid, stats)
        }
        with self._looking:
            self._follow(processes, {(pid, stat.start_ticks) for pid, stat in stats.items()})
            return World(processes, dict(self._codes), frozenset(self._strangers))

    def kill(self, pid: int) -> None:
        """SIGKILL a descendant, and wait for its end; it may already have ended."""
        with suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                stats = _read_stats()
                if pid in stats and _descends(pid, stats):  # looked at now that the pidfd refers to it
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    _await(pidfd)
            finally:
                os.close(pidfd)

    def await_end(self, pid: int) -> None:
        """Wait for the end of a child that is reaped elsewhere."""
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    def keep_stranger(self, pid: int) -> None:
        """Mark this child as no container's process, whatever its pid."""
        self._strangers.add(pid)

    def end_all(self) -> None:
        """Kill all children, and all that become children by that, until none is left."""
        self._may_reap.set()
        while _has_children():
            for pid in _children():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # only we can reap it, so the pid was not reused
            time.sleep(0.002)
        self._stopping = True
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        for pidfd in self._watched.values():
            os.close(pidfd)
        self._watched.clear()
        _set_subreaper(on=False)

    def _watch(self) -> None:
        while not self._stopping:
            with suppress(OSError):
                self.look()
            time.sleep(_LOOK_EVERY_SECONDS)

    def _follow(self, processes: Mapping[int, Process], present: set[Birth]) -> None:
        """Note how those ended that were watched, and watch those that are new. Those `present` are not yet reaped."""
        for birth, pidfd in list(self._watched.items()):
            code = _read_code(pidfd)
            if code is not None:
                self._codes[(*birth, _read_inode(pidfd))] = code
            if code is not None or (_has_ended(pidfd) and birth not in present):
                os.close(self._watched.pop(birth))
        for process in processes.values():
            if process.bundle and process.session == process.pid and process.birth not in self._watched:
                with suppress(OSError):
                    pidfd = os.pidfd_open(process.pid)
                    if _read_bundle(process.pid) != process.bundle:
                        os.close(pidfd)
                        continue
                    self._watched[process.birth] = pidfd

    def _run(self) -> None:
        while not self._stopping:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            except ChildProcessError:
                time.sleep(0.005)
                continue
            assert found is not None
            exited = found.si_code == os.CLD_EXITED
            with suppress(OSError):  # reaped by the caller of a command: no container
                with open_pidfd(found.si_pid) as pidfd:
                    mark = found.si_pid, _read_stat(found.si_pid).start_ticks, _read_inode(pidfd)
                self._codes[mark] = found.si_status if exited else 128 + found.si_status
            self._may_reap.wait()
            with suppress(ChildProcessError):  # the caller of a command also waits for it, and may be faster
                os.waitid(os.P_PID, found.si_pid, os.WEXITED | os.WNOHANG)


def _set_subreaper(*, on: bool) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _has_zombies() -> bool:
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    except ChildProcessError:
        return False


def _children() -> list[int]:
    """Return the pids of this process's children, including zombies."""
    return [pid for pid, stat in _read_stats().items() if stat.parent == os.getpid()]


class _Stat(NamedTuple):
    command: str
    state: str
    parent: int
    group: int
    session: int
    start_ticks: int


def _read_stats() -> dict[int, _Stat]:
    stats = {}
    for pid in _read_pids():
        with suppress(OSError):  # it has ended
            stats[pid] = _read_stat(pid)
    return stats


def _read_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read_stat(pid: int) -> _Stat:
    with open(f"/proc/{pid}/stat", "rb") as file:
        command, _, rest = file.read().partition(b"(")[2].rpartition(b")")
    fields = rest.split()  # from the third on, the state (proc(5))
    parent, group, session, start_ticks = (int(fields[number - 3]) for number in (4, 5, 6, 22))
    return _Stat(os.fsdecode(command), fields[0].decode(), parent, group, session, start_ticks)


def _descends(pid: int, stats: Mapping[int, _Stat]) -> bool:
    """Return whether this process is an ancestor, even if one in between has ended: its children become ours."""
    parent = stats[pid].parent
    while parent in stats and parent != os.getpid():
        parent = stats[parent].parent
    return parent not in {0, 1} or os.getpid() == 1


def _read_bundle(pid: int) -> str:
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        for entry in file.read().split(b"\0"):
            name, _, value = entry.partition(b"=")
            if name == VARIABLE.encode():
                return os.fsdecode(value)
    return ""


def _read_code(pidfd: int) -> int | None:
    """Return the exit code of a process that was reaped, None if it was not, or the kernel does not tell."""
    info = bytearray(64)
    struct.pack_into("Q", info, 0, _PIDFD_INFO_EXIT)
    with suppress(OSError):
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
        if struct.unpack_from("Q", info)[0] & _PIDFD_INFO_EXIT:
            return _as_code(struct.unpack_from("i", info, 60)[0])
    return None


def _read_inode(pidfd: int) -> int:
    return os.fstat(pidfd).st_ino if has_pidfs() else 0


def _as_code(wait_status: int) -> int:
    code = os.waitstatus_to_exitcode(wait_status)
    return 128 - code if code < 0 else code


def _has_ended(pidfd: int) -> bool:
    return bool(_poll(pidfd, 0))


def _await(pidfd: int) -> None:
    _poll(pidfd, None)


def _poll(pidfd: int, timeout_ms: int | None) -> list[tuple[int, int]]:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return poll.poll(timeout_ms)
