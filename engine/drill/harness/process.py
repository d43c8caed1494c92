"""Forked processes that leave nothing behind: a family is a process and all its descendants, ended together.

Between the caller and the process is a keeper, a process that is the subreaper of all its descendants. No descendant
can leave it, whatever session it creates and however often it forks, and the keeper ends the whole family when its
caller closes it or dies, even by SIGKILL. The caller must have one thread: a lock that another thread holds at a fork
stays locked in the child for ever.
"""

import contextlib
import ctypes
import errno
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from typing import Final, NoReturn, Protocol, Self

from limpet.schema.errors import UnsupportedError

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_STATUS: Final = struct.Struct("=i")
FAILED: Final = 99
"""Exit status of a process whose function raised."""

libc: Final = ctypes.CDLL(None, use_errno=True)
_owns_descendants = False


class Process(Protocol):
    """A forked process that runs a function, and its descendants; a context manager that ends them all.

    It leads its own session. If an exception ends the function, its traceback is sent to `report`.
    """

    report: socket.socket
    """The other end of the datagram socket that the function gets."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    @property
    def status(self) -> int | None:
        """Its exit status (negative: the signal that ended it), once wait() has seen its end."""

    def fileno(self) -> int:
        """Return a descriptor for poll() that is readable once it has ended."""

    def wait(self, timeout_seconds: float | None = None) -> int | None:
        """Wait for its end and return its status; None if the time runs out first."""

    def kill(self) -> None:
        """SIGKILL only this process, and wait until it is gone; its descendants live on."""

    def close(self) -> None:
        """End the process and every descendant, and wait until all are reaped."""


def start(function: Callable[[socket.socket], None]) -> Process:
    """Fork a process that runs `function`.

    If this process owns its descendants (see `own_descendants`) it is its own keeper, which saves a fork. Raises
    UnsupportedError if this process has other threads, and OSError if it cannot fork.
    """
    require_single_thread()
    _flush()
    return Child(function) if _owns_descendants else Family(function)


class Child:
    """A process whose parent, this process, owns all its descendants: ending one ends them all."""

    def __init__(self, function: Callable[[socket.socket], None]) -> None:
        self.status: int | None = None
        self.report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            self.report.close()
            _run(theirs, function)
        theirs.close()
        self._pidfd = os.pidfd_open(self._pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """See Process."""
        return self._pidfd

    def wait(self, timeout_seconds: float | None = None) -> int | None:
        """See Process."""
        if self.status is None and select.select([self._pidfd], [], [], timeout_seconds)[0]:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self.status

    def kill(self) -> None:
        """See Process."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """See Process."""
        if self._pidfd >= 0:
            end_descendants()
            self.report.close()
            os.close(self._pidfd)
            self._pidfd = -1


class Family:
    """A process behind a keeper, which ends it with all its descendants."""

    def __init__(self, function: Callable[[socket.socket], None]) -> None:
        self.status: int | None = None
        self._pidfd = -1
        self._control, keeper_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.report, process_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._keeper = os.fork()
        if self._keeper == 0:
            self._control.close()
            self.report.close()
            _keep(keeper_end, process_end, function)
        keeper_end.close()
        process_end.close()
        _, descriptors, _, _ = socket.recv_fds(self._control, 1, 1)
        if not descriptors:
            self.close()
            raise OSError(errno.EAGAIN, "the process could not be forked")
        self._pidfd = descriptors[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """See Process."""
        return self._control.fileno()

    def wait(self, timeout_seconds: float | None = None) -> int | None:
        """See Process."""
        if self.status is None and select.select([self._control], [], [], timeout_seconds)[0]:
            status = self._control.recv(_STATUS.size)
            self.status = _STATUS.unpack(status)[0] if status else -signal.SIGKILL  # the keeper was killed
        return self.status

    def kill(self) -> None:
        """See Process."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """See Process."""
        if not self._keeper:
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(b"q")  # closing is not enough: a family forked later has a copy
        self._control.close()
        os.waitpid(self._keeper, 0)
        self._keeper = 0
        self.report.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)


def read_failure(process: Process) -> str:
    """Return the traceback of the exception that ended the process's function, once; otherwise an empty string."""
    try:
        return process.report.recv(65_536, socket.MSG_DONTWAIT).decode(errors="replace")
    except BlockingIOError:
        return ""


def require_single_thread() -> None:
    """Raise UnsupportedError if this process has more than one thread: it cannot fork safely."""
    deadline = time.monotonic() + 1  # a thread that was joined may be there for an instant yet
    while (threads := thread_count()) > 1 and time.monotonic() < deadline:
        time.sleep(0.005)
    if threads > 1:
        raise UnsupportedError(
            f"crash tests fork, which is safe only from a process with one thread, and this one has {threads}; "
            "start them before other threads, or in a separate process"
        )


def thread_count() -> int:
    """Return the number of threads of this process, including those unknown to Python."""
    return len(os.listdir("/proc/self/task"))


def _keep(control: socket.socket, report: socket.socket, function: Callable[[socket.socket], None]) -> NoReturn:
    """Be the keeper: fork the process, report how it ends, and end all that remains when the caller lets go."""
    try:
        os.setsid()  # the caller handles interrupts from the terminal
        own_descendants()
        process = os.fork()
        if process == 0:
            control.close()
            _run(report, function)
        report.close()
        pidfd = os.pidfd_open(process)
        socket.send_fds(control, [b"p"], [pidfd])
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(control, select.POLLIN)
        ready = [descriptor for descriptor, _ in poll.poll()]
        if pidfd in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                control.send(_STATUS.pack(status))
                control.recv(1)
        end_descendants()
    finally:
        os._exit(0)


def _run(report: socket.socket, function: Callable[[socket.socket], None]) -> NoReturn:
    global _owns_descendants  # noqa: PLW0603 - true of the parent, not of the child
    _owns_descendants = False
    status = FAILED
    try:
        os.setsid()
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        function(report)
        status = 0
    except BaseException:  # noqa: BLE001 - any exception is reported to the caller, who judges it
        with contextlib.suppress(OSError):
            report.send(traceback.format_exc()[-16_384:].encode(errors="replace"), socket.MSG_DONTWAIT)
    finally:
        with contextlib.suppress(OSError, ValueError):
            _flush()
        os._exit(status)


def own_descendants() -> None:
    """Become the parent of every descendant whose own parent dies, and end them all together from now on.

    For a process created by start(), in which nobody else starts processes.
    """
    global _owns_descendants  # noqa: PLW0603 - a fact about this process, as the kernel keeps it (PR_SET_CHILD_SUBREAPER)
    _owns_descendants = True
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants() -> None:
    """SIGKILL and reap every child of this process, and all that become its children by that.

    A thread that a check has left may reap some of them meanwhile, as an engine's does where orphans come to it.
    """
    while True:
        children = _children()
        for pid in children:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                _kill_child(pid)
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        try:
            os.waitpid(-1, os.WNOHANG)  # proc(5): a list read while children end may miss some; look again
        except ChildProcessError:
            return


def _kill_child(pid: int) -> None:
    """Kill the process with this number if it is a child of ours. Raises ProcessLookupError, ChildProcessError."""
    pidfd = os.pidfd_open(pid)
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # the number may be a stranger's by now
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


def _children() -> list[int]:
    pids: list[int] = []
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{thread}/children", "rb") as file:
            pids += map(int, file.read().split())
    return pids


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
