"""The history of each container's states, and the reports of the recovery passes."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

INT64 = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Create the two tables."""
    op.create_table(
        "transition",
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("number", INT64, nullable=False),
        sa.Column("seq", INT64, nullable=False),
        sa.Column("at", INT64, nullable=False),
        sa.Column("state", INT64, nullable=False),
        sa.Column("exit_code", INT64, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("node", "id", "number", name="pk_transition"),
        sa.ForeignKeyConstraint(
            ["node", "id"],
            ["container.node", "container.id"],
            name="fk_transition_container",
            ondelete="CASCADE",
        ),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "recovery",
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("number", INT64, nullable=False),
        sa.Column("at", INT64, nullable=False),
        sa.Column("report", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("node", "number", name="pk_recovery"),
        sqlite_strict=True,
    )
