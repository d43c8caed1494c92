"""Descriptors of which a fork of this process keeps no copy: one may live for long, and never execute another program.

A file that is open for writing cannot be executed, whoever has it open.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_open: set[int] = set()


@contextmanager
def closed_in_forks(descriptor: int) -> Iterator[None]:
    """Have forks close it at once while the block lasts, in which it stays open."""
    _open.add(descriptor)
    try:
        yield
    finally:
        _open.discard(descriptor)


def _close_after_fork() -> None:
    for each in _open:
        with suppress(OSError):
            os.close(each)
    _open.clear()


os.register_at_fork(after_in_child=_close_after_fork)
