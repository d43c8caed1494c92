"""The plain SQL that an engine runs, held against the tables that it is about."""

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from limpet import Store
from limpet.engine.database.sqlite import statements
from limpet.schema import ddl, rows
from limpet.schema.revision import SCHEMA_REVISION
from limpet.schema.seal import SEALS, sealed_columns
from limpet.schema.tables import TABLES

ROOT = Path(__file__).parents[2]
ROWS = {
    "container": rows.ContainerRow,
    "event": rows.EventRow,
    "container_status": rows.StatusRow,
    "recovery": rows.ReportRow,
    "sandbox": rows.SandboxRow,
}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """Return an empty database of the newest schema."""
    with closing(sqlite3.connect(tmp_path / "fresh.db")) as connection:
        for statement in ddl.CREATE:
            connection.execute(statement)
        yield connection


def test_the_newest_schema_is_what_the_tables_print() -> None:
    """schema/ddl.py is the output of docs/printed/ddl.py, to the letter."""
    command = [sys.executable, "docs/printed/ddl.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "schema" / "ddl.py").read_text() == printed


def test_rows_have_the_columns_of_their_tables() -> None:
    """Each row's class names the table's columns in order; the checksum of today covers all but itself."""
    for name, row in ROWS.items():
        columns = [column.name for column in TABLES.tables[name].columns]
        assert ["node", *row._fields] == columns  # type: ignore[attr-defined]
        if name in SEALS:
            assert [*sealed_columns(name, SCHEMA_REVISION), "checksum"] == columns
    assert {name for name, table in TABLES.tables.items() if "checksum" in table.columns} == set(SEALS)


def test_every_statement_is_one_that_the_schema_knows(database: sqlite3.Connection) -> None:
    """SQLite prepares each statement, with as many parameters as it has, on the newest schema.

    None has a number: Python 3.12.1 takes it for a name, and warns that a sequence is given.
    """
    texts = [getattr(statements, name) for name in dir(statements) if name.isupper() and not name.startswith("_")]
    texts = [text for each in texts for text in ([each] if isinstance(each, str) else each)]
    assert len(texts) > 25
    for text in (*texts, statements.update_statuses(4)):
        assert not re.search(r"\?\d", text)
        database.execute(f"EXPLAIN {text}", (None,) * text.count("?")).fetchall()


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        ("SELECT_NAMES_BY_NAME", "COVERING INDEX sqlite_autoindex_container_3 (node=? AND name=?)"),
        ("SELECT_NAMES_BY_SANDBOX", "sandbox_id=?)"),
        ("SELECT_NAMES_BY_BOTH", "name=? AND sandbox_id=?)"),
        ("SELECT_NAMES_BY_TEXT", "COVERING INDEX sqlite_autoindex_container_3 (node=?)"),
        ("SELECT_NAMES_BY_LABEL", "label USING PRIMARY KEY (node=? AND key=? AND value=?)"),
        ("COUNT_LABELLED", "(node=? AND key=? AND value=?)"),
        ("DELETE_LABEL", "(node=? AND key=? AND value=? AND id=?)"),
        ("SELECT_IDS_BETWEEN", "(node=? AND id>? AND id<?)"),
        ("SELECT_IDS_OF_SANDBOX", "sandbox_id=?)"),
        ("SELECT_CONTAINER_BY_NAME", "(node=? AND sandbox_id=? AND name=? AND attempt=?)"),
        ("SELECT_RESTARTABLE", "USING INDEX ix_container_restartable (node=?)"),
        ("SELECT_EVENTS_OF_ONE", "(node=? AND id=?)"),
        ("SELECT_LAST_VERSION", "(node=? AND id=?)"),
        ("PRUNE_EVENTS", "SEARCH later USING INDEX sqlite_autoindex_event_2 (node=? AND id=? AND revision>?)"),
        ("PRUNE_HISTORY", "(node=? AND id=? AND revision<?)"),
    ],
)
def test_what_is_asked_for_is_found_by_an_index(database: sqlite3.Connection, statement: str, index: str) -> None:
    """No table, and no log of changes, is read from its beginning to its end; labels are looked for in an index."""
    text = getattr(statements, statement)
    plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {text}", (None,) * text.count("?"))]
    assert index in " ".join(plan)
    assert not [step for step in plan if step.startswith("SCAN container")], plan


def test_opening_a_current_store_loads_no_sqlalchemy(state_dir: str) -> None:
    """SQLAlchemy and alembic take longer to load than a store to open; only a database that is older pays for them."""
    script = (
        f"import sys\nfrom limpet import Store\nfor _ in range(2): Store.open({state_dir!r}).close()\n"
        "assert not {'sqlalchemy', 'alembic', 'asyncio', 'rich', 'click', 'zstandard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_import_and_open_cost(state_dir: str, tmp_path: Path) -> None:
    """Importing limpet and opening a current store costs about 8.5 times the processor time of Python alone.

    Beside another copy of the tests it is up to 11 times: a busy machine's caches are slower for whoever reads more.
    """
    Store.open(state_dir).close()
    measure = (
        "import resource, subprocess, sys\n"
        "def cpu(code):\n"
        "    before = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "    subprocess.run([sys.executable, '-c', code], check=True)\n"
        "    after = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime\n"
        "pairs = [(cpu('pass'), cpu(sys.argv[1])) for _ in range(9)]\n"
        "print(min(pair[1] for pair in pairs[1:]) / min(pair[0] for pair in pairs))\n"
    )
    code = f"from limpet import Store; Store.open({state_dir!r}).close()"
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", measure, code]
    done = subprocess.run(command, env=os.environ | compiled, check=True, capture_output=True, text=True)
    assert float(done.stdout) < 14
