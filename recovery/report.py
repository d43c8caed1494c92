"""What a recovery pass found: for each container the checkpoint, the evidence, the verdict and why."""

from typing import Any

import msgspec

from limpet.recovery.evidence import Observation
from limpet.recovery.orphans import Orphan
from limpet.recovery.rules import RULES, Action, Ruling, Verdict
from limpet.schema.status import Status


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One container that was examined."""

    id: str
    checkpoint: dict[str, Any]
    """The fields of the status as it was on disk."""
    observation: Observation
    rule: str
    state: str
    """The name of the container's state from now on."""
    status: dict[str, Any]
    """The fields of the status from now on."""
    because: str
    actions: tuple[Action, ...] = ()
    problem: str = ""
    """What went wrong with this container alone: while it was looked at, or when an action was carried out."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One recovery pass. Finished containers are counted, not examined: how they ended was written down."""

    number: int
    """Counts the passes over this store; 0 for a dry run."""
    at: int
    """When it began: nanoseconds since the epoch."""
    took_ns: int
    boot_id: str
    dry_run: bool = False
    settled: int = 0
    """Containers that had ended, and needed no look."""
    findings: tuple[Finding, ...] = ()
    orphans: tuple[Orphan, ...] = ()

    @property
    def totals(self) -> dict[str, int]:
        """How many of the examined containers are in each state now, and how many had a problem."""
        totals = dict.fromkeys(("CREATED", "RUNNING", "EXITED", "UNKNOWN"), 0)
        for finding in self.findings:
            totals[finding.state] += 1
        totals["problems"] = sum(bool(finding.problem) for finding in self.findings)
        return totals

    @property
    def has_unresolved(self) -> bool:
        """True if a container cannot be vouched for, or something went wrong with one, or with an orphan."""
        return any(finding.problem or finding.rule in _UNRESOLVED for finding in self.findings) or any(
            orphan.error for orphan in self.orphans
        )


_UNRESOLVED = {rule.label for rule in RULES if rule.ruling is Ruling.UNKNOWN}


def status_fields(status: Status) -> dict[str, Any]:
    """Return the fields of a status that are kept on disk, by name: all but the Unknown flag."""
    fields: dict[str, Any] = msgspec.to_builtins(status)
    del fields["unknown"]
    return fields


def make_finding(
    container_id: str, checkpoint: Status, observation: Observation, verdict: Verdict, problem: str = ""
) -> Finding:
    """Return the report's entry for one container."""
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
