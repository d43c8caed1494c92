"""When a time that was set is reached by the clock of the boot, which nobody sets: see `schema.deadline`."""

from alembic import op

revision = "0008"
down_revision = "0007"

DEADLINE = """CREATE TABLE deadline (
    node TEXT NOT NULL,
    kind TEXT NOT NULL,
    id TEXT NOT NULL,
    at INTEGER NOT NULL,
    boot_id TEXT NOT NULL,
    boot_at INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    CONSTRAINT pk_deadline PRIMARY KEY (node, kind, id)
)
 WITHOUT ROWID,
 STRICT"""


def upgrade() -> None:
    """Make the table. It is empty: by which clock the times were set that are there already, nobody knows."""
    op.get_bind().exec_driver_sql(DEADLINE)
