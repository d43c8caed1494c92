"""A look beside a live engine, or at a dead one's state: nothing is written."""

from limpet.engine.inspection.snapshot import Snapshot

__all__ = ["Snapshot"]
