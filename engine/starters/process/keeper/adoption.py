"""Taking over what a keeper that died knew: which processes are still the ones that it wrote down."""

import errno
import os
import signal

from .container import Container
from .kernel import close, has_ended, hold_uts_namespace, kill, read_inode, read_stat, read_stat_of
from .members import Members

_NO_PROCESS = {errno.ESRCH, errno.EINVAL, errno.ENOENT}
"""What pidfd_open(2) says of a number that is no process's: nobody's, 0, or a thread's."""
_END_SECONDS = 1.0
"""How long one that was killed may take to end before we go on."""


def find_again(container: Container, anonymous: os.stat_result) -> bool:
    """Hold a container's first process if it is still there, or may be; say whether it is.

    It is the one with the inode. Before Linux 6.9, a child of ours with its pid and start time is: nobody else
    could have reaped it. Of another's child these prove nothing, and it is held for its end alone.
    """
    try:
        container.pidfd = os.pidfd_open(container.pid)
    except OSError as error:
        if error.errno not in _NO_PROCESS:
            raise
    stat = read_stat_of(container.pid, container.pidfd) if container.pidfd >= 0 else None
    container.is_stranger = stat is None or stat.parent != os.getpid()
    if stat is not None:
        inode = read_inode(container.pidfd, anonymous)
        has_proof = bool(inode and container.inode)
        if inode == container.inode if has_proof else stat.start_ticks == container.start_ticks:
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
    """End a process whose gate closed with the keeper before us; say whether it had executed its program just before.

    True where nobody knows: "never ran" is not said of what may have run.
    """
    if not container.is_proven:
        return True
    stat = read_stat_of(container.pid, container.pidfd)
    if stat is not None and not stat.has_executed:
        kill(container.pidfd, signal.SIGKILL)
        has_ended(container.pidfd, _END_SECONDS)
        stat = read_stat_of(container.pid, container.pidfd)
    return stat is None or stat.has_executed
