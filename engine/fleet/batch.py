"""Writing to the fleet: a node's claim, its sign of life, and batches of rows, each in one transaction.

Each transaction begins with the node's row, which it locks: one at a time writes for a node, and only the one whose
epoch is the newest.
"""

import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any
from zlib import crc32

import msgspec
import psycopg

from limpet.engine.database.sqlite.extract import ROWS, Extract, Keys
from limpet.engine.fleet import rows as sql
from limpet.engine.fleet.address import Connection, replicated, replication_required
from limpet.schema.codec import are_sound, row_is_sound
from limpet.schema.errors import FleetFencedError, InvalidStateError, NotFoundError, quote, quote_path
from limpet.schema.rows import EventRow

Doubts = Mapping[str, tuple[str, str]]
"""By container, reason and message why the node does not vouch for what is on its disk."""
NO_DOUBTS: Doubts = {}

LEASE_SECONDS = 30.0
"""A node that has not been heard of for so long is not vouched for."""

_EPOCHS = " UNION ALL ".join(f"SELECT fleet_epoch FROM {table} WHERE node = %(node)s" for table in ROWS)  # noqa: S608
"""Those of a node's rows. If its own was removed or altered by hand it begins after them, or could not replace them."""
_CLAIM = f"""
INSERT INTO fleet_node AS old
    (name, epoch, directory, host, pid, path, claimed_at, heard_at, lease_seconds, as_of, revision, is_whole, doubts)
VALUES (%(node)s, 1 + (SELECT coalesce(max(fleet_epoch), 0) FROM ({_EPOCHS}) AS sent), %(directory)s, %(host)s,
    %(pid)s, %(path)s, clock_timestamp(), clock_timestamp(), %(lease)s, 0, 0, false, %(doubts)s)
ON CONFLICT (name) DO UPDATE SET
    epoch = greatest(old.epoch + 1, excluded.epoch), host = excluded.host, pid = excluded.pid, path = excluded.path,
    claimed_at = clock_timestamp(), heard_at = clock_timestamp(), lease_seconds = excluded.lease_seconds, as_of = 0,
    doubts = excluded.doubts
WHERE old.directory = excluded.directory
RETURNING epoch"""  # noqa: S608  # our own names
_TAKE_OVER = """
UPDATE fleet_node SET
    epoch = epoch + 1, directory = %(directory)s, host = %(host)s, pid = %(pid)s, path = %(path)s,
    claimed_at = clock_timestamp(), as_of = 0
WHERE name = %(node)s
    AND (%(is_forced)s OR clock_timestamp() - heard_at > make_interval(secs => lease_seconds))
RETURNING is_whole"""
_BEGIN = """
WITH begun AS (
    UPDATE fleet_node SET heard_at = clock_timestamp(), as_of = %(as_of)s,
        doubts = coalesce(%(doubts)s, doubts), revision = coalesce(%(revision)s, revision),
        is_whole = is_whole OR %(is_whole)s
    WHERE name = %(node)s AND epoch = %(epoch)s AND as_of <= %(as_of)s
    RETURNING name
), put AS (
    INSERT INTO node AS old (name, epoch, opened_at, pruned)
    SELECT name, %(own_epoch)s, %(opened_at)s, %(pruned)s FROM begun
    ON CONFLICT (name) DO UPDATE SET epoch = excluded.epoch, opened_at = excluded.opened_at, pruned = excluded.pruned
    WHERE (old.epoch, old.opened_at, old.pruned) <> (excluded.epoch, excluded.opened_at, excluded.pruned)
)"""
"""What follows may write if `begun` is not empty."""
_GO_ON = "WITH begun AS (SELECT name FROM fleet_node WHERE name = %(node)s AND epoch = %(epoch)s)"
"""The beginning of a statement that follows in the same transaction, which holds the lock of the node's row."""
_END = " SELECT 1 / count(*) FROM begun"
"""Who may not write divides by 0: that ends the transaction, with all that is sent along."""
_IS_LOST = f"""
SELECT coalesce(
    (SELECT directory = %(directory)s AND epoch < %(epoch)s FROM fleet_node WHERE name = %(node)s),
    NOT EXISTS ({_EPOCHS}) AND NOT EXISTS (SELECT FROM event WHERE node = %(node)s))"""  # noqa: S608  # our own names
