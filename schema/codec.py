"""Records to rows and back. A row is a tuple in the order of its table's columns, the node's name left out.

Each row ends with a checksum over all of it and the node's name, because most bit flips in a database file
pass SQLite's own integrity check. A row of another shape, type or range than the tables allow is never
written, and one that fails its checksum is never believed: decoding raises StoreDamagedError.
"""

from collections.abc import Sequence
from typing import Annotated, Any
from zlib import crc32

import msgspec
from msgspec.structs import astuple

from limpet.schema.cri import ContainerConfig, PodSandboxConfig
from limpet.schema.errors import InvalidInputError, StoreDamagedError
from limpet.schema.identity import ProcessIdentity
from limpet.schema.image import ImageManifest
from limpet.schema.metadata import Metadata, SandboxMetadata, require_id
from limpet.schema.status import ContainerState, Resources, Status

Row = tuple[Any, ...]

_Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_ExitCode = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
_Message = Annotated[str, msgspec.Meta(max_length=1 << 16)]
_Flag = Annotated[int, msgspec.Meta(ge=0, le=1)]
_encode = msgspec.json.encode
_UNREADABLE = (msgspec.MsgspecError, RecursionError)
"""What decoding JSON raises: for JSON that is none, or of another shape, and for what is nested too deep."""

STATUS_COLUMNS = (
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
    "checksum",
)
_StatusRow = tuple[
    str,  # node
    str,
    _Natural,
    _Natural,
    _Natural,
    _Natural,
    _Natural,
    _Natural,
    _ExitCode,
    _Message,
    _Message,
    _Flag,
    str | None,
    _Natural | None,
    _Natural | None,
    str | None,
    _Natural | None,
    _Natural | None,
]
_NO_IDENTITY = (None,) * 5
_status_row = msgspec.json.Decoder(_StatusRow)
_resources = msgspec.json.Decoder(Resources)

CONTAINER_COLUMNS = (
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
    "checksum",
)
SANDBOX_COLUMNS = ("id", "name", "created_at", "root_dir", "config", "checksum")


def status_to_row(node: str, container_id: str, seq: int, transitions: int, status: Status) -> Row:
    """Return the row of table container_status. `status.unknown` has no column: it is never written.

    Raises InvalidInputError if a field has the wrong type, is out of range or cannot be written as UTF-8.
    """
    row = (
        node,
        container_id,
        seq,
        transitions,
        status.pid,
        status.created_at,
        status.started_at,
        status.finished_at,
        status.exit_code,
        status.reason,
        status.message,
        1 if status.released else 0,
        None if status.resources is None else _encode(status.resources).decode(),
        *(_NO_IDENTITY if status.identity is None else astuple(status.identity)),
    )
    try:
        encoded = _encode(row)
        _status_row.decode(encoded)
    except (msgspec.MsgspecError, UnicodeEncodeError, OverflowError, TypeError) as error:
        raise InvalidInputError(f"status of container {container_id}: {_name_column(error)}") from error
    return (*row[1:], crc32(encoded))


def row_is_sound(node: str, row: Row) -> bool:
    """Say whether a row of any of the tables carries the checksum of its content.

    JSON makes the same of an empty BLOB as of an empty text, which are one flipped bit apart: it is looked for.
    """
    try:
        return bool(crc32(_encode((node, *row[:-1]))) == row[-1]) and bytes not in map(type, row)
    except (UnicodeEncodeError, TypeError):
        return False


def find_unsound(node: str, rows: Sequence[Row]) -> list[Row]:
    """Return those of the rows of a table that do not carry the checksum of their content."""
    try:  # a call for each row would double the time
        return [row for row in rows if crc32(_encode((node, *row[:-1]))) != row[-1] or bytes in map(type, row)]
    except (UnicodeEncodeError, TypeError):
        return [row for row in rows if not row_is_sound(node, row)]


def status_can_be_read(row: Row) -> bool:
    """Say whether a sound row of table container_status decodes: another program may have written it."""
    if row[11] is None:
        return True
    try:
        _resources.decode(row[11])
    except _UNREADABLE:
        return False
    return True


def row_state(row: Row) -> tuple[ContainerState, bool]:
    """Return the state that a sound row of table container_status has on disk, and whether it is released."""
    return _state(row[4], row[5], row[6]), bool(row[10])


def state_of(status: Status) -> tuple[ContainerState, bool]:
    """Return the state that the status has on disk, where there is no Unknown flag, and whether it is released."""
    return _state(status.created_at, status.started_at, status.finished_at), status.released


