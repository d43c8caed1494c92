"""A database as an earlier limpet left it: created by the migrations up to a revision."""

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool

from limpet.engine.database.sqlite.connection import APPLICATION_ID, connect_writer, create_file


def make_old_database(path: str, revision: str) -> None:
    """Create the new file `path` as an empty database of this schema revision."""
    create_file(path)
    engine = create_engine("sqlite://", creator=lambda: connect_writer(path), poolclass=StaticPool)
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", "limpet.schema:migrations")
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
    engine.dispose()
