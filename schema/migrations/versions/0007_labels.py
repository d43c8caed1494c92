"""An index of labels, made of those of the containers' rows, and a smaller one of what has a restart policy."""

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from alembic import op

from limpet.schema.migrations.reseal import rebuild
from limpet.schema.seal import sealed_columns

revision = "0007"
down_revision = "0006"

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
    CONSTRAINT uq_container_node_name_sandbox_id_attempt_labels_id UNIQUE (node, name, sandbox_id, attempt, labels, id)
)
 STRICT"""
RESTARTABLE = "CREATE INDEX ix_container_restartable ON container (node, id) WHERE restart_policy <> 'no'"

LABEL = """CREATE TABLE label (
    node TEXT NOT NULL,
    "key" TEXT NOT NULL,
    value TEXT NOT NULL,
    id TEXT NOT NULL,
    CONSTRAINT pk_label PRIMARY KEY (node, "key", value, id)
)
 WITHOUT ROWID,
 STRICT"""


def upgrade() -> None:
    """Make the containers' table anew, with the smaller index, then the index of labels."""
    columns = sealed_columns("container", revision)
    rebuild(op.get_bind(), "container", CONTAINER, columns, columns, lambda _: {})
    driver: Any = op.get_bind().connection.driver_connection
    driver.execute(RESTARTABLE)
    driver.execute(LABEL)
    driver.text_factory = _decode_what_can_be
    try:
        rows = driver.execute("SELECT node, id, labels FROM container").fetchall()
    finally:
        driver.text_factory = str
    driver.executemany("INSERT OR IGNORE INTO label (node, key, value, id) VALUES (?, ?, ?, ?)", _make_rows(rows))


def _make_rows(rows: Iterable[tuple[object, ...]]) -> Iterator[tuple[str, str, str, str]]:
    """Yield a row for each label; none where a container's are damaged, of which a check tells."""
    for node, container_id, text in rows:
        if isinstance(node, str) and isinstance(container_id, str) and isinstance(text, str):
            try:
                labels = msgspec.json.decode(text, type=dict[str, str])  # noqa: TID251  # no class
            except (msgspec.MsgspecError, RecursionError):
                continue
            yield from ((node, key, value, container_id) for key, value in labels.items())


def _decode_what_can_be(text: bytes) -> str:
    return text.decode(errors="replace")
