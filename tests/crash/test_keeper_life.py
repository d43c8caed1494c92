"""The journal of the keeper: kills and power cuts leave the ends that an engine relies on, and none that is false."""

import pytest

from tests.crash.trial import WORKERS, run


def test_an_end_that_was_told_survives_the_keeper() -> None:
    """Killed before, after and within each call that changes its files, also while the journal is rewritten."""
    report = run(f"kill_points(KeeperLife(), workers={WORKERS})")
    assert report["points"] > 30
    assert report["violations"] == 0, report["findings"]


def test_an_end_that_was_flushed_survives_a_power_cut() -> None:
    """What the keeper has reaped unasked is on the disk; a torn journal says less, and nothing false."""
    report = run(f"power_cuts(KeeperLife(flushed=True), samples=2, workers={WORKERS})")
    assert report["images"] > 50
    assert report["violations"] == 0, report["findings"]


@pytest.mark.parametrize(
    "trial",
    [
        "kill_points(LateKeeperLife(), workers={})",
        "power_cuts(UnflushedKeeperLife(flushed=True), samples=1, workers={})",
    ],
    ids=["told before written", "reaped before flushed"],
)
def test_a_broken_keeper_is_found_out(trial: str) -> None:
    """What was told and is not there is found as lost."""
    assert run(trial.format(WORKERS))["lost"] > 0
