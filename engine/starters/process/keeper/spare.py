"""The spare gate: one that is forked ahead of the start that needs it, for a fork is the slowest part of a start.

It knows nothing of a container and is none's process until it is handed a plan. While it waits its name is
SPARE_NAME; it ends when the keeper does.
"""

import os
import select
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from .gate import become_container
from .kernel import close, read_stat
from .messages import send


class Gate(NamedTuple):
    """A gate that was forked, and our ends of what leads to it. All are the holder's."""

    pid: int
    start_ticks: int
    pidfd: int
    control: int
    """A socket: it takes a plan with the streams, then the byte that opens the gate; closed, the gate closes."""
    report: int
    """A pipe, not blocking: why the program was not executed, up to the end of file."""

    def hand_over(self, plan: int, streams: tuple[int, int]) -> None:
        """Give it the plan and the streams of a container. Raises OSError, also if it has ended."""
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, self.control)
        try:
            send(link, {}, (plan, *streams))
        finally:
            link.detach()

    def end(self) -> None:
        """Kill it, reap it and close what leads to it. It must be our child still."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        _close_all((self.pidfd, self.control, self.report))

    @property
    def is_of_use(self) -> bool:
        """Say that nobody has killed it, or stopped it."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        if poll.poll(0):
            return False
        stat = read_stat(self.pid)
        return stat is not None and stat.state != "T"


class Spare:
    """At most one gate that waits for a container."""

    def __init__(self) -> None:
        self._gate: Gate | None = None
        self.is_wanted = False
        """True if a gate was taken since one was made."""

    @property
    def pid(self) -> int:
        """The process that waits, 0 if there is none."""
        return self._gate.pid if self._gate else 0

    def make(self) -> None:
        """Fork one; where that is refused, there is none, and `take` tries again."""
        self.is_wanted = False
        if self._gate is None:
            with suppress(OSError):
                self._gate = _fork_gate()

    def take(self) -> Gate:
        """Return the one that waits, or another. Raises OSError."""
        self.is_wanted = True
        gate, self._gate = self._gate, None
        if gate is not None and not gate.is_of_use:
            gate.end()
            gate = None
        return gate or _fork_gate()

    def give_up(self) -> None:
        """End the one that waits."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.end()


def _fork_gate() -> Gate:
    """Fork a gate. Whatever fails, no process is left. Raises OSError."""
    opened: list[int] = []
    try:
        ours, theirs = _make_link()
        opened += (ours, theirs)
        report_read, report_write = os.pipe2(os.O_CLOEXEC)
        opened += (report_read, report_write)
        os.set_blocking(report_read, False)
        pid = os.fork()
        if not pid:
            become_container(theirs, report_write)
        try:
            stat = read_stat(pid)
            if stat is None:
                raise ProcessLookupError(f"process {pid} is not to be seen in /proc")
            gate = Gate(pid, stat.start_ticks, os.pidfd_open(pid), ours, report_read)
        except BaseException:
            os.kill(pid, signal.SIGKILL)  # our child, not reaped: the number is its own
            os.waitpid(pid, 0)
            raise
        opened = [theirs, report_write]
        return gate
    finally:
        _close_all(opened)


def _make_link() -> tuple[int, int]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return ours.detach(), theirs.detach()


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        close(descriptor)
