"""`limpet backup`: copy the database to a file, also beside a live engine."""

import os

import click

from limpet.engine.cli.options import Place, output_option, place_option
from limpet.engine.cli.output import print_json, print_lines, printable
from limpet.engine.database.sqlite import back_up
from limpet.engine.inspection.snapshot import Snapshot


@click.command("backup")
@click.argument("file", type=click.Path(path_type=str))
@output_option
@place_option
def command(place: Place, file: str, *, as_json: bool) -> None:
    """Copy the database, as it is at one instant, to the new FILE: whole, verified and flushed, or not there.

    Restore it by putting it in the place of store.db in a state directory that is not in use, with -wal, -shm and
    owner.json removed. Bundles and images are not in it.
    """
    with Snapshot.open(place.state_dir, node=place.node) as snapshot:
        snapshot.source.ask(lambda reader: back_up(reader, file))
    size = os.path.getsize(file)
    if as_json:
        print_json(path=os.path.abspath(file), bytes=size, containers=len(snapshot))
    else:
        print_lines([f"{printable(file)}: {size} bytes, containers: {len(snapshot)}, verified"])
