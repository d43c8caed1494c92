"""`limpet ps`: containers and their actual state."""

import shlex
import time
from collections.abc import Mapping

import click

from limpet.engine.cli.documents import command_of, container_document
from limpet.engine.cli.options import Place, complete_id, no_trunc_option, output_option, parse_labels, place_option
from limpet.engine.cli.output import (
    Cell,
    Column,
    Ids,
    age,
    cut,
    duration,
    print_json,
    print_lines,
    print_table,
    state_cell,
)
from limpet.engine.inspection.snapshot import Snapshot, View
from limpet.schema.errors import NotFoundError, StoreDamagedError, escape
from limpet.schema.metadata import Metadata
from limpet.schema.status import ContainerState, Reason

_COLUMNS = (
    Column("CONTAINER"),
    Column("NAME", keeps_end=True),
    Column("ATTEMPT", optional=True),
    Column("SANDBOX"),
    Column("STATE"),
    Column("AGE"),
    Column("STATUS", flexible=True),
    Column("IMAGE", optional=True),
    Column("COMMAND", optional=True),
)
_LONGEST_COMMAND = 60
_ENDS: Mapping[str, str] = {
    Reason.COMPLETED: "exit {}",
    Reason.ERROR: "exit {}",
    Reason.UNKNOWN: "exit code unknown",
    Reason.REBOOTED: "machine rebooted, exit code unknown",
}
"""How a container ended. Other reasons are shown with the exit code."""


def _parse_state(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> ContainerState | None:
    return None if value is None else ContainerState[value.upper()]


@click.command("ps")
@click.argument("id", metavar="[ID]", default="", shell_complete=complete_id)
@click.option("-a", "--all", "ended", is_flag=True, help="Include all exited containers.")
@click.option(
    "--state",
    type=click.Choice([state.name.lower() for state in ContainerState], case_sensitive=False),
    callback=_parse_state,
    help="Only containers in this state.",
)
@click.option("--name", default="", help="Only containers with this name.")
@click.option(
    "--label",
    "labels",
    metavar="KEY=VALUE",
    multiple=True,
    callback=parse_labels,
    help="Only containers with this label. Repeat it to require several.",
)
@click.option(
    "--sandbox", "sandbox_id", metavar="ID", default="", help="Only containers of this sandbox (id, name, or prefix)."
)
@click.option("-q", "--quiet", is_flag=True, help="Print only the full ids.")
@no_trunc_option
@output_option
@place_option
def command(
    place: Place,
    id: str,
    *,
    ended: bool,
    state: ContainerState | None,
    name: str,
    labels: dict[str, str],
    sandbox_id: str,
    quiet: bool,
    no_trunc: bool,
    as_json: bool,
) -> None:
    """List containers that have not exited, or wait for their restart; with ID, those whose id or name that is.

    With the beginning of an id, those whose id begins with it.

    A container is shown as RUNNING only if its process is alive now. If its process is gone, it is shown as UNKNOWN
    until an engine has recovered it. ATTEMPT, IMAGE and COMMAND are shown where the terminal is wide enough.
    """
    ended = ended or state is ContainerState.EXITED
    with Snapshot.open(place.state_dir, node=place.node) as snapshot:
        found = snapshot.list(name=name, sandbox_id=sandbox_id, state=state, labels=labels, ended=ended)
        views = [view for view in found if view.id.startswith(id) or view.name == id]
        if quiet:
            print_lines(view.id for view in views)
            return
        shown = [(view, _load_config(snapshot, view)) for view in views]
        names = {view.name for view in views}
        ids = Ids(snapshot.ids, names, no_trunc=no_trunc)
        sandboxes = Ids({*snapshot.sandbox_ids, *(view.sandbox_id for view in views)}, no_trunc=no_trunc)
    if as_json:
        print_json(containers=[container_document(view, metadata) for view, metadata in shown])
        return
    rows = [_make_row(view, metadata, ids, sandboxes, no_trunc=no_trunc) for view, metadata in shown]
    print_table(_COLUMNS, rows, no_trunc=no_trunc)


def _load_config(snapshot: Snapshot, view: View) -> Metadata | None:
    try:
        return snapshot.metadata(view.id)
    except (NotFoundError, StoreDamagedError):  # removed just now; or check tells of it
        return None


def _make_row(view: View, metadata: Metadata | None, ids: Ids, sandboxes: Ids, *, no_trunc: bool) -> list[str | Cell]:
    image = str(metadata.image_manifest.name) if metadata else "-"
    line = shlex.join(command_of(metadata)) if metadata else "-"
    return [
        ids.cell(view.id),
        view.name or "-",
        str(metadata.config.metadata.attempt) if metadata else "-",
        sandboxes.cell(view.sandbox_id),
        state_cell(view.status.state.name),
        age(view.status.created_at),
        describe(view),
        image,
        line if no_trunc else cut(escape(line), _LONGEST_COMMAND),
    ]


def describe(view: View) -> str | Cell:
    """Return a short description of a container's status."""
    status = view.status
    if status.unknown:
        return Cell(status.message, "yellow")
    if status.state is ContainerState.EXITED:
        released = ", released" if status.released else ""
        words = _ENDS.get(status.reason, f"exit {status.exit_code} ({status.reason})").format(status.exit_code)
        waits = f"; {_tell_restart(view.restart_at)}" if view.restart_at else ""
        return Cell(f"{words}, {age(status.finished_at)} ago{released}{waits}", "red" if status.exit_code else "")
    if status.state is ContainerState.RUNNING:
        told = f"up {age(status.started_at)}, pid {status.pid}" + (f"; {status.message}" if status.message else "")
        doing = "stopping" if status.stop_requested_at else "paused" if status.paused else ""
        return f"{doing}, {told}" if doing else told
    if status.state is ContainerState.CREATED:
        return "released" if status.released else "not started"
    return "never created"


def _tell_restart(at: int) -> str:
    left = -((time.time_ns() - at) // 10**9)
    return f"restarting in {duration(left)}" if left > 0 else "restart is due"
