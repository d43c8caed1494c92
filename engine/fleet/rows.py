"""The SQL by which rows reach the fleet: one statement for all rows of a table, and each guarded by how new it is.

A row is written only over an older one: one of an older epoch of the node in the fleet, else read at an earlier
revision of its log, else with a lower number. What is sent twice, or late, so changes nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, cast, get_args, get_type_hints

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


def encode_columns(table: str, row_class: Any, rows: Iterable[AnyRow]) -> dict[str, str]:
    """Return rows as the parameters of a statement that writes them to a table: an array for each column.

    That is half as long as JSON, with the names of all columns in each row, and the server needs half the time for it.
    """
    kinds = column_types(row_class)
    return {
        _parameter(table, name): (_texts if kinds[name] == "text" else _numbers)(values)
        for name, values in zip(kinds, zip(*rows, strict=True), strict=True)
    }


def _numbers(values: Sequence[int | None]) -> str:
    return f"{{{msgspec.json.encode(values).decode()[1:-1]}}}"


def _texts(values: Sequence[str | None]) -> str:
    """Return the literal of an array, as the fleet holds the texts in it; joined first, so that C does the work."""
    nulls = values.count(None)
    joined = "\0".join([_NULL if value is None else value for value in values] if nulls else cast("list[str]", values))
    if joined.count("\0") >= len(values) or joined.count("\x1a") > nulls:
        joined = "\0".join([_NULL if value is None else escape(value) for value in values])
    quoted = joined.replace("\\", "\\\\").replace('"', '\\"').replace("\0", '","')
    return f'{{"{quoted}"}}'.replace(f'"{_NULL}"', "NULL")


_NULL = "\x1aN"
"""Stands for NULL until an array is put together: no text that is escaped has it."""


def _parameter(table: str, name: str) -> str:
    return f"{table}.{name}"


def from_record(row_class: Any, values: Sequence[object]) -> Any:
    """Return a row that was read from the fleet."""
    for value in values:  # a generator would take three times as long, of every row of every node
        if type(value) is str and "\x1a" in value:
            return row_class._make(unescape(each) if isinstance(each, str) else each for each in values)
    return row_class._make(values)


@cache
def column_types(row_class: Any) -> dict[str, str]:
    """Return the type of each of a row's columns in the fleet."""
    hints = get_type_hints(row_class)
    return {name: "text" if str in (hints[name], *get_args(hints[name])) else "bigint" for name in row_class._fields}


def _select(table: str, row_class: Any, *others: str) -> str:
    kinds = column_types(row_class)
    arrays = ", ".join(f"%({_parameter(table, name)})s::{kind}[]" for name, kind in kinds.items())
    return (
        f"SELECT {', '.join(('%(node)s', 'new.*', *others))}"  # noqa: S608  # our own names
        f" FROM begun, unnest({arrays}) AS new({', '.join(kinds)})"
    )


def _upsert(table: str) -> str:
    row_class, keys = ROWS[table]
    names = row_class._fields
    changed = ", ".join(f"{name} = excluded.{name}" for name in (*names, "fleet_epoch", "fleet_as_of"))
    number = [_NUMBERS[table]] if table in _NUMBERS else []
    newness = ["fleet_epoch", "fleet_as_of", *number]
    return (
        f"INSERT INTO {table} AS old (node, {', '.join(names)}, fleet_epoch, fleet_as_of)"
        f" {_select(table, row_class, '%(epoch)s', '%(as_of)s')}"
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
"""By table; part of a statement in which `begun` is one row, or none if nothing may be written."""
INSERT_EVENTS = (
    f"INSERT INTO event (node, {', '.join(EventRow._fields)}) {_select('event', EventRow)}"
    " ON CONFLICT (node, revision) DO NOTHING"
)
"""Part of such a statement, too."""
DELETE: Mapping[str, str] = {table: _delete(table) for table in ROWS}
DELETE_EVENTS = "DELETE FROM event WHERE node = %(node)s AND revision = ANY(%(revisions)s)"