_BEAT = """
UPDATE fleet_node SET heard_at = clock_timestamp(), doubts = coalesce(%s, doubts) WHERE name = %s AND epoch = %s"""
_EVICT = """
SELECT pg_terminate_backend(pid, 2000) FROM pg_stat_activity
WHERE application_name = %s AND datname = current_database() AND pid <> pg_backend_pid()"""
_NEWEST = f"""
SELECT {", ".join(EventRow._fields)} FROM event
WHERE node = %(node)s AND EXISTS (SELECT FROM fleet_node WHERE name = %(node)s AND directory = %(directory)s)
ORDER BY revision DESC LIMIT 100"""  # noqa: S608  # our own names
_MOST_CHARACTERS = 64 << 20
"""Rows are split into several statements beyond that: a server takes 1 GB in a message, and keeps it in memory."""
ALTERED = -1
"""A checksum that no row has."""
_ROWS_AT_ONCE = 1024
_LOCK_SECONDS = 2.0
"""For so long a claim waits for a transaction of whoever had the node; then that connection is ended."""
_WHO = """
SELECT epoch, host, pid, path, extract(epoch FROM clock_timestamp() - heard_at)::float8
FROM fleet_node WHERE name = %s"""


@dataclass(frozen=True)
class Claim:
    """A node's right to write to the fleet, until somebody claims it after."""

    node: str
    epoch: int
    """Grows with each claim, in the fleet alone; the epoch of the node's own database is another."""


def claim(connection: Connection, node: str, directory: str, path: str, doubts: Doubts = NO_DOUBTS) -> Claim:
    """Take the node's place in the fleet: from now on whoever had it changes nothing.

    `directory` is the identity of the state directory, which must be the one that has this name in the fleet. Raises
    FleetFencedError otherwise, FleetError.
    """
    values = {**_name(node, directory, path), "lease": LEASE_SECONDS, "doubts": _doubts_text(doubts)}
    _evict_if_stuck(connection, node)
    with replicated(connection):
        row = connection.execute(_CLAIM, values).fetchone()
    if row is None:
        raise FleetFencedError(
            f"node {quote(node)} is another state directory's in the fleet: {_describe(connection, node)};"
            " give this one another name, or restore that one's records from the fleet instead"
        )
    return Claim(node, int(row[0]))


def take_over(connection: Connection, node: str, directory: str, path: str, *, is_forced: bool) -> None:
    """Give a node's place to another state directory: from now on the old one changes nothing.

    Raises NotFoundError if there is no such node, InvalidStateError if it lives and is not `is_forced`, or if its
    records were never whole here; FleetError.
    """
    _evict_if_stuck(connection, node)
    with replicated(connection):
        row = connection.execute(_TAKE_OVER, {**_name(node, directory, path), "is_forced": is_forced}).fetchone()
        if row is None and connection.execute(_WHO, (node,)).fetchone() is None:
            raise NotFoundError(f"the fleet knows no node {quote(node)}")
        if row is None:
            raise InvalidStateError(
                f"node {quote(node)} is alive: {_describe(connection, node)}; stop its engine and wait for its lease to"
                " end, or take it over by force"
            )
        if not row[0]:
            raise InvalidStateError(f"node {quote(node)} has never sent all its records; there is nothing to restore")


def introduce(connection: Connection, node: str) -> None:
    """Let the server know whose connection this is. Raises FleetError."""
    if not connection.is_pooled:  # others may have the session next, and must not be evicted for it
        connection.execute("SELECT set_config('application_name', %s, false)", (_name_connection(connection, node),))


def _name_connection(connection: Connection, node: str) -> str:
    row = connection.execute("SELECT current_schema()").fetchone()
    # A server cuts long names, and keeps only ASCII.
    return f"limpet {node[:20].encode('ascii', 'replace').decode()} {crc32(f'{row}{node}'.encode()):08x}"


def _evict_if_stuck(connection: Connection, node: str) -> None:
    """End the connections of whoever had the node, if one of them stands amid a transaction.

    It may have vanished without a word, or be stopped; the server would keep its lock for as long as that lasts.
    """
    try:
        with connection.transaction():
            connection.execute("SELECT set_config('lock_timeout', %s, true)", (f"{1000 * _LOCK_SECONDS:.0f}ms",))
            connection.execute("SELECT FROM fleet_node WHERE name = %s FOR UPDATE", (node,))
    except psycopg.errors.LockNotAvailable:
        connection.execute(_EVICT, (_name_connection(connection, node),))


