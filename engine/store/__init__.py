"""The store: every record of one node, durable when a call returns, and in memory for reading."""

from limpet.engine.store.draft import Draft
from limpet.engine.store.record import Record, Unsettled
from limpet.engine.store.store import Store

__all__ = ["Draft", "Record", "Store", "Unsettled"]
