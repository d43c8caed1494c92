"""All statements that an engine runs, as plain SQL: the one place for SQL beside migrations and settings.

Nothing is built while an engine runs, and SQLAlchemy, which takes longer to load than a store to open, is not needed
for it. Parameters come in the order of the text. A test prepares each statement on the tables' own schema.
"""

from functools import cache

from limpet.schema import events
from limpet.schema.deadline import DeadlineKind
from limpet.schema.rows import (
    ContainerRow,
    DeadlineRow,
    EventRow,
    ItemRow,
    NameRow,
    ReportRow,
    SandboxRow,
    SandboxStatusRow,
    StatusRow,
)


def _select(columns: tuple[str, ...], table: str, *keys: str) -> str:
    conditions = " AND ".join(f"{key} = ?" for key in ("node", *keys))
    return f"SELECT {', '.join(columns)} FROM {table} WHERE {conditions}"  # noqa: S608  # our own names


def _insert(table: str, *columns: str) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608  # ours


SELECT_NODES = "SELECT name, epoch FROM node"
SELECT_EPOCH = "SELECT epoch FROM node WHERE name = ?"
INSERT_NODE = "INSERT INTO node (name, epoch, opened_at, pruned) VALUES (?, ?, ?, 0)"
UPDATE_NODE = "UPDATE node SET epoch = ?, opened_at = ? WHERE name = ?"

SELECT_STATUSES = _select(StatusRow._fields, "container_status")
SELECT_UNSETTLED = f"{SELECT_STATUSES} AND (finished_at = 0 OR pid <> 0 OR (expires_at <> 0 AND released = 0))"
"""What has not ended, or will be released. One flipped bit cannot hide a process: two columns would have to change."""
SELECT_STATUS_IDS = f"{_select(('id',), 'container_status')} ORDER BY id"
SELECT_STATUS = _select(StatusRow._fields, "container_status", "id")
INSERT_STATUS = _insert("container_status", "node", *StatusRow._fields)
DELETE_STATUS = "DELETE FROM container_status WHERE node = ? AND id = ?"
_CHANGED = [name for name in StatusRow._fields if name != "id"]
UPDATE_STATUS = (
    f"UPDATE container_status SET {', '.join(f'{name} = ?' for name in _CHANGED)}"  # noqa: S608  # our own names
    " WHERE node = ? AND id = ? AND seq = ? AND ? = (SELECT epoch FROM node WHERE name = container_status.node)"
)
"""Parameters: the row without its id; node, id, the seq that it replaces; epoch."""


@cache
def update_statuses(size: int) -> str:
    """Return the statement that replaces `size` status rows: for a whole batch the interpreter lock is given up once.

    Parameters: each new row followed by the seq that it replaces; then the node and the epoch.
    """
    values = ", ".join(f"{name} = new.column{index}" for index, name in enumerate(_CHANGED, start=2))
    row = f"({', '.join('?' * (len(_CHANGED) + 2))})"
    return (
        f"UPDATE container_status SET {values} FROM (VALUES {', '.join([row] * size)}) AS new"  # noqa: S608  # our own names
        " WHERE container_status.node = ? AND container_status.id = new.column1"
        f" AND container_status.seq = new.column{len(_CHANGED) + 2}"
        " AND ? = (SELECT epoch FROM node WHERE name = container_status.node)"
    )


