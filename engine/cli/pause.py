"""`limpet pause`: freeze containers."""

import click

from limpet.engine.cli.documents import done_document
from limpet.engine.cli.hands import Hands, each
from limpet.engine.cli.options import Place, complete_id, output_option, place_option
from limpet.engine.cli.output import print_json, print_lines
from limpet.engine.cli.telling import tell_done
from limpet.engine.control.requests import Done, Pause


@click.command("pause")
@click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=complete_id)
@output_option
@place_option
@click.pass_context
def command(ctx: click.Context, place: Place, ids: tuple[str, ...], *, as_json: bool) -> None:
    """Freeze all processes of the RUNNING containers with these ids or names. That is durable, over restarts too."""
    ask_each(ctx, place, ids, is_wanted=True, as_json=as_json)


def ask_each(ctx: click.Context, place: Place, ids: tuple[str, ...], *, is_wanted: bool, as_json: bool) -> None:
    """Have each of these paused, or let go on; print what came of it, and end with its status."""
    with Hands(place) as hands:
        found: list[Done]
        found, status = each(ids, lambda text: hands.ask(Pause(id=text, is_wanted=is_wanted)))
    if as_json:
        print_json(**{"paused" if is_wanted else "resumed": [done_document(done) for done in found]})
    else:
        print_lines(map(tell_done, found))
    ctx.exit(status)
