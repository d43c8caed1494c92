"""Looks at many containers, side by side and each with a deadline: one that hangs is Unknown, and delays no other.

A probe is foreign code, and what it asks may never answer: a mount that hangs, a process in the kernel. One thread does
all looks as long as they are quick. Where a look takes long, others go on with the rest; one that is overdue is left to
its thread, which nobody waits for, and which does not keep the program from ending.
"""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from typing import NamedTuple

from limpet.recovery.evidence import Observation
from limpet.recovery.probe import Probe, Subject
from limpet.recovery.queues import Empty, Queue
from limpet.recovery.thread import Thread

LOOK_TIMEOUT_SECONDS = 10.0
"""How long one look may take, unless the caller says otherwise."""
_QUICK_SECONDS = 0.02
_MOST_AT_ONCE = 16
_MOST_THREADS = 64
"""Those that hang included: beyond them, nothing more is looked at."""


class Seen(NamedTuple):
    """What came of one look."""

    observation: Observation | None
    """None if there was no answer."""
    problem: str = ""
    """Why there was none."""


def look_at_all(
    containers: Sequence[Subject], probe: Probe, *, timeout_seconds: float = LOOK_TIMEOUT_SECONDS
) -> list[Seen]:
    """Return what the probe saw of each container, in their order, or why there was no answer."""
    looks = _Looks(containers, probe, timeout_seconds)
    try:
        return looks.run()
    finally:
        looks.is_over = True


class _Look(NamedTuple):
    """What a thread is doing."""

    at: int
    begun: float


class _Looks:
    def __init__(self, containers: Sequence[Subject], probe: Probe, timeout_seconds: float) -> None:
        self._containers = containers
        self._probe = probe
        self._timeout_seconds = timeout_seconds
        self._indexes = count()  # each is handed out once
        self._found: list[Seen | None] = [None] * len(containers)
        self._current: dict[threading.Thread, _Look] = {}
        self._finished: Queue[threading.Thread] = Queue()
        self._working: set[threading.Thread] = set()
        self._started = 0
        self.is_over = False

    def run(self) -> list[Seen]:
        """Look at all, and return what was seen."""
        if self._containers:
            self._start()
        while self._working:
            with suppress(Empty):
                thread = self._finished.get(timeout=_QUICK_SECONDS)
                self._working.discard(thread)
                thread.join()
                continue
            dead = {thread for thread in self._working if not thread.is_alive()}
            if dead:  # for want of memory, and it could not tell: another looks at what it has left
                self._working -= dead
                self._start()
            self._give_up_what_is_overdue()
            if self._is_slow():
                self._start()
        missing = Seen(None, f"not looked at: {self._started} looks at other containers hang")
        return [seen or missing for seen in self._found]

    def _start(self) -> None:
        """Start one more thread; if that fails and there is no other, look from this one."""
        if len(self._working) >= _MOST_AT_ONCE or self._started >= _MOST_THREADS:
            return
        thread = Thread(target=self._look, name="limpet-look")
        try:
            thread.start()
        except RuntimeError:  # no thread to be had
            if not self._working:
                self._look()
            return
        self._started += 1
        self._working.add(thread)

    def _look(self) -> None:
        thread = threading.current_thread()
        try:
            while not self.is_over and (index := next(self._indexes)) < len(self._containers):
                try:
                    self._current[thread] = _Look(index, time.monotonic())
                    seen = Seen(self._probe.observe(self._containers[index]))
                except BaseException as error:  # noqa: BLE001  # one container never stops the others
                    seen = Seen(None, f"{type(error).__name__}: {error}")
                if self._found[index] is None:  # else it was given up, and this is too late
                    self._found[index] = seen
        finally:
            self._current.pop(thread, None)
            with suppress(MemoryError):  # then it is seen that this thread has ended
                self._finished.put(thread)

    def _give_up_what_is_overdue(self) -> None:
        for thread, look in list(self._current.items()):
            is_overdue = time.monotonic() - look.begun >= self._timeout_seconds
            if is_overdue and thread in self._working and self._found[look.at] is None:
                self._found[look.at] = Seen(None, f"no answer within {self._timeout_seconds:g} s")
                self._working.discard(thread)

    def _is_slow(self) -> bool:
        """Say whether every thread, if any is left, has been at one look for a while, and more is to be looked at."""
        now = time.monotonic()
        looks = [self._current.get(thread) for thread in self._working]
        is_left = any(seen is None for seen in self._found)
        return is_left and all(look is not None and now - look.begun >= _QUICK_SECONDS for look in looks)
