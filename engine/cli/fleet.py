"""`limpet fleet`: what many nodes have sent to one PostgreSQL."""

import time
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import click
import msgspec

from limpet.engine.cli.documents import status_document
from limpet.engine.cli.events import event_document
from limpet.engine.cli.options import no_trunc_option, output_option, parse_labels, require_text
from limpet.engine.cli.output import (
    SCHEMA_VERSION,
    Cell,
    Column,
    age,
    duration,
    moment,
    note,
    print_json,
    print_line,
    print_lines,
    print_table,
    recorded_state,
    short_id,
    state_cell,
)
from limpet.schema.any_text import encode_any
from limpet.schema.errors import FleetError, FleetTooNewError, UnsupportedError, escape
from limpet.schema.status import ContainerState

_NODES = (
    Column("NODE", keeps_end=True),
    Column("HEARD OF"),
    Column("CONTAINERS"),
    Column("REV"),
    Column("WHERE", flexible=True),
)
_CONTAINERS = (
    Column("NODE", keeps_end=True),
    Column("CONTAINER"),
    Column("NAME", keeps_end=True),
    Column("STATE"),
    Column("AGE"),
    Column("STATUS", flexible=True),
)
_PAUSE_SECONDS = 1.0
"""Who follows events tries so often whether a database that went away is back."""
_STATES = [state.name.lower() for state in ContainerState]


def _load_fleet() -> ModuleType:
    try:
        return import_module("limpet.engine.fleet")  # its driver is an extra
    except ImportError as error:
        raise UnsupportedError(
            f"fleet: the driver of PostgreSQL is missing ({error}); pip install limpet[fleet]"
        ) from error


def _open_fleet(url: str) -> Any:
    return _load_fleet().Fleet.open(url)


