"""The recovery rules: from evidence to verdict, as a table that reads top to bottom.

Every combination of evidence matches exactly one rule, so their order does not matter. A rule names the crash that
leads to its case. Nothing here looks at the machine or the clock.
"""

from collections.abc import Collection
from enum import StrEnum
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from limpet.recovery.evidence import Boot, Bundle, Evidence, Observation, Process, Stage, classify
from limpet.schema.status import Reason, Status, end, end_never_run


class Ruling(StrEnum):
    """The ruling on a container."""

    KEEP = "keep"
    """The checkpoint is true."""
    RUNNING = "running"
    EXITED = "exited"
    """It ended, and its exit code was observed."""
    NEVER_RAN = "never ran"
    """It ended before its program was executed: 128, reason StartError."""
    ENDED_UNSEEN = "ended unseen"
    """It ended, and its exit code was not observed: 255."""
    UNKNOWN = "unknown"
    """Its state cannot be determined; the checkpoint's fields are kept."""


class Action(StrEnum):
    """What is done once the verdict is durable. Each action can be repeated safely."""

    NONE = "none"
    ADOPT = "adopt"
    """Watch the process, and record its exit."""
    REMOVE_BUNDLE = "remove bundle"
    END_HELD = "end what is held"
    """End the process that was made for it: its program was not executed."""


_ANY_BOOT = frozenset(Boot)
_ANY_PROCESS = frozenset(Process)
_ANY_BUNDLE = frozenset(Bundle)
_LIVING = frozenset({Process.ALIVE, Process.PAUSED, Process.MONITOR_GONE})
_HELD = frozenset({Process.HELD})
_NOT_ALIVE = _ANY_PROCESS - _LIVING
_NOTHING = _NOT_ALIVE - _HELD
_NOT_THERE = frozenset({Process.NONE, Process.GONE, Process.STRANGER, Process.ENDED, Process.NEVER_RAN})
_PERHAPS = frozenset({Process.UNPROVEN, Process.HIDDEN, Process.ELSEWHERE, Process.ORIGINAL})
_OVER = frozenset({Process.GONE, Process.STRANGER})
_UNPROVEN = frozenset({Process.UNPROVEN, Process.HIDDEN, Process.ELSEWHERE, Process.NONE})
_USABLE = frozenset({Bundle.WHOLE, Bundle.NOT_KEPT})
_LEFT = frozenset({Bundle.WHOLE, Bundle.PARTIAL})
_LOST = frozenset({Bundle.PARTIAL, Bundle.ABSENT, Bundle.FOREIGN})
_NOTHING_LEFT = frozenset({Bundle.ABSENT, Bundle.NOT_KEPT})
_NOT_OURS = frozenset({Bundle.FOREIGN, Bundle.HIDDEN})


class Rule(NamedTuple):
    """A row of the table: the evidence it matches, its ruling, and the crash that leads to it."""

    label: str
    stage: Stage
    boot: Collection[Boot]
    process: Collection[Process]
    bundle: Collection[Bundle]
    ruling: Ruling
    reason: Reason | None
    actions: tuple[Action, ...]
    because: str
    settle: str = ""
    """What ends the doubt of Ruling.UNKNOWN. Following it destroys nothing."""

    def matches(self, evidence: Evidence) -> bool:
        """Return whether this rule matches `evidence`."""
        return (
            self.stage == evidence.stage
            and evidence.boot in self.boot
            and evidence.process in self.process
            and evidence.bundle in self.bundle
        )


_C, _R, _A = Stage, Ruling, Action
_SAME, _CHANGED, _NO_BOOT = {Boot.SAME}, {Boot.CHANGED}, {Boot.UNREADABLE}
_ENDED, _NEVER_RAN, _ORIGINAL = {Process.ENDED}, {Process.NEVER_RAN}, {Process.ORIGINAL}

DECLARE = "or, if you know that no process of it is left, say so with declare_gone (limpet resolve)"
_ONCE_ENDED = f"recover again once that process has ended, {DECLARE}"
_LOOK_AGAIN = f"recover again where its process can be seen, {DECLARE}"

