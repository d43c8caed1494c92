"""Waits until what a container has written is in its log."""

import time
from collections.abc import Callable

_LONGEST_SECONDS, _LOOK_SECONDS = 2.0, 0.002


def await_output(is_copying: Callable[[], bool]) -> None:
    """Return once nothing is on its way to the log any more, after two seconds at most."""
    deadline = time.monotonic() + _LONGEST_SECONDS
    while is_copying() and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
