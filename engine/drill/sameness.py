"""Makes runs of a store repeatable to the byte, so that identical files are checked only once."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Final

from limpet.engine.database.sqlite import wal
from limpet.testing.nodes import VOLATILE_SUFFIXES

_KEPT_FRAMES: Final = 1024  # of 4 KiB each
_checksum = lru_cache(_KEPT_FRAMES)(wal._checksum)  # noqa: SLF001  # the disks of one life share frames


@contextmanager
def same_moment() -> Iterator[None]:
    """Stop the clocks that stamp records, so that what is written depends only on what was there.

    The checksum of each WAL frame is computed once. For a process with one thread.
    """
    before = time.time_ns, time.monotonic_ns, wal._checksum  # noqa: SLF001
    time.time_ns = time.monotonic_ns = lambda: 1
    wal._checksum = _checksum  # noqa: SLF001
    try:
        yield
    finally:
        time.time_ns, time.monotonic_ns, wal._checksum = before  # noqa: SLF001


def digest(directory: str) -> bytes:
    """Return a digest of all names and contents in `directory`, except volatile files, which nothing relies on."""
    state = hashlib.sha256()  # twice as fast as others on processors that support it
    for folder, folders, files in os.walk(directory):
        folders.sort()
        state.update(f"{folder.removeprefix(directory)}\0".encode())
        for name in sorted(files):
            if name.endswith(VOLATILE_SUFFIXES):
                continue
            with open(f"{folder}/{name}", "rb") as file:
                content = file.read()
            state.update(f"{name}\0{len(content)}\0".encode())
            state.update(content)
    return state.digest()
