"""`limpet rm`: remove containers or sandboxes."""

import click
import msgspec

from limpet.engine.cli.hands import Hands, each
from limpet.engine.cli.options import Place, complete_id, output_option, place_option
from limpet.engine.cli.output import print_json, print_lines
from limpet.engine.cli.telling import tell_removal
from limpet.engine.control.requests import Removal, Remove


@click.command("rm")
@click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=complete_id)
@click.option("-f", "--force", is_flag=True, help="Kill what runs, and remove a sandbox with all that is in it, too.")
@output_option
@place_option
@click.pass_context
def command(ctx: click.Context, place: Place, ids: tuple[str, ...], *, force: bool, as_json: bool) -> None:
    """Remove the containers (or sandboxes) with these ids or names, with their bundles and their records.

    By its name a container goes with the attempts that its restart policy has made it after, by its id alone. A sandbox
    that was made by limpet run goes with its last container. An UNKNOWN container is removed with -f if a look shows
    what became of it; settle it with limpet resolve if you know that it is gone.
    """
    with Hands(place) as hands:
        found, status = each(ids, lambda text: hands.ask(Remove(id=text, force=force)))
    removed: list[Removal] = [removal for several in found for removal in several]
    if as_json:
        print_json(removed=msgspec.to_builtins(removed))
    else:
        print_lines(map(tell_removal, removed))
    ctx.exit(status)
