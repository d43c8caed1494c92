"""The log of changes, which takes in what was kept of the containers' states, and indexes for lists."""

from collections.abc import Iterator
from typing import Any

from alembic import op

from limpet.schema.migrations.reseal import rebuild, rebuild_unsealed
from limpet.schema.seal import seal, sealed_columns

revision = "0006"
down_revision = "0005"

NODE = """CREATE TABLE node_new (
    name TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    opened_at INTEGER NOT NULL,
    pruned INTEGER NOT NULL,
    CONSTRAINT pk_node PRIMARY KEY (name)
)
 WITHOUT ROWID,
 STRICT"""

EVENT = """CREATE TABLE event (
    node TEXT NOT NULL,
    revision INTEGER NOT NULL,
    last_revision INTEGER NOT NULL,
    at INTEGER NOT NULL,
    kind TEXT NOT NULL,
    id TEXT NOT NULL,
    sandbox_id TEXT NOT NULL,
    name TEXT NOT NULL,
    labels TEXT NOT NULL,
    seq INTEGER NOT NULL,
    number INTEGER NOT NULL,
    state INTEGER,
    exit_code INTEGER NOT NULL,
    reason TEXT NOT NULL,
    message TEXT NOT NULL,
    body TEXT,
    checksum INTEGER NOT NULL,
    CONSTRAINT pk_event PRIMARY KEY (node, revision),
    CONSTRAINT uq_event_node_id_revision UNIQUE (node, id, revision)
)
 WITHOUT ROWID,
 STRICT"""

CONTAINER = """CREATE TABLE container_new (
    node TEXT NOT NULL,
    id TEXT NOT NULL,
    sandbox_id TEXT NOT NULL,
    name TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    root_dir TEXT NOT NULL,
    log_path TEXT NOT NULL,
    stop_signal TEXT NOT NULL,
    labels TEXT NOT NULL,
    config TEXT NOT NULL,
    image_manifest TEXT NOT NULL,
    starter TEXT NOT NULL,
    restart_policy TEXT NOT NULL,
    restart_count INTEGER NOT NULL,
    restart_delay INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    CONSTRAINT pk_container PRIMARY KEY (node, id),
    CONSTRAINT fk_container_sandbox FOREIGN KEY(node, sandbox_id) REFERENCES sandbox (node, id),
    CONSTRAINT uq_container_node_sandbox_id_name_attempt UNIQUE (node, sandbox_id, name, attempt),
    CONSTRAINT uq_container_node_name_sandbox_id_attempt_labels_id UNIQUE (node, name, sandbox_id, attempt, labels, id),
    CONSTRAINT uq_container_node_restart_policy_id UNIQUE (node, restart_policy, id)
)
 STRICT"""

# In the order of the clock, but a container's own changes in theirs: the clock may have been set back.
TRANSITIONS = """
SELECT old.node, old.id, old.number, old.seq, old.at, old.state, old.exit_code, old.reason, old.message,
       container.sandbox_id, container.name, container.labels
FROM (SELECT *, max(at) OVER (PARTITION BY node, id ORDER BY number) AS latest FROM transition) AS old
LEFT JOIN container ON container.node = old.node AND container.id = old.id
ORDER BY old.node, latest, old.id, old.number"""


def upgrade() -> None:
    """Make the table, move what is in the old one there, and drop that."""
    rebuild_unsealed(op.get_bind(), "node", NODE, ("name", "epoch", "opened_at"), {"pruned": 0})
    driver: Any = op.get_bind().connection.driver_connection
    driver.execute(EVENT)
    columns = (*sealed_columns("event", revision), "checksum")
    insert = f"INSERT INTO event ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608  # ours
    driver.text_factory = _decode_what_can_be
    try:
        driver.executemany(insert, list(_make_rows(driver)))
    finally:
        driver.text_factory = str
    driver.execute("DROP TABLE transition")
    columns = sealed_columns("container", revision)
    rebuild(op.get_bind(), "container", CONTAINER, columns, columns, lambda _: {})


def _make_rows(driver: Any) -> Iterator[list[object]]:
    """Yield a row of the new table for each of the old one: of one that was added first, and of each change after."""
    newest: dict[str, int] = {}
    for node, key, number, *change in driver.execute(TRANSITIONS):
        seq, at, state, exit_code, reason, message, *names = change
        newest[node] = newest.get(node, 0) + 1
        row = [
            node,
            newest[node],
            newest[node],
            at,
            "added" if number == 1 else "state",
            key,
            *(each if isinstance(each, str) else "" for each in names),  # of a container whose row is missing, nothing
            seq,
            number,
            state,
            exit_code,
            reason,
            message,
            None,
        ]
        yield [*row, seal(row)]


def _decode_what_can_be(text: bytes) -> str:
    return text.decode(errors="replace")
