"""What is mounted, as /proc/self/mountinfo says (proc_pid_mountinfo(5)), or each file of a few (statx(2))."""

import ctypes
import os
import re
import struct
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, TextIO

MOUNTINFO = "/proc/self/mountinfo"
_PLAIN = re.compile(r"[A-Za-z0-9/._-]+")
"""What no kernel escapes."""
_FEW = 64
"""Entries of a tree that are asked one by one; /proc/self/mountinfo takes longer, the more mounts the host has."""
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW, _AT_NO_AUTOMOUNT, _AT_STATX_DONT_SYNC = -100, 0x100, 0x800, 0x4000
_AT_EMPTY_PATH, _STATX_MNT_ID = 0x1000, 0x1000
_STATX_ATTR_MOUNT_ROOT = 0x2000
"""What is there is the root of a mount (Linux 5.8)."""
_STATX_BYTES, _ATTRIBUTES_AT, _ATTRIBUTES_MASK_AT, _MOUNT_ID_AT = 256, 8, 56, 144
"""Of struct statx, where these are 8 bytes each."""
_statx = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
if _statx is not None:
    _statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)


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
    with open_lines(MOUNTINFO) as lines:
        return list(parse_mounts(lines))


def open_lines(path: str) -> TextIO:
    r"""Open a file of /proc in whose lines are names that anybody chooses. Raises OSError.

    Its lines end with "\n" alone, which the kernel escapes in names: nothing else that Python takes for an end, such
    as "\r" here, or also "\f" and U+2028 in str.splitlines().
    """
    return open(path, encoding="utf-8", errors="surrogateescape", newline="\n")


def parse_mounts(lines: Iterable[str]) -> Iterator[Mount]:
    r"""Yield the mount in each line, such as `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`."""
    for line in lines:
        before, _, after = line.rstrip("\n").partition(" - ")
        _, _, device, root, point, *_ = before.split(" ")
        kind, _, options = after.split(" ", 2)
        yield Mount(device, _unescape(root), _unescape(point), kind, frozenset(options.split(",")))


def find_mounts(path: str) -> list[str]:
    """Return the mount points at or below `path`. Raises OSError if the mounts cannot be read."""
    if _is_seen_free(path):
        return []
    path = _resolve(path)
    with open(MOUNTINFO, "rb", buffering=0) as file:
        content = file.readall()
    if _PLAIN.fullmatch(path) and path.encode() not in content:
        return []  # nearly always so, and looking closer takes ten times as long
    mounts = parse_mounts(content.decode("utf-8", "surrogateescape").rstrip("\n").split("\n"))
    return [mount.point for mount in mounts if mount.point == path or mount.point.startswith(path + "/")]


def _is_seen_free(path: str) -> bool:
    """Say whether a directory tree of few entries has no mount, not even at its top; False if that is not seen.

    What is mounted below a directory keeps that from being empty, so all that there is has been asked then.
    """
    try:
        pending = _list_few(path)
        if not is_no_mount_point(path, follow=True):
            return False
        seen = len(pending)
        while pending:
            entry = pending.pop()
            if not is_no_mount_point(entry.path):
                return False
            if entry.is_dir(follow_symlinks=False):
                below = _list_few(entry.path)
                seen += len(below)
                pending += below
            if seen > _FEW:
                return False
    except OSError:  # such as one that is missing, or may not be looked into
        return False
    return True


def _list_few(path: str) -> list[os.DirEntry[str]]:
    """Return what is in a directory, or a part of it that is more than few. Raises OSError."""
    with os.scandir(path) as entries:
        return list(islice(entries, _FEW + 1))


def is_no_mount_point(path: str, *, follow: bool = False) -> bool:
    """Say whether the kernel says that nothing is mounted at the very path; not whether below. Raises OSError."""
    if _statx is None:
        return False
    found = ctypes.create_string_buffer(_STATX_BYTES)
    flags = _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC | (0 if follow else _AT_SYMLINK_NOFOLLOW)
    if _statx(_AT_FDCWD, os.fsencode(path), flags, 0, found):
        return False
    (attributes,), (known,) = (struct.unpack_from("Q", found, at) for at in (_ATTRIBUTES_AT, _ATTRIBUTES_MASK_AT))
    return bool(known & _STATX_ATTR_MOUNT_ROOT) and not attributes & _STATX_ATTR_MOUNT_ROOT


def read_mount_id(descriptor: int) -> int:
    """Return the id of the mount that a descriptor is in: a bind mount has another, but the same device.

    Raises OSError.
    """
    if _statx is not None:
        found = ctypes.create_string_buffer(_STATX_BYTES)
        flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
        if not _statx(descriptor, b"", flags, _STATX_MNT_ID, found):
            mask, mount = struct.unpack_from("I", found)[0], struct.unpack_from("Q", found, _MOUNT_ID_AT)[0]
            if mask & _STATX_MNT_ID:
                return int(mount)
    with open(f"/proc/self/fdinfo/{descriptor}", "rb") as file:  # before Linux 5.8
        return next(int(line.split()[1]) for line in file if line.startswith(b"mnt_id:"))


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
