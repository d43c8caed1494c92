"""A container's cgroups: which processes are in them, whoever their parent is, and what they use."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress

from limpet.recovery.host import open_pidfd

_ROOT = "/sys/fs/cgroup"


def list_directories(lines: Sequence[str], name: str) -> Iterator[tuple[str, str]]:
    """Yield controllers ("" for version 2) and directory of each cgroup that is called `name` and is there.

    `lines` are those of /proc/PID/cgroup (cgroups(7)).
    """
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if os.path.basename(path) != name:  # not the container's own: the runtime made none there
            continue
        above = [controllers.removeprefix("name=")] if controllers else [".", "unified"]
        for each in above:
            directory = os.path.normpath(f"{_ROOT}/{each}/{path}")
            if os.path.isdir(directory):
                yield controllers, directory


def list_processes(lines: Sequence[str], name: str) -> set[int]:
    """Return the pids of all processes in the container's cgroups."""
    pids: set[int] = set()
    for _, directory in list_directories(lines, name):
        with suppress(OSError), open(os.path.join(directory, "cgroup.procs"), encoding="ascii") as file:
            pids |= {int(line) for line in file}
    return pids - {0, os.getpid()}


def signal_processes(lines: Sequence[str], name: str, number: int) -> int:
    """Send a signal to all processes in the container's cgroups, 0 to none; return how many there are."""
    pids = list_processes(lines, name)
    for pid in pids if number else ():
        with suppress(OSError), open_pidfd(pid) as pidfd:
            if pid in list_processes(lines, name):  # asked after it was opened: it is the very process
                signal.pidfd_send_signal(pidfd, number)
    return len(pids)
