"""Which file a path names, and how large it is, asked so that the question does not slow down the next write.

Linux 6.13 and newer give a file whose times were asked for a finer timestamp at its next write, which dirties
the inode once more: on ext4 a stat() after each commit made the next flush a third slower. statx(2) can be
asked for less (https://docs.kernel.org/filesystems/multigrain-ts.html).
"""

import ctypes
import os
from struct import Struct
from typing import NamedTuple

_AT_FDCWD = -100
_STATX_INO_SIZE = 0x300
_BUFFER_BYTES = 256
_FIELDS = Struct("=32xQQ88xII")  # of struct statx: stx_ino, stx_size, stx_dev_major, stx_dev_minor

_statx = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
if _statx is not None:
    _statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)


class File(NamedTuple):
    """A file as it is found under a path."""

    identity: tuple[int, int, int]
    """Inode, and the major and minor number of the device: no other file has the same while this one exists."""
    size: int
    """In bytes."""


def look_at(path: bytes) -> File:
    """Return the file at `path`. Raises OSError if there is none."""
    buffer = ctypes.create_string_buffer(_BUFFER_BYTES)
    try:
        is_told = _statx is not None and _statx(_AT_FDCWD, path, 0, _STATX_INO_SIZE, buffer) == 0
    except ctypes.ArgumentError as error:  # what ctypes makes of a MemoryError
        raise MemoryError(str(error)) from error
    if is_told:
        inode, size, major, minor = _FIELDS.unpack_from(buffer)
        return File((inode, major, minor), size)
    found = os.stat(path)  # an old kernel or C library; or it says why there is no file
    return File((found.st_ino, os.major(found.st_dev), os.minor(found.st_dev)), found.st_size)
