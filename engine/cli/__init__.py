"""The command line `limpet`. Each verb is a module of its own, loaded when it is called.

Read `exits` (what the exit status says), `options` (where the state is), `output` (how things are printed), then any
verb: it asks the library, and prints. What a verb finds out, a program can find out with the same calls.
"""

import os
import sys
from importlib import import_module
from io import TextIOWrapper
from typing import NoReturn

import click
from click.shell_completion import CompletionItem

from limpet.engine.cli.exits import EXITS, INTERRUPTED, exit_status
from limpet.engine.cli.options import root_options
from limpet.schema.errors import LimpetError

VERBS = {
    "ps": "List containers, and what is true of them now.",
    "inspect": "Show all that is known of containers or sandboxes.",
    "history": "Show the states that a container went through.",
    "recover": "Find out what is true after a crash, and write it down.",
    "check": "Look for damage: database, records, permissions, bundles.",
    "backup": "Copy the database to a file, also beside a live engine.",
    "drill": "Rehearse crashes on this machine, and see what is said after them.",
    "bench": "Measure durable checkpoints and recovery on this machine.",
    "completion": "Print the completion script of a shell.",
}
"""Each verb's module has a click command named `command`; the help is here, so that none is loaded for it."""
_ELSEWHERE = {"bench": "limpet.benchmarks.command"}
"""The modules of the verbs that are not in this package."""

_COMPLETE = "_LIMPET_COMPLETE"
"""By this variable a shell's completion script asks click for words."""


class _Verbs(click.Group):
    """A group whose commands are loaded by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(_ELSEWHERE.get(cmd_name, f"{__name__}.{cmd_name}")).command
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # Like that of click's group, which would load every verb for its help.
        verbs = [CompletionItem(verb, help=text) for verb, text in VERBS.items() if verb.startswith(incomplete)]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Exit status"):
            formatter.write_dl([(str(status), meaning) for status, meaning, _ in EXITS])


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import version  # noqa: PLC0415  # only this needs them
    from platform import python_version  # noqa: PLC0415

    from limpet.engine.database.sqlite import sqlite_version  # noqa: PLC0415
    from limpet.schema.revision import SCHEMA_REVISION  # noqa: PLC0415

    sqlite = ".".join(map(str, sqlite_version()))
    click.echo(f"limpet {version('limpet')} (schema {SCHEMA_REVISION}, Python {python_version()}, SQLite {sqlite})")
    ctx.exit()


@click.group("limpet", cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@root_options
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show versions, and exit.",
)
def limpet(**_: object) -> None:
    """Look at container state that survives a crash, check it, and recover it.

    ps, inspect, history, check and backup only read, and work beside a live engine. Tables are for people; with
    -o json each prints one JSON document, whose schema_version grows if its form changes.
    """


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit. No error of the user, of the system or of ours ends in a traceback."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # it was closed by the caller
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name is printed as well as the terminal can
    try:
        # Without standalone mode click hands back the status that a verb has exited with.
        sys.exit(limpet.main(args, prog_name="limpet", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except LimpetError as error:
        _fail(str(error), exit_status(error))
    except (KeyError, ValueError) as error:
        if _COMPLETE not in os.environ:
            raise
        _fail(f"{_COMPLETE} is set, and what a shell sets with it is not ({error}); unset it", 2)
    except OSError as error:
        _drop_output()
        reason = error.strerror or str(error)
        _fail(f"{error.filename}: {reason}" if error.filename else reason, exit_status(error))


def _drop_output() -> None:
    """Forget what could not be printed: Python would try again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"limpet: {' '.join(message.split())}", err=True)
    sys.exit(status)
