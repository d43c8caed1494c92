"""Kills a process with all that it has started: a conmon with a runtime that hangs, a command in a container.

Whom another has become the parent of is not among them.
"""

import os
import signal
from contextlib import suppress

from limpet.recovery.host import open_pidfd, read_stat


def kill_family(pid: int, pidfd: int) -> None:
    """Kill the process behind a pidfd, those that it is the parent of, and theirs. It is not this process's child."""
    with suppress(OSError):
        signal.pidfd_send_signal(pidfd, signal.SIGSTOP)  # from here on it has no more children
        for child in _children(pid):
            _kill_child(child, pid)
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _kill_child(pid: int, parent: int) -> None:
    with suppress(OSError), open_pidfd(pid) as pidfd:
        if int(read_stat(pid)[1]) == parent:  # asked after it was opened: it is the very child
            for child in _children(pid):
                _kill_child(child, pid)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    found = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children", encoding="utf-8") as file:
            found += [int(child) for child in file.read().split()]
    return found
