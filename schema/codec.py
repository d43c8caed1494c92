"""Records to rows and back: see `rows` for their columns, and `seal` for their checksums.

A row of another shape, type or range than the tables allow is never written, and one that fails its checksum is
never believed: decoding raises StoreDamagedError.
"""

from collections.abc import Mapping, Sequence
from types import GenericAlias
from typing import Any, TypeVar, get_type_hints
from zlib import crc32

import msgspec
from msgspec.structs import astuple

from limpet.schema.cri import ContainerConfig, PodSandboxConfig
from limpet.schema.deadline import Deadline
from limpet.schema.decoders import Decoder, decode_any, make_decoder
from limpet.schema.errors import InvalidInputError, StoreDamagedError, quote
from limpet.schema.events import OF_SANDBOXES, STATE_CHANGES, Event, EventKind
from limpet.schema.history import KEPT_TRANSITIONS, Transition
from limpet.schema.identity import ProcessIdentity
from limpet.schema.image import ImageManifest
from limpet.schema.item import Item, require_item_name
from limpet.schema.metadata import Metadata, SandboxMetadata, require_id
from limpet.schema.rows import (
    AnyRow,
    ContainerRow,
    DeadlineRow,
    EventRow,
    ItemRow,
    NameRow,
    OpenEvent,
    SandboxRow,
    SandboxStatusRow,
    StatusRow,
)
from limpet.schema.sandbox_status import SandboxState, SandboxStatus
from limpet.schema.seal import is_sealed, seal
from limpet.schema.status import ContainerState, Resources, Status, state_at

_encode = msgspec.json.encode
_UNREADABLE = (msgspec.MsgspecError, RecursionError)
"""What decoding JSON raises: for invalid JSON, for another shape, and for too deep nesting."""
_Row = TypeVar("_Row", bound=AnyRow)

_NO_IDENTITY = (None,) * len(ProcessIdentity.__struct_fields__)
_status_types = tuple(get_type_hints(StatusRow, include_extras=True).values())[:-1]
_status_row = make_decoder(GenericAlias(tuple, (str, *_status_types)))
"""Checks the node's name and a row without its checksum."""
_NEW_STATUS = tuple(zip(Status.__struct_fields__, astuple(Status()), strict=True))
_NEW_SANDBOX_STATUS = tuple(zip(SandboxStatus.__struct_fields__, astuple(SandboxStatus()), strict=True))
_sandbox_status = make_decoder(SandboxStatus)
_status = make_decoder(Status)
_labels = make_decoder(dict[str, str])
_resources = make_decoder(Resources)
_unapplied = make_decoder(dict[str, str])
_extra = make_decoder(dict[str, Any])
_sandbox_status_types = tuple(get_type_hints(SandboxStatusRow, include_extras=True).values())[:-1]
_sandbox_status_row = make_decoder(GenericAlias(tuple, (str, *_sandbox_status_types)))
_namespaces = make_decoder(dict[str, str])
_addresses = make_decoder(list[str])
_container_config = make_decoder(ContainerConfig)
_image_manifest = make_decoder(ImageManifest)
_pod_sandbox_config = make_decoder(PodSandboxConfig)

MAX_VALUE_BYTES = 64 << 10
"""How long `extra`, or an item's value, may be as JSON."""


def status_to_row(node: str, container_id: str, seq: int, transitions: int, status: Status) -> StatusRow:
    """Return the row of table container_status. `status.unknown` has no column: it is never written.

    Raises InvalidInputError if a field has the wrong type, is out of range or cannot be written as UTF-8.
    """
    try:
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
            _unapplied_text(status),
            status.stop_requested_at,
            status.stop_deadline,
            status.expires_at,
            1 if status.paused else 0,
            extra_to_text(f"container {container_id}", status.extra) if status.extra != {} else None,
        )
        encoded = _encode(row)
        _status_row.decode(encoded)
    except (msgspec.MsgspecError, UnicodeEncodeError, OverflowError, TypeError) as error:
        reason = _name_column(error, StatusRow._fields)
        raise InvalidInputError(f"status of container {container_id}: {reason}") from error
    return StatusRow._make((*row[1:], crc32(encoded)))


