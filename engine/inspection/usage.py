"""What running containers use of the machine, as /proc tells it: the processes of the session of each one's first.

What has left the session, a daemon, is not counted. A look costs one read for each process of the machine.
"""

import os
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import NamedTuple

from limpet.recovery.host import is_zombie

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SESSION, _USER_TICKS, _SYSTEM_TICKS, _RSS = 3, 11, 12, 21
"""Fields of /proc/PID/stat (proc(5)), counted from the one after the name in parentheses."""


class Usage(NamedTuple):
    """What the processes of one container use."""

    processes: int
    cpu_seconds: float
    """Since they began; of those that have ended nothing is counted."""
    resident_bytes: int


class Look(NamedTuple):
    """One look at the machine."""

    at: float
    """In seconds of the monotonic clock."""
    usage: Mapping[int, Usage]
    """By the pid of the container's first process."""


def look(pids: Collection[int]) -> Look:
    """Return what the sessions that these processes lead use now. One that is gone is missing. Raises OSError."""
    wanted = set(pids)
    found: dict[int, Usage] = {}
    at = time.monotonic()
    for name in os.listdir("/proc") if wanted else ():
        if not name.isdigit():
            continue
        with suppress(OSError, ValueError, IndexError):  # it has ended meanwhile
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b") ")[2].split()
            session = int(fields[_SESSION])
            if session in wanted and not is_zombie(fields):
                ticks = int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])
                before = found.get(session, Usage(0, 0.0, 0))
                found[session] = Usage(
                    before.processes + 1,
                    before.cpu_seconds + ticks / _TICKS_PER_SECOND,
                    before.resident_bytes + int(fields[_RSS]) * _PAGE_BYTES,
                )
    return Look(at, found)


def cpu_share(earlier: Look, later: Look, pid: int) -> float | None:
    """Return how many processors were busy for a container between two looks; None if one of them did not see it."""
    before, now = earlier.usage.get(pid), later.usage.get(pid)
    if before is None or now is None or later.at <= earlier.at:
        return None
    return max(0.0, now.cpu_seconds - before.cpu_seconds) / (later.at - earlier.at)
