"""Making a state directory for a node that is lost, from what the fleet has of it.

First the node's place is taken over, so that whatever is left of the old one can add nothing any more; then the records
are read and the database is made, whole or not at all. A kill in between leaves a directory without a database, which
no engine opens: do it again.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from limpet.engine.database.sqlite.extract import ROWS, make_database
from limpet.engine.fleet.address import Address, Connection
from limpet.engine.fleet.batch import take_over
from limpet.engine.fleet.rows import from_record
from limpet.engine.fleet.upgrade import require_current
from limpet.engine.state.directory import StateDirectory
from limpet.engine.state.names import DATABASE, IDENTITY
from limpet.engine.state.presence import is_there
from limpet.schema.codec import row_is_sound
from limpet.schema.errors import AlreadyExistsError, FleetError, LimpetError, quote_path
from limpet.schema.metadata import require_node
from limpet.schema.rows import EventRow


class Restored(NamedTuple):
    """What a restored state directory has."""

    path: str
    node: str
    containers: int
    sandboxes: int
    items: int
    revision: int
    """That of the newest event."""
    left_out: Sequence[str]
    """Records that could not be believed, in words."""


def restore(url: str, node: str, state_dir: str, *, is_forced: bool = False) -> Restored:
    """Make `state_dir`, which must be new or empty, the node's state directory, with all that the fleet has of it.

    Whoever was the node changes nothing in the fleet from then on. The processes are not restored: the first opening
    finds out what is left of them. A node that is heard of is only taken over if `is_forced`.

    Raises AlreadyExistsError if there is a database already, NotFoundError, InvalidStateError, StateDirectoryError,
    StoreError, InvalidInputError, FleetError.
    """
    node = require_node(node)
    address = Address(url)
    with address.connect() as connection:
        require_current(address, connection)
        directory = StateDirectory.acquire(state_dir)
        try:
            path = directory.join(DATABASE)
            if is_there(path):
                raise AlreadyExistsError(f"{quote_path(path)} exists already; restore into a new directory")
            return _restore(connection, node, directory, path, is_forced=is_forced)
        finally:
            directory.release()


def _restore(connection: Connection, node: str, directory: StateDirectory, path: str, *, is_forced: bool) -> Restored:
    row = connection.execute("SELECT host || ':' || path FROM fleet_node WHERE name = %s", (node,)).fetchone()
    # One that was cut off has taken the node's place already: then the fleet knows no more where it was.
    identity = directory.name_original(directory.find_original(node) or (str(row[0]) if row else ""))
    try:
        take_over(connection, node, identity, directory.path, is_forced=is_forced)
    except LimpetError:
        os.unlink(directory.join(IDENTITY))  # nothing is restored: the directory is to be nobody's copy
        raise
    left_out: list[str] = []
    rows = {table: _load(connection, node, table, row_class, left_out) for table, (row_class, _) in ROWS.items()}
    _drop_deleted(rows)
    events = sorted(_load(connection, node, "event", EventRow, left_out))
    found = connection.execute("SELECT epoch, opened_at, pruned FROM node WHERE name = %s", (node,)).fetchone()
    if found is None:
        raise FleetError(f"the row of node {node} is missing in the fleet")
    epoch, opened_at, pruned = found
    for before, after in zip([pruned, *(each.revision for each in events)], events, strict=False):
        if after.revision > before + 1:  # what is missing must not look as if it had never been
            pruned = max(pruned, after.revision - 1)
    make_database(path, (node, epoch, opened_at, pruned), rows, events)
    return Restored(
        path=directory.path,
        node=node,
        containers=len(rows["container"]),
        sandboxes=len(rows["sandbox"]),
        items=len(rows["item"]),
        revision=max(pruned, events[-1].revision if events else 0),
        left_out=left_out,
    )


def _load(connection: Connection, node: str, table: str, row_class: Any, left_out: list[str]) -> list[Any]:
    query = f"SELECT {', '.join(row_class._fields)} FROM {table} WHERE node = %s"  # noqa: S608  # our own names
    rows = [from_record(row_class, row) for row in connection.execute(query, (node,)).fetchall()]
    left_out += [f"{table} {row[0]}: it does not match its checksum" for row in rows if not row_is_sound(node, row)]
    return [row for row in rows if row_is_sound(node, row)]


def _drop_deleted(rows: Mapping[str, list[Any]]) -> None:
    """Leave out what was being deleted as the node was lost: a sandbox goes after its containers, all of one at once.

    Parts of it may be there, because the rows of a batch may be ahead of its events.
    """
    sandboxes = {row.id for row in rows["sandbox"]} & {row.id for row in rows["sandbox_status"]}
    containers = {row.id for row in rows["container"] if row.sandbox_id in sandboxes}
    containers &= {row.id for row in rows["container_status"]}
    for table, kept in (
        ("sandbox", sandboxes),
        ("sandbox_status", sandboxes),
        ("container", containers),
        ("container_status", containers),
    ):
        rows[table][:] = [row for row in rows[table] if row.id in kept]
