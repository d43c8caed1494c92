"""The tables of the nodes, without what a node itself keeps true, and what the fleet knows of each node."""

from alembic import op

revision = "f001"
down_revision = None

CREATE = (
    """CREATE TABLE event (
    node text COLLATE "C" NOT NULL,
    revision bigint NOT NULL,
    last_revision bigint NOT NULL,
    at bigint NOT NULL,
    kind text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    sandbox_id text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    labels text COLLATE "C" NOT NULL,
    seq bigint NOT NULL,
    number bigint NOT NULL,
    state bigint,
    exit_code bigint NOT NULL,
    reason text COLLATE "C" NOT NULL,
    message text COLLATE "C" NOT NULL,
    body text COLLATE "C",
    checksum bigint NOT NULL,
    PRIMARY KEY (node, revision)
)""",
    "CREATE INDEX event_of_one ON event (node, id, revision)",
    """CREATE TABLE item (
    node text COLLATE "C" NOT NULL,
    kind text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    version bigint NOT NULL,
    updated_at bigint NOT NULL,
    value text COLLATE "C" NOT NULL,
    checksum bigint NOT NULL,
    fleet_epoch bigint NOT NULL,
    fleet_as_of bigint NOT NULL,
    PRIMARY KEY (node, kind, key)
)""",
    """CREATE TABLE node (
    name text COLLATE "C" NOT NULL,
    epoch bigint NOT NULL,
    opened_at bigint NOT NULL,
    pruned bigint NOT NULL,
    PRIMARY KEY (name)
)""",
    """CREATE TABLE sandbox (
    node text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    created_at bigint NOT NULL,
    root_dir text COLLATE "C" NOT NULL,
    config text COLLATE "C" NOT NULL,
    runtime_handler text COLLATE "C" NOT NULL,
    checksum bigint NOT NULL,
    fleet_epoch bigint NOT NULL,
    fleet_as_of bigint NOT NULL,
    PRIMARY KEY (node, id)
)""",
    """CREATE TABLE container (
    node text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    sandbox_id text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    attempt bigint NOT NULL,
    root_dir text COLLATE "C" NOT NULL,
    log_path text COLLATE "C" NOT NULL,
    stop_signal text COLLATE "C" NOT NULL,
    labels text COLLATE "C" NOT NULL,
    config text COLLATE "C" NOT NULL,
    image_manifest text COLLATE "C" NOT NULL,
    starter text COLLATE "C" NOT NULL,
    restart_policy text COLLATE "C" NOT NULL,
    restart_count bigint NOT NULL,
    restart_delay bigint NOT NULL,
    checksum bigint NOT NULL,
    fleet_epoch bigint NOT NULL,
    fleet_as_of bigint NOT NULL,
    PRIMARY KEY (node, id)
)""",
    """CREATE TABLE sandbox_status (
    node text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    seq bigint NOT NULL,
    stopped_at bigint NOT NULL,
    reason text COLLATE "C" NOT NULL,
    message text COLLATE "C" NOT NULL,
    boot_id text COLLATE "C" NOT NULL,
    namespaces text COLLATE "C",
    addresses text COLLATE "C",
    extra text COLLATE "C",
    expires_at bigint NOT NULL,
    checksum bigint NOT NULL,
    fleet_epoch bigint NOT NULL,
    fleet_as_of bigint NOT NULL,
    PRIMARY KEY (node, id)
)""",
    """CREATE TABLE container_status (
    node text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    seq bigint NOT NULL,
    transitions bigint NOT NULL,
    pid bigint NOT NULL,
    created_at bigint NOT NULL,
    started_at bigint NOT NULL,
    finished_at bigint NOT NULL,
    exit_code bigint NOT NULL,
    reason text COLLATE "C" NOT NULL,
    message text COLLATE "C" NOT NULL,
    released bigint NOT NULL,
    resources text COLLATE "C",
    process_pid bigint,
    start_ticks bigint,
    boot_id text COLLATE "C",
    pidfd_inode bigint,
    pid_namespace bigint,
    unapplied text COLLATE "C",
    stop_requested_at bigint NOT NULL,
    stop_deadline bigint NOT NULL,
    expires_at bigint NOT NULL,
    paused bigint NOT NULL,
    extra text COLLATE "C",
    checksum bigint NOT NULL,
    fleet_epoch bigint NOT NULL,
    fleet_as_of bigint NOT NULL,
    PRIMARY KEY (node, id)
)""",
    """CREATE TABLE fleet_node (
    name text COLLATE "C" NOT NULL,
    epoch bigint NOT NULL,
    directory text COLLATE "C" NOT NULL,
    host text COLLATE "C" NOT NULL,
    pid bigint NOT NULL,
    path text COLLATE "C" NOT NULL,
    claimed_at timestamptz NOT NULL,
    heard_at timestamptz NOT NULL,
    lease_seconds double precision NOT NULL,
    as_of bigint NOT NULL,
    revision bigint NOT NULL,
    is_whole boolean NOT NULL,
    doubts text COLLATE "C" NOT NULL,
    PRIMARY KEY (name)
)""",
)


def upgrade() -> None:
    """Make all tables. Rows of one batch need no order among each other: nothing refers to anything."""
    for statement in CREATE:
        op.execute(statement)
