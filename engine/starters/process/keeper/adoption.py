"""Taking over what a keeper that died knew: which processes are still the ones that it wrote down."""

import os
import signal
import time

from .container import Container
from .gate import is_of_program
from .kernel import (
    NO_PROCESS,
    UNKNOWN_TICKS,
    Stat,
    close,
    has_ended,
    hold_uts_namespace,
    kill,
    read_exit_of_stranger,
    read_inode,
    read_stat,
    read_stat_of,
)
from .members import Members

_END_SECONDS = 1.0
"""How long one that was stopped, or killed, may take to do so before we go on."""
_LOOK_AGAIN_SECONDS = 0.0005


def find_again(container: Container, anonymous: os.stat_result) -> bool:
    """Hold a container's first process if it is still there, or may be; say whether it is.

    It is the one with the inode. Before Linux 6.9, a child of ours with its pid and start time is: nobody else
    could have reaped it. Of another's child these prove nothing, and it is held for its end alone.
    """
    try:
        container.pidfd = os.pidfd_open(container.pid)
    except OSError as error:
        if error.errno not in NO_PROCESS:
            raise
    stat = read_stat_of(container.pid, container.pidfd) if container.pidfd >= 0 else None
    container.is_stranger = stat is None or stat.parent != os.getpid()
    if stat is not None:
        inode = read_inode(container.pidfd, anonymous)
        has_proof = bool(inode and container.inode)
        starts = {container.start_ticks} if container.is_stranger else {container.start_ticks, UNKNOWN_TICKS}
        if inode == container.inode if has_proof else stat.start_ticks in starts:
            container.is_proven = has_proof or not container.is_stranger
            if container.end is None or not container.is_stranger:
                return True  # of a stranger that is known to have ended nothing is to be seen
    if container.pidfd >= 0:
        close(container.pidfd)
        container.pidfd = -1
    return False


def hold_uts_of_left(container: Container, members: Members) -> int:
    """Return a descriptor of the UTS namespace of what a container has left, -1 if there is none.

    That is an orphan of ours, younger than its first process, in a namespace with the number that was written down.
    Raises OSError if that cannot be looked at now.
    """
    for pid in members.orphans().pids if container.uts_inode else ():
        stat = read_stat(pid)
        if stat is None or stat.start_ticks < container.start_ticks:
            continue
        held = hold_uts_namespace(pid)
        if held >= 0 and os.fstat(held).st_ino == container.uts_inode:
            return held
        close(held)
    return -1


def settle_executed(container: Container) -> bool:
    """End a process whose gate closed with the keeper before us; note whether it had executed its program just before.

    It has, where it may be another's: "never ran" is not said of what may have run. False, and it is held no more, if
    nobody knows: it is the very process, and was reaped by somebody else.
    """
    if container.executed is None:
        container.executed = _find_executed(container)
    if container.executed is None:
        close(container.pidfd)
        container.pidfd = -1
        return False
    return True


def _find_executed(container: Container) -> bool | None:
    if not container.is_proven:
        return True
    stat = read_stat_of(container.pid, container.pidfd)
    if stat is not None and not stat.has_executed:
        stat = _end_at_gate(container)
    if stat is not None:
        return stat.has_executed
    status = read_exit_of_stranger(container.pid, container.pidfd)
    return True if status is not None and is_of_program(status) else None


def _end_at_gate(container: Container) -> Stat | None:
    """Kill a process at its gate, unless it executes its program just now; return what it was, None if nobody knows.

    What is not our child is reaped by another as soon as it ends, and then nothing tells any more how far it had come.
    So it is stopped first, and looked at.
    """
    stopped = _stop(container) if container.is_stranger else None
    if stopped is not None and stopped.has_executed:
        kill(container.pidfd, signal.SIGCONT)
        return stopped
    kill(container.pidfd, signal.SIGKILL)
    has_ended(container.pidfd, _END_SECONDS)
    return stopped or read_stat_of(container.pid, container.pidfd)


def _stop(container: Container) -> Stat | None:
    """Stop a process; return what it is from then on, None if it is gone, or does not stop in time."""
    kill(container.pidfd, signal.SIGSTOP)
    until = time.monotonic() + _END_SECONDS
    while (stat := read_stat_of(container.pid, container.pidfd)) is not None and time.monotonic() < until:
        if stat.has_executed or stat.state in {"T", "Z"}:
            return stat
        time.sleep(_LOOK_AGAIN_SECONDS)
    return None
