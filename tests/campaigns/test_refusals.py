"""A system that refuses a call, any of an engine's life: callers are told, nothing false is said, nothing is left."""

import pytest

from tests.campaigns.sizes import Size
from tests.crash.trial import WORKERS, run

KNOWN = {
    "keeper/clone": ["EAGAIN"],
    "keeper/sendmsg": ["ETOOMANYREFS"],
    "keeper/pipe2": ["ENFILE"],
    "keeper/pidfd_open": ["EMFILE"],
    "keeper/unlinkat": ["EIO"],
    "keeper/recvmsg": ["KILL"],
    "keeper.child/openat": ["EMFILE"],
    "copier/readv": ["EIO"],
    "life/pidfd_open": ["ENOMEM"],
    "life/flock": ["ENOLCK"],
    "life/prlimit64": ["EPERM"],
    "life/write": ["EIO"],
    "life/close": ["EIO"],
    "gate/prctl": ["EINVAL"],
}
"""Where something was found once."""


@pytest.mark.campaign("refusals")
@pytest.mark.timeout(600)
def test_a_call_that_is_refused(size: Size) -> None:
    """Each kind of call of each process, from all over their lives, with each error; or the process is killed there."""
    order = f"most=1, every={size.every}, workers={WORKERS}"
    report = run(f"call_faults(RefusedLife(), roles=ROLES, failures=FAILURES, {order})")
    assert report["violations"] == 0, report["findings"]
    assert report["faults"] >= size.least, report
    assert report["unreached"] <= 1 + report["faults"] / 5, report


@pytest.mark.long
@pytest.mark.campaign("refusals")
@pytest.mark.timeout(600)
def test_what_was_found_once_is_not_found_again(size: Size) -> None:
    """In the gate ten of each kind; otherwise one."""
    order = f"most={1 if size.every > 1 else 10}, workers={WORKERS}"
    report = run(f"call_faults(RefusedLife(), roles=ROLES, failures={KNOWN}, {order})")
    assert report["violations"] == 0, report["findings"]
    assert report["faults"] + report["unreached"] >= len(KNOWN), report


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_dead_gate_that_is_taken_for_a_start_is_found_out() -> None:
    """An engine that does not ask whether the program was executed says RUNNING of what never ran."""
    order = f"failures={{'gate/chdir': ['EIO']}}, most=1, workers={WORKERS}"
    report = run(f"call_faults(RefusedLifeOfTakers(), roles=ROLES, {order})")
    assert report["false_verdicts"] > 0, report


KILLED_AT_WRITES = f"roles=ROLES, failures={{'keeper/write': ['KILL']}}, most=40, workers={WORKERS}"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_keeper_alone_knows_an_end_and_is_killed_as_it_writes() -> None:
    """No kernel before 6.15 tells of a process that was reaped; the keeper is killed at each of its writes."""
    report = run(f"call_faults(RefusedLifeBefore615(), {KILLED_AT_WRITES})")
    assert report["violations"] == 0, report["findings"]
    assert report["faults"] >= 10, report


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_keeper_that_reaps_before_it_writes_is_found_out() -> None:
    """Killed between the two, it takes the exit code with it: unless its engine, on a busy machine, asks in between."""
    for _ in range(4):
        report = run(f"call_faults(RefusedLifeOfHastyKeepers(), {KILLED_AT_WRITES})")
        if report["false_verdicts"]:
            return
    pytest.fail(f"not found out: {report}")