def extra_to_text(owner: str, extra: object) -> str:
    """Return a JSON object of a runtime's own as it is stored. Raises InvalidInputError for anything else."""
    text = value_to_text(f"{owner}: extra", extra)
    try:
        _extra.decode(text)
    except _UNREADABLE as error:
        raise InvalidInputError(f"{owner}: extra must be a JSON object: {error}") from error
    return text


def value_to_text(what: str, value: object) -> str:
    """Return a JSON value of a runtime's own as it is stored.

    Raises InvalidInputError for what JSON cannot hold, or where it takes more than MAX_VALUE_BYTES.
    """
    try:
        encoded = _encode(value)
        if decode_any(encoded) != value:
            raise InvalidInputError(
                f"{what}: it would not be read back as it is; give str, int, float, bool, list, dict"
            )
        text = encoded.decode()
    except (msgspec.MsgspecError, OverflowError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"{what}: it cannot be written as JSON: {error}") from error
    if len(encoded) > MAX_VALUE_BYTES:
        raise InvalidInputError(f"{what}: {len(encoded)} bytes as JSON, and at most {MAX_VALUE_BYTES} are kept")
    return text


def _unapplied_text(status: Status) -> str | None:
    if status.unapplied == {}:
        return None
    text = _encode(status.unapplied)
    _unapplied.decode(text)  # what is written can be read
    return text.decode()


def row_is_sound(node: str, row: AnyRow) -> bool:
    """Say whether a row of any of the tables carries the checksum of its content."""
    return is_sealed((node, *row[:-1]), row[-1])


def find_unsound(node: str, rows: Sequence[_Row]) -> list[_Row]:
    """Return those of the rows of a table that do not carry the checksum of their content."""
    try:  # a call for each row would double the time
        return [row for row in rows if crc32(_encode((node, *row[:-1]))) != row[-1] or bytes in map(type, row)]
    except (UnicodeEncodeError, TypeError):
        return [row for row in rows if not row_is_sound(node, row)]


def are_sound(node: str, rows: Sequence[_Row]) -> list[bool]:
    """Say of each of the rows of a table whether it carries the checksum of its content."""
    unsound = set(map(id, find_unsound(node, rows)))
    return [id(row) not in unsound for row in rows]


def status_can_be_read(row: StatusRow) -> bool:
    """Say whether a sound row of table container_status decodes: another program may have written it."""
    if row.resources is None and row.unapplied is None and row.extra is None:
        return True
    try:
        row_to_status(row)
    except StoreDamagedError:
        return False
    return True


def row_state(row: StatusRow) -> tuple[ContainerState, bool]:
    """Return the state that a sound row of table container_status has on disk, and whether it is released."""
    return state_at(row.created_at, row.started_at, row.finished_at), bool(row.released)


def state_of(status: Status) -> tuple[ContainerState, bool]:
    """Return the state that the status has on disk, where there is no Unknown flag, and whether it is released."""
    return state_at(status.created_at, status.started_at, status.finished_at), status.released


def row_to_status(row: StatusRow) -> Status:
    """Return the Status in a sound row of table container_status; `unknown` is False in it.

    Raises StoreDamagedError if the row's JSON does not decode.
    """
    try:
        return Status(
            pid=row.pid,
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
            exit_code=row.exit_code,
            reason=row.reason,
            message=row.message,
            released=bool(row.released),
            resources=None if row.resources is None else _resources.decode(row.resources),
            identity=read_identity(row),
            unapplied={} if row.unapplied is None else _unapplied.decode(row.unapplied),
            stop_requested_at=row.stop_requested_at,
            stop_deadline=row.stop_deadline,
            expires_at=row.expires_at,
            paused=bool(row.paused),
            extra={} if row.extra is None else _extra.decode(row.extra),
        )
    except _UNREADABLE as error:
        raise StoreDamagedError(f"container {row.id}: its status does not decode: {error}") from error


def read_identity(row: StatusRow) -> ProcessIdentity | None:
    """Return the process that a row of table container_status names, None if it names none."""
    if row.process_pid is None:
        return None
    return ProcessIdentity(
        pid=row.process_pid,
        start_ticks=row.start_ticks or 0,
        boot_id=row.boot_id or "",
        pidfd_inode=row.pidfd_inode or 0,
        pid_namespace=row.pid_namespace or 0,
    )


