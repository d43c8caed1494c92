"""Bundles whose making costs few flushes and whose removal none: every kill and every power cut leaves ours."""

from tests.crash.trial import WORKERS, run

_TRIAL = "kill_points({life}(), workers={workers}) + power_cuts({life}(), samples=2, workers={workers})"


def test_a_bundle_cut_short_is_known_as_ours() -> None:
    """Killed at every call, and on every disk that a power cut may leave: whole where that was said, never foreign."""
    report = run(_TRIAL.format(life="BundleLife", workers=WORKERS))
    assert report["points"] + report["images"] > 300
    assert report["violations"] == 0, report["findings"]


def test_each_flush_of_a_bundle_is_needed() -> None:
    """Without one of them, or without the marker in config.json, a power cut leaves what nobody may remove."""
    caught = "power_cuts(life(), samples=1, every=4).violations > 0"
    lives = "(Unmarked, MarkedLate, HastyRemoval, Nameless, Hollow)"
    report = run(f"Report(other=sum({caught} for life in {lives}))")
    assert report["violations"] == 5
