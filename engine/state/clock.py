"""The time that is written down."""

import time

LATEST = 2**63 - 1
"""The latest time that can be stored, in nanoseconds since the epoch."""


def now() -> int:
    """Return the time in nanoseconds since the epoch, wherever the clock is: never 0, which stands for "not yet"."""
    return max(time.time_ns(), 1)
