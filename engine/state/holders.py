"""Who has a file open and was stopped by a signal: nobody else gets the lock that it holds (flock(2))."""

import os
from collections.abc import Iterator
from contextlib import suppress

from limpet.recovery.host import has_own_proc, open_pidfd, read_stat

_STOPPED = b"T"
"""On a signal, in proc_pid_stat(5); not by a debugger."""


def find_stopped(file: int, *, with_lock: bool) -> Iterator[tuple[int, int]]:
    """Yield pid and pidfd of each process that was stopped and has this file open, or has it locked.

    The pidfd is open meanwhile, and was before the process was asked what it has. None where /proc is of another pid
    namespace: the numbers there are other processes', which are not ours to signal. Raises OSError.
    """
    if not has_own_proc():
        return
    name, found = os.path.basename(os.readlink(f"/proc/self/fd/{file}")), os.fstat(file)
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(OSError):  # it has ended, or is not to be looked at
            if read_stat(pid)[0] == _STOPPED:
                with open_pidfd(pid) as pidfd:
                    if has_open(pid, name, found, with_lock=with_lock):
                        yield pid, pidfd


def has_open(pid: int, name: str, found: os.stat_result, *, with_lock: bool = False) -> bool:
    """Say whether a process has the file of this name open, or has it locked. Raises OSError."""
    with os.scandir(f"/proc/{pid}/fd") as entries:
        return any(_is_same(each, name, found) and (not with_lock or _is_locked(each)) for each in entries)


def _is_same(entry: os.DirEntry[str], name: str, found: os.stat_result) -> bool:
    """Say whether an entry of /proc/PID/fd is this file. Nothing else is asked for, on whatever disk that may hang."""
    try:
        return os.path.basename(os.readlink(entry.path)) == name and os.path.samestat(entry.stat(), found)
    except OSError:  # closed meanwhile
        return False


def _is_locked(entry: os.DirEntry[str]) -> bool:
    """Say whether the lock is this descriptor's; others may have the file open, too. Raises OSError."""
    with open(entry.path.replace("/fd/", "/fdinfo/"), encoding="utf-8") as file:
        return any(line.startswith("lock:") and "FLOCK" in line for line in file)
