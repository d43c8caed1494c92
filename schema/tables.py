"""The tables, as SQLAlchemy Core sees them. Every row that a node owns carries the node's name.

Immutable and mutable parts are apart, so that a checkpoint rewrites one narrow row. Only Integer and Text
columns are used: those are what SQLite's STRICT tables and other databases both check for us. Only migrations and
tests load this module: what an engine runs is in `ddl`, printed from here, and in plain SQL.
"""

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

INT64 = BigInteger().with_variant(Integer, "sqlite")

TABLES = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

node = Table(
    "node",
    TABLES,
    Column("name", Text, primary_key=True),
    Column("epoch", INT64, nullable=False),  # grows by one with each opening; every write checks it
    Column("opened_at", INT64, nullable=False),
    Column("pruned", INT64, nullable=False),  # of the events up to this one only histories are kept
    sqlite_strict=True,
    sqlite_with_rowid=False,
)

sandbox = Table(
    "sandbox",
    TABLES,
    Column("node", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("created_at", INT64, nullable=False),
    Column("root_dir", Text, nullable=False),
    Column("config", Text, nullable=False),
    Column("runtime_handler", Text, nullable=False),
    Column("checksum", INT64, nullable=False),
    sqlite_strict=True,
)

sandbox_status = Table(
    "sandbox_status",
    TABLES,
    Column("node", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("seq", INT64, nullable=False),  # numbers this sandbox's checkpoints, without a gap
    Column("stopped_at", INT64, nullable=False),
    Column("reason", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("boot_id", Text, nullable=False),
    Column("namespaces", Text),
    Column("addresses", Text),
    Column("extra", Text),
    Column("expires_at", INT64, nullable=False),
    Column("checksum", INT64, nullable=False),
    ForeignKeyConstraint(["node", "id"], ["sandbox.node", "sandbox.id"], ondelete="CASCADE"),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)

container = Table(
    "container",
    TABLES,
    Column("node", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("sandbox_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("attempt", INT64, nullable=False),
    Column("root_dir", Text, nullable=False),
    Column("log_path", Text, nullable=False),
    Column("stop_signal", Text, nullable=False),
    Column("labels", Text, nullable=False),
    Column("config", Text, nullable=False),
    Column("image_manifest", Text, nullable=False),
    Column("starter", Text, nullable=False),
    Column("restart_policy", Text, nullable=False),
    Column("restart_count", INT64, nullable=False),
    Column("restart_delay", INT64, nullable=False),
    Column("checksum", INT64, nullable=False),
    ForeignKeyConstraint(["node", "sandbox_id"], ["sandbox.node", "sandbox.id"]),
    UniqueConstraint("node", "sandbox_id", "name", "attempt"),  # as the CRI reserves names
    UniqueConstraint("node", "name", "sandbox_id", "attempt", "labels", "id"),  # for its index: what lists filter by
    Index("ix_container_restartable", "node", "id", sqlite_where=text("restart_policy <> 'no'")),  # of few, mostly none
    sqlite_strict=True,
)

label = Table(
    "label",
    TABLES,
    Column("node", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, primary_key=True),
    Column("id", Text, primary_key=True),  # of the container; not a foreign key, which would need an index of its own
    sqlite_strict=True,
    sqlite_with_rowid=False,
)

container_status = Table(
    "container_status",
    TABLES,
    Column("node", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("seq", INT64, nullable=False),  # numbers this container's checkpoints, without a gap
    Column("transitions", INT64, nullable=False),  # how many state changes so far; the newest one's number
    Column("pid", INT64, nullable=False),
    Column("created_at", INT64, nullable=False),
    Column("started_at", INT64, nullable=False),
    Column("finished_at", INT64, nullable=False),
    Column("exit_code", INT64, nullable=False),
    Column("reason", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("released", INT64, nullable=False),
    Column("resources", Text),
    Column("process_pid", INT64),  # from here to pid_namespace the process identity, all or none
    Column("start_ticks", INT64),
    Column("boot_id", Text),
    Column("pidfd_inode", INT64),
    Column("pid_namespace", INT64),
    Column("unapplied", Text),
    Column("stop_requested_at", INT64, nullable=False),
    Column("stop_deadline", INT64, nullable=False),
    Column("expires_at", INT64, nullable=False),
    Column("paused", INT64, nullable=False),
    Column("extra", Text),
    Column("checksum", INT64, nullable=False),
    ForeignKeyConstraint(["node", "id"], ["container.node", "container.id"], ondelete="CASCADE"),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)

event = Table(
    "event",
    TABLES,
    Column("node", Text, primary_key=True),
    Column("revision", INT64, primary_key=True),  # numbers the node's events, without a gap
    Column("last_revision", INT64, nullable=False),  # of the last event of the same transaction
    Column("at", INT64, nullable=False),
    Column("kind", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("sandbox_id", Text, nullable=False),  # as are name and labels, what the row said that may be gone
    Column("name", Text, nullable=False),
    Column("labels", Text, nullable=False),
    Column("seq", INT64, nullable=False),  # the checkpoint that made it
    Column("number", INT64, nullable=False),  # how many state changes so far
    Column("state", INT64),  # a CRI state number, of a container
    Column("exit_code", INT64, nullable=False),
    Column("reason", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("body", Text),
    Column("checksum", INT64, nullable=False),
    UniqueConstraint("node", "id", "revision"),  # for its index: what happened to one container
    sqlite_strict=True,
    sqlite_with_rowid=False,
)

recovery = Table(
    "recovery",
    TABLES,
    Column("node", Text, primary_key=True),
    Column("number", INT64, primary_key=True),
    Column("at", INT64, nullable=False),
    Column("report", Text, nullable=False),
    sqlite_strict=True,
)

deadline = Table(
    "deadline",
    TABLES,
    Column("node", Text, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("id", Text, primary_key=True),  # of a container or sandbox; not a foreign key: it may be either
    Column("at", INT64, nullable=False),  # by the wall clock, as in the status
    Column("boot_id", Text, nullable=False),
    Column("boot_at", INT64, nullable=False),  # by the clock of that boot
    Column("checksum", INT64, nullable=False),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)

item = Table(
    "item",
    TABLES,
    Column("node", Text, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("version", INT64, nullable=False),  # numbers the values that were put, without a gap
    Column("updated_at", INT64, nullable=False),
    Column("value", Text, nullable=False),
    Column("checksum", INT64, nullable=False),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)
