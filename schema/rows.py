"""The rows of the tables, column by column, without the node's name: the only place that knows their order.

A row is made and read by the names of its columns, so that one that is added shifts nothing unseen.
"""

from typing import Annotated, Any, NamedTuple

from msgspec import Meta

AnyRow = tuple[Any, ...]
"""A row of any table, or of a query."""

Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]
ExitCode = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Message = Annotated[str, Meta(max_length=1 << 16)]
Flag = Annotated[int, Meta(ge=0, le=1)]


class StatusRow(NamedTuple):
    """A row of table container_status. The types are those that may be written."""

    id: str
    seq: Natural
    transitions: Natural
    pid: Natural
    created_at: Natural
    started_at: Natural
    finished_at: Natural
    exit_code: ExitCode
    reason: Message
    message: Message
    released: Flag
    resources: str | None
    process_pid: Natural | None
    start_ticks: Natural | None
    boot_id: str | None
    pidfd_inode: Natural | None
    pid_namespace: Natural | None
    unapplied: str | None
    stop_requested_at: Natural
    stop_deadline: Natural
    expires_at: Natural
    paused: Flag
    extra: str | None
    checksum: int


class ContainerRow(NamedTuple):
    """A row of table container."""

    id: str
    sandbox_id: str
    name: str
    attempt: int
    root_dir: str
    log_path: str
    stop_signal: str
    labels: str
    config: str
    image_manifest: str
    starter: str
    restart_policy: str
    restart_count: int
    restart_delay: int
    checksum: int


class SandboxRow(NamedTuple):
    """A row of table sandbox."""

    id: str
    name: str
    created_at: int
    root_dir: str
    config: str
    runtime_handler: str
    checksum: int


class SandboxStatusRow(NamedTuple):
    """A row of table sandbox_status. The types are those that may be written."""

    id: str
    seq: Natural
    stopped_at: Natural
    reason: Message
    message: Message
    boot_id: str
    namespaces: str | None
    addresses: str | None
    extra: str | None
    expires_at: Natural
    checksum: int


class DeadlineRow(NamedTuple):
    """A row of table deadline."""

    kind: str
    id: str
    at: int
    boot_id: str
    boot_at: int
    checksum: int


class ItemRow(NamedTuple):
    """A row of table item."""

    kind: str
    key: str
    version: int
    updated_at: int
    value: str
    checksum: int


class EventRow(NamedTuple):
    """A row of table event."""

    revision: int
    last_revision: int
    at: int
    kind: str
    id: str
    sandbox_id: str
    name: str
    labels: str
    seq: int
    number: int
    state: int | None
    exit_code: int
    reason: str
    message: str
    body: str | None
    checksum: int


class OpenEvent(NamedTuple):
    """What is known of an event before it is numbered: its `names` are four columns of table event."""

    at: int
    kind: str
    names: "NameRow"
    seq: int = 0
    number: int = 0
    state: int | None = None
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    body: str | None = None


class ReportRow(NamedTuple):
    """A row of table recovery."""

    number: int
    at: int
    report: str


class NameRow(NamedTuple):
    """The columns of table container that a list is filtered by."""

    id: str
    sandbox_id: str
    name: str
    labels: str
    attempt: int = 0
