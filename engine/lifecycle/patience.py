"""How long a stop is waited for, and what is raised when that is over."""

import os
import time
from collections.abc import Callable

from limpet.schema.errors import InvalidInputError, InvalidStateError, quote

_KILL_TIMEOUT_SECONDS = 10.0
_FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 0.002, 0.1
"""Between two looks at what a stop has left."""
_LONGEST_SECONDS = 1_000_000_000
"""30 years: a moment that is later than now by that is a number that the database and every clock can take."""


class Patience:
    """What is left of the time in which all of a container is to end."""

    def __init__(self, container_id: str, pid: int, grace: float, find_doubt: Callable[[], str]) -> None:
        """Begin; SIGKILL comes after `grace` seconds at most. `find_doubt` says what is known to be in the way."""
        self._container_id = container_id
        self._find_doubt = find_doubt
        self._pid = pid
        self._latest = time.monotonic() + grace + _KILL_TIMEOUT_SECONDS
        self._pause = _FIRST_LOOK_SECONDS

    def left(self) -> float:
        """Return the seconds that are left."""
        return max(0.0, self._latest - time.monotonic())

    def next_pause(self) -> float:
        """Return the seconds until the next look. Raises InvalidStateError when the time is over."""
        if not self.left():
            if doubt := self._find_doubt():
                raise InvalidStateError(f"container {self._container_id}: {doubt}; try again")
            raise InvalidStateError(
                f"container {self._container_id}: process {self._pid}, or one that it left, has not ended"
                f" {_KILL_TIMEOUT_SECONDS:.0f} s after SIGKILL; {_may_be()}; try again"
            )
        pause = self._pause
        self._pause = min(pause * 2, _LONGEST_LOOK_SECONDS)
        return pause


def _may_be() -> str:
    """Return what keeps a process from being ended by SIGKILL."""
    kernel = "it may hang in the kernel, or a cgroup above its own may be frozen (state D)"
    if os.geteuid() == 0:
        return kernel
    return f"{kernel}, or it is another user's by now (sudo), whom only that user or root can end"


def require_seconds(timeout: object) -> None:
    """Raise InvalidInputError unless `timeout` is seconds, 0 or more, and no more than a time on disk can be later."""
    if not (isinstance(timeout, int | float) and 0 <= timeout <= _LONGEST_SECONDS):  # not a number is neither
        raise InvalidInputError(
            f"timeout {quote(timeout)}: seconds are needed, 0 or more, and {_LONGEST_SECONDS:,} at most"
        )
