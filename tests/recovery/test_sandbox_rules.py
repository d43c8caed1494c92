"""The decision table of sandboxes is total and free of overlap, and what it says is true."""

from itertools import product

import pytest
from msgspec.structs import replace

from limpet.recovery import SANDBOX_RULES, decide_sandbox
from limpet.recovery.sandbox_rules import (
    UNREMARKABLE,
    UNRESOLVED,
    Holdings,
    MadeReady,
    SandboxEvidence,
    compare_boots,
    find_sandbox_rules,
)
from limpet.schema.sandbox_status import SandboxReason, SandboxState, SandboxStatus

EVERY_EVIDENCE = [
    SandboxEvidence(state=state, made_ready=made_ready, holdings=holdings)
    for state, made_ready, holdings in product(SandboxState, MadeReady, Holdings)
]
HOLDING = SandboxStatus(boot_id="now", namespaces={"network": "/run/netns/a"}, addresses=("10.0.0.7",), extra={"a": 1})
STATUSES = [
    replace(status, boot_id=boot_id, stopped_at=stopped_at, reason="Stopped" if stopped_at else "")
    for status, boot_id, stopped_at in product((HOLDING, SandboxStatus()), ("now", "then", ""), (0, 5))
]
SITUATIONS = [
    (status, boot_id, used_in, is_copied)
    for status, boot_id, used_in, is_copied in product(
        STATUSES, ("now", None), (set(), {"now"}, {"then"}, {"now", "then"}), (False, True)
    )
]


def test_every_evidence_meets_exactly_one_rule() -> None:
    """Whatever was recorded and seen, one rule answers, and only one; none is dead."""
    found = {str(each): [rule.label for rule in find_sandbox_rules(each)] for each in EVERY_EVIDENCE}
    assert not {each: labels for each, labels in found.items() if len(labels) != 1}
    assert {label for labels in found.values() for label in labels} == {rule.label for rule in SANDBOX_RULES}
    assert {rule.label for rule in SANDBOX_RULES} >= UNREMARKABLE | UNRESOLVED
    assert len({rule.label for rule in SANDBOX_RULES}) == len(SANDBOX_RULES)


@pytest.mark.parametrize(("status", "boot_id", "used_in", "is_copied"), SITUATIONS)
def test_what_is_said_is_true(status: SandboxStatus, boot_id: str | None, used_in: set[str], is_copied: bool) -> None:
    """NOTREADY for good; Rebooted only of another boot, Copied only of what is held in a copy; nothing else is lost."""
    verdict = decide_sandbox(status, boot_id=boot_id, now=9, used_in=used_in, is_copied=is_copied)
    after = verdict.status
    if status.stopped_at:
        assert after == status
        return
    was_before = boot_id == "now" and (status.boot_id == "then" or (not status.boot_id and used_in == {"then"}))
    is_anothers = is_copied and bool(status.addresses)
    if was_before:
        assert (after.state, after.reason, after.stopped_at) == (SandboxState.NOTREADY, SandboxReason.REBOOTED, 9)
    elif is_anothers:
        assert (after.state, after.reason, after.stopped_at) == (SandboxState.NOTREADY, SandboxReason.COPIED, 9)
    else:
        assert after.state is SandboxState.READY
        assert after.boot_id == (status.boot_id or boot_id or "")
        assert (verdict.rule in UNRESOLVED) is (boot_id is None)
    assert (after.message == verdict.because) is (after.state is SandboxState.NOTREADY)
    kept = ("namespaces", "addresses", "extra", "expires_at")
    assert all(getattr(after, name) == getattr(status, name) for name in kept)
    again = decide_sandbox(after, boot_id=boot_id, now=10, used_in=used_in, is_copied=is_copied)
    assert again.status == after


def test_containers_tell_the_boot_where_the_record_does_not() -> None:
    """One that a process of this boot ran in was used in it; where all are of others, it is of another, too."""
    unrecorded = SandboxStatus()
    assert compare_boots(unrecorded, "now", {"then", "now"}) is MadeReady.UNRECORDED
    assert compare_boots(unrecorded, "now", {"then"}) is MadeReady.BEFORE
    assert compare_boots(unrecorded, None, {"then"}) is MadeReady.UNREADABLE
    assert compare_boots(SandboxStatus(boot_id="now"), "now", {"then"}) is MadeReady.HERE
