"""The SQL by which rows reach the fleet: one statement for all rows of a table, and each guarded by how new it is.

A row is written only over an older one: one of an older epoch of the node in the fleet, else read at an earlier
revision of its log, else with a lower number. What is sent twice, or late, so changes nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

import msgspec

from limpet.engine.database.sqlite.extract import ROWS
from limpet.schema.rows import AnyRow, EventRow

_ESCAPES = {0: "\x1a0", 0x1A: "\x1a1"}
"""PostgreSQL's texts have no NUL."""
_NUMBERS = {"container_status": "seq", "sandbox_status": "seq", "item": "version"}
"""The columns that number the versions of a row; the other tables' rows do not change."""


def escape(text: str) -> str:
    r"""Return a text as the fleet holds it: NUL is \x1a0 there, and \x1a is \x1a1."""
    return text.translate(_ESCAPES) if "\0" in text or "\x1a" in text else text


def unescape(text: str) -> str:
    """Undo `escape`."""
    return text.replace("\x1a0", "\0").replace("\x1a1", "\x1a") if "\x1a" in text else text


def encode_records(row_class: Any, rows: Iterable[AnyRow]) -> str:
    """Return rows as the JSON that json_to_recordset takes."""
    record = _RECORDS[row_class]
    encoded = msgspec.json.encode([record(*row) for row in rows])
    if any(mark in encoded for mark in _MARKS):
        escaped = ((escape(value) if isinstance(value, str) else value for value in row) for row in rows)
        encoded = msgspec.json.encode([record(*row) for row in escaped])
    return encoded.decode()


def _make_record(row_class: Any) -> Any:
    return msgspec.defstruct(row_class.__name__, [(name, Any) for name in row_class._fields])


_RECORDS = {row_class: _make_record(row_class) for row_class in (EventRow, *(each for each, _ in ROWS.values()))}
_MARKS = (rb"\u0000", rb"\u001a")
"""How JSON writes the characters that are escaped."""


def from_record(row_class: Any, values: Sequence[object]) -> Any:
    """Return a row that was read from the fleet."""
    for value in values:  # a generator would take three times as long, of every row of every node
        if type(value) is str and "\x1a" in value:
            return row_class._make(unescape(each) if isinstance(each, str) else each for each in values)
    return row_class._make(values)


def column_types(row_class: Any) -> dict[str, str]:
    """Return the type of each of a row's columns in the fleet."""
    hints = get_type_hints(row_class)
    return {name: "text" if str in (hints[name], *get_args(hints[name])) else "bigint" for name in row_class._fields}


def _columns(row_class: Any) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in column_types(row_class).items())


def _upsert(table: str) -> str:
    row_class, keys = ROWS[table]
    names = row_class._fields
    changed = ", ".join(f"{name} = excluded.{name}" for name in (*names, "fleet_epoch", "fleet_as_of"))
    number = [_NUMBERS[table]] if table in _NUMBERS else []
    newness = ["fleet_epoch", "fleet_as_of", *number]
    return (
        f"INSERT INTO {table} AS old (node, {', '.join(names)}, fleet_epoch, fleet_as_of)"  # noqa: S608  # ours
        f" SELECT %(node)s, {', '.join(f'new.{name}' for name in names)}, %(epoch)s, %(as_of)s"
        f" FROM json_to_recordset(%(rows)s::json) AS new({_columns(row_class)})"
        f" ON CONFLICT (node, {', '.join(keys)}) DO UPDATE SET {changed}"
        f" WHERE ({', '.join(f'excluded.{name}' for name in newness)})"
        f" > ({', '.join(f'old.{name}' for name in newness)})"
    )


def _delete(table: str) -> str:
    _, keys = ROWS[table]
    return (
        f"DELETE FROM {table} WHERE node = %(node)s AND ({', '.join(keys)}) IN"  # noqa: S608  # our own names
        f" (SELECT {', '.join(keys)} FROM json_to_recordset(%(keys)s::json)"
        f" AS gone({', '.join(f'{name} text' for name in keys)}))"
    )


UPSERT: Mapping[str, str] = {table: _upsert(table) for table in ROWS}
DELETE: Mapping[str, str] = {table: _delete(table) for table in ROWS}
INSERT_EVENTS = (
    f"INSERT INTO event (node, {', '.join(EventRow._fields)})"  # noqa: S608  # our own names
    f" SELECT %(node)s, {', '.join(f'new.{name}' for name in EventRow._fields)}"
    f" FROM json_to_recordset(%(rows)s::json) AS new({_columns(EventRow)}) ON CONFLICT (node, revision) DO NOTHING"
)
DELETE_EVENTS = "DELETE FROM event WHERE node = %(node)s AND revision = ANY(%(revisions)s)"
