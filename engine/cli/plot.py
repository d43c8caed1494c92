"""The option --plot: whether its file can be written is found out first, and the drawing is made last."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import click

from limpet.engine.cli.output import note
from limpet.engine.cli.timeline import Timeline
from limpet.engine.state.durable import write_file
from limpet.engine.state.surroundings import may_access
from limpet.schema.errors import UnsupportedError

_KINDS = {".svg": "svg", ".png": "png"}
_Function = Callable[..., Any]


class Plot(NamedTuple):
    """A file to be drawn."""

    path: str
    render: Callable[[Timeline, str], bytes]

    def save(self, timeline: Timeline) -> None:
        """Draw it; a reader finds the old file or the new one. Raises OSError."""
        write_file(self.path, self.render(timeline, _find_kind(self.path)), 0o666)
        note(f"limpet: drew {self.path}")


def plot_option(help: str) -> Callable[[_Function], _Function]:
    """Give a verb --plot, and pass its value as `plot`: a Plot, or None."""
    return click.option("--plot", metavar="FILE", callback=_prepare, help=help)


def _prepare(_ctx: click.Context, _parameter: click.Parameter, path: str | None) -> Plot | None:
    if path is None:
        return None
    if not _find_kind(path):
        raise click.BadParameter(f"{path}: its ending must be .svg or .png")
    directory = os.path.dirname(os.path.abspath(path))
    if not may_access(directory, os.W_OK | os.X_OK) or not os.path.isdir(directory):
        raise click.BadParameter(f"{path}: its directory does not exist or is not writable")
    if os.path.isdir(path):
        raise click.BadParameter(f"{path}: it is a directory")
    try:
        from limpet.engine.cli.drawing import render  # noqa: PLC0415  # it takes a second to load
    except ImportError as error:
        raise UnsupportedError(
            f"--plot needs {error.name}, which is not installed: pip install 'limpet[plots]'"
        ) from None
    return Plot(path, render)


def _find_kind(path: str) -> str:
    return _KINDS.get(os.path.splitext(path)[1].lower(), "")