# fmt: off
RULES: tuple[Rule, ...] = tuple(Rule(*row) for row in (
    # label, stage, boot, process, bundle, ruling, reason, actions, because, settle
    ("new-empty", _C.NEW, _ANY_BOOT, _NOT_THERE, _NOTHING_LEFT, _R.KEEP, None, (),
     "the engine ended after writing the row, before making the bundle; create it again, or delete it"),
    ("new-half-made", _C.NEW, _ANY_BOOT, _NOT_THERE, _LEFT, _R.KEEP, Reason.CREATE_INTERRUPTED, (_A.REMOVE_BUNDLE,),
     "the engine ended while making the bundle, which is removed; create it again, or delete it"),
    ("new-foreign", _C.NEW, _ANY_BOOT, _NOT_THERE, _NOT_OURS, _R.UNKNOWN, Reason.BUNDLE_LOST, (),
     "at its bundle's path is something that was not made for it, or that cannot be read",
     "move that away, or make it readable, and recover again"),
    ("new-alive", _C.NEW, _ANY_BOOT, _LIVING, _ANY_BUNDLE, _R.UNKNOWN, Reason.UNVERIFIED, (),
     "a process runs for a container that was never created", _ONCE_ENDED),
    ("new-held", _C.NEW, _ANY_BOOT, _HELD, _ANY_BUNDLE, _R.UNKNOWN, Reason.UNVERIFIED, (),
     "a process is held for a container that was never created", _ONCE_ENDED),
    ("new-perhaps", _C.NEW, _ANY_BOOT, _PERHAPS, _ANY_BUNDLE, _R.UNKNOWN, Reason.UNVERIFIED, (),
     "a process may run for a container that was never created, as after restoring an old backup", _ONCE_ENDED),
    ("created", _C.CREATED, _ANY_BOOT, _NOT_THERE, _USABLE, _R.KEEP, None, (),
     "it was created and not started; an interrupted start did not run the program"),
    ("created-no-bundle", _C.CREATED, _ANY_BOOT, _NOT_THERE, _LOST, _R.UNKNOWN, Reason.BUNDLE_LOST, (),
     "its bundle was removed or damaged while the engine was down; it cannot be started",
     "put the bundle back and recover again, or stop and release it"),
    ("created-hidden", _C.CREATED, _ANY_BOOT, _NOT_THERE, {Bundle.HIDDEN}, _R.UNKNOWN, Reason.UNVERIFIED, (),
     "its bundle cannot be looked at", "remove what prevents that and recover again, or stop and release it"),
    ("created-perhaps", _C.CREATED, _ANY_BOOT, _PERHAPS, _ANY_BUNDLE, _R.UNKNOWN, Reason.UNVERIFIED, (),
     "a process may run for a container that was not started, as after restoring an old backup", _ONCE_ENDED),
    ("created-held", _C.CREATED, _SAME, _HELD, _USABLE, _R.KEEP, None, (_A.END_HELD,),
     "the engine ended while it was starting it; what is held is ended, and its program did not run"),
    ("created-held-no-bundle", _C.CREATED, _SAME, _HELD, _LOST | {Bundle.HIDDEN}, _R.UNKNOWN, Reason.UNVERIFIED, (),
     "a process is held for it, and its bundle was removed or damaged, or cannot be looked at", _ONCE_ENDED),
    ("created-alive", _C.CREATED, _SAME, _LIVING, _ANY_BUNDLE, _R.RUNNING, None, (_A.ADOPT,),
     "the runtime ended after starting it, before recording the start"),
    ("created-alive-boot", _C.CREATED, _CHANGED | _NO_BOOT, _LIVING | _HELD, _ANY_BUNDLE, _R.UNKNOWN,
     Reason.UNVERIFIED, (),
     "its process is reported alive, but is not, or may not be, of this boot", _LOOK_AGAIN),
    ("survivor", _C.RUNNING, _SAME, {Process.ALIVE}, _USABLE, _R.RUNNING, None, (_A.ADOPT,),
     "the engine ended; the container is still running"),
    ("survivor-no-bundle", _C.RUNNING, _SAME, _LIVING, _LOST, _R.RUNNING, Reason.BUNDLE_LOST, (_A.ADOPT,),
     "the engine ended; the container is still running, but its bundle was removed or damaged"),
    ("survivor-paused", _C.RUNNING, _SAME, {Process.PAUSED}, _USABLE | {Bundle.HIDDEN}, _R.RUNNING, None, (_A.ADOPT,),
     "the engine ended; the container is still there, and is frozen"),
    ("survivor-alone", _C.RUNNING, _SAME, {Process.MONITOR_GONE}, _USABLE | {Bundle.HIDDEN}, _R.RUNNING,
     Reason.MONITOR_GONE, (_A.ADOPT,),
     "its monitor has ended; the container is still running, and how it ends may stay unseen"),
    ("running-held", _C.RUNNING, _SAME, _HELD, _ANY_BUNDLE, _R.NEVER_RAN, Reason.START_ERROR, (_A.END_HELD,),
     "the engine ended before its program was executed; what is held is ended"),
    ("survivor-hidden", _C.RUNNING, _SAME, {Process.ALIVE}, {Bundle.HIDDEN}, _R.RUNNING, None, (_A.ADOPT,),
     "the engine ended; the container is still running, and its bundle cannot be looked at"),
    ("exit-observed", _C.RUNNING, _ANY_BOOT, _ENDED, _ANY_BUNDLE, _R.EXITED, None, (),
     "it ended while the engine was down, and its exit code was recorded"),
    ("never-ran", _C.RUNNING, _ANY_BOOT, _NEVER_RAN, _ANY_BUNDLE, _R.NEVER_RAN, Reason.START_ERROR, (),
     "the engine ended before its program was executed"),
    ("exit-unseen", _C.RUNNING, _SAME, {Process.GONE}, _ANY_BUNDLE, _R.ENDED_UNSEEN, Reason.UNKNOWN, (),
     "it ended while the engine was down, or the engine ended before its program could run"),
    ("pid-reused", _C.RUNNING, _SAME, {Process.STRANGER}, _ANY_BUNDLE, _R.ENDED_UNSEEN, Reason.UNKNOWN, (),
     "it ended while the engine was down, and its pid now belongs to another process, which is left alone"),
    ("rebooted", _C.RUNNING, _CHANGED, _OVER | _UNPROVEN | _ORIGINAL, _ANY_BUNDLE, _R.ENDED_UNSEEN, Reason.REBOOTED, (),
     "the machine was rebooted, and no process survives a reboot"),
    ("rebooted-alive", _C.RUNNING, _CHANGED, _LIVING | _HELD, _ANY_BUNDLE, _R.UNKNOWN, Reason.UNVERIFIED, (),
     "its process is reported alive, but cannot be of this boot", _LOOK_AGAIN),
    ("copied", _C.RUNNING, _SAME, _ORIGINAL, _ANY_BUNDLE, _R.UNKNOWN, Reason.COPIED, (),
     "this state directory is a copy, and the process is the original's, which alone looks after it", DECLARE[4:]),
    ("not-proven", _C.RUNNING, _SAME, _UNPROVEN, _ANY_BUNDLE, _R.UNKNOWN, Reason.UNVERIFIED, (),
     "its process cannot be identified or inspected, so it may be alive", _LOOK_AGAIN),
    ("no-boot-id", _C.RUNNING, _NO_BOOT, _ANY_PROCESS - _ENDED - _NEVER_RAN, _ANY_BUNDLE, _R.UNKNOWN,
     Reason.UNVERIFIED, (),
     "without a boot id a pid proves nothing", f"recover again with a readable /proc, {DECLARE}"),
    ("exited", _C.EXITED, _ANY_BOOT, _NOTHING, _ANY_BUNDLE, _R.KEEP, None, (),
     "its exit was already recorded"),
    ("exited-held", _C.EXITED, _ANY_BOOT, _HELD, _ANY_BUNDLE, _R.KEEP, None, (_A.END_HELD,),
     "its end was already recorded; what is still held is ended"),
    ("exited-alive", _C.EXITED, _ANY_BOOT, _LIVING, _ANY_BUNDLE, _R.UNKNOWN, Reason.UNVERIFIED, (),
     "a process runs for a container that is recorded as ended", _ONCE_ENDED),
    ("release-unfinished", _C.RELEASED, _ANY_BOOT, _NOT_ALIVE, _LEFT, _R.KEEP, None, (_A.REMOVE_BUNDLE,),
     "the engine ended while releasing it; the removal of its bundle is completed now"),
    ("released", _C.RELEASED, _ANY_BOOT, _NOTHING, _NOTHING_LEFT, _R.KEEP, None, (),
     "it was released"),
    ("released-foreign", _C.RELEASED, _ANY_BOOT, _NOTHING, _NOT_OURS, _R.KEEP, None, (),
     "it was released; what is now at its bundle's path was not made for it and is left alone"),
    ("released-held", _C.RELEASED, _ANY_BOOT, _HELD, _NOTHING_LEFT | _NOT_OURS, _R.KEEP, None, (_A.END_HELD,),
     "it was released; what is still held is ended"),
    ("released-alive", _C.RELEASED, _ANY_BOOT, _LIVING, _ANY_BUNDLE, _R.UNKNOWN, Reason.UNVERIFIED, (),
     "a process runs for a container that was released", _ONCE_ENDED),
    ("damaged", _C.DAMAGED, _ANY_BOOT, _ANY_PROCESS, _ANY_BUNDLE, _R.UNKNOWN, Reason.DAMAGED, (),
     "its record on disk cannot be read",
     "delete it, which ends what is left of it, or keep a copy of the state directory and restore a backup"),
))
# fmt: on


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Recovery's verdict on one container, and the reason."""

    rule: str
    """The label of the matching rule."""
    ruling: Ruling
    status: Status
    """The container's new status."""
    actions: tuple[Action, ...]
    because: str


