"""Reads small files from untrusted places: without waiting for a pipe, following a link, or reading too much."""

import errno
import os
import stat

_CHUNK = 1 << 16


WRONG = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.EFBIG, errno.ELOOP, errno.ENXIO})
"""What `read_small_file` tells of what is there: nothing, or no such file. By any other error it could not look."""


def find_small_file(path: str, limit: int) -> bytes | None:
    """Return the content of `path`, None if no such file is there. Raises OSError if it cannot be looked at."""
    try:
        return read_small_file(path, limit)
    except OSError as error:
        if error.errno not in WRONG:
            raise
        return None


def read_small_file(path: str, limit: int) -> bytes:
    """Return the content of `path`. Raises OSError, also if it is not a file or is larger than `limit` bytes."""
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(path):  # "too many levels" says of one link what is not so
            raise OSError(errno.ELOOP, "it is a symbolic link", path) from error
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a file", path)
        data = os.read(descriptor, min(found.st_size, limit) + 1)  # room for all of it, and no more
        while len(data) <= limit and (chunk := os.read(descriptor, min(limit + 1 - len(data), _CHUNK))):
            data += chunk
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit} bytes, the limit for this file", path)
    return data
