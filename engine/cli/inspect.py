"""`limpet inspect`: details of containers and sandboxes."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import click
import msgspec

from limpet.engine.cli.documents import status_document, verification_document
from limpet.engine.cli.lookup import find_id
from limpet.engine.cli.options import Place, complete_id, output_option, place_option
from limpet.engine.cli.output import age, paint, print_json, print_lines, printable, rfc3339
from limpet.engine.inspection.snapshot import Snapshot, View
from limpet.engine.lifecycle.cri_status import to_cri_status
from limpet.recovery.evidence import Observation
from limpet.schema.errors import StoreDamagedError
from limpet.schema.metadata import Metadata, SandboxMetadata
from limpet.schema.protobuf_json import to_json
from limpet.schema.status import ContainerState, Resources, Status

_Line = tuple[str, str]


@click.command("inspect")
@click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=complete_id)
@output_option
@place_option
def command(place: Place, ids: tuple[str, ...], *, as_json: bool) -> None:
    """Show details of the containers or sandboxes with these ids, names, or unique beginnings of ids.

    For a container: its image and command, its status on disk, and its actual state, found by looking at its process
    and its bundle. -o json adds the whole config and the status as the CRI defines it.
    """
    with Snapshot.open(place.state_dir, node=place.node) as snapshot:
        keys = [find_id(snapshot, text) for text in ids]
        if as_json:
            print_json(inspected=[_make_document(snapshot, key) for key in keys])
        else:
            print_lines("\n".join(_describe(snapshot, key)) for key in keys)


def _make_document(snapshot: Snapshot, key: str) -> dict[str, Any]:
    if key in snapshot.sandbox_ids:
        sandbox = snapshot.sandbox(key)
        metadata = {**msgspec.to_builtins(sandbox), "created_at": rfc3339(sandbox.created_at)}
        containers = [view.id for view in snapshot.list(sandbox_id=key)]
        return {"kind": "sandbox", "id": key, "metadata": metadata, "containers": containers}
    view = snapshot.get(key)
    container, damage = _load_metadata(snapshot, view)
    document: dict[str, Any] = {
        "kind": "container",
        "id": key,
        "metadata": container,
        "status": _full_status(view.status),
        "checkpoint": _full_status(view.checkpoint),
        "verification": verification_document(view),
        "cri_status": None,
        "damage": damage,
    }
    if container is not None:
        document["cri_status"] = msgspec.Raw(to_json(to_cri_status(container, view.status), camel_case=True))
    return document


def _full_status(status: Status) -> dict[str, Any]:
    return {
        **status_document(status),
        "resources": status.resources,
        "unapplied": status.unapplied,
        "identity": status.identity,
        "stop_requested_at": rfc3339(status.stop_requested_at),
        "stop_deadline": rfc3339(status.stop_deadline),
    }


def _load_metadata(snapshot: Snapshot, view: View) -> tuple[Metadata | None, str]:
    """Return a container's metadata (None if damaged), and the damage found in its metadata and status."""
    try:
        return snapshot.metadata(view.id), view.damage
    except StoreDamagedError as error:
        return None, "; ".join(filter(None, (view.damage, str(error))))


def _describe(snapshot: Snapshot, key: str) -> list[str]:
    if key in snapshot.sandbox_ids:
        title, lines = f"Sandbox {key}", _sandbox_lines(snapshot, snapshot.sandbox(key))
    else:
        view = snapshot.get(key)
        metadata, damage = _load_metadata(snapshot, view)
        lines = _container_lines(view, metadata, damage)
        title = f"Container {key}"
    shown = [(name, printable(text)) for name, text in lines if text]
    return [paint(title, "bold"), *(f"  {paint(f'{name:10}', 'dim')}  {text}" for name, text in shown), ""]


def _sandbox_lines(snapshot: Snapshot, metadata: SandboxMetadata) -> Iterator[_Line]:
    yield "name", metadata.name
    yield "created", _when(metadata.created_at)
    yield "labels", _pairs(metadata.config.labels)
    yield "logs", metadata.config.log_directory
    yield "directory", metadata.root_dir
    for view in snapshot.list(sandbox_id=metadata.id):
        yield "container", f"{view.id[:12]}  {view.name}  {view.status.state.name}"


def _container_lines(view: View, metadata: Metadata | None, damage: str) -> Iterator[_Line]:
    status, disk = view.status, view.checkpoint
    yield "name", view.name
    yield "sandbox", view.sandbox_id
    if metadata is not None:
        yield "image", f"{metadata.image_manifest.name}{' (built in)' if metadata.image_manifest.is_builtin else ''}"
        yield "command", shlex.join((*metadata.config.command, *metadata.config.args))
        yield "labels", _pairs(view.labels)
        yield "log", metadata.log_path
        yield "bundle", metadata.root_dir
    yield "state", status.state.name + (", released" if status.released else "")
    if disk.state is not status.state:
        yield "on disk", disk.state.name
    if status.state is ContainerState.EXITED:
        yield "exit code", str(status.exit_code)
    yield "reason", status.message if status.unknown else ": ".join(filter(None, (status.reason, status.message)))
    yield "created", _when(disk.created_at)
    yield "started", _when(disk.started_at)
    yield "finished", _when(disk.finished_at)
    if disk.identity is not None:
        yield (
            "process",
            f"pid {disk.identity.pid}, pidfd inode {disk.identity.pidfd_inode}, boot {disk.identity.boot_id}",
        )
    yield "resources", _limits(disk.resources)
    for name, why in disk.unapplied.items():
        yield "not done", f"{name}: {why}"
    if disk.stop_requested_at:
        yield "stop", f"asked for {_when(disk.stop_requested_at)}, SIGKILL due {rfc3339(disk.stop_deadline)}"
    if view.observation is not None and view.verdict is not None:
        yield "seen now", _evidence(view.observation)
        yield "recovery", f"{view.verdict.rule}: {view.verdict.because}"
    yield "damage", damage


def _evidence(observation: Observation) -> str:
    return f"boot {observation.boot.value}, process {observation.process.value}, bundle {observation.bundle.value}"


def _when(nanoseconds: int) -> str:
    return f"{rfc3339(nanoseconds)} ({age(nanoseconds)} ago)" if nanoseconds else ""


def _pairs(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))


def _limits(resources: Resources | None) -> str:
    if resources is None:
        return ""
    unapplied = [f"{name} not enforced ({reason})" for name, reason in resources.unapplied.items()]
    return ", ".join([*(f"{name} enforced" for name in resources.applied), *unapplied])
