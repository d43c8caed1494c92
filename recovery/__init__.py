"""What is true after a restart: observe without touching, decide by a table, report.

Assumptions. The engine that wrote the checkpoints is dead: its lock is ours. Everything else may have happened
since: processes ended, pids came around, the machine was rebooted, directories were removed or planted. A pass may
be killed at any instant and run again: it observes and decides anew, commits all verdicts in one transaction,
and only then acts, each action harmless to repeat. What cannot be seen is Unknown, never guessed.

Read `evidence` (what is asked), `rules` (what follows from the answers), then `probe` and `host` (how it is
seen), `orphans` (directories that nobody owns) and `report`.

Names are loaded when they are first used: opening a store needs none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limpet.recovery.evidence import Boot, Bundle, Checkpoint, Evidence, Observation, Process
    from limpet.recovery.probe import HostProbe, Probe, Subject
    from limpet.recovery.report import Finding, Report
    from limpet.recovery.rules import RULES, Action, Ruling, Verdict, decide

_HOMES = {
    **dict.fromkeys(("Boot", "Bundle", "Checkpoint", "Evidence", "Observation", "Process"), "evidence"),
    **dict.fromkeys(("HostProbe", "Probe", "Subject"), "probe"),
    **dict.fromkeys(("Finding", "Report"), "report"),
    **dict.fromkeys(("RULES", "Action", "Ruling", "Verdict", "decide"), "rules"),
}

__all__ = [
    "RULES",
    "Action",
    "Boot",
    "Bundle",
    "Checkpoint",
    "Evidence",
    "Finding",
    "HostProbe",
    "Observation",
    "Probe",
    "Process",
    "Report",
    "Ruling",
    "Subject",
    "Verdict",
    "decide",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'limpet.recovery' has no attribute {name!r}")
    return getattr(import_module(f"limpet.recovery.{_HOMES[name]}"), name)
