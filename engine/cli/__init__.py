"""The command line `limpet`. Each verb is a separate module, loaded when it is called.

Start with `exits` (the exit statuses), `options` (where the state is) and `output` (printing), then read any verb: it
calls the library and prints the result. A program can get the same result with the same calls.
"""

import os
import sys
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from typing import NoReturn

import click
from click.shell_completion import CompletionItem

from limpet.engine.cli.exits import EXITS, INTERRUPTED, exit_status
from limpet.engine.cli.options import root_options
from limpet.engine.cli.wording import tell_error
from limpet.schema.errors import LimpetError

VERBS = {
    "run": "Make a container of an image, start it, and wait for its end.",
    "ps": "List containers and their actual state.",
    "pods": "List sandboxes.",
    "exec": "Run a command in a container.",
    "attach": "Connect to a container's program.",
    "top": "Show what running containers use, live.",
    "stats": "Show what containers of an OCI runtime have used.",
    "inspect": "Show details of containers or sandboxes.",
    "history": "Show a container's state changes.",
    "events": "Show what has happened, and what happens.",
    "logs": "Print the output of a container.",
    "wait": "Wait until containers have ended.",
    "stop": "Stop containers.",
    "pause": "Freeze containers.",
    "resume": "Let paused containers go on.",
    "rm": "Remove containers or sandboxes.",
    "prune": "Remove all containers that have ended.",
    "images": "List images.",
    "load": "Load images from an archive or a layout.",
    "info": "Show versions, paths, and who has the state open.",
    "recover": "Recover the state after a crash, and record the result.",
    "resolve": "Settle an UNKNOWN container on your word.",
    "fleet": "Show what many nodes have sent to one PostgreSQL.",
    "check": "Check the database, records, permissions and bundles for damage.",
    "backup": "Copy the database to a file, even while an engine is running.",
    "drill": "Cause crashes on this machine and check every recovery.",
    "bench": "Measure durable checkpoints and recovery on this machine.",
    "completion": "Print a shell's completion script.",
}
"""Each verb's module has a click command named `command`. The help is here so that --help loads no verb."""
_ELSEWHERE = {"bench": "limpet.benchmarks.command"}
"""The modules of the verbs outside this package."""

_COMPLETE = "_LIMPET_COMPLETE"
"""A shell's completion script sets this variable to ask click for completions."""


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
        # click's own version would load every verb to get its help.
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
    from platform import python_version  # noqa: PLC0415  # only this needs them

    from limpet.engine.database.sqlite import sqlite_version  # noqa: PLC0415
    from limpet.schema.release import read_version  # noqa: PLC0415
    from limpet.schema.revision import SCHEMA_REVISION  # noqa: PLC0415

    sqlite = ".".join(map(str, sqlite_version()))
    click.echo(f"limpet {read_version()} (schema {SCHEMA_REVISION}, Python {python_version()}, SQLite {sqlite})")
    ctx.exit()


@click.group("limpet", cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@root_options
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show versions and exit.",
)
def limpet(**_: object) -> None:
    """Run, inspect, check and recover containers whose state survives crashes.

    What changes something is done by the live engine, if there is one, or by one that is opened for it. All other
    verbs only read. A container or sandbox is given by its id, its name, or an unambiguous beginning of its id. With
    -o json each but logs prints one JSON document, events one a line; its schema_version increases when the format
    changes.
    """


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit. Usage errors, system errors and limpet's errors print no traceback."""
    _fill_standard_streams()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # escape characters that the terminal cannot show
    try:
        _run(args)
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            from limpet.engine.cli.output import drop  # noqa: PLC0415  # only this needs it

            drop(sys.stderr)


def _run(args: list[str] | None) -> NoReturn:
    try:
        # Without standalone mode click returns the verb's exit status.
        sys.exit(limpet.main(args, prog_name="limpet", standalone_mode=False))
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except LimpetError as error:
        _fail(tell_error(error), exit_status(error))
    except (KeyError, ValueError) as error:
        if _COMPLETE not in os.environ:
            raise
        _fail(f"{_COMPLETE} is set, but not the variables that a shell sets with it ({error}); unset it", 2)
    except OSError as error:
        from limpet.engine.cli.output import drop  # noqa: PLC0415  # only this needs it

        drop(sys.stdout)
        reason = error.strerror or str(error)
        # What has no name is the output, or where a path begins: all else is told by limpet's errors.
        nameless = "the working directory" if isinstance(error, FileNotFoundError) else "the output cannot be written"
        _fail(f"{error.filename or nameless}: {reason}", exit_status(error))


def _fill_standard_streams() -> None:
    """Open those that the caller has closed: under their numbers files of ours would be read, or written to."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # the lowest number that is free is this one
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # for as long as it runs


def _fail(message: str, status: int) -> NoReturn:
    from limpet.schema.errors import escape  # noqa: PLC0415  # only this needs it

    with suppress(OSError):  # the exit status tells it, where stderr takes nothing
        click.echo(f"limpet: {escape(' '.join(message.split()))}", err=True)
    sys.exit(status)
