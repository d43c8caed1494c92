"""Bring a database to the schema of this version: make it, or migrate it after a backup."""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress

from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import Connection
from sqlalchemy.pool import StaticPool

from limpet.engine.database.sqlite.backup import back_up
from limpet.engine.database.sqlite.connection import (
    APPLICATION_ID,
    connect_writer,
    create_file,
    finish_rollback,
    translate,
    truncate_wal,
)
from limpet.engine.database.sqlite.reader import Reader, too_new
from limpet.engine.state.durable import sync_directory, sync_file, temporary_path
from limpet.schema.errors import StoreDamagedError, StoreError
from limpet.schema.tables import SCHEMA_REVISION, TABLES


def create_database(path: str) -> None:
    """Make an empty database with the newest schema, durably: whoever looks, also after a crash, sees it whole.

    It is made under a temporary name, because a database that is being made has a journal which only a
    writer may roll back. Raises StoreError.
    """
    directory = os.path.dirname(path)
    temporary = temporary_path(directory)
    try:
        create_file(temporary)
        _in_transaction(temporary, _create_tables)
        _require_whole(temporary)
        sync_file(temporary)
        os.rename(temporary, path)
        sync_directory(directory)
    except OSError as error:
        raise StoreError(f"{path}: it could not be made ({error.strerror})") from error
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.unlink(temporary + suffix)


def _require_whole(path: str) -> None:
    """Raise StoreError unless all of a database that was just made is in its file, and nothing in a WAL beside it.

    SQLite moves the WAL when it closes the database, and does not say so if that fails.
    """
    if os.path.lexists(path + "-wal"):
        raise StoreError(f"{path}: it could not be written out; see whether the disk is full or failing")


def prepare_database(path: str, node: str, backup_path: str, *, is_torn: bool) -> Reader:
    """Upgrade an older schema, after copying the database to `backup_path`; begin its WAL anew where that is torn.

    Return a reader of it. It stays open, because a writer that is closed last removes the WAL, which would be missed.

    Raises StoreTooNewError if a newer limpet made it, StoreDamagedError if it is not ours; untouched then.
    """
    if os.path.lexists(path + "-journal"):
        # A restored backup was being turned to WAL when it was killed: a reader may not undo what is half done.
        finish_rollback(path)
    reader = Reader(path, node)
    try:
        revision = reader.identify()
        if revision > SCHEMA_REVISION:
            raise too_new(path, revision)
        if is_torn:
            _begin_wal_anew(path)
        if revision < SCHEMA_REVISION:
            back_up(reader, backup_path)
            _in_transaction(path, _upgrade)
    except BaseException:
        reader.close()
        raise
    return reader


def _begin_wal_anew(path: str) -> None:
    """Move what is sound in the WAL into the database, and drop the rest. Another program that reads may prevent it."""
    try:
        with closing(connect_writer(path)) as connection:
            truncate_wal(connection)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise translate(path, error) from error


def _create_tables(connection: Connection) -> None:
    TABLES.create_all(connection, checkfirst=False)
    connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"))
    connection.execute(text("INSERT INTO alembic_version VALUES (:revision)"), {"revision": SCHEMA_REVISION})
    connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")


def _upgrade(connection: Connection) -> None:
    # Imported here: alembic costs more time than opening a store that has nothing to migrate.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", "limpet.schema:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, SCHEMA_REVISION)


def _in_transaction(path: str, change: Callable[[Connection], None]) -> None:
    """Run `change` in one transaction, all of it or nothing, also DDL."""
    engine = create_engine("sqlite://", creator=lambda: _connect(path), poolclass=StaticPool)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    try:
        with engine.begin() as connection:
            change(connection)
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
            if broken:
                raise StoreDamagedError(f"{path}: {len(broken)} rows refer to rows that are missing; see limpet check")
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


def _connect(path: str) -> sqlite3.Connection:
    connection = connect_writer(path)
    # Rebuilding a table drops the old one; with foreign keys on, the rows that refer to it would go with it.
    connection.execute("PRAGMA foreign_keys = off")
    return connection
