"""`limpet wait`: wait until containers have ended."""

import click

from limpet.engine.cli.documents import done_document
from limpet.engine.cli.hands import Hands, each
from limpet.engine.cli.options import Place, complete_id, output_option, place_option
from limpet.engine.cli.output import print_json, print_lines
from limpet.engine.cli.telling import tell_done
from limpet.engine.control.requests import Done, Wait


@click.command("wait")
@click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=complete_id)
@click.option("-q", "--quiet", is_flag=True, help="Print only the exit codes.")
@output_option
@place_option
@click.pass_context
def command(ctx: click.Context, place: Place, ids: tuple[str, ...], *, quiet: bool, as_json: bool) -> None:
    """Wait until the containers with these ids or names have ended, and print how.

    If the engine ends meanwhile, the next one is asked, or one is opened here.
    """
    with Hands(place) as hands:
        ended: list[Done]
        ended, status = each(ids, lambda text: hands.ask(Wait(id=text)))
    if as_json:
        print_json(ended=[done_document(done) for done in ended])
    else:
        print_lines(str(done.status.exit_code) if quiet else tell_done(done) for done in ended)
    ctx.exit(status)
