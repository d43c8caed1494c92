"""`limpet resume`: let paused containers go on."""

import click

from limpet.engine.cli.documents import done_document
from limpet.engine.cli.hands import Hands, each
from limpet.engine.cli.options import Place, complete_id, output_option, place_option
from limpet.engine.cli.output import print_json, print_lines
from limpet.engine.cli.telling import tell_done
from limpet.engine.control.requests import Done, Pause


@click.command("resume")
@click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=complete_id)
@output_option
@place_option
@click.pass_context
def command(ctx: click.Context, place: Place, ids: tuple[str, ...], *, as_json: bool) -> None:
    """Let paused containers go on."""
    with Hands(place) as hands:
        found: list[Done]
        found, status = each(ids, lambda text: hands.ask(Pause(id=text, is_wanted=False)))
    if as_json:
        print_json(resumed=[done_document(done) for done in found])
    else:
        print_lines(map(tell_done, found))
    ctx.exit(status)
