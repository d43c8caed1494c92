"""A database as an earlier limpet left it: created by the migrations up to a revision."""

from limpet.engine.database.sqlite.connection import APPLICATION_ID, connect_writer, create_file
from limpet.engine.database.sqlite.upgrade import upgrade


def make_old_database(path: str, revision: str) -> None:
    """Create the new file `path` as an empty database of this schema revision."""
    create_file(path)
    upgrade(path, revision=revision)
    connection = connect_writer(path)
    try:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    finally:
        connection.close()
