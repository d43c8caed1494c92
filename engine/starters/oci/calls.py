"""Calls of the runtime that are under way: those of an engine that was killed are ended by the next one.

A `delete`, `pause` or `update` that hangs would else be carried out at any time later, on a container that has been
told otherwise since, or on another with its name. Each works in the runtime's own directory (see `root`), and inherits
a lock of it from its engine. The next engine sees by the lock whether one is left, and by both which processes these
are. A `start` is not among them: whether the program runs is not known until it has ended.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from limpet.engine.starters.oci.family import kill_family, list_processes
from limpet.recovery.host import open_pidfd
from limpet.schema.telling import get_log

_log = get_log("limpet.starter.oci")
_END_SECONDS = 5.0
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextmanager
def held(root: str) -> Iterator[int]:
    """Yield a descriptor that a call is to inherit, which then works in the runtime's directory. Raises OSError."""
    descriptor = os.open(root, _DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield descriptor
    finally:
        os.close(descriptor)


def release(descriptor: int) -> None:
    """Let go what `held` has yielded, for a call that has ended: a fork of this process may have a copy for long."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def end_left(root: str) -> None:
    """Kill the calls that an engine which is dead has left, with what they have started. Raises OSError.

    They are this process's own if that is at work there in another thread: those are let alone.
    """
    descriptor = os.open(root, _DIRECTORY)
    try:
        deadline = time.monotonic() + _END_SECONDS
        while not _is_free(descriptor):
            if time.monotonic() > deadline:
                _log.warning("%s: a call of the runtime by an engine that is dead does not end", root)
                return
            for pid, parent, _ in list_processes():
                if parent != os.getpid():
                    with suppress(OSError), open_pidfd(pid) as pidfd:
                        if _is_call(pid, os.path.realpath(root)):  # asked after it was opened: it is the one
                            kill_family(pid, pidfd, sessions=True)
            time.sleep(0.005)
    finally:
        os.close(descriptor)


def _is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_call(pid: int, root: str) -> bool:
    """Say whether a process works in that directory and has it open, as a shell of somebody there has not."""
    if os.readlink(f"/proc/{pid}/cwd") != root:
        return False
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            if os.readlink(f"/proc/{pid}/fd/{name}") == root:
                return True
    return False
