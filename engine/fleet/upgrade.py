"""Make or migrate the fleet's tables: one node does it, the others wait. Only this loads SQLAlchemy, when it must."""

import re
from typing import Any

from limpet.engine.fleet.address import Address, Connection
from limpet.engine.fleet.shape import require_shape
from limpet.schema.errors import FleetError, FleetTooNewError, quote

FLEET_REVISION = "f002"
"""The newest revision of the fleet's tables that this version knows."""
_LOCK = 0x6C696D706574
"""The key of the advisory lock under which tables are made: "limpet"."""
_MARKS = {"fleet_node", "container_status", "event"}
"""Tables by which a schema is known for limpet's, whatever became of `fleet_version`."""
_OURS = re.compile(r"f\d{3}")


def require_schema(address: Address, connection: Connection, revision: str = FLEET_REVISION) -> None:
    """Make the tables if there are none, migrate older ones.

    Raises FleetTooNewError for newer ones, FleetError for a schema "limpet" that is not ours, which is left untouched,
    or for tables that were altered.
    """
    if read_revision(address, connection) != revision:
        _migrate(address, revision)
    require_shape(address, connection)


def require_current(address: Address, connection: Connection) -> None:
    """Raise FleetError unless the tables are this version's: for who only reads."""
    found = read_revision(address, connection)
    if found != FLEET_REVISION:
        raise FleetError(
            f"{address}: its tables are {'missing' if not found else f'of revision {quote(found)}'};"
            " a node that is opened with it makes or upgrades them"
        )
    require_shape(address, connection)


def read_revision(address: Address, connection: Connection) -> str:
    """Return the revision of the fleet's tables, nothing if there are none. Raises as `require_schema` does."""
    tables = {
        name
        for (name,) in connection.execute(
            "SELECT tablename FROM pg_tables WHERE schemaname = %s", (address.schema,)
        ).fetchall()
    }
    if not tables:
        return ""
    # With the schema's name: whoever has no rights on it is told that, not that the table is missing.
    query = f"SELECT version_num FROM {address.schema}.fleet_version"  # noqa: S608  # a name of small letters
    rows = connection.execute(query) if "fleet_version" in tables else ()
    revisions = [str(row[0]) for row in rows]
    if len(revisions) != 1 or not _OURS.fullmatch(revisions[0]):
        if not revisions and tables >= _MARKS:
            raise FleetError(
                f"{address}: fleet_version, which tells of what revision the tables in schema {address.schema} are, was"
                " altered. Undo that; or drop the schema: then each node that has an engine sends all of its records"
                " again"
            )
        raise FleetError(f"{address}: its schema {address.schema!r} is not limpet's; give an empty database")
    if revisions[0] > FLEET_REVISION:
        raise FleetTooNewError(
            f"{address}: its tables are of revision {revisions[0]}, this limpet knows {FLEET_REVISION}; upgrade limpet"
        )
    return revisions[0]


def _migrate(address: Address, revision: str) -> None:
    """Run the migrations in one transaction, unless another node has done it while this one waited."""
    # Imported here: they take long to load, and a fleet is migrated once.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415
    from sqlalchemy import create_engine  # noqa: PLC0415
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415
    from sqlalchemy.pool import StaticPool  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", "limpet.engine.fleet:migrations")
    config.set_main_option("path_separator", "os")
    engine = create_engine("postgresql+psycopg://", creator=address.open, poolclass=StaticPool)
    try:
        with address.errors_told(), engine.begin() as connection:
            driver: Any = connection.connection.driver_connection
            driver.set_locally()
            # An index of a million rows takes a minute; so does the wait for another node that makes it.
            driver.is_patient = True
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            if read_revision(address, driver) != revision:
                connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {address.schema}")
                config.attributes["connection"] = connection
                command.upgrade(config, revision)
    except DBAPIError as error:
        raise address.tell(error.orig or error) from None
    finally:
        engine.dispose()