SELECT_CONTAINERS = _select(ContainerRow._fields, "container")
SELECT_CONTAINER = _select(ContainerRow._fields, "container", "id")
SELECT_CONTAINER_IDS = f"{_select(('id',), 'container')} ORDER BY id"
SELECT_CONTAINER_NAMES = _select(NameRow._fields, "container")
SELECT_CONTAINER_NAME = _select(NameRow._fields, "container", "id")
_WITH_TEXT = "AND instr(labels, ?) > 0"
SELECT_NAMES_BY_TEXT = f"{SELECT_CONTAINER_NAMES} {_WITH_TEXT}"
# CROSS JOIN keeps it to this order: the label leads to few containers.
SELECT_NAMES_BY_LABEL = (
    f"SELECT {', '.join(f'container.{name}' for name in NameRow._fields)} FROM label CROSS JOIN container"  # noqa: S608  # ours
    " WHERE label.node = ? AND label.key = ? AND label.value = ?"
    " AND container.node = label.node AND container.id = label.id"
)
COUNT_LABELLED = "SELECT count(*) FROM (SELECT 1 FROM label WHERE node = ? AND key = ? AND value = ? LIMIT ?)"
SELECT_LABELS = "SELECT key, value, id FROM label WHERE node = ?"
SELECT_LABELS_OF_ONE = _select(("labels",), "container", "id")
INSERT_LABEL = _insert("label", "node", "key", "value", "id").replace("INSERT", "INSERT OR IGNORE", 1)
DELETE_LABEL = "DELETE FROM label WHERE node = ? AND key = ? AND value = ? AND id = ?"
DELETE_LABELS_OF_ONE = "DELETE FROM label WHERE node = ? AND id = ?"
"""Reads them all, for what `DELETE_LABEL` does not find."""
SELECT_NAMES_BY_NAME = f"{_select(NameRow._fields, 'container', 'name')} {_WITH_TEXT}"
# Without statistics SQLite takes a node to have few containers, and would read them all: few are in a sandbox.
# CROSS JOIN keeps it to this order ("The SQLite Query Optimizer Overview").
SELECT_NAMES_BY_SANDBOX = (
    f"SELECT {', '.join(NameRow._fields)}"  # noqa: S608  # ours
    " FROM (SELECT ? AS ours, value AS wanted FROM json_each(?)) CROSS JOIN container"
    " WHERE node = ours AND likelihood(sandbox_id = wanted, 0.0001) AND instr(labels, ?) > 0"
)
SELECT_NAMES_BY_BOTH = f"{SELECT_NAMES_BY_SANDBOX} AND name = ?"
SELECT_IDS_BETWEEN = (
    "SELECT id FROM container WHERE node = ? AND id >= ? AND id < ?"
    " UNION SELECT id FROM container_status WHERE node = ? AND id >= ? AND id < ?"
)
SELECT_RESTARTABLE = f"{_select(('id',), 'container')} AND restart_policy <> 'no'"
SELECT_CONTAINER_BY_NAME = _select(("id",), "container", "sandbox_id", "name", "attempt")
SELECT_IDS_OF_SANDBOX = "SELECT id FROM container WHERE node = ? AND likelihood(sandbox_id = ?, 0.0001)"
SELECT_SANDBOX_IDS_IN_USE = "SELECT DISTINCT sandbox_id FROM container WHERE node = ?"
INSERT_CONTAINER = _insert("container", "node", *ContainerRow._fields)
DELETE_CONTAINER = "DELETE FROM container WHERE node = ? AND id = ?"

SELECT_SANDBOXES = _select(SandboxRow._fields, "sandbox")
SELECT_ALL_SANDBOXES = f"SELECT node, {', '.join(SandboxRow._fields)} FROM sandbox"  # noqa: S608  # our own names
INSERT_SANDBOX = _insert("sandbox", "node", *SandboxRow._fields)
DELETE_SANDBOX = "DELETE FROM sandbox WHERE node = ? AND id = ?"

SELECT_SANDBOX_STATUSES = _select(SandboxStatusRow._fields, "sandbox_status")
SELECT_SANDBOX_STATUS = _select(SandboxStatusRow._fields, "sandbox_status", "id")
INSERT_SANDBOX_STATUS = _insert("sandbox_status", "node", *SandboxStatusRow._fields)
DELETE_SANDBOX_STATUS = "DELETE FROM sandbox_status WHERE node = ? AND id = ?"
UPDATE_SANDBOX_STATUS = (
    f"UPDATE sandbox_status SET {', '.join(f'{name} = ?' for name in SandboxStatusRow._fields[1:])}"  # noqa: S608  # ours
    " WHERE node = ? AND id = ? AND seq = ?"
)
"""Parameters: the row without its id; node, id, the seq that it replaces."""

SELECT_DEADLINES = (
    f"{_select(DeadlineRow._fields, 'deadline')} AND boot_id = ? AND (kind <> '{DeadlineKind.STOP}' OR boot_at > ?)"
)
SELECT_DEADLINE = _select(DeadlineRow._fields, "deadline", "kind", "id")
SELECT_ALL_DEADLINES = _select(DeadlineRow._fields, "deadline")
PUT_DEADLINE = _insert("deadline", "node", *DeadlineRow._fields).replace("INSERT", "INSERT OR REPLACE", 1)
DELETE_DEADLINE = "DELETE FROM deadline WHERE node = ? AND kind = ? AND id = ?"

