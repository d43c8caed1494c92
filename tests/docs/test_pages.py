"""The pages in docs say what the code does, as far as a machine can tell."""

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Table, Text

from limpet.engine import Engine, Store
from limpet.engine.cli import VERBS
from limpet.recovery import RULES, SANDBOX_RULES
from limpet.recovery.intents import INTENT_RULES
from limpet.recovery.orphans import ORPHAN_RULES
from limpet.schema import ContainerState
from limpet.schema.revision import SCHEMA_REVISION
from limpet.schema.tables import TABLES
from tests.conftest import EngineProcess, require_tools

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"])
FORMAT = (ROOT / "docs" / "on-disk-format.md").read_text()
SLEEPER = {"metadata": {"name": "sleeper"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}


def blocks(section: str, language: str) -> list[str]:
    """Return the code blocks in a section of the format's page, up to the next heading."""
    text = re.split(r"^#+ ", FORMAT.partition(f"# {section}\n")[2], flags=re.MULTILINE)[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_rules_page_is_printed_from_the_tables() -> None:
    """docs/recovery-rules.md is what `python docs/printed/recovery_rules.py` prints."""
    command = [sys.executable, "docs/printed/recovery_rules.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "recovery-rules.md").read_text() == printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_is_there(page: Path) -> None:
    """Every relative link and every path of the source that a page names exists."""
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    paths = re.findall(r"`((?:benchmarks|engine|recovery|schema|tests|docs)/[\w./-]+)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing + [path for path in paths if not (ROOT / path).exists()]


def test_the_command_lines_page_lists_every_verb() -> None:
    """The table of verbs has each of them once."""
    rows = re.findall(r"^\| (`.+?`) \|", (ROOT / "docs" / "command-line.md").read_text(), re.MULTILINE)
    assert sorted(re.findall(r"`([a-z]+)[`\s]", " ".join(rows) + " ")) == sorted(VERBS)


def test_the_architecture_lists_every_room() -> None:
    """The table of rooms has each folder of the engine with code, except the package that exports the names."""
    section = (ROOT / "docs" / "ARCHITECTURE.md").read_text().partition("## The rooms of the engine\n")[2]
    listed = re.findall(r"^\| `engine/(\w+)/` \|", section.partition("\n## ")[0], re.MULTILINE)
    rooms = {path.parent.name for path in ROOT.glob("engine/*/__init__.py")} - {"package"}
    assert sorted(listed) == sorted(rooms)


@pytest.mark.parametrize("table", TABLES.sorted_tables, ids=lambda table: table.name)
def test_every_column_is_described(table: Table) -> None:
    """The format's page lists each table's columns in their order, with type and null as in the schema."""
    section = re.split(r"^#", FORMAT.partition(f"### table `{table.name}`\n")[2], flags=re.MULTILINE)[0]
    described = re.findall(r"^\| `(\w+)` \| (\w+(?: or null)?) \| \S", section, re.MULTILINE)
    assert described == [
        (
            column.name,
            ("text" if isinstance(column.type, Text) else "integer") + (" or null" if column.nullable else ""),
        )
        for column in table.columns
    ]
    assert f"Schema `{SCHEMA_REVISION}`." in FORMAT


def test_crash_windows_name_rules_that_exist() -> None:
    """The rules that the table of crash windows names are rules of the three tables."""
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text().partition("## Crash windows\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[-2] for line in text.splitlines() if line.startswith("| ")]
    named = {label for cell in cells for label in re.findall(r"`([\w-]+)`", cell)}
    assert named
    assert named <= {rule.label for table in (RULES, INTENT_RULES, SANDBOX_RULES, ORPHAN_RULES) for rule in table}


def test_checksums_are_computed_as_described(state_dir: str) -> None:
    """The program on the page finds sound rows sound, and one changed value damaged."""
    with Engine.open(state_dir) as engine:
        sandbox = engine.create_sandbox({"metadata": {"name": "jöbs"}, "annotations": {"odd": '\x01\n"\\\x7f\u2028𝄞'}})
        engine.create_container(SLEEPER, sandbox.id, id="one")
    (program,) = blocks("Checksums", "python")
    exec(program, {"state_dir": state_dir})
    with closing(sqlite3.connect(f"{state_dir}/store.db")) as connection:
        connection.execute("UPDATE container SET log_path = 'x'")
        connection.commit()
    with pytest.raises(AssertionError, match="container one is damaged"):
        exec(program, {"state_dir": state_dir})


def test_restoring_a_backup_as_described(state_dir: str, tmp_path: Path) -> None:
    """The steps on the page find what runs, bring back the records of the backup, and are asked for nothing more."""
    backup = str(tmp_path / "backup.db")
    (find, *steps) = blocks("Restoring a backup", "sh")
    with Engine.open(state_dir) as engine:
        sandbox = engine.create_sandbox({"metadata": {"name": "jobs"}})
        sleeper = engine.create_container(SLEEPER, sandbox.id, id="sleeper")
        sleeper.start()
        (line,) = shell(state_dir, find)
        assert line.split() == [str(sleeper.status.pid), "sleep", "sleep", "1000"]
        engine.store.back_up(backup)
    with Engine.open(state_dir) as engine:
        engine.get("sleeper").stop(1)
    for step in steps:
        shell(state_dir, step, BACKUP=backup)
    with Engine.open(state_dir) as engine:
        assert [finding.rule for finding in engine.recovery.findings] == ["exit-unseen"]
        assert engine.get("sleeper").status.exit_code == 255


def test_reading_with_sqlite3_as_described(state_dir: str, engine_process: Callable[[str], EngineProcess]) -> None:
    """The query on the page works beside a live engine and after its crash, and leaves the state as it was."""
    require_tools("sqlite3")
    (query,) = blocks("Reading it with sqlite3", "sh")
    process = engine_process(f"""
engine = Engine.open(state_dir)
sandbox = engine.create_sandbox({{"metadata": {{"name": "jobs"}}}})
container = engine.create_container({ {**SLEEPER, "command": ["false"]} }, sandbox.id, id="one")
container.start()
say(container.wait(10).exit_code)
time.sleep(1000)
""")
    assert process.read() == ["1"]
    (line,) = shell(state_dir, query)
    assert line.startswith("sleeper|one|EXITED|1|Error|20")
    process.kill()
    assert shell(state_dir, query) == [line]
    with Store.open(state_dir) as store:
        assert store.status("one").state is ContainerState.EXITED


def shell(state_dir: str, script: str, **environment: str) -> list[str]:
    done = subprocess.run(
        ["sh", "-eu", "-c", script],
        env={**os.environ, "STATE": state_dir, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()
