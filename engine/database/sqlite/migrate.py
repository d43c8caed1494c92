"""Bring a database to the schema of this version: make it, or migrate it after a backup."""

import os
import sqlite3
from collections.abc import Callable
from contextlib import suppress

from limpet.engine.database.sqlite.backup import copy
from limpet.engine.database.sqlite.connection import (
    APPLICATION_ID,
    Pragmas,
    create_file,
    finish_rollback,
    translate,
    truncate_wal,
    writing,
)
from limpet.engine.database.sqlite.reader import Reader, too_new
from limpet.engine.state.durable import rename_new, sync_directory, sync_file, temporary_path
from limpet.engine.state.presence import is_there
from limpet.schema.ddl import CREATE
from limpet.schema.errors import StoreError
from limpet.schema.revision import SCHEMA_REVISION
from limpet.schema.telling import get_log

_log = get_log("limpet.migrations")


def create_database(path: str, pragmas: Pragmas, fill: Callable[[sqlite3.Connection], None] = lambda _: None) -> None:
    """Make a database with the newest schema, durably: as soon as it is visible, it is complete.

    `fill` may write to it before; otherwise it is empty.

    It is made under a temporary name, because a database that is being made has a journal which only a
    writer may roll back. Raises StoreError.
    """
    directory = os.path.dirname(path)
    temporary = temporary_path(directory)
    try:
        create_file(temporary)
        _create_tables(temporary, pragmas, fill)
        _require_whole(temporary)
        sync_file(temporary)
        rename_new(temporary, path)
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
    if is_there(path + "-wal"):
        raise StoreError(f"{path}: it could not be written out; see whether the disk is full or failing")


def prepare_database(path: str, node: str, backup_path: str, pragmas: Pragmas, *, is_torn: bool) -> Reader:
    """Upgrade an older schema, after copying the database to `backup_path`; begin its WAL anew where that is torn.

    Return a reader of it. It stays open, because a writer that is closed last removes the WAL, which would be missed.

    Raises StoreTooNewError if a newer limpet made it, StoreDamagedError if it is not limpet's; it is left untouched.
    """
    if is_there(path + "-journal"):
        # A restored backup was being turned to WAL when it was killed: a reader may not undo what is half done.
        finish_rollback(path)
    reader = Reader(path, node)
    try:
        revision = reader.read_revision()
        if revision > SCHEMA_REVISION:
            raise too_new(path, revision)
        if is_torn:
            _begin_wal_anew(path, pragmas)
        if revision < SCHEMA_REVISION:
            _upgrade(reader, path, backup_path, pragmas)
    except BaseException:
        reader.close()
        raise
    return reader


def _begin_wal_anew(path: str, pragmas: Pragmas) -> None:
    """Move what is sound in the WAL into the database, and drop the rest. Another program that reads may prevent it."""
    try:
        with writing(path, pragmas) as connection:
            truncate_wal(connection)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise translate(path, error) from error


def _create_tables(path: str, pragmas: Pragmas, fill: Callable[[sqlite3.Connection], None]) -> None:
    """Make all tables in one transaction. Raises StoreError."""
    try:
        with writing(path, pragmas) as connection:
            connection.execute("BEGIN IMMEDIATE")
            for statement in CREATE:
                connection.execute(statement)
            connection.execute("INSERT INTO alembic_version VALUES (?)", (SCHEMA_REVISION,))
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            fill(connection)
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise translate(path, error) from error


def _upgrade(reader: Reader, path: str, backup_path: str, pragmas: Pragmas) -> None:
    """Copy the database, then migrate it. What was damaged before is logged, and keeps nobody from upgrading."""
    for damage in copy(reader, backup_path):
        _log.warning("%s, copied before its upgrade: %s", backup_path, damage)
    # Imported here: SQLAlchemy and alembic take ten times as long to load as a current store to open.
    from limpet.engine.database.sqlite.upgrade import upgrade  # noqa: PLC0415

    upgrade(path, pragmas)
