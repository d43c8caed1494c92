"""`limpet history`: a container's state changes."""

import time
from typing import Any

import click

from limpet.engine.cli.options import Place, complete_id, output_option, place_option
from limpet.engine.cli.output import (
    Cell,
    Column,
    moment,
    print_json,
    print_table,
    recorded_state,
    rfc3339,
    state_cell,
    terminal_width,
)
from limpet.engine.cli.plot import Plot, plot_option
from limpet.engine.inspection.snapshot import Snapshot
from limpet.schema.errors import InvalidStateError, quote
from limpet.schema.history import Transition
from limpet.schema.status import ContainerState

_COLUMNS = (
    Column("#"),
    Column("WHEN"),
    Column("STATE"),
    Column("EXIT"),
    Column("REASON", flexible=True),
    Column("MESSAGE", flexible=True),
)


@click.command("history")
@click.argument("id", shell_complete=complete_id)
@plot_option("Also draw them as a timeline, an SVG or PNG file.")
@output_option
@place_option
def command(place: Place, id: str, *, plot: Plot | None, as_json: bool) -> None:
    """Show the recorded state changes of container ID, oldest first. The last 64 are kept."""
    with Snapshot.open(place.state_dir, node=place.node) as snapshot:
        view = snapshot.get(id)
        transitions = snapshot.history(view.id)
    if as_json:
        print_json(id=view.id, transitions=[_make_document(one) for one in transitions])
    else:
        width = terminal_width()
        print_table(_COLUMNS, [_make_row(one, width) for one in transitions])
    if plot:
        from limpet.engine.cli.history_timeline import make_history_timeline  # noqa: PLC0415

        if not transitions:
            raise InvalidStateError(f"container {quote(view.id)} has no recorded state changes, so nothing was drawn")
        plot.save(make_history_timeline(view.id, transitions, view.status, time.time_ns()))


def _make_document(transition: Transition) -> dict[str, Any]:
    ended = transition.state is ContainerState.EXITED
    return {
        "number": transition.number,
        "checkpoint": transition.seq,
        "at": rfc3339(transition.at),
        "state": transition.state.name,
        "exit_code": transition.exit_code if ended else None,
        "reason": transition.reason,
        "message": transition.message,
    }


def _make_row(transition: Transition, width: int | None) -> list[str | Cell]:
    ended = transition.state is ContainerState.EXITED
    return [
        str(transition.number),
        moment(transition.at, width),
        state_cell(recorded_state(transition.state)),
        Cell(str(transition.exit_code), "red" if transition.exit_code else "") if ended else "",
        transition.reason,
        transition.message,
    ]
