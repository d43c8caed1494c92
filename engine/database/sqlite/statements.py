"""The statements, written with SQLAlchemy Core and compiled once: what runs is plain SQL on the driver.

Building a statement for each call costs ten times what running it does, so nothing is built later on.
"""

from collections.abc import Sequence

from sqlalchemy import bindparam, delete, insert, select, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.elements import BindParameter

from limpet.schema.codec import CONTAINER_COLUMNS, SANDBOX_COLUMNS, STATUS_COLUMNS
from limpet.schema.tables import container, container_status, node, recovery, sandbox, transition

_DIALECT = sqlite.dialect(paramstyle="qmark")


def _sql(statement: ClauseElement, order: Sequence[str]) -> str:
    """Compile `statement`, whose parameters must come in this order."""
    compiled = statement.compile(dialect=_DIALECT)
    found = [name.removesuffix("_1") for name in compiled.positiontup or ()]  # type: ignore[attr-defined]
    assert found == list(order), f"{found} is not {list(order)}"
    return str(compiled)


_NODE: BindParameter[str] = bindparam("node")
_ID: BindParameter[str] = bindparam("id")
_epoch = select(node.c.epoch).where(node.c.name == bindparam("node")).scalar_subquery()

INSERT_SANDBOX = _sql(insert(sandbox), ("node", *SANDBOX_COLUMNS))
INSERT_CONTAINER = _sql(insert(container), ("node", *CONTAINER_COLUMNS))
INSERT_STATUS = _sql(insert(container_status), ("node", *STATUS_COLUMNS))
INSERT_TRANSITION = _sql(insert(transition), [column.name for column in transition.columns])
INSERT_RECOVERY = _sql(insert(recovery), ("node", "number", "at", "report"))
DELETE_SANDBOX = _sql(delete(sandbox).where(sandbox.c.node == _NODE, sandbox.c.id == _ID), ("node", "id"))
DELETE_CONTAINER = _sql(delete(container).where(container.c.node == _NODE, container.c.id == _ID), ("node", "id"))
UPDATE_STATUS = _sql(
    update(container_status)
    .where(
        container_status.c.node == bindparam("node"),
        container_status.c.id == bindparam("key"),
        container_status.c.seq == bindparam("seq_before"),
        _epoch == bindparam("epoch"),
    )
    .values({name: bindparam(f"new_{name}") for name in STATUS_COLUMNS if name != "id"}),
    (
        *(f"new_{name}" for name in STATUS_COLUMNS if name != "id"),
        "node",
        "key",
        "seq_before",
        "node",
        "epoch",
    ),
)
"""Parameters: the row without its id; node, id, the seq it replaces; node, epoch."""
INSERT_NODE = _sql(insert(node), ("name", "epoch", "opened_at"))
UPDATE_NODE = _sql(
    update(node)
    .where(node.c.name == bindparam("node"))
    .values(epoch=bindparam("new_epoch"), opened_at=bindparam("new_opened_at")),
    ("new_epoch", "new_opened_at", "node"),
)
PRUNE_TRANSITIONS = _sql(
    delete(transition).where(
        transition.c.node == _NODE, transition.c.id == _ID, transition.c.number <= bindparam("last")
    ),
    ("node", "id", "last"),
)
PRUNE_RECOVERIES = _sql(
    delete(recovery).where(recovery.c.node == _NODE, recovery.c.number <= bindparam("last")), ("node", "last")
)

SELECT_CONTAINER_BY_NAME = _sql(
    select(container.c.id).where(
        container.c.node == _NODE,
        container.c.sandbox_id == bindparam("sandbox_id"),
        container.c.name == bindparam("name"),
        container.c.attempt == bindparam("attempt"),
    ),
    ("node", "sandbox_id", "name", "attempt"),
)
SELECT_IDS_OF_SANDBOX = _sql(
    select(container.c.id).where(container.c.node == _NODE, container.c.sandbox_id == bindparam("sandbox_id")),
    ("node", "sandbox_id"),
)
