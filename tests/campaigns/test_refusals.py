"""A system that refuses a call, any of an engine's life: callers are told, nothing false is said, nothing is left."""

import pytest

from tests.campaigns.sizes import Size
from tests.crash.trial import WORKERS, run


@pytest.mark.campaign("refusals")
@pytest.mark.timeout(600)
def test_a_call_that_is_refused(size: Size) -> None:
    """Each kind of call of each process, from all over their lives, with each error; or the process is killed there."""
    order = f"most=1, every={size.every}, workers={WORKERS}"
    report = run(f"call_faults(RefusedLife(), roles=ROLES, failures=FAILURES, {order})")
    assert report["violations"] == 0, report["findings"]
    assert report["faults"] >= size.least, report
    assert report["unreached"] <= report["faults"] / 5, report


@pytest.mark.timeout(300)
def test_a_dead_gate_that_is_taken_for_a_start_is_found_out() -> None:
    """An engine that does not ask whether the program was executed says RUNNING of what never ran."""
    trial = "call_faults(RefusedLifeOfTakers(), roles=ROLES, failures={'fchdir': ['EIO']}, most=1, workers={})"
    report = run(trial.replace("{}", str(WORKERS)))
    assert report["false_verdicts"] > 0, report


@pytest.mark.timeout(300)
def test_a_keeper_that_reaps_before_it_writes_is_found_out() -> None:
    """Killed in between, it takes the exit code with it, though its anchor lives."""
    order = f"roles={{'limpet-keeper': 'keeper'}}, failures={{'write': ['KILL']}}, workers={WORKERS}"
    report = run(f"call_faults(RefusedLifeOfHastyKeepers(), {order})")
    assert report["false_verdicts"] > 0, report
