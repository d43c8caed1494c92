"""`limpet inspect`: details of containers and sandboxes."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import click
import msgspec

from limpet.engine.cli.documents import sandbox_status_document, status_document, verification_document
from limpet.engine.cli.lookup import find_id
from limpet.engine.cli.options import Place, complete_id, output_option, place_option
from limpet.engine.cli.output import age, paint, print_json, print_lines, rfc3339
from limpet.engine.inspection.snapshot import SandboxView, Snapshot, View
from limpet.engine.lifecycle.cri_status import to_cri_sandbox_status, to_cri_status
from limpet.engine.state.homes import bring_home, bring_sandbox_home, log_directory
from limpet.recovery.evidence import Observation
from limpet.recovery.sandbox_rules import UNREMARKABLE
from limpet.schema.errors import StoreDamagedError, escape
from limpet.schema.metadata import Metadata
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
        return _make_sandbox_document(snapshot, snapshot.view_sandbox(key))
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


def _make_sandbox_document(snapshot: Snapshot, view: SandboxView) -> dict[str, Any]:
    metadata, status = bring_sandbox_home(view.metadata, snapshot.path), view.status
    told = None if status is None else to_json(to_cri_sandbox_status(metadata, status), camel_case=True)
    return {
        "kind": "sandbox",
        "id": metadata.id,
        "metadata": {**msgspec.to_builtins(metadata), "created_at": rfc3339(metadata.created_at)},
        "status": None if status is None else sandbox_status_document(status),
        "checkpoint": None if view.checkpoint is None else sandbox_status_document(view.checkpoint),
        "rule": None if view.verdict is None else view.verdict.rule,
        "because": None if view.verdict is None else view.verdict.because,
        "cri_status": None if told is None else msgspec.Raw(told),
        "containers": [each.id for each in snapshot.list(sandbox_id=metadata.id)],
        "damage": view.damage,
    }


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
        return bring_home(snapshot.metadata(view.id), snapshot.path), view.damage
    except StoreDamagedError as error:
        return None, "; ".join(filter(None, (view.damage, str(error))))


def _describe(snapshot: Snapshot, key: str) -> list[str]:
    if key in snapshot.sandbox_ids:
        title, lines = f"Sandbox {key}", _sandbox_lines(snapshot, snapshot.view_sandbox(key))
    else:
        view = snapshot.get(key)
        metadata, damage = _load_metadata(snapshot, view)
        lines = _container_lines(view, metadata, damage)
        title = f"Container {key}"
    shown = [(name, escape(text)) for name, text in lines if text]
    return [paint(title, "bold"), *(f"  {paint(f'{name:10}', 'dim')}  {text}" for name, text in shown), ""]


def _sandbox_lines(snapshot: Snapshot, view: SandboxView) -> Iterator[_Line]:
    metadata, status, disk = bring_sandbox_home(view.metadata, snapshot.path), view.status, view.checkpoint
    named = metadata.config.metadata
    yield "name", metadata.name
    yield "namespace", named.namespace
    yield "uid", named.uid
    yield "attempt", str(named.attempt) if named.attempt else ""
    if status is not None and disk is not None and view.verdict is not None:
        yield "state", status.state.name
        yield "on disk", disk.state.name if disk.state is not status.state else ""
        yield "reason", ": ".join(filter(None, (status.reason, status.message)))
        yield "stopped", _when(disk.stopped_at)
        yield "expires", rfc3339(status.expires_at) or ""
        yield "namespaces", _pairs(status.namespaces)
        yield "addresses", ", ".join(status.addresses)
        yield "extra", msgspec.json.encode(status.extra).decode() if status.extra else ""
        if view.verdict.rule not in UNREMARKABLE:
            yield "recovery", f"{view.verdict.rule}: {view.verdict.because}"
    yield "created", _when(metadata.created_at)
    yield "handler", metadata.runtime_handler
    yield "labels", _pairs(metadata.config.labels)
    yield "logs", log_directory(view.metadata, snapshot.path) if metadata.config.log_directory else ""
    yield "directory", metadata.root_dir
    yield "damage", view.damage
    for each in snapshot.list(sandbox_id=metadata.id):
        yield "container", f"{each.id[:12]}  {each.name}  {each.status.state.name}"


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
