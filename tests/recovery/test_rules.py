"""The decision tables are total and free of overlap, and their verdicts keep the promises."""

from itertools import product

import pytest

from limpet.recovery import RULES, Boot, Bundle, Evidence, Observation, Process, Ruling, Stage, decide
from limpet.recovery.orphans import (
    ORPHAN_RULES,
    Age,
    Disposal,
    Kind,
    Origin,
    OrphanFacts,
    Use,
    find_orphan_rules,
)
from limpet.recovery.rules import Action, find_rules
from limpet.schema import ContainerState, ProcessIdentity, Reason, Status

LIVING = {Process.ALIVE, Process.PAUSED, Process.MONITOR_GONE}
EVERY_EVIDENCE = [
    Evidence(stage=checkpoint, boot=boot, process=process, bundle=bundle)
    for checkpoint, boot, process, bundle in product(Stage, Boot, Process, Bundle)
]
IDENTITY = ProcessIdentity(pid=7, start_ticks=70, boot_id="b", pidfd_inode=700, pid_namespace=1)
STATUSES = {
    Stage.NEW: Status(),
    Stage.CREATED: Status(created_at=1),
    Stage.RUNNING: Status(created_at=1, started_at=2, pid=7, identity=IDENTITY),
    Stage.EXITED: Status(created_at=1, started_at=2, finished_at=3, exit_code=4, reason="Error"),
    Stage.RELEASED: Status(created_at=1, started_at=2, finished_at=3, exit_code=4, released=True),
    Stage.DAMAGED: Status(),
}


def verdict_on(evidence: Evidence, exit_code: int | None = 9):  # type: ignore[no-untyped-def]
    observation = Observation(boot=evidence.boot, process=evidence.process, bundle=evidence.bundle, exit_code=exit_code)
    damage = "torn" if evidence.stage is Stage.DAMAGED else ""
    return decide(STATUSES[evidence.stage], observation, now=99, damage=damage)


def test_every_evidence_meets_exactly_one_rule() -> None:
    """Whatever was recorded and seen, one rule answers, and only one."""
    wrong = {str(e): [r.label for r in find_rules(e)] for e in EVERY_EVIDENCE if len(find_rules(e)) != 1}
    assert not wrong


def test_no_rule_is_dead() -> None:
    """Each rule answers some evidence, and labels are unique."""
    used = {rule.label for evidence in EVERY_EVIDENCE for rule in find_rules(evidence)}
    assert used == {rule.label for rule in RULES}
    assert len(used) == len(RULES)


def test_running_is_said_only_of_a_process_seen_alive_in_this_boot() -> None:
    """RUNNING needs the very process, alive now; nothing else is adopted."""
    for evidence in EVERY_EVIDENCE:
        verdict = verdict_on(evidence)
        if verdict.status.state is ContainerState.RUNNING or Action.ADOPT in verdict.actions:
            assert evidence.process in LIVING, evidence
            assert evidence.boot is Boot.SAME, evidence


def test_an_exit_code_is_stated_only_where_it_was_observed() -> None:
    """A container that recovery ends has the observed code, or 255 and a reason that says it is not known."""
    for evidence in EVERY_EVIDENCE:
        before, verdict = STATUSES[evidence.stage], verdict_on(evidence)
        if verdict.status.state is not ContainerState.EXITED or before.finished_at:
            continue
        if evidence.process is Process.ENDED:
            assert (verdict.status.exit_code, verdict.status.reason) == (9, Reason.ERROR)
        elif evidence.process in {Process.NEVER_RAN, Process.HELD}:
            assert (verdict.status.exit_code, verdict.status.reason) == (128, Reason.START_ERROR)
            assert verdict.status.message.startswith("never ran")
        else:
            assert verdict.status.exit_code == 255
            assert verdict.status.reason in {Reason.UNKNOWN, Reason.REBOOTED}
            assert verdict.status.message


def test_a_finished_container_is_never_rewritten() -> None:
    """How a container ended was written down; no evidence changes that, it can only be doubted."""
    for evidence in EVERY_EVIDENCE:
        before = STATUSES[evidence.stage]
        after = verdict_on(evidence).status
        if before.finished_at and not after.unknown:
            assert after == before


def test_unknown_keeps_the_checkpoint_and_says_why() -> None:
    """An Unknown container keeps its checkpointed fields, has a message, and nothing is done to it."""
    for evidence in EVERY_EVIDENCE:
        verdict = verdict_on(evidence)
        if verdict.ruling is Ruling.UNKNOWN:
            before = STATUSES[evidence.stage]
            kept = ("pid", "created_at", "started_at", "finished_at", "exit_code", "released", "identity")
            assert all(getattr(verdict.status, name) == getattr(before, name) for name in kept)
            assert verdict.status.state is ContainerState.UNKNOWN
            assert verdict.status.message
            assert verdict.actions == ()


