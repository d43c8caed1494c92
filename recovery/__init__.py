"""What is true after a restart: observe without touching, decide by a table, report.

Assumptions. The engine that wrote the checkpoints is dead: its lock is ours. Everything else may have happened
since: processes ended, pids came around, the machine was rebooted, directories were removed or planted. A pass may
be killed at any instant and run again: it observes and decides anew, commits all verdicts in one transaction,
and only then acts, each action harmless to repeat. What cannot be seen is Unknown, never guessed.

Read `evidence` (what is asked), `rules` (what follows from the answers), then `probe` and `host` (how it is
seen), `orphans` (directories that nobody owns) and `report`.
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
