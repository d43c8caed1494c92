"""Migrate an older database, in one transaction: the only module that loads SQLAlchemy and alembic."""

import sqlite3
from collections import Counter
from collections.abc import Callable

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, event
from sqlalchemy.engine import Connection
from sqlalchemy.pool import StaticPool

from limpet.engine.database.sqlite.connection import WRITER_PRAGMAS, Pragmas, connect_writer, translate
from limpet.schema.errors import StoreError
from limpet.schema.migrations.reseal import LEFT_OUT
from limpet.schema.revision import SCHEMA_REVISION


def upgrade(path: str, pragmas: Pragmas = WRITER_PRAGMAS, *, revision: str = SCHEMA_REVISION) -> None:
    """Bring the database to a newer schema, or leave it as it was. Raises StoreError."""

    def migrate(connection: Connection) -> None:
        broken = _find_broken_references(connection)
        run_migrations(connection, revision)
        # Rows that referred to nothing before may do so still; a migration must not make more of them.
        more = _find_broken_references(connection) - broken
        if more and not connection.info.get(LEFT_OUT):
            raise StoreError(f"{path}: the migration would break references ({dict(more)}); nothing was written")

    _in_transaction(path, pragmas, migrate)


def run_migrations(connection: Connection, revision: str) -> None:
    """Run the migrations up to `revision` in the connection's transaction."""
    config = Config()
    config.set_main_option("script_location", "limpet.schema:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def _find_broken_references(connection: Connection) -> Counter[tuple[str, str]]:
    """Count the rows that refer to missing rows, by their table and that of what is missing."""
    found = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
    return Counter((str(table), str(parent)) for table, _, parent, _ in found)


def _in_transaction(path: str, pragmas: Pragmas, change: Callable[[Connection], None]) -> None:
    """Run `change` in one transaction, all of it or nothing, also DDL."""
    engine = create_engine("sqlite://", creator=lambda: _connect(path, pragmas), poolclass=StaticPool)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    try:
        with engine.begin() as connection:
            change(connection)
    except sqlite3.Error as error:
        raise translate(path, error) from error
    except StoreError:
        raise
    except Exception as error:
        cause = getattr(error, "orig", None)
        if isinstance(cause, sqlite3.Error):
            raise translate(path, cause) from error
        raise StoreError(f"{path}: its schema could not be changed ({error}); nothing was written") from error
    finally:
        engine.dispose()


def _connect(path: str, pragmas: Pragmas) -> sqlite3.Connection:
    connection = connect_writer(path, pragmas)
    # Rebuilding a table drops the old one; with foreign keys on, the rows that refer to it would go with it.
    connection.execute("PRAGMA foreign_keys = off")
    return connection
