"""Indexes for what is looked for among the containers of all nodes: an id, a name, labels."""

from alembic import op

revision = "f002"
down_revision = "f001"

CREATE = (
    "CREATE INDEX container_by_id ON container (id)",
    "CREATE INDEX container_by_name ON container (name)",
    r"""CREATE INDEX container_by_labels ON container
    USING gin ((replace(labels, '\u0000', '\u0001')::jsonb) jsonb_path_ops)""",
)
"""PostgreSQL's jsonb has no NUL; what is found by it is compared with what was looked for."""


def upgrade() -> None:
    """Make them. No row changes."""
    for statement in CREATE:
        op.execute(statement)
