"""Whoever watches a store that is killed or loses power was told of nothing that is not there afterwards."""

import pytest

from tests.crash.trial import WORKERS, run


@pytest.mark.long
@pytest.mark.timeout(600)
def test_kills_and_power_cuts() -> None:
    """At every call of a short life, and for the images of each power cut: what was seen is kept, without a gap."""
    report = run(
        f"kill_points(WatchLife(2, seed=2), every=9, workers={WORKERS})"
        f" + power_cuts(WatchLife(2, seed=2), samples=1, every=12, workers={WORKERS})"
    )
    assert report["points"] > 20
    assert report["images"] > 20
    assert report["violations"] == 0, report["findings"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_check_has_teeth() -> None:
    """A store that tells of a change before it is durable is found."""
    report = run(f"power_cuts(EarlyWatchLife(2, seed=2), samples=1, every=6, workers={WORKERS})")
    assert report["lost"] > 0
