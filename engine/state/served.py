"""Which state directories the processes that look after containers serve, wherever these directories are now.

A keeper has its own directory open for as long as it lives, and conmon works in one of its container's bundle. Both are
found by that also where no path leads: renamed, or in another mount namespace.
"""

import os
from collections.abc import Iterator

from limpet.recovery.host import read_name

_PLACES = {
    b"limpet-anchor": "fd/3/..",
    b"limpet-keeper": "fd/3/..",
    b"conmon": "cwd/../../../../..",  # of containers/ID/oci/RUN/exits
}
"""From a process's entry in /proc to its state directory, by the name that it has."""


def find_served(device: int, inode: int) -> Iterator[str]:
    """Yield paths in /proc of the directory with these numbers, by way of this user's processes that serve it.

    Of other processes the name is read, and nothing else. A process may give itself any name: it is proof of nothing.
    Raises OSError if processes cannot be looked at now, as without file descriptors.
    """
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            place = _PLACES.get(read_name(int(pid))) if os.stat(f"/proc/{pid}").st_uid == os.geteuid() else None
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        if place is not None and _has_numbers(path := f"/proc/{pid}/{place}", device, inode):
            yield path


def _has_numbers(path: str, device: int, inode: int) -> bool:
    try:
        found = os.stat(path)
    except OSError:  # it has ended, or what it works in is gone, or not ours to see
        return False
    return (found.st_dev, found.st_ino) == (device, inode)
