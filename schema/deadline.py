"""When a time that was set is reached, by two clocks: one says which time it is, and may be set; the other goes on.

Nothing is over before as much time has passed as there was left when the time was set: a wall clock that is set forward
brings nothing nearer. Nor before the wall clock says so, except for one that was set back: that puts it off by a minute
at most. In another boot only the wall clock is left to tell how much time there is.
"""

from enum import StrEnum
from typing import NamedTuple

SET_BACK_NS = 60_000_000_000
"""By how much a wall clock that is behind puts it off."""


class DeadlineKind(StrEnum):
    """What is over at a deadline. One container or sandbox has one of each kind."""

    STOP = "stop"
    """The grace of a container that was asked to stop: `Status.stop_deadline`."""
    EXPIRY = "expiry"
    """A container's time: `Status.expires_at`."""
    SANDBOX_EXPIRY = "sandbox-expiry"
    """A sandbox's time: `SandboxStatus.expires_at`."""


class Deadline(NamedTuple):
    """A time that was set, and the time of the boot's clock before which it is not reached; both in nanoseconds."""

    at: int
    boot_at: int

    @classmethod
    def begin(cls, at: int, *, wall: int, boot: int) -> "Deadline":
        """Return the deadline as it is seen at this moment of both clocks."""
        return cls(at, boot + max(0, at - wall))

    def left(self, *, wall: int, boot: int) -> int:
        """Return how many nanoseconds are left, or until it is to be asked again; 0 if it is reached."""
        if boot < self.boot_at:
            return self.boot_at - boot
        latest = self.boot_at + SET_BACK_NS
        if wall >= self.at or boot >= latest:
            return 0
        return min(self.at - wall, latest - boot)
