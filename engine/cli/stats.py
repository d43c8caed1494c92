"""`limpet stats`: what containers of an OCI runtime use, as their cgroups count it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import click

from limpet.engine.cli.hands import Hands
from limpet.engine.cli.options import Place, complete_id, no_trunc_option, output_option, place_option
from limpet.engine.cli.output import (
    Cell,
    Column,
    Ids,
    note,
    print_json,
    print_lines,
    render_table,
    rfc3339,
    size,
    terminal_width,
)
from limpet.engine.control.requests import Measure, Used
from limpet.engine.inspection import Snapshot

_COLUMNS = (
    Column("CONTAINER"),
    Column("NAME", keeps_end=True),
    Column("CPU TIME"),
    Column("MEMORY"),
    Column("WORKING SET"),
    Column("PIDS"),
)


@click.command("stats")
@click.argument("ids", metavar="[ID]...", nargs=-1, shell_complete=complete_id)
@no_trunc_option
@output_option
@place_option
def command(place: Place, ids: tuple[str, ...], *, no_trunc: bool, as_json: bool) -> None:
    """Print what the RUNNING containers with these ids or names, or all, have used, as their cgroups count it.

    Daemons that have left their session are counted. A container of an OCI runtime is needed; limpet top looks at the
    processes of any.
    """
    with Hands(place) as hands:
        used: Sequence[Used] = hands.ask(Measure(ids=ids))
    if as_json:
        print_json(containers=[_make_document(each) for each in used])
    else:
        with Snapshot.open(place.state_dir, node=place.node) as snapshot:
            shown = Ids(snapshot.ids, snapshot.names, no_trunc=no_trunc)
        rows = list(_make_rows(used, shown))
        print_lines(render_table(_COLUMNS, rows, None if no_trunc else terminal_width()))
        for problem, count in Counter(each.problem for each in used if each.problem).items():
            note(f"not measured: {count}: {problem}")


def _make_rows(used: Sequence[Used], ids: Ids) -> Iterator[list[str | Cell]]:
    for each in used:
        yield [
            ids.cell(each.id),
            each.name or "-",
            "-" if each.cpu_ns is None else f"{each.cpu_ns / 1e9:.2f} s",
            "-" if each.memory_bytes is None else size(each.memory_bytes),
            "-" if each.working_set_bytes is None else size(each.working_set_bytes),
            "-" if each.processes is None else str(each.processes),
        ]


def _make_document(used: Used) -> dict[str, Any]:
    return {
        "id": used.id,
        "name": used.name,
        "at": rfc3339(used.at),
        "cpu_ns": used.cpu_ns,
        "memory_bytes": used.memory_bytes,
        "working_set_bytes": used.working_set_bytes,
        "processes": used.processes,
        "problem": used.problem,
    }
