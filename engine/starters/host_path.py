"""Paths of the host that a config names, and what they lead to: the same for every process, or they are refused."""

import os
import stat

from limpet.schema.errors import InvalidInputError, quote_path

_MOST_LINKS = 40
"""So many the kernel follows on the way of a path, and no more (path_resolution(7))."""


def require_plain(field: str, path: str) -> None:
    """Raise InvalidInputError, with the field's name, where a link of /proc is on the way of a path.

    Such are /proc/self, /proc/PID/cwd, /proc/PID/ns/net, /proc/mounts, /dev/fd and /dev/stdin. A path that leads
    nowhere, or cannot be followed, is let pass.
    """
    if _leads_through_process(path):
        raise InvalidInputError(
            f"{field} {quote_path(path)}: a link of /proc is on its way, which leads elsewhere for each process; give"
            " the path that it stands for"
        )


def _leads_through_process(path: str) -> bool:
    proc = os.stat("/proc").st_dev
    here, ahead = "/", path.split("/")[::-1]
    links = 0
    while ahead and links <= _MOST_LINKS:
        part = ahead.pop()
        if part in {"", "."}:
            continue
        here = os.path.dirname(here) if part == ".." else os.path.join(here, part)
        try:
            found = os.lstat(here)
            target = os.readlink(here) if stat.S_ISLNK(found.st_mode) else None
        except OSError:
            return False
        if target is None:
            continue
        if found.st_dev == proc:
            return True
        links += 1
        here = "/" if target.startswith("/") else os.path.dirname(here)
        ahead += target.split("/")[::-1]
    return False
