"""`limpet attach`: connect to the input and output of a container's program."""

import click

from limpet.engine.cli.hands import Hands
from limpet.engine.cli.options import Place, complete_id, place_option
from limpet.engine.cli.talking import ended_by_signals, talk
from limpet.engine.control.requests import Attach, Done, Wait


@click.command("attach")
@click.argument("container", metavar="ID", shell_complete=complete_id)
@click.option("--no-stdin", is_flag=True, help="Hand on no input.")
@place_option
@click.pass_context
def command(ctx: click.Context, place: Place, container: str, *, no_stdin: bool) -> None:
    """Connect to the program of the RUNNING container ID, and end as it ends; what it wrote before is in its log.

    Ctrl-P Ctrl-Q leaves a container with a terminal, and it runs on. A container of an OCI runtime is needed.

    The exit status is the program's, and 0 if you left it.
    """
    status = 0
    with ended_by_signals(), Hands(place) as hands:
        session = hands.open_session(Attach(id=container))
        try:
            has_ended = talk(session, has_input=not no_stdin, may_detach=True)
        finally:
            session.close()
        if has_ended:
            done: Done = hands.ask(Wait(id=container))
            status = done.status.exit_code & 0xFF
    ctx.exit(status)
