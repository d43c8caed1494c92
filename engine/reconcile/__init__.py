"""After a crash: look at every container, decide, write the verdicts down, then act."""

from limpet.engine.reconcile.recovery_pass import examine_all, recover
from limpet.engine.reconcile.sweep import dispose, judge_orphans

__all__ = ["dispose", "examine_all", "judge_orphans", "recover"]
