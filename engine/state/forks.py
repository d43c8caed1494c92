"""What a fork of this process must not have: one may live for long, and never execute another program.

The host program may fork in another thread at any time. A fork waits for what begins a program, and for the instant in
which a file is opened or closed; what is open then and may be no fork's, it closes at once. A file that is open for
writing cannot be executed, whoever has it open; and who reads a pipe comes to no end while a fork could write.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO
from weakref import WeakSet

_FORK_SECONDS = 5.0
"""How long a fork waits: what it waits for may hang, as where a program is on a disk that does."""
_open: set[int] = set()
_hidden: "WeakSet[IO[bytes]]" = WeakSet()
_guard = threading.RLock()  # a signal's handler may fork amid what a fork waits for
_forking = threading.local()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Have this process's forks wait until the block is done: they would keep its descriptors open."""
    guard = _guard
    with guard:
        yield


@contextmanager
def opened_here(path: bytes, flags: int, mode: int, *, dir_fd: int) -> Iterator[int]:
    """Open a file while the block runs; no fork has it open for longer than it takes to begin. Raises OSError."""
    with undisturbed():
        descriptor = os.open(path, flags, mode, dir_fd=dir_fd)
        _open.add(descriptor)
    try:
        yield descriptor
    finally:
        with undisturbed():
            _open.discard(descriptor)
            os.close(descriptor)


def hide(file: IO[bytes]) -> None:
    """Have forks from now on have /dev/null in place of this file. It is opened, and this called, undisturbed.

    Its number stays taken there: what would close the file is in the fork, too.
    """
    _hidden.add(file)


def close_hidden(file: IO[bytes]) -> None:
    """Close a file that is hidden; no fork has it. May be repeated."""
    with undisturbed():
        file.close()


def _before_fork() -> None:
    _forking.guard = _guard if _guard.acquire(timeout=_FORK_SECONDS) else None


def _after_fork() -> None:
    if _forking.guard is not None:
        _forking.guard.release()


def _empty_hidden() -> None:
    with suppress(OSError):
        if found := [file.fileno() for file in _hidden if not file.closed]:
            nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            for each in found:
                os.dup2(nothing, each, inheritable=False)
            os.close(nothing)
    _hidden.clear()


def _after_fork_in_child() -> None:
    global _guard  # noqa: PLW0603  # another thread, which is not here, may hold it
    for each in _open:
        with suppress(OSError):
            os.close(each)
    _open.clear()
    _empty_hidden()
    _guard = threading.RLock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
