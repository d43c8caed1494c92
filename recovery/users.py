"""Which processes use a directory. Reads nothing of a neighbour that can hang, or that he can make large.

What is asked of /proc/PID needs none of the locks that a process can hold for ever: the links `root`, `cwd`, `exe`,
`fd/N` and `ns/mnt`, and `mountinfo`, which the kernel answers from its own memory. `environ`, `cmdline` and `maps` wait
for a process whose memory is busy, and stat(2) through a link waits for its file system. All of it has a limit of time,
and each file one of size.
"""

import os
import time
from collections.abc import Collection, Iterator

import msgspec

from limpet.recovery.mounts import Mount, open_lines, parse_mounts, read_mounts

_TIME_LIMIT_SECONDS = 5.0
_MOST_MOUNTS_BYTES = 1 << 20


class Users(msgspec.Struct, frozen=True, kw_only=True):
    """Who uses some directories."""

    pids: dict[str, int] = {}
    """For each directory that is used, the pid of one process that uses it."""
    hidden: str = ""
    """Why there may be more; empty if everything was looked at."""


class _OutOfTimeError(Exception):
    """It takes too long."""


def find_users(directories: Collection[str], *, time_limit_seconds: float = _TIME_LIMIT_SECONDS) -> Users:
    """Return which of these directories live processes use. Raises OSError if /proc cannot be listed.

    A process uses a directory as its root, its working directory, its program, an open file, or as a mount in a mount
    namespace of its own; memory that is mapped does not count. Another user's process cannot reach into our private
    directory, so only our own count as hidden; of root, all: it has started them as anybody.
    """
    if not directories:
        return Users()
    search = _Search(directories, time.monotonic() + time_limit_seconds)
    hidden = ""
    try:
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                search.look_at(int(name))
            except (FileNotFoundError, ProcessLookupError):  # it has ended
                continue
            except OSError as error:
                # An init that we may not inspect is the machine's, with more rights than ours.
                if name != "1" and _may_be_ours(name):
                    hidden = f"process {name} cannot be inspected: {error.strerror}"
    except _OutOfTimeError:
        hidden = f"there is more to look at than {time_limit_seconds:g} s allow"
    return Users(pids=search.found, hidden=hidden)


class _Search:
    def __init__(self, directories: Collection[str], deadline: float) -> None:
        self.found: dict[str, int] = {}
        self._deadline = deadline
        self._names = {os.path.realpath(path): path for path in directories}
        mounts = read_mounts()
        self._places = {_find_place(path, mounts): name for path, name in self._names.items()}
        self._seen = {(os.readlink("/proc/self/ns/mnt"), os.readlink("/proc/self/root"))}

    def look_at(self, pid: int) -> None:
        """Note which of the directories a process uses. Raises OSError."""
        process = f"/proc/{pid}"
        for link in _links(process):
            if time.monotonic() > self._deadline:
                raise _OutOfTimeError
            try:
                target = os.readlink(link)
            except FileNotFoundError:  # a kernel thread's program, a descriptor closed since
                continue
            for path in _and_above(target):
                if path in self._names:
                    self.found.setdefault(self._names[path], pid)
        view = (os.readlink(f"{process}/ns/mnt"), os.readlink(f"{process}/root"))
        if view not in self._seen:
            self._seen.add(view)
            self._look_at_mounts(pid)

    def _look_at_mounts(self, pid: int) -> None:
        """Note which of the directories are mounted where this process lives."""
        for mount in parse_mounts(_read_start(f"/proc/{pid}/mountinfo")):
            for root in _and_above(mount.root):
                if (mount.device, root) in self._places:
                    self.found.setdefault(self._places[mount.device, root], pid)


def _links(process: str) -> Iterator[str]:
    yield from (f"{process}/{name}" for name in ("root", "cwd", "exe"))
    with os.scandir(f"{process}/fd") as descriptors:
        yield from (descriptor.path for descriptor in descriptors)


def _and_above(path: str) -> Iterator[str]:
    """Yield a path and all directories above it; nothing for what is no path, such as a socket."""
    while path.startswith("/") and path != "/":
        yield path
        path = os.path.dirname(path)


def _find_place(path: str, mounts: Collection[Mount]) -> tuple[str, str]:
    """Return the device of a directory, and where on it the directory is: the same in every mount namespace."""
    around = [mount for mount in mounts if f"{path}/".startswith(f"{mount.point.rstrip('/')}/")]
    nearest = max(around, key=lambda mount: len(mount.point), default=None)
    if nearest is None:
        return "", path
    below = path[len(nearest.point.rstrip("/")) :]
    return nearest.device, f"{nearest.root.rstrip('/')}{below}"


def _read_start(path: str) -> Iterator[str]:
    """Yield the lines of a file up to the limit. Raises OSError if there is more."""
    left = _MOST_MOUNTS_BYTES
    with open_lines(path) as file:
        while line := file.readline(left):
            left -= len(line)
            if left <= 0:
                raise OSError(None, f"it has more than {_MOST_MOUNTS_BYTES} bytes of mounts", path)
            yield line


def _may_be_ours(pid: str) -> bool:
    try:
        return os.geteuid() in {0, os.stat(f"/proc/{pid}").st_uid}
    except FileNotFoundError:
        return False
