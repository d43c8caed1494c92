"""Reads small files from untrusted places: without waiting for a pipe, following a link, or reading too much."""

import errno
import os
import stat


def read_small_file(path: str, limit: int) -> bytes:
    """Return the content of `path`. Raises OSError, also if it is not a file or is larger than `limit` bytes."""
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a file", path)
        data = bytearray()
        while len(data) <= limit and (chunk := os.read(descriptor, limit + 1 - len(data))):
            data += chunk
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit} bytes, the limit for this file", path)
    return bytes(data)
