"""Reading what has changed, as it was at one instant, for whoever keeps a copy elsewhere; and making it from a copy."""

import json
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import not_
from typing import Any

from limpet.engine.database.sqlite import statements as sql
from limpet.engine.database.sqlite.connection import WRITER_PRAGMAS, fetch_all, require_integer
from limpet.engine.database.sqlite.labels import insert_labels
from limpet.engine.database.sqlite.migrate import create_database
from limpet.engine.database.sqlite.reader import Reader
from limpet.schema.codec import are_sound
from limpet.schema.rows import AnyRow, ContainerRow, EventRow, ItemRow, SandboxRow, SandboxStatusRow, StatusRow

Key = tuple[str, ...]
"""The values of a row's key columns, without the node's name."""

ROWS: Mapping[str, tuple[Any, tuple[str, ...]]] = {
    "sandbox": (SandboxRow, ("id",)),
    "sandbox_status": (SandboxStatusRow, ("id",)),
    "container": (ContainerRow, ("id",)),
    "container_status": (StatusRow, ("id",)),
    "item": (ItemRow, ("kind", "key")),
}
"""The tables of present rows: the class of a row, and its key columns, which come first in it."""


@dataclass(slots=True)
class Extract:
    """Part of a node's records, as they were at one instant."""

    epoch: int = 0
    opened_at: int = 0
    pruned: int = 0
    newest: int = 0
    """The revision of the newest event."""
    reached: int = 0
    """Of the events that follow the revision asked for, all up to this one were read."""
    events: list[EventRow] = field(default_factory=list)
    rows: dict[str, list[AnyRow]] = field(default_factory=dict)
    """By table, those that carry the checksum of their content."""
    absent: dict[str, list[Key]] = field(default_factory=dict)
    """By table, the keys that were asked for and lead to no row."""
    damaged: list[str] = field(default_factory=list)
    """Rows that cannot be believed, in words; they are neither in `rows` nor in `absent`."""


@dataclass(slots=True)
class Keys:
    """Which rows there are, by their checksums, as they were at one instant."""

    pruned: int
    newest: int
    events: dict[int, int]
    """The checksum of each event, by its revision."""
    rows: dict[str, dict[Key, int]]
    """By table and key, the checksum."""


class Extractor(Reader):
    """Reads pieces of one node's records, each at one instant."""

    def extract(
        self,
        events: tuple[int, int] | Collection[int],
        choose: Callable[[Sequence[EventRow]], Mapping[str, Collection[Key]]],
    ) -> Extract:
        """Return events, and the rows whose keys `choose` gives for them, of the same instant. Raises StoreError.

        `events` are a revision and how many are wanted of those that follow, or a collection of revisions.
        """
        found = Extract()
        with self._pool.lend_for_an_instant() as connection:
            node = (self.node,)
            row = connection.execute(_SELECT_NODE, node).fetchone() or (0, 0, 0)
            found.epoch, found.opened_at, found.pruned = (require_integer(self._path, each) for each in row)
            found.newest = self._load_revision(connection, found.pruned)
            if isinstance(events, tuple):
                rows = fetch_all(connection, sql.SELECT_EVENTS, (*node, *events))
                found.reached = rows[-1][0] if len(rows) == events[1] and rows else found.newest
            else:
                rows = fetch_all(connection, _SELECT_EVENTS_AT, (*node, json.dumps(list(events))))
            found.events = list(map(EventRow._make, rows))
            wanted = choose(found.events)
            loaded = {
                table: fetch_all(connection, _SELECT_KEYED[table], (*node, json.dumps(list(keys))))
                for table, keys in wanted.items()
                if keys
            }
        for table, rows in loaded.items():
            row_class, key_columns = ROWS[table]
            length = len(key_columns)
            found.absent[table] = sorted(set(wanted[table]) - {row[:length] for row in rows})
            sound = are_sound(self.node, rows)
            found.rows[table] = list(map(row_class._make, compress(rows, sound)))
            found.damaged += [f"{table} {row[:length]}" for row in compress(rows, map(not_, sound))]
        sound = are_sound(self.node, found.events)
        found.damaged += [f"event {row.revision}" for row in compress(found.events, map(not_, sound))]
        found.events = list(compress(found.events, sound))
        return found

    def extract_keys(self) -> Keys:
        """Return the key and the checksum of every row. Raises StoreError."""
        with self._pool.lend_for_an_instant() as connection:
            node = (self.node,)
            row = connection.execute(sql.SELECT_PRUNED, node).fetchone() or (0,)
            pruned = require_integer(self._path, row[0])
            newest = self._load_revision(connection, pruned)
            events = fetch_all(connection, "SELECT revision, checksum FROM event WHERE node = ?", node)
            rows = {table: fetch_all(connection, _SELECT_CHECKSUMS[table], node) for table in ROWS}
        return Keys(
            pruned=pruned,
            newest=newest,
            events=dict(events),
            rows={table: {row[:-1]: row[-1] for row in found} for table, found in rows.items()},
        )

    def load_kept_events(self, until: int) -> set[int]:
        """Return the revisions of the events up to `until` that are kept. Raises StoreError."""
        return {row[0] for row in self._read(_SELECT_KEPT_EVENTS, until)}


_SELECT_KEPT_EVENTS = "SELECT revision FROM event WHERE node = ? AND revision <= ?"
_SELECT_NODE = "SELECT epoch, opened_at, pruned FROM node WHERE name = ?"
_SELECT_EVENTS_AT = (
    f"SELECT {', '.join(EventRow._fields)} FROM event"  # noqa: S608  # our own names
    " WHERE node = ? AND revision IN (SELECT value FROM json_each(?)) ORDER BY revision"
)


def _select(table: str) -> str:
    row_class, keys = ROWS[table]
    wanted = ", ".join(f"json_extract(value, '$[{place}]')" for place in range(len(keys)))
    return (
        f"SELECT {', '.join(row_class._fields)} FROM {table}"  # noqa: S608  # our own names
        f" WHERE node = ? AND ({', '.join(keys)}) IN (SELECT {wanted} FROM json_each(?))"
    )


_SELECT_KEYED = {table: _select(table) for table in ROWS}
_SELECT_CHECKSUMS = {
    table: f"SELECT {', '.join(keys)}, checksum FROM {table} WHERE node = ?"  # noqa: S608  # our own names
    for table, (_, keys) in ROWS.items()
}


def make_database(
    path: str, node: tuple[str, int, int, int], rows: Mapping[str, Collection[AnyRow]], events: Collection[EventRow]
) -> None:
    """Make the database at `path` from a copy of its rows, durably; whole, or not there. Raises StoreError.

    `node` is the row of table node.
    """

    def fill(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO node (name, epoch, opened_at, pruned) VALUES (?, ?, ?, ?)", node)
        for table, found in [*((table, rows.get(table, ())) for table in ROWS), ("event", events)]:
            for row in found:
                names = ", ".join(("node", *row._fields))  # type: ignore[attr-defined]  # they are named tuples
                marks = ", ".join("?" * (len(row) + 1))
                connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", (node[0], *row))  # noqa: S608
        insert_labels(connection, node[0], rows.get("container", ()))  # type: ignore[arg-type]  # those of `ROWS`

    create_database(path, WRITER_PRAGMAS, fill)
