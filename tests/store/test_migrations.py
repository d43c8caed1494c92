"""The database's history: replayed it equals what is made fresh, and an older database is upgraded or left alone."""

import importlib
import os
import re
import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from limpet.engine import Store, errors
from limpet.engine.database.sqlite import WRITER_PRAGMAS, migrate, upgrade
from limpet.engine.drill.old_database import make_old_database
from limpet.schema.revision import SCHEMA_REVISION
from limpet.schema.tables import TABLES
from tests.records import RUNNING, metadata, sandbox

VERSIONS = sorted(
    path.name.split("_")[0]
    for path in Path(__file__).parents[2].joinpath("schema/migrations/versions").glob("[0-9]*.py")
)


def schema_of(path: str) -> dict[str, str]:
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    connection.close()
    return {name: _normalize(sql) for name, sql in rows if name != "alembic_version"}


def _normalize(sql: str) -> str:
    head, _, body = re.sub(r"\s+", " ", sql.replace('"', "")).partition("(")
    inner, _, options = body.rpartition(")")
    clauses = sorted(part.strip() for part in re.split(r",(?![^(]*\))", inner))
    return f"{head.strip()} ({', '.join(clauses)}) {options.strip()}"


def test_replayed_equals_fresh(tmp_path: Path) -> None:
    """Running every migration gives the very tables that a new database is made with."""
    make_old_database(str(tmp_path / "replayed.db"), "head")
    migrate.create_database(str(tmp_path / "fresh.db"), WRITER_PRAGMAS)
    assert schema_of(str(tmp_path / "replayed.db")) == schema_of(str(tmp_path / "fresh.db"))
    assert VERSIONS[-1] == SCHEMA_REVISION
    engine = create_engine(f"sqlite:///{tmp_path}/replayed.db")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), TABLES) == []
    engine.dispose()


@pytest.mark.parametrize("revision", VERSIONS[:-1])
def test_an_older_database_is_backed_up_and_upgraded(state_dir: str, revision: str) -> None:
    """A database of each older revision opens, keeps its rows, and was copied before it was changed."""
    os.mkdir(state_dir, 0o700)
    make_old_database(f"{state_dir}/store.db", revision)
    with sqlite3.connect(f"{state_dir}/store.db") as raw:
        row = ("other", 7, 1, 0)[: len(raw.execute("PRAGMA table_info(node)").fetchall())]
        raw.execute(f"INSERT INTO node VALUES ({', '.join('?' * len(row))})", row)
    raw.close()
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        assert len(store.history("a")) == 1
    with sqlite3.connect(f"{state_dir}/store.db") as raw:
        assert raw.execute("SELECT epoch FROM node WHERE name = 'other'").fetchone() == (7,)
    raw.close()
    (backup,) = Path(state_dir, "backups").iterdir()
    with sqlite3.connect(backup) as raw:
        assert raw.execute("SELECT version_num FROM alembic_version").fetchone() == (revision,)
    raw.close()


def test_a_migration_that_fails_changes_nothing(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in the middle of a migration leaves schema and revision as they were; the next opening succeeds."""
    os.mkdir(state_dir, 0o700)
    make_old_database(f"{state_dir}/store.db", VERSIONS[0])
    before = schema_of(f"{state_dir}/store.db")

    def change_half(connection: object, revision: str) -> None:
        connection.exec_driver_sql("CREATE TABLE half (a)")  # type: ignore[attr-defined]
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(upgrade, "run_migrations", change_half)
        with pytest.raises(errors.StoreError, match="in the middle"):
            Store.open(state_dir)
    assert schema_of(f"{state_dir}/store.db") == before
    Store.open(state_dir).close()


def test_revisions_are_in_order() -> None:
    """Revisions are numbers that grow, so that newer and older can be told apart by comparing them."""
    modules = [
        importlib.import_module(f"limpet.schema.migrations.versions.{path.stem}")
        for path in sorted(Path(__file__).parents[2].joinpath("schema/migrations/versions").glob("[0-9]*.py"))
    ]
    assert [module.revision for module in modules] == VERSIONS
    assert [module.down_revision for module in modules] == [None, *VERSIONS[:-1]]
