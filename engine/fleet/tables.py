"""Making a fleet's tables before any node does, and removing them altogether."""

from limpet.engine.fleet.address import Address
from limpet.engine.fleet.upgrade import read_revision, require_schema
from limpet.schema.errors import InvalidInputError


def make_tables(url: str) -> None:
    """Make the fleet's tables, or upgrade them. Raises InvalidInputError, FleetTooNewError, FleetError."""
    address = Address(url)
    with address.connect() as connection:
        require_schema(address, connection)


def remove_tables(url: str) -> None:
    """Remove the fleet's tables and their schema, with all that the nodes have sent. Raises FleetError.

    A schema that is not limpet's, or is the one that is used when a URL names none, is refused.
    """
    address = Address(url)
    if address.is_default:
        raise InvalidInputError("fleet: only a schema that the URL names by schema= is removed")
    with address.connect() as connection:
        if read_revision(address, connection):
            connection.execute(f"DROP SCHEMA {address.schema} CASCADE")
