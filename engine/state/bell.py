"""Waiting for what another process makes durable in a state directory, woken by the kernel.

inotify(7) tells of each write to the WAL, but before it is flushed, and so before anybody can see the commit. So the
owner reads a byte of its lock's file after each commit that others want to know of, which inotify tells, too, and which
changes nothing on disk.
"""

import ctypes
import os
import select
from contextlib import suppress

from limpet.engine.state.names import LOCK

_IN_ACCESS, _IN_MODIFY = 0x1, 0x2
_IN_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC
_BYTES = 64 << 10
_NET_SECONDS = 2.0
"""So often whoever waits looks by itself: an owner may be killed between its commit and the ring."""
_WITHOUT_SECONDS = 0.2
"""So often where this user has no inotify instance left."""


class Bell:
    """Wakes one thread when the owner of a state directory rings. Closed by `close`; another thread may do that."""

    _ending = _inotify = -1  # until they are there

    def __init__(self, path: str) -> None:
        self._path = os.fsencode(os.path.join(path, LOCK))
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._ending = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._inotify = self._libc.inotify_init1(_IN_NONBLOCK_CLOEXEC)
        self.is_closed = False
        self._listen()

    @property
    def is_deaf(self) -> bool:
        """True if the kernel tells nothing, so that only looking helps."""
        return self._inotify < 0

    def wait(self, timeout: float | None) -> None:
        """Return at a ring, after `close`, or after a while, which is at most `timeout` seconds."""
        longest = _WITHOUT_SECONDS if self.is_deaf else _NET_SECONDS
        seconds = longest if timeout is None else min(timeout, longest)
        poll = select.poll()
        for descriptor in (self._ending, self._inotify):
            if descriptor >= 0:
                poll.register(descriptor, select.POLLIN)
        if poll.poll(seconds * 1000):
            with suppress(BlockingIOError):
                os.read(self._inotify, _BYTES)
        else:
            self._listen()  # the file may be another one by now, or may not have been there

    def close(self) -> None:
        """Let whoever waits return, now and from now on. May be repeated."""
        self.is_closed = True
        if self._ending >= 0:
            os.eventfd_write(self._ending, 1)

    def _listen(self) -> None:
        """Listen to the lock's file, which is fine to ask for twice."""
        if not self.is_deaf:
            self._libc.inotify_add_watch(self._inotify, ctypes.c_char_p(self._path), _IN_ACCESS | _IN_MODIFY)

    def __del__(self) -> None:
        for descriptor in (self._ending, self._inotify):
            if descriptor >= 0:
                os.close(descriptor)
