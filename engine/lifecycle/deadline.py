"""When a time that was set is reached, by two clocks: one can be stored and may be set, the other goes on by itself.

Within one engine's life nothing is over before as much time has passed as there was left when the time was set, or when
the engine was opened: a wall clock that is set forward brings nothing nearer. Nor before the wall clock says so, except
for one that was set back: that puts it off by a minute at most. Across a reopening only the wall clock is left to tell.
"""

import time
from typing import NamedTuple

SET_BACK_NS = 60_000_000_000
"""By how much a wall clock that is behind puts it off."""


def read_boot_clock() -> int:
    """Return the nanoseconds since the boot, those of suspension included: nobody can set that."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Deadline(NamedTuple):
    """A time that was set, and the time of the boot's clock before which it is not reached."""

    expires_at: int
    boot_at: int

    @classmethod
    def begin(cls, expires_at: int, *, wall: int, boot: int) -> "Deadline":
        """Return the deadline as it is seen at this moment of both clocks."""
        return cls(expires_at, boot + max(0, expires_at - wall))

    def left(self, *, wall: int, boot: int) -> int:
        """Return how many nanoseconds are left, or until it is to be asked again; 0 if it is reached."""
        if boot < self.boot_at:
            return self.boot_at - boot
        latest = self.boot_at + SET_BACK_NS
        if wall >= self.expires_at or boot >= latest:
            return 0
        return min(self.expires_at - wall, latest - boot)
