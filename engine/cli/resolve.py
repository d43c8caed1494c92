"""`limpet resolve`: settle a container that no look can settle, on a person's word."""

import click

from limpet.engine.cli.documents import status_document
from limpet.engine.cli.options import Place, complete_id, output_option, place_option
from limpet.engine.cli.output import print_json, print_lines, printable
from limpet.engine.engine import Engine
from limpet.engine.inspection.snapshot import require_state


@click.command("resolve")
@click.argument("id", shell_complete=complete_id)
@click.option("--gone", is_flag=True, required=True, help="No process of the container is left.")
@click.option("--why", metavar="TEXT", required=True, help="How you know; it is recorded with the container.")
@output_option
@place_option
def command(place: Place, id: str, *, gone: bool, why: str, as_json: bool) -> None:  # noqa: ARG001  # --gone is the word
    """Record that the UNKNOWN container ID is gone: its process belongs to a pid namespace that is over, for instance.

    Like recover, this opens an engine: no other may have the state open. The container is looked at once more; if that
    settles it, the result is recorded instead. Otherwise it is EXITED with code 255, reason DeclaredGone and your TEXT.
    Nothing is signalled.
    """
    with Engine.open(require_state(place.state_dir), node=place.node) as engine:
        container_id = engine.get(id).id
        status = engine.declare_gone(container_id, why)
    if as_json:
        print_json(id=container_id, **status_document(status))
    else:
        print_lines([printable(f"{container_id}: {status.state.name}, exit code {status.exit_code}, {status.reason}")])
