"""Reads the state of a running or a dead engine, without writing anything."""

from limpet.engine.inspection.snapshot import Snapshot

__all__ = ["Snapshot"]
