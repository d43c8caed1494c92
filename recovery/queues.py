"""A queue on which who waits for so long waits no longer.

`queue.SimpleQueue.get(timeout=...)` of CPython (seen with 3.11) waits without an end if its time is over just as it
goes to sleep, as where another thread or a signal handler has had the processor: what is left is negative then, and
that stands for ever. `queue.Queue` may be used by no signal handler, and by no finalizer, amid a use of it.
"""

import threading
from collections import deque
from queue import Empty
from time import monotonic
from typing import Final, Generic, TypeVar

__all__ = ["Empty", "Queue"]

_T = TypeVar("_T")
_LONGEST_SECONDS: Final = threading.TIMEOUT_MAX


class Queue(Generic[_T]):
    """First in, first out, for any number of threads; `put` also for signal handlers and finalizers."""

    __slots__ = ("_bell", "_items")

    def __init__(self) -> None:
        self._items: deque[_T] = deque()
        self._bell = threading.Lock()  # released: something may have come since somebody looked
        self._bell.acquire()

    def put(self, item: _T) -> None:
        """Add something, and wake one who waits. It waits for nobody."""
        self._items.append(item)
        self._ring()

    def get(self, timeout: float | None = None) -> _T:
        """Take the first, and wait until there is one. Raises Empty if there is none after `timeout` seconds."""
        until = None if timeout is None else monotonic() + timeout
        while True:
            try:
                return self.get_nowait()
            except Empty:
                left = -1.0 if until is None else until - monotonic()
                if until is not None and left <= 0:
                    raise
            self._bell.acquire(timeout=min(left, _LONGEST_SECONDS))

    def get_nowait(self) -> _T:
        """Take the first. Raises Empty if there is none."""
        try:
            item = self._items.popleft()
        except IndexError:
            raise Empty from None
        if self._items:  # both may have been put before anybody woke up
            self._ring()
        return item

    def qsize(self) -> int:
        """Return how many there are."""
        return len(self._items)

    def empty(self) -> bool:
        """Say whether there is none."""
        return not self._items

    def _ring(self) -> None:
        try:  # noqa: SIM105  # there may be no memory for more
            self._bell.release()
        except RuntimeError:  # it has rung already
            pass
