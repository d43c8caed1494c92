"""`limpet load`: load images from an archive or a layout."""

import os

import click

from limpet.engine.cli.hands import Hands
from limpet.engine.cli.options import Place, output_option, place_option, require_text
from limpet.engine.cli.output import print_json, print_lines
from limpet.engine.control.requests import Load, Loaded
from limpet.schema.errors import escape


@click.command("load")
@click.argument("path", metavar="ARCHIVE|LAYOUT", type=click.Path(path_type=str), callback=require_text)
@output_option
@place_option
def command(place: Place, path: str, *, as_json: bool) -> None:
    """Load all images for this machine from an OCI layout (a directory or a tar archive) or a `docker save` archive.

    Each is verified and unpacked once, so that one that cannot be is refused here; then none of them is loaded. A live
    engine does it, and reads the path as its own user.
    """
    with Hands(place, makes=True) as hands:
        loaded: Loaded = hands.ask(Load(path=os.path.abspath(path)))
    if as_json:
        print_json(images=loaded.names)
    else:
        print_lines(f"loaded {escape(name)}" for name in loaded.names)
