"""The newest schema as SQL, printed from `tables` by docs/printed/ddl.py."""

CREATE = (
    """CREATE TABLE deadline (
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
 STRICT""",
    """CREATE TABLE event (
    node TEXT NOT NULL,
    revision INTEGER NOT NULL,
    last_revision INTEGER NOT NULL,
    at INTEGER NOT NULL,
    kind TEXT NOT NULL,
    id TEXT NOT NULL,
    sandbox_id TEXT NOT NULL,
    name TEXT NOT NULL,
    labels TEXT NOT NULL,
    seq INTEGER NOT NULL,
    number INTEGER NOT NULL,
    state INTEGER,
    exit_code INTEGER NOT NULL,
    reason TEXT NOT NULL,
    message TEXT NOT NULL,
    body TEXT,
    checksum INTEGER NOT NULL,
    CONSTRAINT pk_event PRIMARY KEY (node, revision),
    CONSTRAINT uq_event_node_id_revision UNIQUE (node, id, revision)
)
 WITHOUT ROWID,
 STRICT""",
    """CREATE TABLE item (
    node TEXT NOT NULL,
    kind TEXT NOT NULL,
    "key" TEXT NOT NULL,
    version INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    value TEXT NOT NULL,
    checksum INTEGER NOT NULL,
    CONSTRAINT pk_item PRIMARY KEY (node, kind, "key")
)
 WITHOUT ROWID,
 STRICT""",
    """CREATE TABLE label (
    node TEXT NOT NULL,
    "key" TEXT NOT NULL,
    value TEXT NOT NULL,
    id TEXT NOT NULL,
    CONSTRAINT pk_label PRIMARY KEY (node, "key", value, id)
)
 WITHOUT ROWID,
 STRICT""",
    """CREATE TABLE node (
    name TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    opened_at INTEGER NOT NULL,
    pruned INTEGER NOT NULL,
    CONSTRAINT pk_node PRIMARY KEY (name)
)
 WITHOUT ROWID,
 STRICT""",
    """CREATE TABLE recovery (
    node TEXT NOT NULL,
    number INTEGER NOT NULL,
    at INTEGER NOT NULL,
    report TEXT NOT NULL,
    CONSTRAINT pk_recovery PRIMARY KEY (node, number)
)
 STRICT""",
    """CREATE TABLE sandbox (
    node TEXT NOT NULL,
    id TEXT NOT NULL,
    name TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    root_dir TEXT NOT NULL,
    config TEXT NOT NULL,
    runtime_handler TEXT NOT NULL,
    checksum INTEGER NOT NULL,
    CONSTRAINT pk_sandbox PRIMARY KEY (node, id)
)
 STRICT""",
    """CREATE TABLE container (
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
 STRICT""",
    """CREATE INDEX ix_container_restartable ON container (node, id) WHERE restart_policy <> 'no'""",
    """CREATE TABLE sandbox_status (
    node TEXT NOT NULL,
    id TEXT NOT NULL,
    seq INTEGER NOT NULL,
    stopped_at INTEGER NOT NULL,
    reason TEXT NOT NULL,
    message TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    namespaces TEXT,
    addresses TEXT,
    extra TEXT,
    expires_at INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    CONSTRAINT pk_sandbox_status PRIMARY KEY (node, id),
    CONSTRAINT fk_sandbox_status_sandbox FOREIGN KEY(node, id) REFERENCES sandbox (node, id) ON DELETE CASCADE
)
 WITHOUT ROWID,
 STRICT""",
    """CREATE TABLE container_status (
    node TEXT NOT NULL,
    id TEXT NOT NULL,
    seq INTEGER NOT NULL,
    transitions INTEGER NOT NULL,
    pid INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    started_at INTEGER NOT NULL,
    finished_at INTEGER NOT NULL,
    exit_code INTEGER NOT NULL,
    reason TEXT NOT NULL,
    message TEXT NOT NULL,
    released INTEGER NOT NULL,
    resources TEXT,
    process_pid INTEGER,
    start_ticks INTEGER,
    boot_id TEXT,
    pidfd_inode INTEGER,
    pid_namespace INTEGER,
    unapplied TEXT,
    stop_requested_at INTEGER NOT NULL,
    stop_deadline INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    paused INTEGER NOT NULL,
    extra TEXT,
    checksum INTEGER NOT NULL,
    CONSTRAINT pk_container_status PRIMARY KEY (node, id),
    CONSTRAINT fk_container_status_container FOREIGN KEY(node, id) REFERENCES container (node, id) ON DELETE CASCADE
)
 WITHOUT ROWID,
 STRICT""",
    """CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)""",
)
