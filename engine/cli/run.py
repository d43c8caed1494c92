"""`limpet run`: make a container of an image, start it, and wait for its end."""

import os
import re
import sys

import click

from limpet.engine.cli.documents import done_document
from limpet.engine.cli.exits import RUN_FAILED
from limpet.engine.cli.following import Stopping, follow_until_end, wait_for_end
from limpet.engine.cli.hands import Hands
from limpet.engine.cli.options import Place, output_option, parse_labels, place_option, require_text
from limpet.engine.cli.output import drop, note, print_json, print_lines
from limpet.engine.cli.wording import tell_error
from limpet.engine.control.requests import MADE_BY, Began, CreateAndStart, Done, Remove
from limpet.schema.errors import AlreadyExistsError, InvalidInputError, LimpetError, StartError
from limpet.schema.metadata import new_id
from limpet.schema.restart import RestartKind, parse_restart_policy
from limpet.schema.status import Reason

_SHORT = 6
"""Digits of the id in a name that is made up."""


def _parse_variables(_ctx: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not key:
            raise click.BadParameter(f"{text!r}: expected NAME=VALUE, or NAME alone for its value here")
        if equals:
            found[key] = value
        elif key in os.environ:
            found[key] = os.environ[key]
    return found


def _parse_restart(_ctx: click.Context, _parameter: click.Parameter, text: str) -> str:
    try:
        return str(parse_restart_policy(text))
    except InvalidInputError as error:
        raise click.BadParameter(str(error)) from error


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--name", metavar="NAME", callback=require_text, help="The container's name.  [default: made up from the image]"
)
@click.option(
    "-e",
    "--env",
    "env",
    metavar="NAME[=VALUE]",
    multiple=True,
    callback=_parse_variables,
    help="A variable of its environment; NAME alone hands on the one that is set here. Repeatable.",
)
@click.option(
    "-l", "--label", "labels", metavar="KEY=VALUE", multiple=True, callback=parse_labels, help="A label. Repeatable."
)
@click.option(
    "--sandbox",
    "sandbox_id",
    metavar="SANDBOX",
    callback=require_text,
    help="Run it in this sandbox (id, name, or prefix).  [default: one of its own]",
)
@click.option(
    "--runtime",
    metavar="NAME",
    callback=require_text,
    help="Run it under this runtime handler, such as runc or crun.  [default: as a process of this host]",
)
@click.option("-w", "--workdir", metavar="DIR", callback=require_text, help="Its working directory.")
@click.option("-d", "--detach", is_flag=True, help="Print its id, and do not wait for its end.")
@click.option(
    "--restart",
    metavar="POLICY",
    default=RestartKind.NO.value,
    callback=_parse_restart,
    help="no, on-failure, on-failure:N, always or unless-stopped: when to start it again; with -d only.",
)
@click.option("--rm", "removes", is_flag=True, help="Remove it once it has ended.")
@output_option
@place_option
def run_command(
    place: Place,
    image: str,
    command: tuple[str, ...],
    *,
    name: str | None,
    env: dict[str, str],
    labels: dict[str, str],
    sandbox_id: str | None,
    runtime: str | None,
    workdir: str | None,
    detach: bool,
    restart: str,
    removes: bool,
    as_json: bool,
) -> None:
    """Make a container of IMAGE, start it, print what it writes, and end as it ends.

    COMMAND is what to run, or the arguments of the image's entrypoint. The image `host` is this machine: its programs
    are run. Ctrl-C stops the container as soon as it has begun, and a second one kills it. With -o json nothing is
    followed, and one document tells how it ended.

    Whichever engine has the state open does the restarts, each as the next attempt of the name, until the container is
    stopped. Without a live engine nothing is restarted before the next one opens the state.

    The exit status is the program's, 128 + N if signal N ended it, and 125 if limpet failed. With -d it is that of any
    other verb.
    """
    if detach and removes:
        raise click.UsageError("--rm waits for the end, -d does not; give one of them")
    if runtime and sandbox_id:
        raise click.UsageError("--runtime is for a sandbox that is made, --sandbox names one that is there; give one")
    if restart != RestartKind.NO and not detach:
        raise click.UsageError("--restart: what is started again has no one end to wait for; give -d, too")
    key = new_id()
    name = name or _make_name(image, key)
    request = CreateAndStart(
        id=key,
        config={
            "metadata": {"name": name},
            "image": {"image": image},
            "args": list(command),
            "envs": [{"key": variable, "value": value} for variable, value in env.items()],
            "labels": labels,
            "log_path": f"{key}.log",
            **({"working_dir": workdir} if workdir else {}),
        },
        sandbox_id=sandbox_id or new_id(),
        sandbox_config=None if sandbox_id else {"metadata": {"name": name}, "annotations": {MADE_BY: "run"}},
        runtime=runtime or "",
        restart=restart,
    )
    if detach:
        with Hands(place, makes=True, runtime=request.runtime) as hands:
            began = _begin(hands, request, name)
        if as_json:
            print_json(**done_document(Done(id=began.id, name=name, status=began.status)), sandbox_id=began.sandbox_id)
        else:
            print_lines([began.id])
        return
    try:
        status = _run(place, request, name, removes=removes, as_json=as_json)
    except LimpetError as error:
        note(f"limpet: {tell_error(error).replace(key, name)}")
        status = RUN_FAILED
    except OSError as error:  # where the output takes no more
        drop(sys.stdout)
        note(f"limpet: the output cannot be written: {error.strerror or error}")
        status = RUN_FAILED
    click.get_current_context().exit(status)


command = run_command


def _run(place: Place, request: CreateAndStart, name: str, *, removes: bool, as_json: bool) -> int:
    with Hands(place, makes=True, runtime=request.runtime) as hands:
        with Stopping(hands, request.id, name) as stopping:
            try:
                began = _begin(hands, request, name)
            except StartError:
                if removes:
                    hands.ask(Remove(id=request.id))
                raise
            stopping.begin()
            done = wait_for_end(hands, began) if as_json else follow_until_end(hands, began)
        if as_json:
            print_json(**done_document(done), sandbox_id=began.sandbox_id)
        status = done.status
        if status.reason == Reason.START_ERROR or (status.message and status.exit_code):
            note(f"limpet: container {name}: {status.message}")
        if removes:
            hands.ask(Remove(id=request.id))
    return RUN_FAILED if status.reason == Reason.START_ERROR else status.exit_code & 0xFF


def _begin(hands: Hands, request: CreateAndStart, name: str) -> Began:
    try:
        began: Began = hands.ask(request)
    except AlreadyExistsError as error:
        if request.sandbox_config is None:  # of which the error tells
            raise
        raise AlreadyExistsError(
            f"the name {name!r} is taken: a sandbox has it; give another with --name, or run it in that one with"
            f" --sandbox {name}"
        ) from error
    return began


def _make_name(image: str, key: str) -> str:
    """Return a name that tells the image, and is nobody else's."""
    base = re.sub(r"[^A-Za-z0-9_.-]", "", image.partition("@")[0].rpartition("/")[2].partition(":")[0])
    return f"{base or 'container'}-{key[:_SHORT]}"
