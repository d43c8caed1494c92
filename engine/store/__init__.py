"""The store: every record of one node, durable when a call returns, and in memory for reading.

Read `store` (what it promises), `draft` (a change before it is written), `commit` (which thread writes), `memory`
(what is known without the disk), then `watch` (who is told).
"""

from limpet.engine.store.commit import Request
from limpet.engine.store.draft import Draft
from limpet.engine.store.feed import StoreFeed
from limpet.engine.store.listing import Listing
from limpet.engine.store.match import Filter, Named
from limpet.engine.store.record import Record, Unsettled
from limpet.engine.store.store import Store
from limpet.engine.store.watch import Cursor, Wanted, Watch

__all__ = [
    "Cursor",
    "Draft",
    "Filter",
    "Listing",
    "Named",
    "Record",
    "Request",
    "Store",
    "StoreFeed",
    "Unsettled",
    "Wanted",
    "Watch",
]
