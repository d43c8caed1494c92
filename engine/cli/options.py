"""The options that verbs share: the state directory, the node, the output format."""

import math
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from limpet.schema.metadata import DEFAULT_NODE

if TYPE_CHECKING:
    from limpet.engine.inspection.snapshot import Snapshot

_Function = Callable[..., Any]


class Seconds(click.FloatRange):
    """A range of seconds, in which "nan" is not: no comparison of click's keeps that out."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds; a usage error otherwise."""
        seconds: float = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value} is no number of seconds", param, ctx)
        return seconds


class Place(NamedTuple):
    """Where the state is."""

    state_dir: str
    node: str


def default_state_dir() -> str:
    """Return the default state directory: root's, or the user's (XDG Base Directory Specification)."""
    if os.geteuid() == 0:
        return "/var/lib/limpet"
    state_home = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state_home):  # the specification: ignore relative paths
        state_home = os.path.expanduser("~/.local/state")
    return os.path.join(state_home, "limpet")


def root_options(function: _Function) -> _Function:
    """Give `limpet` itself --state-dir and --node, which environment variables can set."""
    state_dir = _state_dir(
        envvar="LIMPET_STATE_DIR",
        show_envvar=True,
        help="The state directory.  [default: /var/lib/limpet for root, else ~/.local/state/limpet]",
    )
    node = _node(
        envvar="LIMPET_NODE",
        show_envvar=True,
        help=f"Show this node's records.  [default: {DEFAULT_NODE}]",
    )
    return state_dir(node(function))


def place_option(function: _Function) -> _Function:
    """Give a verb --state-dir and --node too, and pass their values as `place`."""

    @click.pass_context
    def placed(ctx: click.Context, /, state_dir: str | None, node: str | None, **arguments: object) -> object:
        return ctx.invoke(function, place=find_place(ctx, state_dir, node), **arguments)

    placed.__doc__ = function.__doc__
    placed.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]  # click's own
    return _state_dir(help="The state directory; overrides one given before the verb.")(_node(hidden=True)(placed))


def find_place(ctx: click.Context, state_dir: str | None, node: str | None) -> Place:
    """Return where the state is: from the options after the verb, those before it, the environment, or the default."""
    root = ctx.find_root().params
    return Place(
        state_dir or root.get("state_dir") or default_state_dir(),
        node or root.get("node") or DEFAULT_NODE,
    )


def output_option(function: _Function) -> _Function:
    """Give a verb -o table|json, and pass its value as `as_json`."""
    return click.option(
        "-o",
        "--output",
        "as_json",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        callback=lambda _ctx, _parameter, value: value == "json",
        help="The output format.",
    )(function)


def no_trunc_option(function: _Function) -> _Function:
    """Give a verb --no-trunc, and pass its value as `no_trunc`."""
    return click.option("--no-trunc", is_flag=True, help="Show full ids and do not shorten columns.")(function)


def parse_labels(_ctx: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Return the labels in KEY=VALUE texts, for a click option's callback."""
    labels = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{text!r}: expected KEY=VALUE")
        labels[key] = value
    return labels


def complete_id(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the container ids and names with this prefix, for shell completion; none if they cannot be read."""
    return _complete(ctx, incomplete, lambda snapshot: [*snapshot.ids, *snapshot.names])


def complete_sandbox(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the sandbox ids and names with this prefix, for shell completion; none if they cannot be read."""
    return _complete(ctx, incomplete, lambda snapshot: [*snapshot.sandbox_ids, *snapshot.sandbox_names])


def _complete(ctx: click.Context, incomplete: str, find: Callable[["Snapshot"], Iterable[str]]) -> list[CompletionItem]:
    from limpet.engine.inspection.snapshot import Snapshot  # noqa: PLC0415  # `limpet --help` must not load it
    from limpet.schema.errors import LimpetError  # noqa: PLC0415

    place = find_place(ctx, ctx.params.get("state_dir"), ctx.params.get("node"))
    try:
        with Snapshot.open(place.state_dir, node=place.node) as snapshot:
            texts = sorted({text for text in find(snapshot) if text and text.startswith(incomplete)})
        return [CompletionItem(text) for text in texts]
    except (LimpetError, OSError):  # a shell's completion has no place for an error
        return []


def _state_dir(**settings: Any) -> Callable[[_Function], _Function]:
    return click.option(
        "-s",
        "--state-dir",
        metavar="DIR",
        callback=require_text,
        shell_complete=lambda _ctx, _parameter, incomplete: [CompletionItem(incomplete, type="dir")],
        **settings,
    )


def _node(**settings: Any) -> Callable[[_Function], _Function]:
    return click.option("--node", metavar="NAME", callback=require_text, **settings)


def require_text(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Return the value, for a click option's or argument's callback; a usage error if it is given and empty."""
    if value == "":  # an unset shell variable must not select the default
        raise click.BadParameter("it is empty")
    return value