def is_lost(connection: Connection, held: Claim, directory: str) -> bool:
    """Return whether the fleet has lost a claim: it is made anew, or as it was before that. Raises FleetError.

    Claims only grow, and each that follows has a higher number. So nobody has had the node's place since.
    """
    values = {"node": held.node, "epoch": held.epoch, "directory": directory}
    return connection.execute(_IS_LOST, values).fetchone() == (True,)


def load_revision(connection: Connection, node: str) -> int:
    """Return the revision up to which the fleet has a node's changes, 0 for one it does not know. Raises FleetError."""
    row = connection.execute("SELECT revision FROM fleet_node WHERE name = %s", (node,)).fetchone()
    return 0 if row is None else int(row[0])


def load_newest_event(connection: Connection, node: str, directory: str) -> EventRow | None:
    """Return the newest event of a node whose name is this state directory's, None if the fleet has none.

    Events that were altered there are passed over. Raises FleetError.
    """
    rows = connection.execute(_NEWEST, {"node": node, "directory": directory}).fetchall()
    events: Iterator[EventRow] = (sql.from_record(EventRow, row) for row in rows)
    return next((event for event in events if row_is_sound(node, event)), None)


def beat(connection: Connection, held: Claim, doubts: Doubts | None = None) -> None:
    """Tell the fleet that the node lives, and what it does not vouch for, unless that is what it was told before.

    Raises FleetFencedError, FleetError.
    """
    if connection.execute(_BEAT, (_doubts_text(doubts), held.node, held.epoch)).rowcount != 1:
        raise _fenced(connection, held)


def write_batch(
    connection: Connection,
    held: Claim,
    extract: Extract,
    *,
    revision: int | None = None,
    is_whole: bool = False,
    gone_events: list[int] | None = None,
    doubts: Doubts | None = None,
) -> bool:
    """Write what was read at one instant, all of it or nothing; return False if the fleet has what is newer.

    With `revision` the fleet has all events up to that one; with `is_whole` all rows, too. What the node does not vouch
    for is what the fleet was told before, unless there are `doubts`. Raises FleetFencedError if
    the node was claimed by another, FleetError if it is not known whether it was written: send it again.
    """
    of_node = {"node": held.node, "epoch": held.epoch, "as_of": extract.newest}
    begin: dict[str, Any] = {
        **of_node,
        "doubts": _doubts_text(doubts),
        "revision": revision,
        "is_whole": is_whole,
        "own_epoch": extract.epoch,
        "opened_at": extract.opened_at,
        "pruned": extract.pruned,
    }
    writes = _writes(extract, begin)
    first = next(writes)
    second = next(writes, None)
    deletions = list(_deletions(extract, of_node, gone_events))
    try:
        if second is not None:
            with replicated(connection):  # without a pipeline: they need not all be in memory
                for statement, values in chain((first, second), writes, deletions):
                    connection.execute(statement, values)
        elif deletions or connection.is_pooled:
            # All of it in one round trip. Each sees what was there when the node's row was locked.
            with _quietly(), connection.pipeline(), replicated(connection):
                for statement, values in (first, *deletions):
                    connection.execute(statement, values)
        else:
            with replication_required(connection):
                connection.execute(*first)
    except psycopg.errors.DivisionByZero:
        row = connection.execute(_WHO, (held.node,)).fetchone()
        if row is not None and row[0] == held.epoch:
            return False
        raise _fenced(connection, held) from None
    return True


@contextmanager
def _quietly() -> Iterator[None]:
    """Have psycopg not log what it ignores where this thread's pipeline breaks: what broke it is raised, and told."""
    _here.is_quiet = True
    try:
        yield
    finally:
        _here.is_quiet = False


def _is_news(_: logging.LogRecord) -> bool:
    return not getattr(_here, "is_quiet", False)


_here = threading.local()
logging.getLogger("psycopg").addFilter(_is_news)


