"""Nodes, sandboxes, containers and their status."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

INT64 = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Create the four tables."""
    op.create_table(
        "node",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("epoch", INT64, nullable=False),
        sa.Column("opened_at", INT64, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_node"),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "sandbox",
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("created_at", INT64, nullable=False),
        sa.Column("root_dir", sa.Text, nullable=False),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("checksum", INT64, nullable=False),
        sa.PrimaryKeyConstraint("node", "id", name="pk_sandbox"),
        sqlite_strict=True,
    )
    op.create_table(
        "container",
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("sandbox_id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("attempt", INT64, nullable=False),
        sa.Column("root_dir", sa.Text, nullable=False),
        sa.Column("log_path", sa.Text, nullable=False),
        sa.Column("stop_signal", sa.Text, nullable=False),
        sa.Column("labels", sa.Text, nullable=False),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("image_manifest", sa.Text, nullable=False),
        sa.Column("checksum", INT64, nullable=False),
        sa.PrimaryKeyConstraint("node", "id", name="pk_container"),
        sa.ForeignKeyConstraint(["node", "sandbox_id"], ["sandbox.node", "sandbox.id"], name="fk_container_sandbox"),
        sa.UniqueConstraint("node", "sandbox_id", "name", "attempt", name="uq_container_node_sandbox_id_name_attempt"),
        sqlite_strict=True,
    )
    op.create_table(
        "container_status",
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("seq", INT64, nullable=False),
        sa.Column("transitions", INT64, nullable=False),
        sa.Column("pid", INT64, nullable=False),
        sa.Column("created_at", INT64, nullable=False),
        sa.Column("started_at", INT64, nullable=False),
        sa.Column("finished_at", INT64, nullable=False),
        sa.Column("exit_code", INT64, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("released", INT64, nullable=False),
        sa.Column("resources", sa.Text),
        sa.Column("process_pid", INT64),
        sa.Column("start_ticks", INT64),
        sa.Column("boot_id", sa.Text),
        sa.Column("pidfd_inode", INT64),
        sa.Column("pid_namespace", INT64),
        sa.Column("checksum", INT64, nullable=False),
        sa.PrimaryKeyConstraint("node", "id", name="pk_container_status"),
        sa.ForeignKeyConstraint(
            ["node", "id"],
            ["container.node", "container.id"],
            name="fk_container_status_container",
            ondelete="CASCADE",
        ),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
