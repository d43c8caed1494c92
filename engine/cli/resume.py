"""`limpet resume`: let paused containers go on."""

import click

from limpet.engine.cli.options import Place, complete_id, output_option, place_option
from limpet.engine.cli.pause import ask_each


@click.command("resume")
@click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=complete_id)
@output_option
@place_option
@click.pass_context
def command(ctx: click.Context, place: Place, ids: tuple[str, ...], *, as_json: bool) -> None:
    """Let paused containers go on."""
    ask_each(ctx, place, ids, is_wanted=False, as_json=as_json)
