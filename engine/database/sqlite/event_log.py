"""The log of changes as it lies in SQLite: appended to within a commit, and pruned there, a few rows at a time."""

import sqlite3
import time

from limpet.engine.database.changes import KEPT_CHARACTERS, KEPT_EVENTS, KEPT_NS, PRUNED_AT_ONCE, Changes
from limpet.engine.database.sqlite import statements as sql
from limpet.engine.database.sqlite.connection import require_integer
from limpet.schema.events import STATE_CHANGES
from limpet.schema.history import KEPT_TRANSITIONS


class EventLog:
    """The events of one node. `load` and `append` are called within a transaction of the caller's, or none.

    Events leave in their order, and are never missed: up to which they may be missing is in the row of their node,
    written in the same transaction. The histories of containers that are there outlast that. The newest event always
    stays, so that no revision is used twice.
    """

    def __init__(self, path: str, node: str) -> None:
        self._path = path
        self._node = node
        self.newest = 0
        """The revision of the newest event, 0 if there was none yet."""
        self._pruned = 0
        self._oldest_at = 0
        """When the oldest event was written that is not pruned."""
        self._length: int | None = None
        """How long its labels, messages and statuses are; None until an event is written."""
        self._next: tuple[int, int, int, int] | None = None

    def load(self, connection: sqlite3.Connection) -> None:
        """Read how far the log goes. Raises StoreDamagedError, sqlite3.Error."""
        node = (self._node,)
        row = connection.execute(sql.SELECT_PRUNED, node).fetchone()
        self._pruned = require_integer(self._path, row[0]) if row else 0
        (newest,) = connection.execute(sql.SELECT_NEWEST_EVENT, node).fetchone()
        self.newest = max(self._pruned, 0 if newest is None else require_integer(self._path, newest))
        self._length = None
        row = connection.execute(sql.SELECT_EVENT_SIZES, (*node, self._pruned, 1)).fetchone()
        self._oldest_at = row[1] if row and isinstance(row[1], int) else time.time_ns()

    def append(self, connection: sqlite3.Connection, changes: Changes) -> None:
        """Write the events of a commit, and drop old ones. Only `confirm` makes it so: the commit may fail."""
        node = (self._node,)
        newest, pruned, oldest_at = changes.events[-1].revision, self._pruned, self._oldest_at
        length = self._length
        if length is None:
            (length,) = connection.execute(sql.SELECT_LOG_LENGTH, (*node, pruned)).fetchone()
            length = length or 0
        for row in changes.events:
            length += len(row.labels) + len(row.message) + len(row.body or "")
            connection.execute(sql.INSERT_EVENT, node + row)
        if pruned:
            histories = [(*node, key, pruned, 2**63 - 1) for key in changes.deleted_containers]
            histories += [
                (*node, row.id, pruned, row.number - KEPT_TRANSITIONS)
                for row in changes.events
                if row.number > KEPT_TRANSITIONS and row.kind in STATE_CHANGES
            ]
            if histories:
                connection.executemany(sql.PRUNE_HISTORY, histories)
        is_long = newest - pruned > KEPT_EVENTS + PRUNED_AT_ONCE or length > KEPT_CHARACTERS
        if is_long or time.time_ns() - oldest_at > KEPT_NS + KEPT_NS // PRUNED_AT_ONCE:
            most = max(2 * len(changes.events), 4 * PRUNED_AT_ONCE)
            pruned, oldest_at, length = self._prune(connection, newest, length, most)
        self._next = newest, pruned, oldest_at, length

    def confirm(self) -> None:
        """Believe what `append` has done, now that it is in the database."""
        if self._next is not None:
            self.newest, self._pruned, self._oldest_at, self._length = self._next
            self._next = None

    def _prune(self, connection: sqlite3.Connection, newest: int, length: int, most: int) -> tuple[int, int, int]:
        """Drop up to `most` events that are too many, too old or too long; return what `_next` has of what is left."""
        expired = time.time_ns() - KEPT_NS
        pruned, oldest_at = self._pruned, self._oldest_at
        sizes = connection.execute(sql.SELECT_EVENT_SIZES, (self._node, self._pruned, most + 1)).fetchall()
        for revision, at, size in sizes:
            if type(revision) is not int or type(at) is not int:
                break  # damage, which a check tells
            oldest_at = at
            is_surplus = revision <= newest - KEPT_EVENTS or at < expired or length > KEPT_CHARACTERS
            if not is_surplus or revision >= newest or revision > self._pruned + most:
                break
            pruned = revision
            length -= size
        if pruned > self._pruned:
            connection.execute(sql.PRUNE_EVENTS, (self._node, self._pruned, pruned, newest, KEPT_TRANSITIONS))
            connection.execute(sql.UPDATE_PRUNED, (pruned, self._node))
        return pruned, oldest_at, length
