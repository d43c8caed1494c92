"""Paths of the host that a config names, and what they lead to: the same for every process, or they are refused."""

import os
import stat


def leads_through_process(path: str) -> bool:
    """Return whether a link of /proc is on the way of a path, which is another file for each process that follows it.

    So are /proc/self, /proc/PID/cwd, /proc/PID/ns/net, /proc/mounts, /dev/fd and /dev/stdin. False where a path leads
    nowhere, or cannot be followed.
    """
    proc = os.stat("/proc").st_dev
    here, ahead = "/", path.split("/")[::-1]
    while ahead:
        part = ahead.pop()
        if part in {"", "."}:
            continue
        here = os.path.dirname(here) if part == ".." else os.path.join(here, part)
        try:
            found = os.lstat(here)
        except OSError:
            return False
        if not stat.S_ISLNK(found.st_mode):
            continue
        if found.st_dev == proc:
            return True
        target = os.readlink(here)
        here = "/" if target.startswith("/") else os.path.dirname(here)
        ahead += target.split("/")[::-1]
    return False