SELECT_ITEMS = f"{_select(ItemRow._fields, 'item', 'kind')} ORDER BY key"
SELECT_ITEM = _select(ItemRow._fields, "item", "kind", "key")
SELECT_ALL_ITEMS = _select(ItemRow._fields, "item")
PUT_ITEM = _insert("item", "node", *ItemRow._fields).replace("INSERT", "INSERT OR REPLACE", 1)
DELETE_ITEM = "DELETE FROM item WHERE node = ? AND kind = ? AND key = ?"

SELECT_EPOCH_AND_PRUNED = "SELECT epoch, pruned FROM node WHERE name = ?"
SELECT_PRUNED = "SELECT pruned FROM node WHERE name = ?"
UPDATE_PRUNED = "UPDATE node SET pruned = ? WHERE name = ?"
SELECT_NEWEST_EVENT = "SELECT max(revision) FROM event WHERE node = ? AND revision < 4611686018427387904"
"""No log comes as far as 2 to the 62nd: what says so is damaged, and must not keep others from being numbered."""
SELECT_EVENT = _select(EventRow._fields, "event", "revision")
SELECT_EVENTS = f"{_select(EventRow._fields, 'event')} AND revision > ? ORDER BY revision LIMIT ?"
_LENGTH = "length(labels) + length(message) + ifnull(length(body), 0)"
SELECT_EVENT_SIZES = f"{_select(('revision', 'at', _LENGTH), 'event')} AND revision > ? ORDER BY revision LIMIT ?"
SELECT_LOG_LENGTH = f"{_select((f'sum({_LENGTH})',), 'event')} AND revision > ?"
# Without statistics SQLite would read the log from its beginning: few of its events are of one container.
_EVENT_IS_OF = "likelihood({} = {}, 0.0001)"
SELECT_EVENTS_OF_ONE = f"{_select(EventRow._fields, 'event')} AND {_EVENT_IS_OF.format('id', '?')} ORDER BY revision"
_ENDINGS = ", ".join(repr(kind.value) for kind in events.ENDINGS)
SELECT_LAST_VERSION = (
    f"SELECT max(seq) FROM event WHERE node = ? AND {_EVENT_IS_OF.format('id', '?')} AND kind IN ({_ENDINGS})"  # noqa: S608  # ours
)
INSERT_EVENT = _insert("event", "node", *EventRow._fields)
_STATE_CHANGES = ", ".join(repr(kind.value) for kind in events.STATE_CHANGES)
PRUNE_EVENTS = f"""
DELETE FROM event WHERE node = ? AND revision > ? AND revision <= ? AND NOT (kind IN ({_ENDINGS}) AND seq > ?)
AND NOT (
    kind IN ({_STATE_CHANGES})
    AND event.number > ifnull((
        SELECT kept.transitions FROM container_status AS kept WHERE kept.node = event.node AND kept.id = event.id
        UNION ALL SELECT 0 FROM container WHERE container.node = event.node AND container.id = event.id), 1 << 62) - ?
    AND NOT EXISTS (
        SELECT 1 FROM event AS later
        WHERE later.node = event.node AND {_EVENT_IS_OF.format("later.id", "event.id")}
        AND later.revision > event.revision AND later.kind = '{events.EventKind.DELETED.value}'))"""  # noqa: S608  # our own names
"""Drop all but the histories of the containers that are there, damaged ones too.

What was deleted with a version that revisions have not come to yet is kept, so that no other begins with it.
Parameters: node, from, to, the newest revision, how long a history is.
"""
PRUNE_HISTORY = f"""
DELETE FROM event
WHERE node = ? AND {_EVENT_IS_OF.format("id", "?")} AND revision <= ? AND kind IN ({_STATE_CHANGES}) AND number <= ?"""  # noqa: S608  # our own names
"""Drop what has become too much of a container's history, or all, where the log does not reach any more."""

SELECT_LAST_RECOVERY = "SELECT max(number) FROM recovery WHERE node = ?"
SELECT_LAST_REPORT = f"{_select(('report',), 'recovery')} ORDER BY number DESC LIMIT 1"
INSERT_RECOVERY = _insert("recovery", "node", *ReportRow._fields)
PRUNE_RECOVERIES = "DELETE FROM recovery WHERE node = ? AND number <= ?"

SELECT_READ_BY_PEOPLE = ("SELECT opened_at, pruned FROM node WHERE name = ?", _select(ReportRow._fields, "recovery"))
"""Columns that no engine reads: one that is missing would be noticed at the next write only."""
