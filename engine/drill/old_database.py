"""A database as an earlier limpet left it: made by its migrations, up to the revision of that time."""

from limpet.engine.database.sqlite.connection import APPLICATION_ID, connect_writer, create_file
from limpet.engine.database.sqlite.upgrade import upgrade


def make_old_database(path: str, revision: str) -> None:
    """Make the new file `path` an empty database of this schema revision."""
    create_file(path)
    upgrade(path, revision=revision)
    connection = connect_writer(path)
    try:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    finally:
        connection.close()