def find_rules(evidence: Evidence) -> list[Rule]:
    """Return the rules that match `evidence`: always exactly one, which a test proves for every combination."""
    return [rule for rule in RULES if rule.matches(evidence)]


def decide(status: Status, observation: Observation, *, now: int, damage: str = "") -> Verdict:
    """Return the verdict on a container whose checkpoint is `status`, as read from disk.

    `now`, nanoseconds since the epoch, is used as the end time if the real one is unknown. `damage`, if not empty, says
    what is wrong with the record.
    """
    evidence = Evidence(
        stage=Stage.DAMAGED if damage else classify(status),
        boot=observation.boot,
        process=observation.process,
        bundle=observation.bundle,
    )
    (rule,) = find_rules(evidence)
    because = "; ".join(part for part in (rule.because, damage or observation.detail, rule.settle) if part)
    return Verdict(
        rule=rule.label,
        ruling=rule.ruling,
        status=_apply(rule, status, observation, because, now),
        actions=rule.actions,
        because=because,
    )


def _apply(rule: Rule, status: Status, observation: Observation, because: str, now: int) -> Status:
    ended_at = max(observation.finished_at or now, 1)
    match rule.ruling:
        case Ruling.KEEP:
            changes = {} if rule.reason is None else {"reason": rule.reason, "message": because}
            return replace(status, unknown=False, **changes)
        case Ruling.RUNNING:
            changes = {} if rule.reason is None else {"reason": rule.reason, "message": because}
            identity = status.identity or observation.identity
            return replace(
                status,
                unknown=False,
                identity=identity,
                pid=identity.pid if identity else status.pid,
                started_at=status.started_at or observation.started_at or now,
                **changes,
            )
        case Ruling.EXITED:
            return end(
                status, observation.exit_code, finished_at=ended_at, is_out_of_memory=observation.is_out_of_memory
            )
        case Ruling.NEVER_RAN:
            return end_never_run(status, because, finished_at=ended_at)
        case Ruling.ENDED_UNSEEN:
            ended = end(status, None, finished_at=ended_at)
            return replace(ended, reason=rule.reason or Reason.UNKNOWN, message=because)
        case Ruling.UNKNOWN:
            return replace(status, unknown=True, reason=rule.reason or Reason.UNVERIFIED, message=because)
