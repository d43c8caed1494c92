"""The fleet: the truth of many nodes in one PostgreSQL, sent there by each node while it runs.

Read `batch` (what one transaction writes, and what guards it), `rows` (the guard of each row), then `shipper`,
`view` and `restore`.
"""

from limpet.engine.fleet.address import Address
from limpet.engine.fleet.comparison import comparing, find_differences
from limpet.engine.fleet.restore import Restored, restore
from limpet.engine.fleet.shipper import FleetLag, Promise, Shipper
from limpet.engine.fleet.tables import make_tables, remove_tables
from limpet.engine.fleet.view import Fleet, FleetContainer, FleetEvent, FleetNode

__all__ = [
    "Address",
    "Fleet",
    "FleetContainer",
    "FleetEvent",
    "FleetLag",
    "FleetNode",
    "Promise",
    "Restored",
    "Shipper",
    "comparing",
    "find_differences",
    "make_tables",
    "remove_tables",
    "restore",
]
