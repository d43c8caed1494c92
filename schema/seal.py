"""The seal of a row: its checksum, and which columns that covers at which revision of the schema.

Most bit flips in a database file pass SQLite's own integrity check, so each row carries a checksum of its own. It
covers named columns in a fixed order, the node's name first. Frozen, as migrations are: a migration verifies old rows
by the seal of their time, and writes the new one. An entry is added here, and none is ever changed.
"""

from collections.abc import Mapping, Sequence
from zlib import crc32

import msgspec

_encode = msgspec.json.encode

_SANDBOX = ("node", "id", "name", "created_at", "root_dir", "config")
_CONTAINER = (
    "node",
    "id",
    "sandbox_id",
    "name",
    "attempt",
    "root_dir",
    "log_path",
    "stop_signal",
    "labels",
    "config",
    "image_manifest",
)
_STATUS = (
    "node",
    "id",
    "seq",
    "transitions",
    "pid",
    "created_at",
    "started_at",
    "finished_at",
    "exit_code",
    "reason",
    "message",
    "released",
    "resources",
    "process_pid",
    "start_ticks",
    "boot_id",
    "pidfd_inode",
    "pid_namespace",
)

_EVENT = (
    "node",
    "revision",
    "last_revision",
    "at",
    "kind",
    "id",
    "sandbox_id",
    "name",
    "labels",
    "seq",
    "number",
    "state",
    "exit_code",
    "reason",
    "message",
    "body",
)

SEALS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sandbox": {"0001": _SANDBOX, "0005": (*_SANDBOX, "runtime_handler")},
    "sandbox_status": {
        "0005": (
            "node",
            "id",
            "seq",
            "stopped_at",
            "reason",
            "message",
            "boot_id",
            "namespaces",
            "addresses",
            "extra",
            "expires_at",
        ),
    },
    "container": {
        "0001": _CONTAINER,
        "0003": (*_CONTAINER, "starter"),
        "0005": (*_CONTAINER, "starter", "restart_policy", "restart_count", "restart_delay"),
    },
    "container_status": {
        "0001": _STATUS,
        "0004": (*_STATUS, "unapplied", "stop_requested_at", "stop_deadline"),
        "0005": (*_STATUS, "unapplied", "stop_requested_at", "stop_deadline", "expires_at", "paused", "extra"),
    },
    "deadline": {"0008": ("node", "kind", "id", "at", "boot_id", "boot_at")},
    "item": {"0005": ("node", "kind", "key", "version", "updated_at", "value")},
    "event": {"0006": _EVENT},
}
"""For each table the columns that its seal covers, by the first revision at which it does."""


def sealed_columns(table: str, revision: str) -> tuple[str, ...]:
    """Return the columns that the checksum of a row covers at a revision, in order."""
    return SEALS[table][max(first for first in SEALS[table] if first <= revision)]


def seal(values: Sequence[object]) -> int:
    """Return the checksum of a row's sealed values. Raises UnicodeEncodeError, TypeError for what no row can hold."""
    return crc32(_encode(values))


def is_sealed(values: Sequence[object], checksum: object) -> bool:
    """Say whether the values carry this checksum.

    JSON makes the same of an empty BLOB as of an empty text, and they are one flipped bit apart: no BLOB is accepted.
    """
    try:
        return seal(values) == checksum and bytes not in map(type, values)
    except (UnicodeEncodeError, TypeError):
        return False