def require_readable_status(node: str, row: StatusRow) -> None:
    """Raise StoreDamagedError if a row of table container_status is not sound, or does not decode."""
    _require_sound(node, "container_status", row)
    row_to_status(row)


def status_to_text(status: Status | SandboxStatus, *, with_extra: bool) -> str:
    """Return the status as JSON, as an event has it: what differs from a new one. A doubt is not written."""
    new = _NEW_STATUS if isinstance(status, Status) else _NEW_SANDBOX_STATUS
    found = {name: value for (name, default), value in zip(new, astuple(status), strict=True) if value != default}
    found.pop("unknown", None)
    if not with_extra:
        found.pop("extra", None)
    return _encode(found).decode()


def sandbox_name_row(metadata: SandboxMetadata) -> NameRow:
    """Return what events of a sandbox are filtered by."""
    return NameRow(metadata.id, metadata.id, metadata.name, _to_text(metadata.id, metadata.config.labels))


def seal_event(node: str, revision: int, last_revision: int, event: OpenEvent) -> EventRow:
    """Return the row of table event. Its texts are of rows that were written, or are about to be."""
    at, kind, names, *rest = event
    values = (revision, last_revision, at, kind, *names[:4], *rest)
    return EventRow._make((*values, seal((node, *values))))


def row_to_event(node: str, row: EventRow) -> Event:
    """Return the Event in a row of table event. Raises StoreDamagedError if it is damaged."""
    if not row_is_sound(node, row):
        damage = "does not match its checksum"
        raise StoreDamagedError(f"event {row.revision} of {quote(row.id)} {damage}: {_DAMAGED_EVENT}")
    try:
        kind = EventKind(row.kind)
        is_sandbox = kind in OF_SANDBOXES
        states = SandboxState if is_sandbox else ContainerState
        return Event(
            revision=row.revision,
            commit=row.last_revision,
            at=row.at,
            kind=kind,
            id=row.id,
            sandbox_id=row.sandbox_id,
            name=row.name,
            labels=read_labels(row.labels),
            seq=row.seq,
            number=row.number,
            state=None if row.state is None else states(row.state),
            exit_code=row.exit_code,
            reason=row.reason,
            message=row.message,
            status=None if is_sandbox or row.body is None else _status.decode(row.body),
            sandbox_status=None if not is_sandbox or row.body is None else _sandbox_status.decode(row.body),
        )
    except (*_UNREADABLE, ValueError) as error:
        raise StoreDamagedError(
            f"event {row.revision} of {quote(row.id)} does not decode ({error}): {_DAMAGED_EVENT}"
        ) from error


_DAMAGED_EVENT = "list anew to see what is true now, and watch from the list's revision"


def rows_to_history(node: str, container_id: str, rows: Sequence[EventRow]) -> list[Transition]:
    """Return the state changes among a container's events, oldest first, since it was last added, the newest few.

    Raises StoreDamagedError if a row among them is damaged.
    """
    found: list[Transition] = []
    for row in rows:
        try:
            event = row_to_event(node, row)
        except StoreDamagedError as error:
            raise StoreDamagedError(f"container {container_id}: its history is damaged: {error}") from error
        if event.kind is EventKind.DELETED:
            found.clear()
        elif event.kind in STATE_CHANGES:
            found.append(
                Transition(
                    number=event.number,
                    seq=event.seq,
                    at=event.at,
                    state=event.state if isinstance(event.state, ContainerState) else ContainerState.UNKNOWN,
                    exit_code=event.exit_code,
                    reason=event.reason,
                    message=event.message,
                )
            )
    return found[-KEPT_TRANSITIONS:]


def read_labels(labels_json: str) -> dict[str, str]:
    """Return labels as they are stored; none where they are damaged, which is for a check to tell."""
    try:
        return _labels.decode(labels_json)
    except _UNREADABLE:
        return {}


