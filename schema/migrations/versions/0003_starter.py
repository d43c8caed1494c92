"""Which starter runs a container."""

from alembic import op

from limpet.schema.migrations.reseal import rebuild
from limpet.schema.seal import sealed_columns

revision = "0003"
down_revision = "0002"

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
    checksum INTEGER NOT NULL,
    CONSTRAINT pk_container PRIMARY KEY (node, id),
    CONSTRAINT fk_container_sandbox FOREIGN KEY(node, sandbox_id) REFERENCES sandbox (node, id),
    CONSTRAINT uq_container_node_sandbox_id_name_attempt UNIQUE (node, sandbox_id, name, attempt)
)
 STRICT"""


def upgrade() -> None:
    """Add the column. So far there was one starter, and a bundle for each container that it ran."""
    old, new = (sealed_columns("container", each) for each in (down_revision, revision))
    rebuild(
        op.get_bind(),
        "container",
        CONTAINER,
        old,
        new,
        lambda row: {"starter": "process" if row["root_dir"] else ""},
    )
