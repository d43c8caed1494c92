"""A signal stops a process of the keeper, at any of its calls: callers see nothing of that, it only takes longer."""

import pytest

from tests.campaigns.sizes import Size
from tests.crash.trial import WORKERS, run

LIMITS = f"workers={4 * WORKERS}, deadline_seconds=30"
"""Most of a life is a wait for what is stopped to be looked at."""


@pytest.mark.campaign("stops")
@pytest.mark.timeout(600)
def test_a_process_of_the_keeper_that_is_stopped(size: Size) -> None:
    """Each kind of call of each process, from all over their lives."""
    report = run(f"call_faults(StoppedLife(), roles=ROLES, failures=STOPS, most=1, every={size.every}, {LIMITS})")
    assert report["violations"] == 0, report["findings"]
    assert report["faults"] >= size.least, report
    assert report["unreached"] <= 1 + report["faults"] / 5, report


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_keeper_that_has_nothing_go_on_is_found_out() -> None:
    """A gate that is stopped is no start, then."""
    order = f"failures={{'gate/prlimit64': ['STOP']}}, most=1, {LIMITS}"
    report = run(f"call_faults(NeglectedLife(), roles=ROLES, {order})")
    assert report["violations"] > 0, report
