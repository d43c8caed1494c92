"""What limpet needs of the program around it: threads and calls of the system, and that it is not at its end."""

import _thread
import os
import select
import sys

from limpet.schema.errors import ClosedError, UnsupportedError

_REPLACED_BY = {
    "gevent": "monkey.patch_all(thread=False, select=False, os=False, subprocess=False, signal=False)",
    "eventlet": "monkey_patch(thread=False, select=False, os=False, subprocess=False)",
}
"""Who replaces what blocks by what switches between tasks of one thread, and how it keeps off what limpet relies on."""
_RELIED_ON = (
    (_thread, "start_new_thread"),
    (_thread, "allocate_lock"),
    (select, "select"),  # and with it poll and epoll
    (os, "posix_spawn"),
    (os, "waitpid"),
)


def may_access(path: str, mode: int) -> bool:
    """Say whether this process may read, write or execute a file, as `os.access` does, by the user that it acts as.

    The system call that asks for that user is younger than many a sandbox's list of what is allowed, which then says no
    whatever the file: the older one is believed, too, where that user is the one that began this process.
    """
    is_one_user = (os.geteuid(), os.getegid()) == (os.getuid(), os.getgid())
    return os.access(path, mode, effective_ids=True) or (is_one_user and os.access(path, mode))


def require_no_shutdown() -> None:
    """Raise ClosedError in a finalizer at the end of the interpreter: no other thread runs any more, nor ever will."""
    if sys.is_finalizing():
        raise ClosedError("Python is shutting down, and limpet's threads run no more; ask earlier, as in atexit")


def require_system_calls() -> None:
    """Raise UnsupportedError where gevent or eventlet has replaced what limpet relies on: it would hang.

    Raises ClosedError at the end of the interpreter.
    """
    require_no_shutdown()
    for module, name in _RELIED_ON:
        maker = getattr(getattr(module, name), "__module__", None) or ""
        package = maker.partition(".")[0]
        if package in _REPLACED_BY:
            raise UnsupportedError(
                f"{package} has replaced {module.__name__.lstrip('_')}.{name} in this process, and limpet would hang;"
                f" keep it off, {package}.{_REPLACED_BY[package]}, and call limpet from {package}'s pool of"
                " threads, for its calls block; or have limpet in a process of its own"
            )
