"""Waiting for a state directory that another has open: how long, and how often it is tried."""

import gc
import math
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Generic, Protocol, TypeVar

from limpet.schema.errors import InvalidInputError, StateDirectoryLockedError, quote


class _Closable(Protocol):
    def close(self) -> None: ...


_T = TypeVar("_T")
_Opened = TypeVar("_Opened", bound=_Closable)
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.001, 0.02
"""Between two tries. flock(2) can wait by itself, but not for a time, nor so that an interrupt ends it."""
_PART_SECONDS = 0.2
"""The longest that an interrupt, or a task that is cancelled, waits for a wait to end."""
_GIVEN_UP_SECONDS = 10.0
"""How long an opening may take to end whose caller does not wait for it any more."""
_COLLECTING_SHARE = 0.01
"""Of a wait: how much may be spent on collecting garbage, which takes long where there are many objects."""
_given_up: list[tuple[threading.Event, float]] = []
"""Such openings of this process: what is set once they have closed what they opened, and until when that is waited for.

Nobody else can: what nobody has cannot be closed by a caller.
"""


def pauses(wait: float) -> Iterator[float]:
    """Yield the seconds to pause before each next try, for `wait` seconds in all; `math.inf` never ends."""
    deadline, pause = time.monotonic() + wait, _FIRST_PAUSE_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        yield min(pause, left)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


class Attempt(Generic[_Opened]):
    """An opening on another thread, whose caller may be interrupted or cancelled while it is under way."""

    def __init__(self) -> None:
        self.opened: list[_Opened] = []
        """What was opened. Who does not take it discards the attempt."""
        self._is_wanted = True
        self._over = threading.Event()
        self._over.set()  # it has not begun

    def run(self, open_it: Callable[[], _Opened]) -> None:
        """Open it; it is closed at once if nobody wants it any more, and not opened if that is so already."""
        self._over.clear()
        try:
            if self._is_wanted:
                self.opened.append(open_it())
            if self.opened and not self._is_wanted:
                self.opened[0].close()
        finally:
            self._over.set()

    def discard(self) -> None:
        """Close what was opened. What its thread is still at is closed by that; a next opening waits for it.

        To be called again if it is interrupted: nobody else could close it.
        """
        self._is_wanted = False  # before the look: another interrupt does not wait until it is open
        if not self._over.is_set():
            _given_up.append((self._over, time.monotonic() + _GIVEN_UP_SECONDS))
        for one in self.opened:
            one.close()


def patience_with_given_up() -> float:
    """Return how many seconds another opening waits for those that were given up; 0 if there are none."""
    now = time.monotonic()
    _given_up[:] = [(over, until) for over, until in _given_up if not over.is_set() and until > now]
    return max((until - now for _, until in _given_up), default=0)


_collect_again_at = [0.0]
"""Not before, by the monotonic clock, while a wait goes on."""


def collect_garbage(wait: float) -> bool:
    """Collect what nobody has any more, which may hold the lock; say whether that was done.

    At the last try, which waits no longer, it always is.
    """
    began = time.monotonic()
    if wait > 0 and began < _collect_again_at[0]:
        return False
    gc.collect()
    now = time.monotonic()
    _collect_again_at[0] = now + (now - began) / _COLLECTING_SHARE
    return True


def open_in_parts(attempt: Callable[[float], _T], wait: float) -> _T:
    """Return what `attempt` returns, which is given a part of `wait` to wait, and called again while it is locked.

    So nothing holds an interrupt back for longer than a part. Raises InvalidInputError unless `wait` is 0 or more, and
    StateDirectoryLockedError when it is over.
    """
    for part in _parts(wait):
        try:
            return attempt(part)
        except StateDirectoryLockedError:  # the last attempt is made below
            continue
    return attempt(0)


async def open_in_parts_async(attempt: Callable[[float], Awaitable[_T]], wait: float) -> _T:
    """Do the same in a task of asyncio."""
    for part in _parts(wait):
        try:
            return await attempt(part)
        except StateDirectoryLockedError:
            continue
    return await attempt(0)


def _parts(wait: float) -> Iterator[float]:
    require_wait(wait)
    deadline = time.monotonic() + wait
    while (left := deadline - time.monotonic()) > 0:
        yield min(_PART_SECONDS, left)


def require_wait(wait: object, name: str = "wait") -> None:
    """Raise InvalidInputError unless `wait` is seconds, 0 or more; `math.inf` is for as long as it takes."""
    if not (isinstance(wait, int | float) and (0 <= wait <= sys.float_info.max or wait == math.inf)):
        raise InvalidInputError(f"{name} {quote(wait)}: seconds are needed, 0 or more")
