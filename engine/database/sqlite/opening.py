"""Opening a database for writing, step by step: nothing is changed before all that can be checked was checked."""

import os
from contextlib import ExitStack

from limpet.engine.database.sqlite.backup import back_up
from limpet.engine.database.sqlite.connection import WRITER_PRAGMAS, Pragmas
from limpet.engine.database.sqlite.migrate import create_database, prepare_database
from limpet.engine.database.sqlite.plausibility import require_plausible_files, require_same_age
from limpet.engine.database.sqlite.reader import Reader
from limpet.engine.database.sqlite.wal import examine_wal
from limpet.engine.database.sqlite.writer import Writer
from limpet.engine.state.directory import StateDirectory
from limpet.engine.state.durable import make_directory, sync_directory
from limpet.engine.state.names import BACKUPS, DATABASE
from limpet.engine.state.owner import Owner
from limpet.engine.state.presence import is_there
from limpet.schema.errors import StateDirectoryError, quote_path
from limpet.schema.revision import SCHEMA_REVISION


class SqliteDatabase:
    """One node's records in the SQLite database of a state directory."""

    def __init__(self, directory: StateDirectory, writer: Writer, reader: Reader, owner: Owner) -> None:
        self.node = reader.node
        self.journal = writer
        self.records = reader
        self._directory = directory
        self._owner = owner

    def back_up(self, target_path: str) -> None:
        """Copy the database to a new file while it is in use; whole and verified, or not there."""
        back_up(self.records, target_path)

    def close(self) -> None:
        """Move the WAL into the database, note that it was closed in order, and close it. Raises StoreError."""
        self.records.close()
        self.journal.close(lambda: self._directory.write_owner(self._owner.as_closed()))

    def leave(self) -> None:
        """Close it without moving the WAL: the reader goes last, and whoever only reads leaves the WAL alone."""
        self.journal.close()
        self.records.close()

    def abandon(self) -> None:
        """In a fork: leave the connections to the parent."""
        self.journal.abandon()
        self.records.abandon()


def open_database(directory: StateDirectory, node: str, pragmas: Pragmas = WRITER_PRAGMAS) -> SqliteDatabase:
    """Open the database of a state directory whose lock is held: check it, migrate it if it is older, claim it.

    `pragmas` are set and read back on each connection that writes; a crash test gives others, to break a promise.
    Raises StoreDamagedError, StoreTooNewError or another StoreError, and leaves the database untouched.
    """
    path = directory.join(DATABASE)
    last = directory.read_owner()
    directory.remove_temporary_files()
    require_plausible_files(directory.path, last)
    if is_there(path):
        is_torn = examine_wal(path + "-wal").is_torn
        make_directory(directory.join(BACKUPS))
        backup_path = directory.join(f"{BACKUPS}/before-{SCHEMA_REVISION}-{os.urandom(4).hex()}.db")
        reader = prepare_database(path, node, backup_path, pragmas, is_torn=is_torn)
    else:
        _require_no_copy(directory, node)
        create_database(path, pragmas)
        reader = Reader(path, node)
    with ExitStack() as undo:
        undo.callback(reader.close)
        require_same_age(directory.path, last, reader.epochs())
        writer = Writer(path, node, pragmas, ring=directory.ring)
        undo.callback(writer.close)
        owner = Owner(pid=os.getpid(), node=node, epoch=writer.claim(), closed=False)
        undo.callback(writer.close, lambda: directory.write_owner(owner.as_closed()))
        # The WAL's name must be durable before we say that acknowledged commits may be in it.
        sync_directory(directory.path)
        directory.write_owner(owner)
        undo.pop_all()
    return SqliteDatabase(directory, writer, reader, owner)


def _require_no_copy(directory: StateDirectory, node: str) -> None:
    """Refuse to begin anew where a copy was to be made, and a kill came in between.

    Raises StateDirectoryError.
    """
    original = directory.find_original(node)
    if original:
        raise StateDirectoryError(
            f"state directory {quote_path(directory.path)} was to be made from {quote_path(original)}, and its database"
            " was not: make it again, or give another directory"
        )
