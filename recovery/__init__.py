"""Recovery after a restart: observe without changing anything, decide by a table, report.

Assumptions: the engine that wrote the checkpoints is dead, because we hold its lock. Anything else may have happened
since: processes ended, pids were reused, the machine was rebooted, directories were removed or planted. A pass may be
killed at any moment and run again: it observes and decides anew, commits all verdicts in one transaction, and only then
acts; every action can be repeated safely. What cannot be seen is Unknown, never guessed.

Read `evidence` (the facts), `rules` (the decisions), then `probe` and `host` (how facts are observed), `orphans`
(directories without an owner) and `report`.
"""

from limpet.recovery.evidence import Boot, Bundle, Checkpoint, Evidence, Observation, Process
from limpet.recovery.probe import HostProbe, Probe, Subject
from limpet.recovery.report import Finding, Report
from limpet.recovery.rules import RULES, Action, Ruling, Verdict, decide

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
