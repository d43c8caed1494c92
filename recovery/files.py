"""Reads small files that anybody may have put there: waits for no pipe, follows no link, and reads only so much."""

import errno
import os
import stat


def read_small_file(path: str, limit: int) -> bytes:
    """Return the content of the file `path`. Raises OSError, also for what is no file, and for over `limit` bytes."""
    # Without O_NONBLOCK a pipe would keep us waiting for somebody who writes to it.
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
        raise OSError(errno.EFBIG, f"it has more than the {limit} bytes that are read of it", path)
    return bytes(data)
