"""The rules for sandboxes: from evidence to verdict, as a table that reads top to bottom.

What a sandbox holds (namespaces, addresses) ends with the boot of its machine, so one of another boot is NOTREADY.
Every combination of evidence matches exactly one rule. Nothing here looks at the machine or the clock.
"""

from collections.abc import Collection
from enum import StrEnum
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from limpet.schema.sandbox_status import SandboxReason, SandboxState, SandboxStatus, stop_sandbox


class MadeReady(StrEnum):
    """In which boot the sandbox was made ready."""

    HERE = "here"
    """In this one."""
    BEFORE = "before"
    """In another one."""
    UNRECORDED = "unrecorded"
    """Its record is older than that boots are recorded, and none of its containers tells of another boot."""
    UNREADABLE = "unreadable"
    """The present boot cannot be read."""


class Holdings(StrEnum):
    """Whose the namespaces and addresses are that its record names."""

    OWN = "own"
    """Its own, or there are none."""
    ORIGINAL = "of the original"
    """This state directory is a copy, made just now; the original's runtime looks after them."""


class SandboxRuling(StrEnum):
    """The ruling on a sandbox."""

    KEEP = "keep"
    """Its record is true, or nothing shows that it is not."""
    RECORD_BOOT = "record boot"
    """It is taken for one of this boot, and that is recorded."""
    END = "end"
    """It is NOTREADY from now on."""


class SandboxEvidence(msgspec.Struct, frozen=True, kw_only=True):
    """The facts that the rules match."""

    state: SandboxState
    made_ready: MadeReady
    holdings: Holdings


class SandboxRule(NamedTuple):
    """A row of the table: the evidence it matches, its ruling, and what leads to it."""

    label: str
    state: SandboxState
    made_ready: Collection[MadeReady]
    holdings: Collection[Holdings]
    ruling: SandboxRuling
    reason: SandboxReason | None
    because: str

    def matches(self, evidence: SandboxEvidence) -> bool:
        """Return whether this rule matches `evidence`."""
        return (
            self.state is evidence.state
            and evidence.made_ready in self.made_ready
            and evidence.holdings in self.holdings
        )


_READY, _NOTREADY = SandboxState.READY, SandboxState.NOTREADY
_ANY_BOOT, _ANY_HOLDINGS = frozenset(MadeReady), frozenset(Holdings)
_NOT_BEFORE = _ANY_BOOT - {MadeReady.BEFORE}
_OWN, _ORIGINAL = {Holdings.OWN}, {Holdings.ORIGINAL}
_R = SandboxRuling

# fmt: off
SANDBOX_RULES: tuple[SandboxRule, ...] = tuple(SandboxRule(*row) for row in (
    # label, state, made ready, holdings, ruling, reason, because
    ("sandbox-ready", _READY, {MadeReady.HERE}, _OWN, _R.KEEP, None,
     "it was made ready in this boot"),
    ("sandbox-rebooted", _READY, {MadeReady.BEFORE}, _ANY_HOLDINGS, _R.END, SandboxReason.REBOOTED,
     "it was made ready in another boot of this machine, or of another; nothing that it held is left; make another"),
    ("sandbox-unrecorded", _READY, {MadeReady.UNRECORDED}, _OWN, _R.RECORD_BOOT, None,
     "an older version did not record the boot that it was made ready in, and nothing tells of another than this one"),
    ("sandbox-no-boot-id", _READY, {MadeReady.UNREADABLE}, _OWN, _R.KEEP, None,
     "the boot id cannot be read, so it may have been made ready in another boot; recover again with a readable /proc"),
    ("sandbox-copied", _READY, _NOT_BEFORE, _ORIGINAL, _R.END, SandboxReason.COPIED,
     "this state directory is a copy, and what the sandbox holds is the original's; make another"),
    ("sandbox-notready", _NOTREADY, _ANY_BOOT, _ANY_HOLDINGS, _R.KEEP, None,
     "it takes no new containers, and never will again; what still runs in it is stopped"),
))
# fmt: on

UNREMARKABLE = frozenset({"sandbox-ready", "sandbox-notready"})
"""The rules of which a report says nothing: the record is true as it is."""
UNRESOLVED = frozenset({"sandbox-no-boot-id"})
"""The rules that leave open whether the record is true."""


class SandboxVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """Recovery's verdict on one sandbox, and the reason."""

    rule: str
    status: SandboxStatus
    """The sandbox's new status."""
    because: str


def find_sandbox_rules(evidence: SandboxEvidence) -> list[SandboxRule]:
    """Return the rules that match `evidence`: always exactly one, which a test proves for every combination."""
    return [rule for rule in SANDBOX_RULES if rule.matches(evidence)]


def compare_boots(status: SandboxStatus, boot_id: str | None, used_in: Collection[str] = ()) -> MadeReady:
    """Return in which boot a sandbox was made ready. `boot_id` is the present one, None if it cannot be read.

    `used_in` are the boots in which processes of its containers ran; they tell where the record does not.
    """
    if boot_id is None:
        return MadeReady.UNREADABLE
    if status.boot_id:
        return MadeReady.HERE if status.boot_id == boot_id else MadeReady.BEFORE
    return MadeReady.UNRECORDED if boot_id in used_in or not used_in else MadeReady.BEFORE


def decide_sandbox(
    status: SandboxStatus, *, boot_id: str | None, now: int, used_in: Collection[str] = (), is_copied: bool = False
) -> SandboxVerdict:
    """Return the verdict on a sandbox whose status is `status`, as read from disk; see `compare_boots`.

    `now`, nanoseconds since the epoch, is since when one is NOTREADY that was READY. `is_copied` says that the record
    was written by the engine of another state directory, of which this one is a copy.
    """
    holds_something = bool(status.namespaces or status.addresses)
    evidence = SandboxEvidence(
        state=status.state,
        made_ready=compare_boots(status, boot_id, used_in),
        holdings=Holdings.ORIGINAL if is_copied and holds_something else Holdings.OWN,
    )
    (rule,) = find_sandbox_rules(evidence)
    if rule.reason is not None:
        status = stop_sandbox(status, rule.reason, at=now, message=rule.because)
    elif rule.ruling is SandboxRuling.RECORD_BOOT:
        status = replace(status, boot_id=boot_id or "")
    return SandboxVerdict(rule=rule.label, status=status, because=rule.because)