def _writes(extract: Extract, begin: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the statements that write all rows, most often one, with their values."""
    text, values, size = _BEGIN, dict(begin), 0
    for table, row_class, rows, part in _parts(extract):
        for number, (encoded, length) in enumerate(_encode(table, row_class, rows)):
            if number or (size and size + length > _MOST_CHARACTERS):
                yield text + _END, values
                text, values, size = _GO_ON, {name: begin[name] for name in ("node", "epoch", "as_of")}, 0
            text += f", {table}_put AS ({part})"
            values |= encoded
            size += length
    yield text + _END, values


def _encode(table: str, row_class: Any, rows: Sequence[Any]) -> Iterator[tuple[dict[str, str], int]]:
    """Yield rows as parameters, and their length: in one piece, or in several that are not too long."""
    encoded = sql.encode_columns(table, row_class, rows)
    length = sum(map(len, encoded.values()))
    if length <= _MOST_CHARACTERS or len(rows) == 1:
        yield encoded, length
        return
    del encoded
    middle = len(rows) // 2
    yield from _encode(table, row_class, rows[:middle])
    yield from _encode(table, row_class, rows[middle:])


def _parts(extract: Extract) -> Iterator[tuple[str, Any, Sequence[Any], str]]:
    """Yield tables, their rows' class, the rows to write, and how."""
    for table, found in extract.rows.items():
        if found:
            yield table, ROWS[table][0], found, sql.UPSERT[table]
    if extract.events:
        yield "event", EventRow, extract.events, sql.INSERT_EVENTS


def _deletions(
    extract: Extract, of_node: Mapping[str, Any], gone_events: list[int] | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if gone_events:
        yield sql.DELETE_EVENTS, {**of_node, "revisions": gone_events}
    for table, keys in extract.absent.items():
        if keys:
            names = ROWS[table][1]
            gone = [dict(zip(names, map(sql.escape, key), strict=True)) for key in keys]
            yield sql.DELETE[table], {**of_node, "keys": _json(gone)}


def load_keys(connection: Connection, node: str) -> Keys:
    """Return what the fleet has of a node, by checksums, to be compared with what the node has. Raises FleetError.

    A row that does not carry the checksum of what it holds was altered there: it has `ALTERED`, which no row has.
    """
    events = _load_checksums(connection, node, "event", EventRow, 1)
    found = {table: _load_checksums(connection, node, table, each, len(keys)) for table, (each, keys) in ROWS.items()}
    return Keys(pruned=0, newest=0, events={key[0]: checksum for key, checksum in events.items()}, rows=found)


def _load_checksums(connection: Connection, node: str, table: str, row_class: Any, width: int) -> dict[Any, int]:
    """Return the checksum of each row of a node's, by the columns that come first in it."""
    query = f"SELECT {', '.join(row_class._fields)} FROM {table} WHERE node = %s"  # noqa: S608  # our own names
    found: dict[Any, int] = {}
    # The server keeps what was not fetched yet: all at once may be more than this process should use of memory.
    with connection.transaction(), connection.cursor("limpet_rows") as cursor:
        cursor.execute(query, (node,))
        while rows := cursor.fetchmany(_ROWS_AT_ONCE):
            for record, is_sound in zip(rows, are_sound(node, rows), strict=True):
                row = record if is_sound else sql.from_record(row_class, record)  # few have anything escaped
                found[row[:width]] = row[-1] if is_sound or row_is_sound(node, row) else ALTERED
    return found


def _name(node: str, directory: str, path: str) -> dict[str, object]:
    return {
        "node": node,
        "directory": directory,
        "host": os.fsencode(socket.gethostname()).decode(errors="backslashreplace"),
        "pid": os.getpid(),
        "path": os.fsencode(path).decode(errors="backslashreplace"),
    }


def _fenced(connection: Connection, held: Claim) -> FleetFencedError:
    if connection.execute(_WHO, (held.node,)).fetchone() is None:
        return FleetFencedError(
            f"node {quote(held.node)} was removed from the fleet; nothing more of this engine's is taken: close it, and"
            " open it again, if the node is to be there"
        )
    return FleetFencedError(
        f"node {quote(held.node)} was taken over in the fleet by {_describe(connection, held.node)}; nothing more of"
        " this engine's is taken: close it, or give it another node's name"
    )


def _describe(connection: Connection, node: str) -> str:
    row = connection.execute(_WHO, (node,)).fetchone()
    if row is None:
        return "nobody (its row was removed)"
    _, host, pid, path, seconds = row
    return f"process {pid} on {quote(host)} with {quote_path(path)}, heard of {seconds:.0f} s ago"


def _doubts_text(doubts: Doubts | None) -> str | None:
    return None if doubts is None else sql.escape(_json(doubts))


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
