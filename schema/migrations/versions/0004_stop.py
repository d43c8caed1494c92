"""What of a config is not carried out, and that a stop was asked for."""

from alembic import op

from limpet.schema.migrations.reseal import rebuild
from limpet.schema.seal import sealed_columns

revision = "0004"
down_revision = "0003"

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
    checksum INTEGER NOT NULL,
    CONSTRAINT pk_container_status PRIMARY KEY (node, id),
    CONSTRAINT fk_container_status_container FOREIGN KEY(node, id) REFERENCES container (node, id) ON DELETE CASCADE
)
 WITHOUT ROWID,
 STRICT"""


def upgrade() -> None:
    """Add the columns. So far nothing was listed, and no stop was written down."""
    old, new = (sealed_columns("container_status", each) for each in (down_revision, revision))
    rebuild(
        op.get_bind(),
        "container_status",
        CONTAINER_STATUS,
        old,
        new,
        lambda _: {"unapplied": None, "stop_requested_at": 0, "stop_deadline": 0},
    )
