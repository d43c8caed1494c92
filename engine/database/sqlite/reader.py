"""A read-only connection: for what is not kept in memory, and for looking beside a live engine.

It can neither write nor checkpoint, and each read ends at once, so that it never holds the WAL back.
"""

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import msgspec

from limpet.engine.database.sqlite import reads
from limpet.engine.database.sqlite.connection import (
    connect_reader,
    copy_database,
    fetch_all,
    find_damage,
    find_format_damage,
    identify,
    keep_open,
    require_integer,
    translate,
)
from limpet.schema.codec import Row, require_readable_status, row_to_metadata, row_to_sandbox
from limpet.schema.errors import NotFoundError, StoreDamagedError, StoreTooNewError, quote
from limpet.schema.metadata import Metadata
from limpet.schema.revision import SCHEMA_REVISION
from limpet.schema.status import ContainerState

_KEPT_METADATA = 1024


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """One change of a container's state, as `history` tells it."""

    number: int
    """Counts the container's transitions from 1, without a gap."""
    seq: int
    """The checkpoint that made it."""
    at: int
    """Nanoseconds since the epoch."""
    state: ContainerState
    exit_code: int
    reason: str
    message: str


class Reader:
    """Reads one node's records. Thread-safe."""

    def __init__(self, path: str, node: str, *, immutable: bool = False) -> None:
        self._path = path
        self.node = node
        self._lock = threading.Lock()
        try:
            self._connection = connect_reader(path, immutable=immutable)
        except sqlite3.Error as error:
            raise translate(path, error) from error
        self.metadata = lru_cache(_KEPT_METADATA)(self._load_metadata)

    def identify(self) -> str:
        """Return the database's schema revision. Raises StoreDamagedError if it is not one of ours."""
        with self._lock:
            try:
                return identify(self._connection, self._path)
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise translate(self._path, error) from error

    def require_current(self) -> None:
        """Raise StoreTooNewError, or StoreDamagedError for an older one, unless the schema is this version's."""
        revision = self.identify()
        if revision < SCHEMA_REVISION:
            raise StoreDamagedError(
                f"{self._path}: schema {quote(revision)} is older than {SCHEMA_REVISION};"
                " open it with an engine once, which upgrades it"
            )
        if revision > SCHEMA_REVISION:
            raise too_new(self._path, revision)

    def load_statuses(self) -> list[Row]:
        """Return the status row of every container."""
        return self._read_keyed(reads.SELECT_STATUSES)

    def load_unsettled(self) -> list[Row]:
        """Return the status row of every container that has not ended, or says that it has a process."""
        return self._read_keyed(reads.SELECT_UNSETTLED)

    def load_status_ids(self) -> list[str]:
        """Return the id of every container that has a status row, in order."""
        return [row[0] for row in self._read_keyed(reads.SELECT_STATUS_IDS)]

    def load_container_ids(self) -> list[str]:
        """Return the id of every container, also of those that have no status row, in order."""
        return [row[0] for row in self._read_keyed(reads.SELECT_CONTAINER_IDS)]

    def load_status(self, container_id: str) -> Row | None:
        """Return the status row of one container, None if it has none."""
        rows = self._read(reads.SELECT_STATUS, container_id)
        return rows[0] if rows else None

    def load_names(self) -> list[tuple[str, str, str, str]]:
        """Return (id, sandbox id, name, labels as JSON) of every container."""
        return self._read_keyed(reads.SELECT_CONTAINER_NAMES)

    def load_instant(self) -> tuple[list[Row], list[tuple[str, str, str, str]], list[Row]]:
        """Return what `load_sandboxes`, `load_names` and `load_statuses` do, all as it was at one instant."""
        with self._lock:
            try:
                self._connection.execute("BEGIN")
                try:
                    sandboxes, names, statuses = (
                        self._require_ids(fetch_all(self._connection, statement, (self.node,)))
                        for statement in (reads.SELECT_SANDBOXES, reads.SELECT_CONTAINER_NAMES, reads.SELECT_STATUSES)
                    )
                finally:
                    self._connection.execute("COMMIT")
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise translate(self._path, error) from error
        return sandboxes, names, statuses

    def load_sandboxes(self) -> list[Row]:
        """Return the row of every sandbox."""
        return self._read_keyed(reads.SELECT_SANDBOXES)

    def load_all_sandboxes(self) -> list[tuple[str, Row]]:
        """Return node and row of every sandbox of every node, read past the index: it may be what is damaged."""
        with self._lock:
            try:
                return [(row[0], row[1:]) for row in fetch_all(self._connection, reads.SELECT_ALL_SANDBOXES)]
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise translate(self._path, error) from error

    def load_sandbox_ids_in_use(self) -> list[str]:
        """Return the ids of the sandboxes that containers are in."""
        return [row[0] for row in self._read_keyed(reads.SELECT_SANDBOX_IDS_IN_USE)]

    def history(self, container_id: str) -> list[Transition]:
        """Return the container's state changes that are kept, oldest first. Raises StoreDamagedError."""
        rows = self._read(reads.SELECT_TRANSITIONS, container_id)
        try:
            return [msgspec.convert(dict(zip(reads.TRANSITION_COLUMNS, row, strict=True)), Transition) for row in rows]
        except msgspec.ValidationError as error:
            raise StoreDamagedError(
                f"container {container_id}: its history does not decode: {error}; restore a backup"
            ) from error

    def last_report(self) -> bytes | None:
        """Return the newest recovery report as JSON, None if there is none."""
        rows = self._read(reads.SELECT_LAST_REPORT)
        return str(rows[0][0]).encode() if rows else None

    def nodes(self) -> list[str]:
        """Return the names of all nodes that have opened this database."""
        with self._lock:
            try:
                rows = fetch_all(self._connection, reads.SELECT_NODES)
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise translate(self._path, error) from error
        return sorted(row[0] for row in self._require_ids(rows))

    def epoch(self) -> int:
        """Return the node's epoch, 0 if it has none yet."""
        rows = self._read(reads.SELECT_EPOCH)
        return require_integer(self._path, rows[0][0]) if rows else 0

    def find_damage(self) -> list[str]:
        """Return what SQLite's own checks find wrong."""
        return self._find(find_damage)

    def find_format_damage(self) -> list[str]:
        """Return what makes SQLite take the database for read-only. Takes as much memory as the database is long."""
        return self._find(find_format_damage)

    def _find(self, look: Callable[[sqlite3.Connection], list[str]]) -> list[str]:
        with self._lock:
            try:
                return look(self._connection)
            except (sqlite3.Error, UnicodeDecodeError) as error:
                return [str(translate(self._path, error))]

    def find_damaged_records(self) -> list[str]:
        """Return each record that cannot be believed, and each gap in the records, in words."""
        statuses = {row[0]: row for row in self.load_statuses()}
        containers = self._read(reads.SELECT_CONTAINERS)
        found = [
            *self._find_unreadable(row_to_metadata, containers),
            *self._find_unreadable(require_readable_status, statuses.values()),
            *self._find_unreadable(row_to_sandbox, self._read(reads.SELECT_SANDBOXES)),
        ]
        found += [f"container {row[0]}: its status row is missing" for row in containers if row[0] not in statuses]
        found += [
            f"container {key}: its metadata is missing" for key in statuses.keys() - {row[0] for row in containers}
        ]
        for ask in (self.epoch, lambda: self.history("")):
            ask()  # the other tables can be read, as their columns should be
        for statement in reads.SELECT_READ_BY_PEOPLE:
            self._read(statement)
        found += [
            f"container {row[0]}: transition {row[1]} of its history is to state {row[2]}, which is none"
            for row in self._read(reads.SELECT_STATELESS_TRANSITIONS)
        ]
        newest = {row[0]: row[1] for row in self._read(reads.SELECT_NEWEST_TRANSITIONS)}
        found += [
            f"container {key}: its history does not reach its newest state change ({row[2]})"
            for key, row in statuses.items()
            if newest.get(key) != row[2]
        ]
        return found

    def _find_unreadable(self, decode: Callable[[str, Row], object], rows: Iterable[Row]) -> Iterator[str]:
        for row in rows:
            try:
                decode(self.node, row)
            except StoreDamagedError as error:
                yield str(error)

    def copy_to(self, target_path: str) -> None:
        """Copy the database, as it is at one instant, into a new file. Raises StoreError, OSError."""
        with self._lock:
            try:
                copy_database(self._connection, target_path)
            except sqlite3.Error as error:
                raise translate(target_path, error) from error

    def abandon(self) -> None:
        """In a fork: never touch the connection again, not even to close it; it is the parent's."""
        keep_open(self._connection)

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._connection.close()

    def _load_metadata(self, container_id: str) -> Metadata:
        rows = self._read(reads.SELECT_CONTAINER, container_id)
        if not rows:
            raise NotFoundError(f"container {quote(container_id)} does not exist")
        if rows[0][0] != container_id:
            raise StoreDamagedError(
                f"{self._path}: the key of container {container_id} leads to another; restore a backup"
            )
        return row_to_metadata(self.node, rows[0])

    def _read_keyed(self, statement: str) -> list[Row]:
        return self._require_ids(self._read(statement))

    def _require_ids(self, rows: list[Row]) -> list[Row]:
        """Return rows that lead with an id; a page that has taken another's place leads with anything."""
        for row in rows:
            if type(row[0]) is not str:
                raise StoreDamagedError(f"{self._path}: {row[0]!r} stands where an id should; restore a backup")
        return rows

    def _read(self, statement: str, *parameters: object) -> list[Row]:
        with self._lock:
            try:
                return fetch_all(self._connection, statement, (self.node, *parameters))
            except UnicodeEncodeError:  # what cannot be written as UTF-8 is in no row
                return []
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise translate(self._path, error) from error


def too_new(path: str, revision: str) -> StoreTooNewError:
    """Return the error for a database whose schema this version does not know."""
    return StoreTooNewError(
        f"{path}: its schema {quote(revision)} is newer than {SCHEMA_REVISION}, which this limpet knows;"
        " it was left untouched: use a newer limpet, or a backup"
    )
