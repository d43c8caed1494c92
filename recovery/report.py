"""The result of a recovery pass: for each container the checkpoint, the evidence, the verdict and the reason."""

from typing import Any

import msgspec

from limpet.recovery.evidence import Observation
from limpet.recovery.orphans import Orphan
from limpet.recovery.rules import RULES, Action, Ruling, Verdict
from limpet.recovery.sandbox_rules import UNRESOLVED, SandboxVerdict
from limpet.schema.sandbox_status import SandboxStatus
from limpet.schema.status import Status


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One examined container."""

    id: str
    checkpoint: dict[str, Any]
    """The fields of the status on disk before the pass."""
    observation: Observation
    rule: str
    state: str
    """The name of the container's new state."""
    status: dict[str, Any]
    """The fields of the new status."""
    because: str
    actions: tuple[Action, ...] = ()
    problem: str = ""
    """What failed for this container: its observation, or an action."""


class SandboxFinding(msgspec.Struct, frozen=True, kw_only=True):
    """One sandbox of which there is something to say."""

    id: str
    checkpoint: dict[str, Any]
    """The fields of the status on disk before the pass; none if the record is damaged."""
    rule: str
    state: str
    """The name of the sandbox's new state; UNKNOWN if the record is damaged."""
    status: dict[str, Any]
    """The fields of the new status."""
    because: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One recovery pass. Exited containers are counted, not examined: their exit was already recorded."""

    number: int
    """The number of this pass over the store, from 1; 0 for a dry run."""
    at: int
    """When the pass began: nanoseconds since the epoch."""
    took_ns: int
    boot_id: str
    dry_run: bool = False
    settled: int = 0
    """Containers that had already exited and needed no examination."""
    findings: tuple[Finding, ...] = ()
    orphans: tuple[Orphan, ...] = ()
    sandboxes: tuple[SandboxFinding, ...] = ()
    """Those whose record was changed, may not be true, or cannot be read."""

    @property
    def totals(self) -> dict[str, int]:
        """How many examined containers are now in each state, and how many had a problem."""
        totals = dict.fromkeys(("CREATED", "RUNNING", "EXITED", "UNKNOWN"), 0)
        for finding in self.findings:
            totals[finding.state] += 1
        totals["problems"] = sum(bool(finding.problem) for finding in self.findings)
        return totals

    @property
    def has_unresolved(self) -> bool:
        """True if a container's or sandbox's state remains open, or something failed for a container or an orphan."""
        return (
            any(finding.problem or finding.rule in _UNRESOLVED for finding in self.findings)
            or any(orphan.error for orphan in self.orphans)
            or any(sandbox.rule in {*UNRESOLVED, _DAMAGED} for sandbox in self.sandboxes)
        )


_DAMAGED = "sandbox-damaged"
"""Stands for a rule where there is nothing to decide about: the record cannot be read."""
_UNRESOLVED = {rule.label for rule in RULES if rule.ruling is Ruling.UNKNOWN}


def status_fields(status: Status) -> dict[str, Any]:
    """Return by name the fields of a status that are stored on disk: all but the Unknown flag."""
    fields: dict[str, Any] = msgspec.to_builtins(status)
    del fields["unknown"]
    return fields


def make_finding(
    container_id: str, checkpoint: Status, observation: Observation, verdict: Verdict, problem: str = ""
) -> Finding:
    """Return the report's entry for a container."""
    return Finding(
        id=container_id,
        checkpoint=status_fields(checkpoint),
        observation=observation,
        rule=verdict.rule,
        state=verdict.status.state.name,
        status=status_fields(verdict.status),
        because=verdict.because,
        actions=verdict.actions,
        problem=problem,
    )


def make_sandbox_finding(sandbox_id: str, checkpoint: SandboxStatus, verdict: SandboxVerdict) -> SandboxFinding:
    """Return the report's entry for a sandbox."""
    return SandboxFinding(
        id=sandbox_id,
        checkpoint=msgspec.to_builtins(checkpoint),
        rule=verdict.rule,
        state=verdict.status.state.name,
        status=msgspec.to_builtins(verdict.status),
        because=verdict.because,
    )


def make_damaged_finding(sandbox_id: str, damage: str) -> SandboxFinding:
    """Return the report's entry for a sandbox whose record cannot be read."""
    return SandboxFinding(id=sandbox_id, checkpoint={}, rule=_DAMAGED, state="UNKNOWN", status={}, because=damage)
