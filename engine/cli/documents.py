"""Records in the form of the JSON documents: states by name, times as RFC 3339, null for values not set yet."""

from collections.abc import Collection
from typing import Any

import msgspec

from limpet.engine.cli.output import rfc3339
from limpet.engine.control.requests import Done
from limpet.engine.inspection.snapshot import View
from limpet.recovery.report import Report
from limpet.schema.command_line import choose_args
from limpet.schema.errors import InvalidInputError
from limpet.schema.metadata import Metadata
from limpet.schema.sandbox_status import SandboxStatus
from limpet.schema.status import ContainerState, Status

_TIMES = ("created_at", "started_at", "finished_at")
_SANDBOX_TIMES = ("stopped_at", "expires_at")


def status_document(status: Status) -> dict[str, Any]:
    """Return a status as `ps` and `inspect` show it."""
    state = status.state
    return {
        "state": state.name,
        "pid": status.pid if state is ContainerState.RUNNING else None,
        **{name: rfc3339(getattr(status, name)) for name in _TIMES},
        "exit_code": status.exit_code if state is ContainerState.EXITED else None,
        "reason": status.reason,
        "message": status.message,
        "released": status.released,
        "paused": status.paused,
        "stop_requested_at": rfc3339(status.stop_requested_at),
        "expires_at": rfc3339(status.expires_at),
    }


def done_document(done: Done) -> dict[str, Any]:
    """Return what became of a container that something was done with."""
    return {"id": done.id, "name": done.name, **status_document(done.status)}


def command_of(metadata: Metadata) -> tuple[str, ...]:
    """Return the command line of a container, by the rule of the CRI; nothing if neither config nor image gives one."""
    try:
        return choose_args(metadata.image_manifest.config, metadata.config)
    except InvalidInputError:
        return ()


def container_document(view: View, metadata: Metadata | None) -> dict[str, Any]:
    """Return a container as `ps` shows it; without what is in its metadata if that is damaged."""
    return {
        "id": view.id,
        "name": view.name,
        "sandbox_id": view.sandbox_id,
        "attempt": metadata.config.metadata.attempt if metadata else None,
        "image": str(metadata.image_manifest.name) if metadata else None,
        "command": command_of(metadata) if metadata else None,
        "labels": view.labels,
        **status_document(view.status),
        "verified": not view.status.unknown,
        "checkpoint": view.checkpoint.state.name,
        "restart_at": rfc3339(view.restart_at),
    }


def verification_document(view: View) -> dict[str, Any]:
    """Return what was observed of a container, and what recovery would conclude."""
    return {
        "verified": not view.status.unknown,
        "observation": _with_times(msgspec.to_builtins(view.observation)) if view.observation else None,
        "rule": view.verdict.rule if view.verdict else None,
        "because": view.verdict.because if view.verdict else "its exit was already recorded",
        "damage": view.damage,
    }


def report_document(report: Report) -> dict[str, Any]:
    """Return a recovery report."""
    fields: dict[str, Any] = msgspec.to_builtins(report)
    for finding in fields["findings"]:
        for name in ("checkpoint", "status", "observation"):
            finding[name] = _with_times(finding[name])
    for sandbox in fields["sandboxes"]:
        for name in ("checkpoint", "status"):
            sandbox[name] = _with_times(sandbox[name], _SANDBOX_TIMES)
    return {**fields, "at": rfc3339(report.at), "totals": report.totals}


def sandbox_status_document(status: SandboxStatus) -> dict[str, Any]:
    """Return a sandbox's status as `inspect` shows it."""
    return {"state": status.state.name, **_with_times(msgspec.to_builtins(status), _SANDBOX_TIMES)}


def _with_times(fields: dict[str, Any], times: Collection[str] = _TIMES) -> dict[str, Any]:
    return {name: rfc3339(value) if name in times else value for name, value in fields.items()}
