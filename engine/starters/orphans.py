"""Reaps what comes to this process as an orphan: where it is a subreaper, or the first process of a pid namespace.

Nobody else does then. A command in a container becomes one when its runtime is killed, and a conmon and the processes
of a keeper from the beginning. A process that is not reaped keeps the pid namespace that it was in from ending, and so
the container. The host program's own children are never reaped: what is, is held by a pidfd, or is in a session that is
known to be the other's.
"""

import ctypes
import errno
import os
import select
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

from limpet.engine.state.descriptors import close_all
from limpet.recovery.host import read_stat
from limpet.recovery.thread import Thread

_PR_GET_CHILD_SUBREAPER = 37
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
    """Waits for the ends of processes, in a thread of its own while there are any."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._sessions: dict[int, int] = {}  # by pidfds of our own: the session to reap with it, 0 for none
        self._ended: dict[int, float] = {}  # of these: since when it is seen that they have ended
        self._ends: select.epoll | None = None
        self._thread: Thread | None = None

    def add(self, pidfd: int, session: int) -> None:
        """Reap the process behind a pidfd, which is ours from now on. Raises OSError."""
        with self._guard:
            ends = self._ends = self._ends or select.epoll()
            self._sessions[pidfd] = session  # before it can be seen that it has ended, amid a wait for the others
            try:
                ends.register(pidfd, select.EPOLLIN)
            except BaseException:
                del self._sessions[pidfd]
                raise
            if self._thread is None or not self._thread.is_alive():
                thread = Thread(self._run, "limpet-reaper", (ends,))
                with suppress(RuntimeError):  # for want of threads: a later call tries again
                    thread.start()
                    self._thread = thread

    def _run(self, ends: "select.epoll") -> None:
        while self._has_any():
            for pidfd, _ in ends.poll(_TRY_SECONDS if self._ended else None):
                ends.unregister(pidfd)
                self._ended[pidfd] = time.monotonic()
            for pidfd, ended_at in list(self._ended.items()):
                self._try(pidfd, ended_at)

    def _has_any(self) -> bool:
        with self._guard:
            if not self._sessions:
                self._thread = None
            return bool(self._sessions)

    def _try(self, pidfd: int, ended_at: float) -> None:
        """Reap it if it is ours; leave it when it has long ended, and is not."""
        try:
            reap_with_session(pidfd, self._sessions[pidfd])
        except OSError:  # ChildProcessError: not ours, or not yet
            if time.monotonic() - ended_at < _LONGEST_TRY_SECONDS:
                return
        with self._guard:
            del self._sessions[pidfd], self._ended[pidfd]
        close_all((pidfd,))


_reaper = _Reaper()


def reap_when_over(pidfd: int, session: int = 0) -> None:
    """Reap the process behind a pidfd, which stays the caller's, once it has ended, if it comes to this process.

    With it go the orphans of its `session`, if one is given: see `reap_with_session`.
    """
    if takes_orphans():
        with suppress(OSError):  # for want of descriptors
            _add(os.dup(pidfd), session)


def reap_with_session(pidfd: int, session: int) -> None:
    """Reap a child that has ended, and the orphans of its session that come to this process, once they have.

    While it is not reaped, that session's number is nobody else's; nor may the session be. Raises ChildProcessError,
    OSError if it was not reaped.
    """
    orphans = list(_hold_orphans(session)) if session and takes_orphans() else []
    try:
        if os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is None:
            raise ChildProcessError(errno.ECHILD, "a debugger has it")
    except BaseException:  # another may have reaped it, and the number be another session's
        close_all(orphans)
        raise
    for each in orphans:
        with suppress(OSError):
            _add(each, session)


def _add(pidfd: int, session: int) -> None:
    try:
        _reaper.add(pidfd, session)
    except BaseException:
        close_all((pidfd,))
        raise


def _hold_orphans(session: int) -> Iterator[int]:
    """Yield pidfds of this process's children that are in a session."""
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(OSError):  # it is gone, or no descriptor is free
            if _is_orphan(pid, session):
                pidfd = os.pidfd_open(pid)
                is_held = False
                try:
                    is_held = _is_orphan(pid, session)  # now that it is held, and so
                finally:
                    if not is_held:
                        close_all((pidfd,))
                if is_held:
                    yield pidfd


def _is_orphan(pid: int, session: int) -> bool:
    _, parent, _, its_session, *_ = read_stat(pid)
    return (int(parent), int(its_session)) == (os.getpid(), session)
