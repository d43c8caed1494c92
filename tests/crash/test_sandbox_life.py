"""Sandboxes made, updated, stopped and removed: every kill and every power cut leaves what a recovery finishes."""

import pytest

from tests.crash.trial import WORKERS, run


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_sandbox_cut_short() -> None:
    """Killed at calls throughout its life, or the power cut: it is what was told, and nothing is left over."""
    report = run(
        f"kill_points(SandboxLife(), every=3, workers={WORKERS})"
        f" + power_cuts(SandboxLife(), samples=1, every=23, workers={WORKERS})"
    )
    assert report["points"] > 100
    assert report["images"] > 50
    assert report["violations"] == 0, report["findings"]


def test_a_stop_that_is_not_written_is_noticed() -> None:
    """The trial finds an engine that says of a sandbox that it is stopped, and has not written that."""
    report = run(f"kill_points(Forgetful(), every=25, workers={WORKERS})")
    assert report["lost"] > 0
