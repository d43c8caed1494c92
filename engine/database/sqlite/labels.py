"""The index of labels: a row for each label of each container, written and removed with the container's row.

It only leads to containers: whoever finds one here looks at its own row. So a row too many is harmless, and one that is
missing, which would hide a container from lists by its label, is for a check to tell.
"""

import sqlite3
from collections.abc import Collection, Iterable, Iterator

from limpet.engine.database.sqlite import statements as sql
from limpet.engine.database.sqlite.connection import fetch_all
from limpet.schema.codec import read_labels
from limpet.schema.rows import AnyRow, ContainerRow

_NO_LABELS = "{}"


def insert_labels(connection: sqlite3.Connection, node: str, rows: Iterable[ContainerRow]) -> None:
    """Write the labels of containers that are added, in the caller's transaction."""
    found = [(node, *label, row.id) for row in rows for label in _read(row.labels)]
    if found:
        connection.executemany(sql.INSERT_LABEL, found)


def delete_labels(connection: sqlite3.Connection, node: str, ids: Iterable[str]) -> None:
    """Remove the labels of containers whose rows are about to be deleted, in the caller's transaction."""
    for key in ids:
        ((text,),) = fetch_all(connection, sql.SELECT_LABELS_OF_ONE, (node, key)) or [(None,)]
        if text == _NO_LABELS:
            continue
        found = [(node, *label, key) for label in _read(text)]
        if not found or connection.executemany(sql.DELETE_LABEL, found).rowcount != len(found):
            # One of the rows was damaged, or is missing: whatever it had is looked for everywhere.
            connection.execute(sql.DELETE_LABELS_OF_ONE, (node, key))


def find_damaged_labels(rows: Iterable[ContainerRow], index: Iterable[AnyRow]) -> Iterator[str]:
    """Yield what the index has too little or too much for the containers, in words."""
    found = set(index)
    expected = {(*label, row.id) for row in rows for label in _read(row.labels)}
    for key, value, container_id in sorted(expected - found):
        yield f"container {container_id}: its label {key}={value} is not in the index, so that lists by it miss it"
    for *_, container_id in sorted(found - expected, key=str):
        yield f"container {container_id}: the index of labels has one for it that it does not have"


def _read(text: object) -> Collection[tuple[str, str]]:
    return read_labels(text).items() if isinstance(text, str) else ()
