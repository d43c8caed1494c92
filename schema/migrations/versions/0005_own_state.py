"""What a runtime keeps of its own, what it intends, and that a sandbox was stopped."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from alembic import op

from limpet.schema.migrations.reseal import rebuild
from limpet.schema.seal import seal, sealed_columns

revision = "0005"
down_revision = "0004"

SANDBOX = """CREATE TABLE sandbox_new (
    node TEXT NOT NULL,
    id TEXT NOT NULL,
    name TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    root_dir TEXT NOT NULL,
    config TEXT NOT NULL,
    runtime_handler TEXT NOT NULL,
    checksum INTEGER NOT NULL,
    CONSTRAINT pk_sandbox PRIMARY KEY (node, id)
)
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
    CONSTRAINT uq_container_node_sandbox_id_name_attempt UNIQUE (node, sandbox_id, name, attempt)
)
 STRICT"""

CONTAINER_STATUS = """CREATE TABLE container_status_new (
    node TEXT NOT NULL,
    id TEXT NOT NULL,
    seq INTEGER NOT NULL,
    transitions INTEGER NOT NULL,
    pid INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    started_at INTEGER NOT NULL,
    finished_at INTEGER NOT NULL,
    exit_code INTEGER NOT NULL,
    reason TEXT NOT NULL,
    message TEXT NOT NULL,
    released INTEGER NOT NULL,
    resources TEXT,
    process_pid INTEGER,
    start_ticks INTEGER,
    boot_id TEXT,
    pidfd_inode INTEGER,
    pid_namespace INTEGER,
    unapplied TEXT,
    stop_requested_at INTEGER NOT NULL,
    stop_deadline INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    paused INTEGER NOT NULL,
    extra TEXT,
    checksum INTEGER NOT NULL,
    CONSTRAINT pk_container_status PRIMARY KEY (node, id),
    CONSTRAINT fk_container_status_container FOREIGN KEY(node, id) REFERENCES container (node, id) ON DELETE CASCADE
)
 WITHOUT ROWID,
 STRICT"""

SANDBOX_STATUS = """CREATE TABLE sandbox_status (
    node TEXT NOT NULL,
    id TEXT NOT NULL,
    seq INTEGER NOT NULL,
    stopped_at INTEGER NOT NULL,
    reason TEXT NOT NULL,
    message TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    namespaces TEXT,
    addresses TEXT,
    extra TEXT,
    expires_at INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    CONSTRAINT pk_sandbox_status PRIMARY KEY (node, id),
    CONSTRAINT fk_sandbox_status_sandbox FOREIGN KEY(node, id) REFERENCES sandbox (node, id) ON DELETE CASCADE
)
 WITHOUT ROWID,
 STRICT"""

ITEM = """CREATE TABLE item (
    node TEXT NOT NULL,
    kind TEXT NOT NULL,
    "key" TEXT NOT NULL,
    version INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    value TEXT NOT NULL,
    checksum INTEGER NOT NULL,
    CONSTRAINT pk_item PRIMARY KEY (node, kind, "key")
)
 WITHOUT ROWID,
 STRICT"""


NEW_COLUMNS: Mapping[str, Mapping[str, object]] = {
    "sandbox": {"runtime_handler": ""},
    "container": {"restart_policy": "no", "restart_count": 0, "restart_delay": 0},
    "container_status": {"expires_at": 0, "paused": 0, "extra": None},
}
"""What old rows get: so far nothing was restarted, expired or was paused."""


def upgrade() -> None:
    """Add the columns and tables. No sandbox was stopped so far."""
    for table, create in (("sandbox", SANDBOX), ("container", CONTAINER), ("container_status", CONTAINER_STATUS)):
        old, new = (sealed_columns(table, each) for each in (down_revision, revision))
        rebuild(op.get_bind(), table, create, old, new, partial(_fill, NEW_COLUMNS[table]))
    op.execute(SANDBOX_STATUS)
    op.execute(ITEM)
    _add_statuses()


def _fill(values: Mapping[str, object], _: Mapping[str, object]) -> Mapping[str, object]:
    return values


def _add_statuses() -> None:
    """Give each sandbox a status: READY since a boot that nobody wrote down."""
    driver: Any = op.get_bind().connection.driver_connection
    columns = sealed_columns("sandbox_status", revision)
    insert = f"INSERT INTO sandbox_status ({', '.join(columns)}, checksum) VALUES ({', '.join('?' * 12)})"  # noqa: S608  # ours
    found = driver.execute("SELECT CAST(node AS BLOB), CAST(id AS BLOB) FROM sandbox").fetchall()
    for keys in found:
        try:
            node, key = map(bytes.decode, keys)
        except UnicodeDecodeError:
            continue  # it is damaged, and stays so
        row = {"node": node, "id": key, "seq": 1, "stopped_at": 0, "reason": "", "message": "", "boot_id": ""}
        row |= {"namespaces": None, "addresses": None, "extra": None, "expires_at": 0}
        values = [row[name] for name in columns]
        driver.execute(insert, (*values, seal(values)))
