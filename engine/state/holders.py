"""Who holds the lock of a file (flock(2)), and was stopped by a signal: nobody else gets it then."""

import os
from collections.abc import Iterator
from contextlib import suppress

from limpet.recovery.host import open_pidfd, read_stat

_STOPPED = b"T"
"""On a signal, in proc_pid_stat(5); not by a debugger."""


def find_stopped_holders(lock: int) -> Iterator[tuple[int, int]]:
    """Yield pid and pidfd of each process that was stopped and holds the lock of an open file, this process's own too.

    The pidfd is open meanwhile, and was before the process was asked what it holds. Raises OSError.
    """
    path, found = os.readlink(f"/proc/self/fd/{lock}"), os.fstat(lock)
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(ProcessLookupError, FileNotFoundError, PermissionError):
            if read_stat(pid)[0] == _STOPPED:
                with open_pidfd(pid) as pidfd:
                    if _holds(pid, path, found):
                        yield pid, pidfd


def _holds(pid: int, path: str, found: os.stat_result) -> bool:
    """Say whether a process has the file open by which it is locked; others may have it open, too. Raises OSError."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        link = f"/proc/{pid}/fd/{name}"
        if os.readlink(link) == path and os.path.samestat(os.stat(link), found):
            with open(f"/proc/{pid}/fdinfo/{name}", encoding="utf-8") as file:
                if any(line.startswith("lock:") and "FLOCK" in line for line in file):
                    return True
    return False
