"""What the drill sees for itself: processes in /proc, and their exit codes, as the parent of all in the end.

As child subreaper (prctl(2)) the drill becomes the parent of all processes that a killed engine leaves behind. It gets
their exit codes from wait, not through the kernel interfaces that the engine uses for adopted processes. Run it in a
process without other children: it reaps, and in the end kills, all children.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from limpet.schema.errors import InvalidStateError
from limpet.schema.layout import BUNDLE_VARIABLE

_PR_SET_CHILD_SUBREAPER = 36
_VARIABLE = BUNDLE_VARIABLE.encode() + b"="


@dataclass(frozen=True)
class Process:
    """A process, not a zombie, that descends from the drill, as seen in /proc."""

    pid: int
    group: int
    session: int
    bundle: str
    """The bundle path in its environment, "" if there is none or it cannot be read."""


@dataclass(frozen=True)
class World:
    """The processes at one moment, and the exit codes known by then."""

    processes: Mapping[int, Process]
    codes: Mapping[int, int]
    strangers: frozenset[int]
    """The drill's own processes, which belong to no container whatever their pid."""

    def leads(self, pid: int, bundle: str) -> bool:
        """Return whether `pid` is alive and is the first process of the container with this bundle."""
        process = self.processes.get(pid)
        if process is None or pid in self.strangers or process.session != pid:
            return False
        return process.bundle in {bundle, ""}  # before it executes the program, its environment lacks the path

    def find_leader(self, bundle: str) -> int:
        """Return the pid of the first process of the container with this bundle, 0 if there is none."""
        for process in self.processes.values():
            if process.bundle == bundle and process.session == process.pid:
                return process.pid
        return 0


class Subreaper:
    """Reaps, in its own thread, the processes left to this one by an engine's death, and remembers the exit codes.

    Raises InvalidStateError in a process that already has children.
    """

    def __init__(self) -> None:
        if _has_children():
            raise InvalidStateError(
                f"process {os.getpid()} has children, which a drill would end; run it in a separate process"
            )
        self._codes: dict[int, int] = {}
        self._strangers: set[int] = set()
        self._dismissed: set[int] = set()
        self._may_reap = threading.Event()
        self._may_reap.set()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="limpet-drill-reaper", daemon=True)

    def start(self) -> None:
        """Become the parent of all descendants."""
        _set_subreaper(on=True)
        self._thread.start()

    def hold(self) -> None:
        """Leave ended processes as zombies until `resume`."""
        self._may_reap.clear()

    def resume(self) -> None:
        """Reap again."""
        self._may_reap.set()

    def look(self) -> World:
        """Return the current state. Exit codes of all earlier exits are known, unless reaping is on hold."""
        while self._may_reap.is_set() and _has_zombies():
            time.sleep(0.001)
        stats = _read_stats()
        processes = {
            pid: Process(pid, group, session, _read_bundle(pid))
            for pid, (state, _, group, session) in stats.items()
            if state not in "ZX" and _descends(pid, stats)
        }
        return World(processes, dict(self._codes), frozenset(self._strangers))

    def kill(self, pid: int) -> None:
        """SIGKILL a child, and wait for its end; it may already have ended."""
        with suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                if pid in _children():  # checked again now that the pidfd refers to it
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)
        self.await_end(pid)

    def await_end(self, pid: int) -> None:
        """Wait for the end of a child that is reaped elsewhere."""
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    def keep_stranger(self, pid: int) -> None:
        """Mark this child as no container's process, whatever its pid."""
        self._strangers.add(pid)

    def dismiss_stranger(self, pid: int) -> None:
        """Kill a child that is no container's process; its exit says nothing about an earlier owner of its pid."""
        self._dismissed.add(pid)
        self.kill(pid)

    def end_all(self) -> None:
        """Kill all children, and all that become children by that, until none is left."""
        self._may_reap.set()
        while _has_children():
            for pid in _children():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # only we can reap it, so the pid was not reused
            time.sleep(0.002)
        self._stopping = True
        if self._thread.is_alive():
            self._thread.join()
        _set_subreaper(on=False)

    def _run(self) -> None:
        while not self._stopping:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            except ChildProcessError:
                time.sleep(0.005)
                continue
            assert found is not None
            exited = found.si_code == os.CLD_EXITED
            if found.si_pid not in self._strangers | self._dismissed:
                self._codes[found.si_pid] = found.si_status if exited else 128 + found.si_status
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
    return [pid for pid, (_, parent, _, _) in _read_stats().items() if parent == os.getpid()]


_Stat = tuple[str, int, int, int]
"""State, parent, process group and session."""


def _read_stats() -> dict[int, _Stat]:
    stats = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):  # it has ended
                stats[int(name)] = _read_stat(name)
    return stats


def _read_stat(pid: str) -> _Stat:
    with open(f"/proc/{pid}/stat", "rb") as file:
        state, parent, group, session = file.read().rpartition(b")")[2].split()[:4]
    return state.decode(), int(parent), int(group), int(session)


def _descends(pid: int, stats: Mapping[int, _Stat]) -> bool:
    """Return whether this process is an ancestor, even if one in between has ended: its children become ours."""
    parent = stats[pid][1]
    while parent in stats and parent != os.getpid():
        parent = stats[parent][1]
    return parent not in {0, 1} or os.getpid() == 1


def _read_bundle(pid: int) -> str:
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        for entry in file.read().split(b"\0"):
            if entry.startswith(_VARIABLE):
                return os.fsdecode(entry[len(_VARIABLE) :])
    return ""
