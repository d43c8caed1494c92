"""What is noted is looked at, whatever happens meanwhile."""

import heapq
from collections import Counter

import pytest

from limpet.engine.lifecycle.timetable import Entry, Kind, Timetable
from limpet.schema.errors import NotFoundError
from tests.conftest import wait_until
from tests.failures import Failing


def test_what_is_made_anew_during_a_look_is_looked_at() -> None:
    """A look that finds the one before gone does not forget the new one of the same id."""
    entry, looks = Entry(Kind.CONTAINER, "c"), []

    def look(looked_at: Entry) -> None:
        looks.append(looked_at)
        if len(looks) == 1:
            timetable.note(entry)
            raise NotFoundError("the one before is gone")

    timetable = Timetable(look)
    timetable.note(entry)
    try:
        wait_until(lambda: len(looks) == 2, "the second look")
    finally:
        timetable.close()


@pytest.mark.parametrize("at", range(1, 25))
def test_a_failure_of_its_own_loses_nothing_that_is_due(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """For want of memory, say, anywhere in a turn: what was noted is looked at, again and again as it asks for that."""

    def look(entry: Entry) -> float | None:
        looks[entry] += 1
        return 0.01 if looks[entry] < 3 else None

    failing = Failing({at})
    looks = Counter[Entry]()
    entries = [Entry(Kind.CONTAINER, name) for name in ("a", "b")]
    timetable = Timetable(look)
    timetable.begin()
    monkeypatch.setattr("limpet.recovery.thread._PAUSE_SECONDS", 0)
    with monkeypatch.context() as patched:
        for name in ("_schedule", "_patience", "_next", "_look_at"):
            patched.setattr(timetable, name, failing(getattr(timetable, name)))
        patched.setattr(heapq, "heappush", failing(heapq.heappush))
        patched.setattr(heapq, "heappop", failing(heapq.heappop))
        for entry in entries:
            timetable.note(entry)
        try:
            wait_until(lambda: all(looks[entry] >= 3 for entry in entries), "all looks")
            assert failing.calls >= at
        finally:
            timetable.close()
