"""`limpet exec`: run a command in a container."""

import sys

import click

from limpet.engine.cli.exits import RUN_FAILED
from limpet.engine.cli.hands import Hands
from limpet.engine.cli.options import Place, complete_id, place_option
from limpet.engine.cli.output import drop, note
from limpet.engine.cli.talking import ended_by_signals, find_size, talk
from limpet.engine.cli.wording import tell_error
from limpet.engine.control.requests import Execute
from limpet.schema.errors import LimpetError


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.argument("container", metavar="ID", shell_complete=complete_id)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("-i", "--interactive", is_flag=True, help="Hand on the input.")
@click.option("-t", "--tty", "terminal", is_flag=True, help="Give the command a terminal.")
@place_option
@click.pass_context
def exec_command(
    ctx: click.Context, place: Place, container: str, command: tuple[str, ...], *, interactive: bool, terminal: bool
) -> None:
    """Run COMMAND in the RUNNING container ID, with its user and environment, and end as it ends.

    It is killed if this command ends first. A container of an OCI runtime is needed; host processes have no inside.

    The exit status is the command's, 128 + N if signal N ended it, and 125 if limpet failed.
    """
    try:
        with ended_by_signals(), Hands(place) as hands:
            session = hands.open_session(Execute(id=container, args=command, terminal=terminal, size=find_size()))
            try:
                talk(session, has_input=interactive)
                status = session.wait()
            finally:
                session.close()
    except LimpetError as error:
        note(f"limpet: {tell_error(error)}")
        status = RUN_FAILED
    except OSError as error:  # its output takes no more; the command is killed
        drop(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            note(f"limpet: the output cannot be written: {error.strerror}")
        status = RUN_FAILED
    ctx.exit(status or 0)


command = exec_command
