"""The store: every record of one node, durable when a call returns, and in memory for reading.

Read `store` (what it promises), `draft` (a change before it is written), `commit` (which thread writes), then `rows`
(what is kept).
"""

from limpet.engine.store.commit import Request, Turn
from limpet.engine.store.draft import Doubt, Draft
from limpet.engine.store.match import Filter, Named, name_container, name_sandbox, read_labels, resolve
from limpet.engine.store.record import Record, Unsettled
from limpet.engine.store.store import Store

__all__ = [
    "Doubt",
    "Draft",
    "Filter",
    "Named",
    "Record",
    "Request",
    "Store",
    "Turn",
    "Unsettled",
    "name_container",
    "name_sandbox",
    "read_labels",
    "resolve",
]
