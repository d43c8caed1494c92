"""After a crash: look at every container, decide, write the verdicts down, then act."""

from limpet.engine.reconcile.recovery_pass import Examined, examine_all, recover, reexamine
from limpet.engine.reconcile.sandboxes import find_remarkable, judge_sandboxes
from limpet.engine.reconcile.sweep import dispose, judge_orphans

__all__ = [
    "Examined",
    "dispose",
    "examine_all",
    "find_remarkable",
    "judge_orphans",
    "judge_sandboxes",
    "recover",
    "reexamine",
]