def test_what_never_ran_is_a_start_error_at_its_stage_alone() -> None:
    """A RUNNING checkpoint whose program was never executed is EXITED 128, StartError; every other stage stays."""
    for evidence in EVERY_EVIDENCE:
        if evidence.process is not Process.NEVER_RAN:
            continue
        before, verdict = STATUSES[evidence.stage], verdict_on(evidence)
        if evidence.stage is Stage.RUNNING:
            assert (verdict.rule, verdict.status.state) == ("never-ran", ContainerState.EXITED)
        else:
            assert verdict.ruling in {Ruling.KEEP, Ruling.UNKNOWN}
            assert verdict.status.finished_at == before.finished_at


def test_what_is_held_is_never_said_to_run_and_is_ended_where_that_is_known() -> None:
    """Its program was not executed: RUNNING is said of none, and what is held ends with every verdict but Unknown."""
    for evidence in EVERY_EVIDENCE:
        verdict = verdict_on(evidence)
        if evidence.process is Process.HELD:
            assert verdict.status.state is not ContainerState.RUNNING, evidence
            ends = {Action.END_HELD, Action.REMOVE_BUNDLE} & set(verdict.actions)
            assert ends or verdict.ruling is Ruling.UNKNOWN, evidence
        else:
            assert Action.END_HELD not in verdict.actions, evidence


def test_an_end_time_that_was_observed_is_the_one_that_is_written() -> None:
    """Where an exit record says when the container ended, that is its end, however it ended; else it is now."""
    for evidence in EVERY_EVIDENCE:
        if evidence.stage is not Stage.RUNNING:
            continue
        for observed, written in ((12, 12), (0, 99)):
            observation = Observation(
                boot=evidence.boot,
                process=evidence.process,
                bundle=evidence.bundle,
                exit_code=9 if evidence.process is Process.ENDED else None,
                finished_at=observed,
            )
            status = decide(STATUSES[Stage.RUNNING], observation, now=99).status
            assert status.finished_at == (written if status.state is ContainerState.EXITED else 0), evidence


def test_every_unknown_says_what_settles_it() -> None:
    """No container is Unknown without a way out, which its message names; other rulings need none."""
    for rule in RULES:
        assert bool(rule.settle) == (rule.ruling is Ruling.UNKNOWN), rule.label
    for evidence in EVERY_EVIDENCE:
        verdict = verdict_on(evidence)
        (rule,) = find_rules(evidence)
        if verdict.ruling is Ruling.UNKNOWN:
            assert verdict.status.message.endswith(rule.settle)


def test_what_runs_in_the_original_is_never_taken_for_the_copys_own() -> None:
    """A copy says neither RUNNING nor EXITED of the original's process in this boot, and does nothing to it."""
    for evidence in EVERY_EVIDENCE:
        if evidence.process is Process.ORIGINAL and evidence.boot is Boot.SAME and evidence.stage is Stage.RUNNING:
            verdict = verdict_on(evidence)
            assert (verdict.status.state, verdict.actions) == (ContainerState.UNKNOWN, ())


def test_deciding_again_says_the_same() -> None:
    """A verdict that was committed, observed again, is confirmed: recovery can be repeated."""
    for evidence in EVERY_EVIDENCE:
        first = verdict_on(evidence)
        if first.ruling is Ruling.UNKNOWN:
            continue
        process = Process.NONE if first.status.finished_at else evidence.process
        bundle = Bundle.ABSENT if Action.REMOVE_BUNDLE in first.actions else evidence.bundle
        observation = Observation(boot=evidence.boot, process=process, bundle=bundle, exit_code=9)
        second = decide(first.status, observation, now=12345)
        assert second.status.state == first.status.state, evidence


@pytest.mark.parametrize("bundle", [Bundle.FOREIGN, Bundle.HIDDEN, Bundle.ABSENT, Bundle.NOT_KEPT])
def test_only_our_own_bundle_is_removed(bundle: Bundle) -> None:
    """A bundle is removed only if it is there and bears our marker for this container."""
    for evidence in EVERY_EVIDENCE:
        if evidence.bundle is bundle:
            assert Action.REMOVE_BUNDLE not in verdict_on(evidence).actions


def test_every_orphan_meets_exactly_one_rule_and_none_is_dead() -> None:
    """The table for orphans is total, too; only what is ours, unused and old is removed."""
    used = set()
    for kind, origin, use, age in product(Kind, Origin, Use, Age):
        (rule,) = find_orphan_rules(OrphanFacts(kind=kind, origin=origin, use=use, age=age))
        used.add(rule.label)
        if origin is Origin.OTHER_NODE and kind is Kind.DIRECTORY:
            assert rule.disposal is Disposal.LEAVE
        if rule.disposal is Disposal.REMOVE:
            assert (kind, origin, use, age) == (Kind.DIRECTORY, Origin.OURS, Use.UNUSED, Age.OLD)
    assert used == {rule.label for rule in ORPHAN_RULES}
