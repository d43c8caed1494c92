"""`limpet resolve`: settle a container that no look can settle, on a person's word."""

import click

from limpet.engine.cli.documents import status_document
from limpet.engine.cli.hands import Hands
from limpet.engine.cli.options import Place, complete_id, output_option, place_option
from limpet.engine.cli.output import print_json, print_lines
from limpet.engine.control.requests import Done, Resolve
from limpet.schema.errors import escape


@click.command("resolve")
@click.argument("id", shell_complete=complete_id)
@click.option("--gone", is_flag=True, required=True, help="No process of the container is left.")
@click.option("--why", metavar="TEXT", required=True, help="How you know; it is recorded with the container.")
@output_option
@place_option
def command(place: Place, id: str, *, gone: bool, why: str, as_json: bool) -> None:  # noqa: ARG001  # --gone is the word
    """Record that the UNKNOWN container ID is gone: its process belongs to a pid namespace that is over, for instance.

    The container is looked at once more; if that
    settles it, the result is recorded instead. Otherwise it is EXITED with code 255, reason DeclaredGone and your TEXT.
    Nothing is signalled.
    """
    with Hands(place) as hands:
        done: Done = hands.ask(Resolve(id=id, why=why))
    status = done.status
    if as_json:
        print_json(id=done.id, **status_document(status))
    else:
        print_lines([escape(f"{done.id}: {status.state.name}, exit code {status.exit_code}, {status.reason}")])
