"""Indexes for what is looked for among the containers of all nodes: an id, a name, labels."""

from alembic import op

revision = "f002"
down_revision = "f001"

CREATE = (
    "CREATE INDEX container_by_id ON container (id)",
    "CREATE INDEX container_by_name ON container (name)",
    r"""CREATE FUNCTION labels_of(labels text) RETURNS jsonb LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
BEGIN
    RETURN replace(labels, '\u0000', '\u0001')::jsonb;  -- it has no NUL
EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
    RETURN NULL;  -- whatever a row holds, it is sent and kept
END $$""",
    "CREATE INDEX container_by_labels ON container USING gin (labels_of(labels) jsonb_path_ops)",
)


def upgrade() -> None:
    """Make them. No row changes."""
    for statement in CREATE:
        op.execute(statement)
