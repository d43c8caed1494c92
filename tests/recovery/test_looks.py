"""Looks at many containers: whatever fails in a thread that looks, it is over in the end, and the others are seen."""

from typing import Any

import pytest

from limpet.recovery import Boot, Observation, Process, looks
from limpet.recovery.looks import look_at_all
from tests.failures import Failing

SEEN = Observation(boot=Boot.SAME, process=Process.ALIVE)
MANY = 5


class Seeing:
    """A probe that sees that all are alive."""

    def observe(self, container: object) -> Observation:
        return SEEN


@pytest.mark.parametrize("part", ["_Look", "Seen", "Queue.put"])
@pytest.mark.parametrize("at", range(1, MANY + 1))
def test_a_failure_of_a_looks_own_hangs_nothing(monkeypatch: pytest.MonkeyPatch, part: str, at: int) -> None:
    """For want of memory, say: one container at most is not looked at, and it is said why; the others are."""

    failing = Failing({at})
    place: Any = looks
    *above, name = part.split(".")
    for each in above:
        place = getattr(place, each)
    monkeypatch.setattr(place, name, failing(getattr(place, name)))
    containers: Any = [object()] * MANY
    found = look_at_all(containers, Seeing())
    unseen = [seen for seen in found if seen.observation is not SEEN]
    assert len(unseen) <= (part != "Queue.put")
    assert all("MemoryError" in seen.problem for seen in unseen)
