"""The statements that only read, as plain SQL: who looks at the state must not wait for SQLAlchemy to load.

Loading it costs more time than reading ten thousand containers. Parameters come in the order of the text, the
node first.
"""

from limpet.schema.codec import CONTAINER_COLUMNS, SANDBOX_COLUMNS, STATUS_COLUMNS


def _select(columns: tuple[str, ...], table: str, *keys: str) -> str:
    conditions = " AND ".join(f"{key} = ?" for key in ("node", *keys))
    return f"SELECT {', '.join(columns)} FROM {table} WHERE {conditions}"  # noqa: S608  # our own names


SELECT_NODES = "SELECT name FROM node"
SELECT_EPOCH = "SELECT epoch FROM node WHERE name = ?"
SELECT_STATUSES = _select(STATUS_COLUMNS, "container_status")
SELECT_UNSETTLED = f"{SELECT_STATUSES} AND (finished_at = 0 OR pid <> 0)"
"""What has not ended. One flipped bit cannot hide what has a process: both columns would have to change."""
SELECT_STATUS_IDS = f"{_select(('id',), 'container_status')} ORDER BY id"
SELECT_STATUS = _select(STATUS_COLUMNS, "container_status", "id")
SELECT_CONTAINERS = _select(CONTAINER_COLUMNS, "container")
SELECT_CONTAINER = _select(CONTAINER_COLUMNS, "container", "id")
SELECT_CONTAINER_IDS = f"{_select(('id',), 'container')} ORDER BY id"
SELECT_CONTAINER_NAMES = _select(("id", "sandbox_id", "name", "labels"), "container")
SELECT_SANDBOXES = _select(SANDBOX_COLUMNS, "sandbox")
SELECT_ALL_SANDBOXES = f"SELECT node, {', '.join(SANDBOX_COLUMNS)} FROM sandbox"  # noqa: S608  # our own names
SELECT_SANDBOX_IDS_IN_USE = "SELECT DISTINCT sandbox_id FROM container WHERE node = ?"
TRANSITION_COLUMNS = ("number", "seq", "at", "state", "exit_code", "reason", "message")
SELECT_TRANSITIONS = f"{_select(TRANSITION_COLUMNS, 'transition', 'id')} ORDER BY number"
SELECT_NEWEST_TRANSITIONS = "SELECT id, max(number) FROM transition WHERE node = ? GROUP BY id"
SELECT_LAST_RECOVERY = "SELECT max(number) FROM recovery WHERE node = ?"
SELECT_LAST_REPORT = f"{_select(('report',), 'recovery')} ORDER BY number DESC LIMIT 1"
SELECT_READ_BY_PEOPLE = ("SELECT opened_at FROM node WHERE name = ?", _select(("at", "report"), "recovery"))
"""What no engine reads, only people: a column that is missing would be noticed at the next write."""
SELECT_STATELESS_TRANSITIONS = "SELECT id, number, state FROM transition WHERE node = ? AND state NOT IN (0, 1, 2, 3)"
