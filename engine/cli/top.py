"""`limpet top`: what running containers use, live on a terminal."""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import click

from limpet.engine.cli.options import Place, Seconds, no_trunc_option, output_option, place_option
from limpet.engine.cli.output import (
    Cell,
    Column,
    Ids,
    age,
    has_colour,
    print_json,
    print_lines,
    render_table,
    size,
    terminal_width,
)
from limpet.engine.cli.talking import ended_by_signals
from limpet.engine.inspection.snapshot import Snapshot, View
from limpet.engine.inspection.usage import Look, Usage, cpu_share, look
from limpet.schema.status import ContainerState

_COLUMNS = (
    Column("CONTAINER"),
    Column("NAME", keeps_end=True),
    Column("CPU"),
    Column("MEMORY"),
    Column("PROCESSES"),
    Column("UP"),
    Column("PID", optional=True),
)
_BETWEEN_SECONDS = 0.5
"""Between the two looks of which one print is made."""


class _Line(NamedTuple):
    view: View
    id: Cell
    cpu: float | None
    usage: Usage | None


@click.command("top")
@click.option("--once", is_flag=True, help="Print once. So it is where stdout is no terminal.")
@click.option(
    "--interval",
    metavar="SECONDS",
    type=Seconds(0.2, 3600),
    default=2.0,
    show_default=True,
    help="Between two looks.",
)
@no_trunc_option
@output_option
@place_option
def command(place: Place, *, once: bool, interval: float, no_trunc: bool, as_json: bool) -> None:
    """Show processor time, memory and processes of each RUNNING container; 100% is one processor.

    The processes of the session of its first process are counted, not daemons that have left it. Memory that processes
    share is counted for each. Ctrl-C ends it.
    """
    if once or as_json or not sys.stdout.isatty():
        _, first = _look(place, None, no_trunc=no_trunc)
        time.sleep(_BETWEEN_SECONDS)
        lines, _ = _look(place, first, no_trunc=no_trunc)
        if as_json:
            print_json(containers=[_make_document(line) for line in lines])
        else:
            print_lines(_render(lines, None if no_trunc else terminal_width()))
        return
    try:
        with ended_by_signals():  # the terminal is as before then
            _show(place, interval, no_trunc=no_trunc)
    except KeyboardInterrupt:  # as it is meant to end
        return


def _show(place: Place, interval: float, *, no_trunc: bool) -> None:
    from rich.console import Console  # noqa: PLC0415  # only a terminal needs it
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console(no_color=not has_colour(), highlight=False)
    _, seen = _look(place, None, no_trunc=no_trunc)
    time.sleep(min(_BETWEEN_SECONDS, interval))
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            lines, seen = _look(place, seen, no_trunc=no_trunc)
            rendered = _render(lines, None if no_trunc else terminal_width())
            room = max(shutil.get_terminal_size().lines - 1, 2)
            if len(rendered) > room:
                rendered = [*rendered[: room - 1], f"... and {len(rendered) - room + 1} more"]
            head = f"limpet top  {time.strftime('%H:%M:%S')}  running: {len(lines)}  {place.state_dir}"
            live.update(Text.from_ansi("\n".join([head, *rendered])), refresh=True)
            time.sleep(interval)


def _look(place: Place, before: Look | None, *, no_trunc: bool) -> tuple[list[_Line], Look]:
    """Return a line for each running container, the busiest first, and what was seen."""
    with Snapshot.open(place.state_dir, node=place.node) as snapshot:
        views = snapshot.list(state=ContainerState.RUNNING, ended=False)
        ids = Ids(snapshot.ids, snapshot.names, no_trunc=no_trunc)
    now = look({view.status.pid for view in views})
    lines = [
        _Line(
            view,
            ids.cell(view.id),
            cpu_share(before, now, view.status.pid) if before else None,
            now.usage.get(view.status.pid),
        )
        for view in views
    ]
    return sorted(lines, key=lambda line: (-(line.cpu or 0), line.view.name, line.view.id)), now


def _render(lines: Sequence[_Line], width: int | None) -> list[str]:
    return render_table(_COLUMNS, list(_make_rows(lines)), width)


def _make_rows(lines: Sequence[_Line]) -> Iterator[list[str | Cell]]:
    for line in lines:
        busy = "yellow" if (line.cpu or 0) >= 1 else ""
        yield [
            line.id,
            line.view.name or "-",
            Cell("-" if line.cpu is None else f"{line.cpu * 100:.1f}%", busy),
            size(line.usage.resident_bytes) if line.usage else "-",
            str(line.usage.processes) if line.usage else "-",
            age(line.view.status.started_at),
            str(line.view.status.pid),
        ]


def _make_document(line: _Line) -> dict[str, Any]:
    return {
        "id": line.view.id,
        "name": line.view.name,
        "pid": line.view.status.pid,
        "cpu": None if line.cpu is None else round(line.cpu, 4),
        "memory_bytes": line.usage.resident_bytes if line.usage else None,
        "processes": line.usage.processes if line.usage else None,
    }
