"""The spare gate: one that is forked ahead of the start that needs it, for a fork is the slowest part of a start.

It knows nothing of a container and is none's process until it is handed a plan. While it waits its name is
SPARE_NAME; it ends when the keeper does. Its memory is held by another process, for the slowest part of what is left of
a start is to take that down; which is done when the next one is made, or no container is left.
"""

import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from .gate import become_container
from .kernel import close, go_on_at, has_ended, read_stat
from .messages import lent, send


class Gate(NamedTuple):
    """A gate that was forked, and our ends of what leads to it. All are the holder's."""

    pid: int
    start_ticks: int
    pidfd: int
    control: int
    """A socket: it takes a plan with the streams, then the byte that opens the gate; closed, the gate closes."""

    def end(self) -> None:
        """Kill it, reap it and close what leads to it. It must be our child still."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        close(self.pidfd)
        close(self.control)


def hand_over(control: int, descriptors: Sequence[int]) -> None:
    """Give a gate what makes it a container's: see `become_container`. Raises OSError."""
    with lent(control) as link:
        send(link, {}, descriptors)


class Spare:
    """At most one gate that waits for a container."""

    def __init__(self) -> None:
        self._gate: Gate | None = None
        self._memory = -1  # the end of a pipe: closed, nothing holds the memory of the last that was made any longer
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
            self._let_memory_go()
            with suppress(OSError):
                until, self._memory = os.pipe2(os.O_CLOEXEC)
                try:
                    self._gate = _fork_gate(until)
                finally:
                    close(until)

    def take(self) -> Gate:
        """Return the one that waits, or another. Raises OSError.

        Where starts come faster than there is a quiet moment, two are forked, and one waits: what costs most is that
        each page we write to after a fork is copied, once for both.
        """
        is_urgent, self.is_wanted = self.is_wanted, True
        self.reap()
        gate, self._gate = self._gate, None
        if gate is None:
            gate = _fork_gate()
            if is_urgent:
                with suppress(Exception):  # the one that is asked for is there
                    self._gate = _fork_gate()
        return gate

    def reap(self) -> None:
        """Give up the one that waits if it has ended, for somebody has killed it."""
        if self._gate is not None and has_ended(self._gate.pidfd):
            gate, self._gate = self._gate, None
            gate.end()

    def give_up(self) -> None:
        """End the one that waits."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.end()
        self._let_memory_go()

    def _let_memory_go(self) -> None:
        close(self._memory)
        self._memory = -1


def _fork_gate(until: int = -1) -> Gate:
    """Fork a gate; its memory is held until the other end of the pipe `until` is closed. Raises OSError.

    Whatever fails, no process is left.
    """
    ours, theirs = _make_link()
    try:
        pid = os.fork()
        if not pid:
            become_container(theirs, until)
        go_on_at(theirs, pid)
        try:
            stat = read_stat(pid)
            if stat is None:
                raise ProcessLookupError(f"process {pid} is not to be seen in /proc")
            _take_oom_score_from(pid)
            return Gate(pid, stat.start_ticks, os.pidfd_open(pid), ours)
        except BaseException:
            os.kill(pid, signal.SIGKILL)  # our child, not reaped: the number is its own
            os.waitpid(pid, 0)
            raise
    except BaseException:
        close(ours)
        raise
    finally:
        close(theirs)


def _take_oom_score_from(pid: int) -> None:
    """Have a gate start with the score of a new process, not the keeper's.

    By itself it would do so once it gets a processor, which may be after its engine has given it another.
    """
    with suppress(OSError):  # one that the keeper was given may not be lowered
        file = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(file, b"0")
        finally:
            close(file)


def _make_link() -> tuple[int, int]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return ours.detach(), theirs.detach()
