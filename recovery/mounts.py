"""What is mounted, as /proc/self/mountinfo says (proc_pid_mountinfo(5))."""

import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

MOUNTINFO = "/proc/self/mountinfo"
_PLAIN = re.compile(r"[A-Za-z0-9/._-]+")
"""What no kernel escapes."""


class Mount(NamedTuple):
    """One mount, as this process sees it."""

    device: str
    """Major and minor number of the device, such as "8:1"."""
    root: str
    """The directory of the file system that is visible at the mount point."""
    point: str
    kind: str
    """The type of the file system."""
    options: frozenset[str]
    """Those of the file system, not of this mount."""


def read_mounts() -> list[Mount]:
    """Return all mounts. Raises OSError if they cannot be read."""
    with open(MOUNTINFO, encoding="utf-8", errors="surrogateescape") as lines:
        return list(parse_mounts(lines))


def parse_mounts(lines: Iterable[str]) -> Iterator[Mount]:
    r"""Yield the mount in each line, such as `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`."""
    for line in lines:
        before, _, after = line.rstrip("\n").partition(" - ")
        _, _, device, root, point, *_ = before.split(" ")
        kind, _, options = after.split(" ", 2)
        yield Mount(device, _unescape(root), _unescape(point), kind, frozenset(options.split(",")))


def find_mounts(path: str) -> list[str]:
    """Return the mount points at or below `path`. Raises OSError if the mounts cannot be read."""
    path = _resolve(path)
    with open(MOUNTINFO, "rb", buffering=0) as file:
        content = file.readall()
    if _PLAIN.fullmatch(path) and path.encode() not in content:
        return []  # nearly always so, and looking closer takes ten times as long
    mounts = parse_mounts(content.decode("utf-8", "surrogateescape").rstrip("\n").split("\n"))
    return [mount.point for mount in mounts if mount.point == path or mount.point.startswith(path + "/")]


def _resolve(path: str) -> str:
    """Return the path without links, as the kernel finds it: os.path.realpath looks at each part of it."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # such as one that is missing
        return os.path.realpath(path)
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def find_file_system(device: int) -> str:
    """Return the type of the file system on a device (st_dev), "" if it is not mounted here.

    Raises OSError if the mounts cannot be read.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    return next((mount.kind for mount in read_mounts() if mount.device == number), "")


def _unescape(text: str) -> str:
    """Undo the octal escapes of spaces and the like."""
    if "\\" not in text:  # a removal reads every mount, and hardly any has one
        return text
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
