"""Recovery after a restart: observe without changing anything, decide by a table, report.

Assumptions: the engine that wrote the checkpoints is dead, because we hold its lock. Anything else may have happened
since: processes ended, pids were reused, the machine was rebooted, directories were removed or planted. A pass may be
killed at any moment and run again: it observes and decides anew, commits all verdicts in one transaction, and only then
acts; every action can be repeated safely. What cannot be seen is Unknown, never guessed.

Read `evidence` (the facts), `rules` and `sandbox_rules` (the decisions), then `probe`, `host` and `looks` (how facts
are observed), `orphans` (directories without an owner) and `report`.

Names are loaded when they are first used: opening a store needs none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limpet.recovery.evidence import Boot, Bundle, Evidence, Observation, Process, Stage
    from limpet.recovery.probe import HostProbe, Probe, Subject
    from limpet.recovery.report import Finding, Report
    from limpet.recovery.rules import RULES, Action, Ruling, Verdict, decide
    from limpet.recovery.sandbox_rules import SANDBOX_RULES, SandboxVerdict, decide_sandbox

_HOMES = {
    **dict.fromkeys(("Boot", "Bundle", "Stage", "Evidence", "Observation", "Process"), "evidence"),
    **dict.fromkeys(("HostProbe", "Probe", "Subject", "Witness", "Witnessed"), "probe"),
    **dict.fromkeys(("Finding", "Report"), "report"),
    **dict.fromkeys(("RULES", "Action", "Ruling", "Verdict", "decide"), "rules"),
    **dict.fromkeys(("SANDBOX_RULES", "SandboxVerdict", "decide_sandbox"), "sandbox_rules"),
}

__all__ = [
    "RULES",
    "SANDBOX_RULES",
    "Action",
    "Boot",
    "Bundle",
    "Evidence",
    "Finding",
    "HostProbe",
    "Observation",
    "Probe",
    "Process",
    "Report",
    "Ruling",
    "SandboxVerdict",
    "Stage",
    "Subject",
    "Verdict",
    "Witness",
    "Witnessed",
    "decide",
    "decide_sandbox",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'limpet.recovery' has no attribute {name!r}")
    return getattr(import_module(f"limpet.recovery.{_HOMES[name]}"), name)
