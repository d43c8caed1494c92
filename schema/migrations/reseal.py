"""A table made anew with other columns, and its rows sealed anew. Frozen, as the migrations that call it are.

Not by ALTER TABLE: it would put a new column behind the checksum, and newer SQLite refuses it on a STRICT table that
has one damaged row.
"""

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy.engine import Connection

from limpet.schema.seal import is_sealed, seal
from limpet.schema.telling import get_log

_log = get_log("limpet.migrations")

LEFT_OUT = "limpet_left_out"
"""In Connection.info: how many rows of a transaction the new tables refused."""


class _Text(bytes):
    """A text as its bytes, so that one that is not UTF-8 is copied as it is; a BLOB is plain bytes."""


def rebuild(
    connection: Connection,
    table: str,
    create: str,
    old: Sequence[str],
    new: Sequence[str],
    fill: Callable[[Mapping[str, object]], Mapping[str, object]],
) -> None:
    """Make `table` anew by `create`, which names it {table}_new, and copy its rows.

    The seal covered the columns `old` so far, and covers `new` from now on; `fill` returns the new columns' values for
    an old row. A row that carries its old seal gets the new one. Any other keeps all of its bytes and its old
    checksum, so that it stays damaged; if the new table refuses it, it is left out and logged, and the backup that was
    made before has it.
    """
    copy = _Copy(connection, table, (*new, "checksum"))
    copy.driver.execute(create)
    for *found, checksum in copy.read((*old, "checksum")):
        values = _decode(found)
        if values is not None and is_sealed(values, checksum):
            row = dict(zip(old, values, strict=True))
            row.update(fill(row))
            row["checksum"] = seal([row[name] for name in new])
            copy.insert(row)
        else:
            row = dict(zip(old, found, strict=True))
            row.update(fill(row), checksum=checksum)
            copy.insert_damaged(row)
    copy.put_in_place()


def rebuild_unsealed(
    connection: Connection, table: str, create: str, old: Sequence[str], new: Mapping[str, object]
) -> None:
    """Make a table without checksums anew by `create`, which names it {table}_new, and copy its rows.

    `new` are the values of the new columns in old rows. A row that the new table refuses is left out and logged.
    """
    copy = _Copy(connection, table, (*old, *new))
    copy.driver.execute(create)
    for found in copy.read(old):
        copy.insert(dict(zip(old, found, strict=True)) | dict(new))
    copy.put_in_place()


class _Copy:
    """The rows of one table on their way into its successor."""

    def __init__(self, connection: Connection, table: str, columns: Sequence[str]) -> None:
        self.driver: Any = connection.connection.driver_connection
        self._info = connection.info
        self._table = table
        self._columns = columns
        self._damaged = self._left_out = 0

    def read(self, columns: Sequence[str]) -> Iterator[Any]:
        """Yield each row of the old table, its texts as their bytes."""
        self.driver.text_factory = _Text
        try:
            yield from self.driver.execute(f"SELECT {', '.join(columns)} FROM {self._table}")  # noqa: S608  # our own names
        finally:
            self.driver.text_factory = str

    def insert(self, row: Mapping[str, object]) -> None:
        """Insert a row as it is. One that the table refuses, for a NULL or a type, is left out."""
        values = [row[name] for name in self._columns]
        holes = ("CAST(? AS TEXT)" if isinstance(value, _Text) else "?" for value in values)
        try:
            self.driver.execute(
                f"INSERT INTO {self._table}_new ({', '.join(self._columns)}) VALUES ({', '.join(holes)})",  # noqa: S608
                values,
            )
        except sqlite3.IntegrityError as error:
            self._left_out += 1
            _log.warning("table %s: a damaged row was left out (%s); the backup has it", self._table, error)

    def insert_damaged(self, row: Mapping[str, object]) -> None:
        """Insert a row that does not carry its seal."""
        self._damaged += 1
        self.insert(row)

    def put_in_place(self) -> None:
        """Let the new table take the old one's place and its named indexes, and say what was damaged."""
        query = "SELECT sql FROM sqlite_master WHERE type = 'index' AND tbl_name = ? AND sql IS NOT NULL"
        indexes = self.driver.execute(query, (self._table,)).fetchall()
        self.driver.execute(f"DROP TABLE {self._table}")
        self.driver.execute(f"ALTER TABLE {self._table}_new RENAME TO {self._table}")
        for (create,) in indexes:
            self.driver.execute(create)
        self._info[LEFT_OUT] = self._info.get(LEFT_OUT, 0) + self._left_out
        if self._damaged:
            _log.warning("table %s: %d rows were damaged before, and stay so", self._table, self._damaged)


def _decode(row: Sequence[object]) -> list[object] | None:
    """Return the row with its texts decoded, None if one of them is not UTF-8."""
    try:
        return [value.decode() if isinstance(value, _Text) else value for value in row]
    except UnicodeDecodeError:
        return None
