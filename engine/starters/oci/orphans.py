"""Reaps what comes to this process as an orphan: where it is a subreaper, or the first process of a pid namespace.

Nobody else does then. A command in a container becomes one when its runtime is killed, and a conmon from the beginning.
A process that is not reaped keeps the pid namespace that it was in from ending, and so the container.
"""

import ctypes
import os
import select
import threading
import time
from contextlib import suppress

from limpet.engine.state.descriptors import close_all
from limpet.recovery.host import has_ended
from limpet.recovery.thread import Thread

_PR_GET_CHILD_SUBREAPER = 37
_LOOK_SECONDS = 0.2
"""As often it is seen what else is to be reaped."""
_TRY_SECONDS = 0.01
_LONGEST_TRY_SECONDS = 5.0
"""How long after its end a process may come to us: its parent is about to end, too, or it is another's child."""
_libc = ctypes.CDLL(None, use_errno=True)


def takes_orphans() -> bool:
    """Return whether processes become this one's children when their parents end (prctl(2))."""
    is_subreaper = ctypes.c_int()
    _libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(is_subreaper), 0, 0, 0)
    return os.getpid() == 1 or bool(is_subreaper)


class _Reaper:
    """Waits for the ends of processes that were killed, in a thread of its own while there are any."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._pending: dict[int, float] = {}  # pidfds of our own, and since when it is seen that they have ended
        self._thread: Thread | None = None

    def add(self, pidfd: int) -> None:
        with self._guard:
            self._pending[os.dup(pidfd)] = 0.0
            if self._thread is None or not self._thread.is_alive():
                thread = Thread(self._run, "limpet-reaper")
                with suppress(RuntimeError):  # for want of threads: a later call tries again
                    thread.start()
                    self._thread = thread

    def _run(self) -> None:
        while pending := self._take_stock():
            poll = select.poll()
            for pidfd, ended_at in pending.items():
                if not ended_at:
                    poll.register(pidfd, select.POLLIN)
            poll.poll((_TRY_SECONDS if any(pending.values()) else _LOOK_SECONDS) * 1000)
            for pidfd, ended_at in pending.items():
                self._try(pidfd, ended_at)

    def _take_stock(self) -> dict[int, float]:
        with self._guard:
            if not self._pending:
                self._thread = None
            return dict(self._pending)

    def _try(self, pidfd: int, ended_at: float) -> None:
        """Reap it if it has ended and is ours; leave it when it has long ended, and is not."""
        try:
            is_over = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is not None
        except OSError:  # ChildProcessError: not ours, or not yet
            self._pending[pidfd] = ended_at = ended_at or (time.monotonic() if has_ended(pidfd) else 0.0)
            is_over = bool(ended_at) and time.monotonic() - ended_at > _LONGEST_TRY_SECONDS
        if is_over:
            with self._guard:
                del self._pending[pidfd]
            close_all((pidfd,))


_reaper = _Reaper()


def reap_when_over(pidfd: int) -> None:
    """Reap the process behind a pidfd, which stays the caller's, once it has ended, if it comes to this process."""
    if takes_orphans():
        with suppress(OSError):  # for want of descriptors
            _reaper.add(pidfd)