def _fleet_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb --fleet, and pass its value as `url`."""
    return click.option(
        "--fleet",
        "url",
        metavar="URL",
        envvar="LIMPET_FLEET",
        show_envvar=True,
        required=True,
        help="The fleet's database, such as postgresql+psycopg://user@host/database. A password is best kept in the"
        " variable, or in libpq's ~/.pgpass.",
    )(function)


def _node_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--node", default="", metavar="NAME", help="Only of this node.")(function)


@click.group("fleet")
def command() -> None:
    """Show what many nodes have sent to one PostgreSQL.

    A node that is opened with a fleet gives signs of life. Of one that is silent for longer than its lease nothing is
    shown as RUNNING.
    """


@command.command("nodes")
@output_option
@_fleet_option
def nodes(url: str, *, as_json: bool) -> None:
    """List nodes, and which are heard of."""
    with _open_fleet(url) as fleet:
        found = fleet.nodes()
    if as_json:
        print_json(nodes=[one._asdict() for one in found])
        return
    rows = [
        [
            one.name,
            Cell(f"{duration(one.silent_seconds)} ago", "" if one.is_heard else "yellow"),
            str(one.containers),
            f"{one.revision}" if one.is_whole else f"{one.revision} (not whole yet)",
            f"{one.host}:{one.path}",
        ]
        for one in found
    ]
    print_table(_NODES, rows)


@command.command("ps")
@click.option("-a", "--all", "ended", is_flag=True, help="Include exited containers.")
@click.option("--state", type=click.Choice(_STATES, case_sensitive=False), help="Only containers in this state.")
@click.option("--name", default="", help="Only containers with this name.")
@click.option(
    "--label",
    "labels",
    metavar="KEY=VALUE",
    multiple=True,
    callback=parse_labels,
    help="Only containers with this label. Repeat it to require several.",
)
@_node_option
@no_trunc_option
@output_option
@_fleet_option
def ps(
    url: str,
    *,
    ended: bool,
    state: str | None,
    name: str,
    labels: dict[str, str],
    node: str,
    no_trunc: bool,
    as_json: bool,
) -> None:
    """List the containers of all nodes that have not exited."""
    with _open_fleet(url) as fleet:
        found = fleet.list(node=node, labels=labels, state=state, name=name)
    if not ended and state is None:
        found = [one for one in found if one.status.state is not ContainerState.EXITED]
    if as_json:
        print_json(containers=[_make_document(one) for one in found])
        return
    rows = [
        [
            one.node,
            one.id if no_trunc else short_id(one.id),
            one.name or "-",
            state_cell(one.status.state.name),
            age(one.status.created_at),
            _describe(one.status),
        ]
        for one in found
    ]
    print_table(_CONTAINERS, rows, no_trunc=no_trunc)


@command.command("inspect")
@click.argument("id")
@_node_option
@output_option
@_fleet_option
def inspect(url: str, id: str, *, node: str, as_json: bool) -> None:  # noqa: ARG001  # it is JSON in any case
    """Show details of container ID (its id, name, or the beginning of its id), as JSON."""
    with _open_fleet(url) as fleet:
        found = fleet.get(id, node=node)
        metadata = fleet.metadata(found)
    print_json(
        **_make_document(found),
        version=found.version,
        extra=found.checkpoint.extra,
        metadata=msgspec.to_builtins(metadata),
    )


@command.command("events")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until interrupted.")
@_node_option
@output_option
@_fleet_option
def events(url: str, *, follow: bool, node: str, as_json: bool) -> None:
    """Show what has happened, of each node in its order. With -o json each event is a document on its own line."""
    for one in _load_events(url, node, follow=follow):
        event = one.event
        if as_json:
            document = {"schema_version": SCHEMA_VERSION, "node": one.node, **event_document(event)}
            print_line(encode_any(document).decode())
        else:
            state = "" if event.state is None else recorded_state(event.state)
            at = moment(event.at)
            print_line(f"{one.node} {event.revision} {at} {event.kind.value} {event.id} {event.name} {state}".rstrip())


def _load_events(url: str, node: str, *, follow: bool) -> Iterator[Any]:
    """Yield events, each once; who follows goes on when the database is back that was there before."""
    since: dict[str, int] = {}
    told = ""
    has_begun = False
    while True:
        try:
            with _open_fleet(url) as fleet:
                has_begun, told = True, ""
                for one in fleet.events(node=node, since=since, follow=follow):
                    since[one.node] = one.event.revision
                    yield one
            return
        except FleetError as error:
            if not (follow and has_begun) or isinstance(error, FleetTooNewError):
                raise
            if str(error) != told:
                told = str(error)
                note(f"limpet: {error}; trying again")
            time.sleep(_PAUSE_SECONDS)


@command.command("restore")
@click.argument("node")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=str), callback=require_text)
@click.option("--force", is_flag=True, help="Take over a node that is still heard of.")
@output_option
@_fleet_option
def restore(url: str, node: str, directory: str, *, force: bool, as_json: bool) -> None:
    """Make the new state directory DIR for a lost NODE from what the fleet has of it.

    Whoever was that node can change nothing in the fleet any more. Then open an engine on DIR, with the same node and
    fleet: it finds out what is left of the containers.
    """
    restored = _load_fleet().restore(url, node, directory, is_forced=force)
    if as_json:
        print_json(**restored._asdict())
        return
    for text in restored.left_out:
        note(f"limpet: left out: {text}")
    counts = f"containers: {restored.containers}, sandboxes: {restored.sandboxes}, items: {restored.items}"
    print_lines([f"{escape(restored.path)}: {counts}, up to event {restored.revision} of node {restored.node}"])


def _make_document(one: Any) -> dict[str, Any]:
    return {
        "node": one.node,
        "id": one.id,
        "name": one.name,
        "sandbox_id": one.sandbox_id,
        "labels": one.labels,
        **status_document(one.status),
        "verified": not one.status.unknown,
        "checkpoint": one.checkpoint.state.name,
    }


def _describe(status: Any) -> str | Cell:
    if status.unknown:
        return Cell(status.message, "yellow")
    if status.state is ContainerState.EXITED:
        return f"exit {status.exit_code} ({status.reason}), {age(status.finished_at)} ago"
    if status.state is ContainerState.RUNNING:
        return f"up {age(status.started_at)}, pid {status.pid}"
    return status.message or "not started"
