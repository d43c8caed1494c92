"""Records in the form of the JSON documents: states by name, times as RFC 3339, null for values not set yet."""

from typing import Any

import msgspec

from limpet.engine.cli.output import rfc3339
from limpet.engine.inspection.snapshot import View
from limpet.recovery.report import Report
from limpet.schema.status import ContainerState, Status

_TIMES = ("created_at", "started_at", "finished_at")


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


def container_document(view: View) -> dict[str, Any]:
    """Return a container as `ps` shows it."""
    return {
        "id": view.id,
        "name": view.name,
        "sandbox_id": view.sandbox_id,
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
    return {**fields, "at": rfc3339(report.at), "totals": report.totals}


def _with_times(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: rfc3339(value) if name in _TIMES else value for name, value in fields.items()}
