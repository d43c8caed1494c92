"""`limpet backup`: copy the database to a file, even while an engine is running."""

import os

import click

from limpet.engine.cli.options import Place, output_option, place_option, require_text
from limpet.engine.cli.output import print_json, print_lines
from limpet.engine.database.sqlite import back_up
from limpet.engine.inspection.snapshot import Snapshot
from limpet.schema.errors import escape


@click.command("backup")
@click.argument("file", type=click.Path(path_type=str), callback=require_text)
@output_option
@place_option
def command(place: Place, file: str, *, as_json: bool) -> None:
    """Copy the database to the new FILE.

    The copy is a consistent snapshot, verified and flushed to disk. If anything fails, FILE is not created. Bundles and
    images are not included.

    To restore it, stop the engine, replace store.db in the state directory with FILE, and remove store.db-wal,
    store.db-shm and owner.json.
    """
    with Snapshot.open(place.state_dir, node=place.node) as snapshot:
        snapshot.source.ask(lambda reader: back_up(reader, file))
    size = os.path.getsize(file)
    if as_json:
        print_json(path=os.path.abspath(file), bytes=size, containers=len(snapshot))
    else:
        print_lines([f"{escape(file)}: {size} bytes, containers: {len(snapshot)}, verified"])