def _state(created_at: int, started_at: int, finished_at: int) -> ContainerState:
    if finished_at:
        return ContainerState.EXITED
    if started_at:
        return ContainerState.RUNNING
    return ContainerState.CREATED if created_at else ContainerState.UNKNOWN


def row_to_status(row: Row) -> Status:
    """Return the Status in a sound row of table container_status; `unknown` is False in it.

    Raises StoreDamagedError if the row's JSON does not decode.
    """
    try:
        return Status(
            pid=row[3],
            created_at=row[4],
            started_at=row[5],
            finished_at=row[6],
            exit_code=row[7],
            reason=row[8],
            message=row[9],
            released=bool(row[10]),
            resources=None if row[11] is None else _resources.decode(row[11]),
            identity=None
            if row[12] is None
            else ProcessIdentity(
                pid=row[12], start_ticks=row[13], boot_id=row[14], pidfd_inode=row[15], pid_namespace=row[16]
            ),
        )
    except _UNREADABLE as error:
        raise StoreDamagedError(f"container {row[0]}: its status does not decode: {error}") from error


def require_readable_status(node: str, row: Row) -> None:
    """Raise StoreDamagedError if a row of table container_status is not sound, or does not decode."""
    _require_sound(node, "container_status", row)
    row_to_status(row)


def metadata_to_row(node: str, metadata: Metadata) -> Row:
    """Return the row of table container. Raises InvalidInputError if it cannot be written."""
    config = metadata.config
    return _checksummed(
        node,
        (
            metadata.id,
            metadata.sandbox_id,
            metadata.name,
            config.metadata.attempt,
            metadata.root_dir,
            metadata.log_path,
            metadata.stop_signal,
            _to_text(metadata.id, config.labels),
            _to_text(metadata.id, config),
            _to_text(metadata.id, metadata.image_manifest),
        ),
    )


def row_to_metadata(node: str, row: Row) -> Metadata:
    """Return the Metadata in a row of table container. Raises StoreDamagedError if it is damaged."""
    _require_sound(node, "container", row)
    try:
        return Metadata(
            id=row[0],
            sandbox_id=row[1],
            name=row[2],
            root_dir=row[4],
            log_path=row[5],
            stop_signal=row[6],
            config=msgspec.json.decode(row[8], type=ContainerConfig),
            image_manifest=msgspec.json.decode(row[9], type=ImageManifest),
        )
    except _UNREADABLE as error:
        raise StoreDamagedError(f"container {row[0]}: its metadata does not decode: {error}") from error


def sandbox_to_row(node: str, metadata: SandboxMetadata) -> Row:
    """Return the row of table sandbox. Raises InvalidInputError if it cannot be written."""
    return _checksummed(
        node,
        (
            metadata.id,
            metadata.name,
            metadata.created_at,
            metadata.root_dir,
            _to_text(metadata.id, metadata.config),
        ),
    )


def row_to_sandbox(node: str, row: Row) -> SandboxMetadata:
    """Return the SandboxMetadata in a row of table sandbox. Raises StoreDamagedError if it is damaged."""
    _require_sound(node, "sandbox", row)
    try:
        return SandboxMetadata(
            id=require_id(row[0]),  # no other could have been written here, and it names a directory
            name=row[1],
            created_at=row[2],
            root_dir=row[3],
            config=msgspec.json.decode(row[4], type=PodSandboxConfig),
        )
    except (*_UNREADABLE, InvalidInputError) as error:
        raise StoreDamagedError(f"sandbox {row[0]}: its metadata does not decode: {error}") from error


def _checksummed(node: str, row: Row) -> Row:
    try:
        return (*row, crc32(_encode((node, *row))))
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{row[0]}: {error.object!r} cannot be written as UTF-8") from error


def _to_text(record_id: str, value: object) -> str:
    try:
        return _encode(value).decode()
    except (UnicodeEncodeError, OverflowError, TypeError) as error:
        raise InvalidInputError(f"{record_id}: its config cannot be written as JSON: {error}") from error


def _require_sound(node: str, table: str, row: Row) -> None:
    if not row_is_sound(node, row):
        raise StoreDamagedError(
            f"{table} {row[0]}: the row does not match its checksum; restore it from a backup or delete it"
        )


def _name_column(error: Exception) -> str:
    """Turn msgspec's `$[7]` into the column's name."""
    text = str(error)
    head, found, tail = text.partition("`$[")
    if not found:
        return text
    return f"{head}`{('node', *STATUS_COLUMNS)[int(tail.partition(']')[0])]}`"
