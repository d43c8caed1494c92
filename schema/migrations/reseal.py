"""A table made anew with other columns, and its rows sealed anew. Frozen, as the migrations that call it are.

Not by ALTER TABLE: it would put a new column behind the checksum, and newer SQLite refuses it on a STRICT table that
has one damaged row.
"""

import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy.engine import Connection

from limpet.schema.seal import is_sealed, seal

_log = logging.getLogger("limpet.migrations")

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
    driver: Any = connection.connection.driver_connection
    driver.execute(create)
    columns = (*new, "checksum")
    into = f"INSERT INTO {table}_new ({', '.join(columns)}) VALUES "  # noqa: S608  # our own names
    insert = f"{into}({', '.join('?' * len(columns))})"
    damaged = left_out = 0
    driver.text_factory = _Text
    try:
        for *found, checksum in driver.execute(f"SELECT {', '.join((*old, 'checksum'))} FROM {table}"):  # noqa: S608
            values = _decode(found)
            if values is not None and is_sealed(values, checksum):
                row = dict(zip(old, values, strict=True))
                row.update(fill(row))
                sealed = tuple(row[name] for name in new)
                driver.execute(insert, (*sealed, seal(sealed)))
                continue
            damaged += 1
            row = dict(zip(old, found, strict=True))
            row.update(fill(row), checksum=checksum)
            holes = ("CAST(? AS TEXT)" if isinstance(row[name], _Text) else "?" for name in columns)
            try:
                driver.execute(f"{into}({', '.join(holes)})", [row[name] for name in columns])
            except sqlite3.IntegrityError as error:  # a NULL or a type that the table does not take
                left_out += 1
                _log.warning("table %s: a damaged row was left out (%s); the backup has it", table, error)
    finally:
        driver.text_factory = str
    driver.execute(f"DROP TABLE {table}")
    driver.execute(f"ALTER TABLE {table}_new RENAME TO {table}")
    connection.info[LEFT_OUT] = connection.info.get(LEFT_OUT, 0) + left_out
    if damaged:
        _log.warning("table %s: %d rows were damaged before, and stay so", table, damaged)


def _decode(row: Sequence[object]) -> list[object] | None:
    """Return the row with its texts decoded, None if one of them is not UTF-8."""
    try:
        return [value.decode() if isinstance(value, _Text) else value for value in row]
    except UnicodeDecodeError:
        return None
