"""Comparing what the fleet has of a node with what the node has."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from limpet.engine.database.sqlite.extract import ROWS, Extractor, Keys
from limpet.engine.fleet import batch
from limpet.engine.fleet.address import Address
from limpet.engine.fleet.upgrade import require_current
from limpet.schema.metadata import require_node

_Key = TypeVar("_Key", bound=object)


def find_differences(url: str, node: str, database: str) -> list[str]:
    """Return in words which rows and events the fleet and the database at this path do not have alike.

    A node that has unsent changes differs. Raises InvalidInputError, StoreError, FleetError.
    """
    node = require_node(node)
    with comparing(url) as find:
        return find(node, database)


@contextmanager
def comparing(url: str) -> Iterator[Callable[[str, str], list[str]]]:
    """Connect, and give what does the same for a node and the path of its database. Raises as `find_differences`."""
    address = Address(url)
    with address.connect() as connection:
        require_current(address, connection)

        def find(node: str, database: str) -> list[str]:
            with address.errors_told():
                theirs = batch.load_keys(connection, node)
            return _compare(node, database, theirs)

        yield find


def _compare(node: str, database: str, theirs: Keys) -> list[str]:
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
