"""`limpet stop`: stop containers, or all of a sandbox."""

import click

from limpet.engine.cli.documents import done_document
from limpet.engine.cli.hands import Hands, each
from limpet.engine.cli.options import Place, Seconds, complete_id, output_option, place_option
from limpet.engine.cli.output import print_json, print_lines
from limpet.engine.cli.telling import tell_done
from limpet.engine.control.requests import Done, Stop
from limpet.engine.lifecycle.stopping import DEFAULT_STOP_TIMEOUT_SECONDS


@click.command("stop")
@click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=complete_id)
@click.option(
    "-t",
    "--time",
    "--timeout",
    "timeout",
    metavar="SECONDS",
    type=Seconds(0, 1e9),
    default=DEFAULT_STOP_TIMEOUT_SECONDS,
    show_default=True,
    help="How long they may take before they are killed; 0 kills at once.",
)
@output_option
@place_option
@click.pass_context
def command(ctx: click.Context, place: Place, ids: tuple[str, ...], *, timeout: float, as_json: bool) -> None:
    """Stop the containers (or sandboxes) with these ids or names: the stop signal first, SIGKILL later.

    Several are stopped side by side. One that has ended stays as it is. What is killed amid this goes on: that they
    are to stop is on disk. An UNKNOWN one is looked at first, and signalled only if its processes are shown to be the
    very ones; limpet resolve settles one of which you know that it is gone.
    """
    with Hands(place) as hands:
        found, status = each(ids, lambda text: hands.ask(Stop(id=text, timeout=timeout)))
    stopped: list[Done] = [done for several in found for done in several]
    if as_json:
        print_json(stopped=[done_document(done) for done in stopped])
    else:
        print_lines(map(tell_done, stopped))
    ctx.exit(status)