def label_text(key: str, value: str) -> str:
    """Return a label as it is in the text of labels that are stored; "" for what cannot be stored."""
    try:
        return msgspec.json.encode({key: value}).decode()[1:-1]
    except (UnicodeEncodeError, TypeError):
        return ""


def metadata_to_row(node: str, metadata: Metadata) -> ContainerRow:
    """Return the row of table container. Raises InvalidInputError if it cannot be written."""
    config = metadata.config
    row = ContainerRow(
        id=metadata.id,
        sandbox_id=metadata.sandbox_id,
        name=metadata.name,
        attempt=config.metadata.attempt,
        root_dir=metadata.root_dir,
        log_path=metadata.log_path,
        stop_signal=metadata.stop_signal,
        labels=_to_text(metadata.id, config.labels),
        config=_to_text(metadata.id, config),
        image_manifest=_to_text(metadata.id, metadata.image_manifest),
        starter=metadata.starter,
        restart_policy=metadata.restart_policy,
        restart_count=metadata.restart_count,
        restart_delay=metadata.restart_delay,
        checksum=0,
    )
    return row._replace(checksum=_seal(node, row))


def row_to_metadata(node: str, row: ContainerRow) -> Metadata:
    """Return the Metadata in a row of table container. Raises StoreDamagedError if it is damaged."""
    _require_sound(node, "container", row)
    try:
        return Metadata(
            id=row.id,
            sandbox_id=row.sandbox_id,
            name=row.name,
            root_dir=row.root_dir,
            log_path=row.log_path,
            stop_signal=row.stop_signal,
            starter=row.starter,
            restart_policy=row.restart_policy,
            restart_count=row.restart_count,
            restart_delay=row.restart_delay,
            config=_container_config.decode(row.config),
            image_manifest=_image_manifest.decode(row.image_manifest),
        )
    except _UNREADABLE as error:
        raise StoreDamagedError(f"container {row.id}: its metadata does not decode: {error}") from error


def sandbox_to_row(node: str, metadata: SandboxMetadata) -> SandboxRow:
    """Return the row of table sandbox. Raises InvalidInputError if it cannot be written."""
    row = SandboxRow(
        id=metadata.id,
        name=metadata.name,
        created_at=metadata.created_at,
        root_dir=metadata.root_dir,
        config=_to_text(metadata.id, metadata.config),
        runtime_handler=metadata.runtime_handler,
        checksum=0,
    )
    return row._replace(checksum=_seal(node, row))


def row_to_sandbox(node: str, row: SandboxRow) -> SandboxMetadata:
    """Return the SandboxMetadata in a row of table sandbox. Raises StoreDamagedError if it is damaged."""
    _require_sound(node, "sandbox", row)
    try:
        return SandboxMetadata(
            id=require_id(row.id),  # no other could have been written here, and it names a directory
            name=row.name,
            created_at=row.created_at,
            root_dir=row.root_dir,
            runtime_handler=row.runtime_handler,
            config=_pod_sandbox_config.decode(row.config),
        )
    except (*_UNREADABLE, InvalidInputError) as error:
        raise StoreDamagedError(f"sandbox {row.id}: its metadata does not decode: {error}") from error


def sandbox_status_to_row(node: str, sandbox_id: str, seq: int, status: SandboxStatus) -> SandboxStatusRow:
    """Return the row of table sandbox_status. Raises InvalidInputError if it cannot be written."""
    try:
        row = (
            node,
            sandbox_id,
            seq,
            status.stopped_at,
            status.reason,
            status.message,
            status.boot_id,
            _json_or_none("namespaces", _namespaces, dict(status.namespaces)),
            _json_or_none("addresses", _addresses, list(status.addresses)),
            extra_to_text(f"sandbox {sandbox_id}", status.extra) if status.extra != {} else None,
            status.expires_at,
        )
        encoded = _encode(row)
        _sandbox_status_row.decode(encoded)
    except (msgspec.MsgspecError, OverflowError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InvalidInputError):
            raise
        reason = _name_column(error, SandboxStatusRow._fields)
        raise InvalidInputError(f"status of sandbox {quote(sandbox_id)}: {reason}") from error
    return SandboxStatusRow._make((*row[1:], crc32(encoded)))


