"""The timetable: one thread that looks at each container or sandbox when something is due. It begins with the first.

It counts by the clock of the boot, which goes on while the machine is suspended, and which nobody sets.
"""

import heapq
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from typing import NamedTuple

from limpet.recovery.host import read_boot_clock
from limpet.recovery.queues import Empty, Queue
from limpet.recovery.thread import Thread, go_on
from limpet.schema.errors import ClosedError, NotFoundError, ResourcesError
from limpet.schema.telling import get_log

_log = get_log("limpet.timetable")
_LONGEST_WAIT_SECONDS = 30.0
"""While something is scheduled the clock is read as often: a suspended machine's timers do not count that time."""
_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 1.0, 60.0


class Kind(StrEnum):
    """What an entry is about."""

    CONTAINER = "container"
    SANDBOX = "sandbox"


class Entry(NamedTuple):
    """A container or a sandbox that is looked at."""

    kind: Kind
    id: str


class Timetable:
    """Calls `look` for each entry when it is due, one after the other.

    `look` returns in how many seconds it wants to be called again, None for never; what it raises is logged, and it is
    called again later and later. After a NotFoundError the entry is forgotten.
    """

    def __init__(self, look: Callable[[Entry], float | None]) -> None:
        self._look = look
        self._noted: Queue[tuple[Entry, float] | None] = Queue()
        self._known: dict[Entry, object] = {}  # the last note of each
        self._failures: dict[Entry, int] = {}
        self._due: dict[Entry, float] = {}
        self._heap: list[tuple[float, Entry]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def begin(self) -> None:
        """Have the thread run that looks. Raises ResourcesError if there is none to be had."""
        with self._lock:
            if self._thread is not None or self._is_closing:
                return
            thread = Thread(target=self._run, name="limpet-timetable")
            try:
                thread.start()
            except RuntimeError as error:
                raise ResourcesError(f"no thread can be started that looks after what is due: {error}") from error
            self._thread = thread

    def note(self, entry: Entry, seconds: float = 0.0) -> None:
        """Have an entry looked at in so many seconds; the earliest time stands. Raises ResourcesError, see `begin`."""
        self.begin()
        with self._lock:
            self._known[entry] = object()
        self._noted.put((entry, read_boot_clock() / 1e9 + seconds))

    def is_known(self, entry: Entry) -> bool:
        """Say whether the entry was noted, and not forgotten since."""
        return entry in self._known

    def forget(self, entry: Entry) -> None:
        """Look at it no more, until it is noted again."""
        with self._lock:
            self._known.pop(entry, None)

    def close(self) -> None:
        """Let the look that is under way end, and look no more: what is due is left to the next. May be repeated."""
        with self._lock:
            self._is_closing = True
        self._noted.put(None)
        if self._thread is not None:
            self._thread.join()

    # The thread

    def _run(self) -> None:
        go_on(self._turn, self._begin_anew, lambda: self._is_closing, _log, "the timetable")

    def _turn(self) -> None:
        self._take_notes(self._patience())
        entry = self._next()
        if entry is not None and not self._is_closing:
            seconds = self._look_at(entry)
            if seconds is not None:
                self._schedule(entry, read_boot_clock() / 1e9 + seconds)

    def _begin_anew(self) -> None:
        """Look at all that was noted, for what is due may be lost: each look finds out for itself what is."""
        now = read_boot_clock() / 1e9
        self._due.clear()
        self._heap.clear()
        for entry in list(self._known):
            self._schedule(entry, now)

    def _patience(self) -> float | None:
        if not self._heap:
            return None
        return min(max(0.0, self._heap[0][0] - read_boot_clock() / 1e9), _LONGEST_WAIT_SECONDS)

    def _take_notes(self, patience: float | None) -> None:
        with suppress(Empty):
            noted = self._noted.get(timeout=patience) if patience != 0 else self._noted.get_nowait()
            while noted is not None:
                self._schedule(*noted)
                noted = self._noted.get_nowait()

    def _schedule(self, entry: Entry, due: float) -> None:
        if due < self._due.get(entry, float("inf")):
            self._due[entry] = due
            heapq.heappush(self._heap, (due, entry))

    def _next(self) -> Entry | None:
        """Take the entry that is due, if there is one."""
        now = read_boot_clock() / 1e9
        while self._heap and self._heap[0][0] <= now:
            due, entry = heapq.heappop(self._heap)
            if self._due.get(entry) == due:  # else an earlier look has taken its place
                del self._due[entry]
                if entry in self._known:
                    return entry
        return None

    def _look_at(self, entry: Entry) -> float | None:
        note = self._known.get(entry)
        try:
            seconds = self._look(entry)
        except NotFoundError:
            with self._lock:
                if self._known.get(entry) is note:  # else another one of this id was noted meanwhile
                    self._known.pop(entry, None)
            self._failures.pop(entry, None)
            return None
        except ClosedError:
            return None
        except Exception as error:  # noqa: BLE001  # whatever it is, the others are looked at
            failures = self._failures[entry] = self._failures.get(entry, 0) + 1
            _log.warning("%s %s: what is due cannot be done now: %s", entry.kind, entry.id, error)
            return min(_RETRY_SECONDS * 2.0 ** min(failures - 1, 10), _LONGEST_RETRY_SECONDS)
        self._failures.pop(entry, None)
        return seconds
