"""After a crash: look at every container, decide, write the verdicts down, then act."""

from limpet.engine.reconcile.recovery_pass import recover

__all__ = ["recover"]