def row_to_sandbox_status(node: str, row: SandboxStatusRow) -> SandboxStatus:
    """Return the SandboxStatus in a row of table sandbox_status. Raises StoreDamagedError if it is damaged."""
    _require_sound(node, "sandbox_status", row)
    try:
        return SandboxStatus(
            stopped_at=row.stopped_at,
            reason=row.reason,
            message=row.message,
            boot_id=row.boot_id,
            namespaces={} if row.namespaces is None else _namespaces.decode(row.namespaces),
            addresses=() if row.addresses is None else tuple(_addresses.decode(row.addresses)),
            extra={} if row.extra is None else _extra.decode(row.extra),
            expires_at=row.expires_at,
        )
    except _UNREADABLE as error:
        raise StoreDamagedError(f"sandbox {row.id}: its status does not decode: {error}") from error


def item_to_row(node: str, item: Item) -> ItemRow:
    """Return the row of table item. Raises InvalidInputError if it cannot be written."""
    require_item_name("kind", item.kind)
    require_item_name("key", item.key)
    text = value_to_text(f"item {item.kind} {quote(item.key)}", item.value)
    values = (item.kind, item.key, item.version, item.updated_at, text)
    return ItemRow(*values, seal((node, *values)))


def row_to_item(node: str, row: ItemRow) -> Item:
    """Return the Item in a row of table item. Raises StoreDamagedError if it is damaged."""
    if not row_is_sound(node, row):
        raise StoreDamagedError(
            f"item {row.kind} {quote(str(row.key))}: it does not match its checksum; delete it, or restore a backup"
        )
    try:
        value = decode_any(row.value)
    except _UNREADABLE as error:
        raise StoreDamagedError(f"item {row.kind} {quote(row.key)}: its value does not decode: {error}") from error
    return Item(kind=row.kind, key=row.key, version=row.version, updated_at=row.updated_at, value=value)


def deadline_to_row(node: str, kind: str, key: str, deadline: Deadline, boot_id: str) -> DeadlineRow:
    """Return the row of table deadline."""
    values = (kind, key, deadline.at, boot_id, deadline.boot_at)
    return DeadlineRow(*values, seal((node, *values)))


def row_to_deadline(node: str, row: DeadlineRow) -> Deadline:
    """Return the Deadline in a row of table deadline. Raises StoreDamagedError if it is damaged."""
    if not row_is_sound(node, row):
        raise StoreDamagedError(
            f"{row.kind} deadline of {quote(str(row.id))}: it does not match its checksum; the wall clock alone tells"
            " when it is reached"
        )
    return Deadline(row.at, row.boot_at)


def _json_or_none(name: str, decoder: Decoder[Any], value: Mapping[str, str] | Sequence[str]) -> str | None:
    if not value:
        return None
    text = _encode(value)
    try:
        decoder.decode(text)  # what is written can be read
    except msgspec.ValidationError as error:
        raise InvalidInputError(f"{name}: {error}") from error
    return text.decode()


def _seal(node: str, row: ContainerRow | SandboxRow) -> int:
    """Return the checksum of a row whose last column is not filled in yet."""
    try:
        return seal((node, *row[:-1]))
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{row.id}: {error.object!r} cannot be written as UTF-8") from error
    except TypeError as error:  # a text of a class of its own, say
        raise InvalidInputError(f"{row.id}: {error}") from error


def _to_text(record_id: str, value: object) -> str:
    try:
        return _encode(value).decode()
    except (UnicodeEncodeError, OverflowError, TypeError) as error:
        raise InvalidInputError(f"{record_id}: its config cannot be written as JSON: {error}") from error


def _require_sound(node: str, table: str, row: AnyRow) -> None:
    if not row_is_sound(node, row):
        raise StoreDamagedError(
            f"{table} {row[0]}: the row does not match its checksum; restore it from a backup or delete it"
        )


def _name_column(error: Exception, columns: Sequence[str]) -> str:
    """Turn msgspec's `$[7]` into the column's name."""
    text = str(error)
    head, found, tail = text.partition("`$[")
    if not found:
        return text
    return f"{head}`{('node', *columns)[int(tail.partition(']')[0])]}`"
