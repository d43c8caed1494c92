"""`limpet pods`: sandboxes, and what is in them."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import click
import msgspec

from limpet.engine.cli.options import Place, complete_sandbox, no_trunc_option, output_option, place_option
from limpet.engine.cli.output import Cell, Column, Ids, age, print_json, print_lines, print_table, rfc3339
from limpet.engine.inspection.snapshot import Snapshot
from limpet.schema.errors import StoreDamagedError
from limpet.schema.metadata import SandboxMetadata
from limpet.schema.sandbox_status import SandboxState, SandboxStatus
from limpet.schema.status import ContainerState

_COLUMNS = (
    Column("SANDBOX"),
    Column("NAME", keeps_end=True),
    Column("NAMESPACE", optional=True),
    Column("ATTEMPT", optional=True),
    Column("STATE"),
    Column("CONTAINERS", flexible=True),
    Column("AGE"),
    Column("LABELS", optional=True),
)


class Pod(msgspec.Struct, frozen=True, kw_only=True):
    """A sandbox, and how many of its containers are in which state. What is damaged is None."""

    id: str
    metadata: SandboxMetadata | None
    status: SandboxStatus | None
    states: dict[str, int]


@click.command("pods")
@click.argument("id", metavar="[SANDBOX]", default="", shell_complete=complete_sandbox)
@click.option("-q", "--quiet", is_flag=True, help="Print only the full ids.")
@no_trunc_option
@output_option
@place_option
def command(place: Place, id: str, *, quiet: bool, no_trunc: bool, as_json: bool) -> None:
    """List sandboxes, oldest first; with SANDBOX, only that one (id, name, or prefix)."""
    with Snapshot.open(place.state_dir, node=place.node) as snapshot:
        wanted = [snapshot.resolve_sandbox(id)] if id else list(snapshot.sandbox_ids)
        pods = _find(snapshot, wanted)
        short = Ids(snapshot.sandbox_ids, snapshot.sandbox_names, no_trunc=no_trunc)
    if as_json:
        print_json(sandboxes=[_make_document(pod) for pod in pods])
    elif quiet:
        print_lines(pod.id for pod in pods)
    else:
        print_table(_COLUMNS, list(_make_rows(pods, short)), no_trunc=no_trunc)


def _find(snapshot: Snapshot, wanted: list[str]) -> list[Pod]:
    states: dict[str, Counter[str]] = {key: Counter() for key in wanted}
    for view in snapshot.list():
        if view.sandbox_id in states:
            states[view.sandbox_id][view.status.state.name] += 1
    verdicts = snapshot.judge_sandboxes(snapshot.sandbox_statuses())
    statuses = {key: verdict.status for key, verdict in verdicts.items()}
    pods = [
        Pod(id=key, metadata=_load(snapshot, key), status=statuses.get(key), states=dict(states[key])) for key in wanted
    ]
    return sorted(pods, key=lambda pod: (pod.metadata.created_at if pod.metadata else 0, pod.id))


def _load(snapshot: Snapshot, key: str) -> SandboxMetadata | None:
    try:
        return snapshot.sandbox(key)
    except StoreDamagedError:
        return None


def _make_document(pod: Pod) -> dict[str, Any]:
    document: dict[str, Any] = {"id": pod.id, "containers": {s.name: pod.states.get(s.name, 0) for s in ContainerState}}
    document["state"] = pod.status.state.name if pod.status else None
    document["reason"] = pod.status.reason if pod.status else None
    if pod.metadata is None:
        return {**document, "name": None, "namespace": None, "attempt": None, "created_at": None, "labels": None}
    config = pod.metadata.config
    return {
        **document,
        "name": pod.metadata.name,
        "namespace": config.metadata.namespace,
        "attempt": config.metadata.attempt,
        "created_at": rfc3339(pod.metadata.created_at),
        "labels": config.labels,
    }


def _make_rows(pods: list[Pod], short: Ids) -> Iterator[list[str | Cell]]:
    for pod in pods:
        counts = ", ".join(f"{pod.states[s.name]} {s.name}" for s in ContainerState if s.name in pod.states) or "none"
        if pod.metadata is None:
            yield [short.cell(pod.id), Cell("record damaged", "red"), "-", "-", _state_cell(pod), counts, "-", "-"]
            continue
        config = pod.metadata.config
        labels = ", ".join(f"{key}={value}" for key, value in sorted(config.labels.items()))
        names = config.metadata
        yield [
            short.cell(pod.id),
            names.name,
            names.namespace or "-",
            str(names.attempt),
            _state_cell(pod),
            counts,
            age(pod.metadata.created_at),
            labels or "-",
        ]


def _state_cell(pod: Pod) -> Cell:
    if pod.status is None:
        return Cell("damaged", "red")
    return Cell(pod.status.state.name, "green" if pod.status.state is SandboxState.READY else "yellow")
