"""Comparing what the fleet has of a node with what the node has."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

from limpet.engine.database.sqlite.extract import ROWS, Extractor
from limpet.engine.fleet import batch
from limpet.engine.fleet.address import Address
from limpet.engine.fleet.upgrade import require_current
from limpet.schema.metadata import require_node

_Key = TypeVar("_Key", bound=object)


def find_differences(url: str, node: str, database: str) -> list[str]:
    """Return in words which rows and events the fleet and the database at this path do not have alike.

    A node that has unsent changes differs. Raises InvalidInputError, StoreError, FleetError.
    """
    require_node(node)
    address = Address(url)
    with address.connect() as connection:
        require_current(address, connection)
        theirs = batch.load_keys(connection, node)
    extractor = Extractor(database, node)
    try:
        ours = extractor.extract_keys()
    finally:
        extractor.close()
    found = list(_differ("event", ours.events, theirs.events))
    for table in ROWS:
        found += _differ(table, ours.rows[table], theirs.rows[table])
    return found


def _differ(table: str, here: Mapping[_Key, int], there: Mapping[_Key, int]) -> Iterator[str]:
    for key in sorted({*here, *there}, key=str):
        if key not in there:
            yield f"{table} {key}: not in the fleet"
        elif key not in here:
            yield f"{table} {key}: in the fleet alone"
        elif there[key] == batch.ALTERED:
            yield f"{table} {key}: altered in the fleet; the node sends it again when its engine is opened"
        elif here[key] != there[key]:
            yield f"{table} {key}: another one in the fleet"
