"""A copy of the sources in which CONTRIBUTING's steps were followed: one column more on each table."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from limpet.schema.revision import SCHEMA_REVISION
from limpet.schema.seal import SEALS, sealed_columns

ROOT = Path(__file__).parents[2]
NEXT = f"{int(SCHEMA_REVISION) + 1:04}"
_FOLDERS = ("benchmarks", "docs", "engine", "recovery", "schema", "tests")
_PACKAGES = {
    "__init__.py": "engine/package/__init__.py",
    "__main__.py": "engine/package/__main__.py",
    "benchmarks": "benchmarks",
    "engine": "engine",
    "recovery": "recovery",
    "schema": "schema",
    "testing": "engine/drill/harness",
}
"""What the package `limpet` is made of, as pyproject.toml maps it."""


class Copy:
    """A copy of the project below `directory`, importable with `environment`."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "project"
        self.edited: set[str] = set()
        """The files that were changed or added, as CONTRIBUTING names them."""
        for folder in _FOLDERS:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / folder, self.root / folder, ignore=ignored)
        for name in ("CONTRIBUTING.md", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        package = self.root / ".packages" / "limpet"
        package.mkdir(parents=True)
        for name, target in _PACKAGES.items():
            (package / name).symlink_to(self.root / target)
        self.environment = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}

    def edit(self, name: str, *changes: tuple[str, str]) -> None:
        """Replace texts in a file, each wherever a pattern matches, which must be somewhere."""
        path = self.root / name
        text = path.read_text()
        for pattern, replacement in changes:
            text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
            assert count, f"{name}: nothing matches {pattern!r}"
        path.write_text(text)
        self.edited.add(name)

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run Python in the copy."""
        return subprocess.run(
            [sys.executable, *command], cwd=self.root, env=self.environment, capture_output=True, text=True, check=False
        )


def follow_the_steps(copy: Copy) -> None:
    """Add the column `added` to each table."""
    copy.edit(
        "schema/tables.py",
        (r'^    Column\("checksum"', '    Column("added", Text, nullable=False),\n    Column("checksum"'),
        (r'^(    Column\("opened_at".*\n)', r'\1    Column("added", Text),\n'),
        (r'^(    Column\("report".*\n)', r'\1    Column("added", Text),\n'),
    )
    copy.edit(
        "schema/rows.py",
        (r"^    checksum: int", "    added: str\n    checksum: int"),
        (r"^(    body: str \| None = None\n)", r'\1    added: str = "new"\n'),
        (r"^    report: str\n", "    report: str\n    added: str\n"),
    )
    copy.edit("schema/status.py", (r"^    unknown: bool = False", '    unknown: bool = False\n    added: str = "old"'))
    copy.edit(
        "schema/sandbox_status.py", (r"^    expires_at: int = 0", '    added: str = "old"\n    expires_at: int = 0')
    )
    copy.edit("schema/item.py", (r"^    updated_at: int", '    added: str = "old"\n    updated_at: int'))
    copy.edit("schema/metadata.py", (r'^    root_dir: str = ""', '    added: str = "old"\n    root_dir: str = ""'))
    copy.edit(
        "schema/codec.py",
        (r"^(        +)(extra_to_text\(.*else None,\n)(        \)\n)", r"\1\2\1status.added,\n\3"),
        (
            r"^(        +)status.expires_at,\n(        \)\n        encoded)",
            r"\1status.expires_at,\n\1status.added,\n\2",
        ),
        (r"deadline.boot_at\)", 'deadline.boot_at, "new")'),
        (r"item.updated_at, text\)", "item.updated_at, text, item.added)"),
        (r"^(    return Item\(kind=row.kind)", r"\1, added=row.added"),
        (
            r"^            stopped_at=row.stopped_at,",
            "            added=row.added,\n            stopped_at=row.stopped_at,",
        ),
        (
            r"^            released=bool\(row.released\),",
            "            released=bool(row.released),\n            added=row.added,",
        ),
        (r"^        checksum=0,", "        added=metadata.added,\n        checksum=0,"),
        (r"^            root_dir=row.root_dir,", "            added=row.added,\n            root_dir=row.root_dir,"),
    )
    copy.edit(
        "engine/store/draft.py",
        (r"message=status.message,\n", 'message=status.message,\n                added="new",\n'),
        (r"ReportRow\(number, at, report\)", 'ReportRow(number, at, report, "new")'),
    )
    copy.edit("schema/revision.py", (re.escape(SCHEMA_REVISION), NEXT))
    for table in SEALS:
        columns = (*sealed_columns(table, SCHEMA_REVISION), "added")
        copy.edit("schema/seal.py", (rf'^    "{table}": {{', f'    "{table}": {{"{NEXT}": {columns!r}, '))
    (copy.root / f"schema/migrations/versions/{NEXT}_added.py").write_text(_write_migration(copy))
    copy.edited.add("schema/migrations/versions/")
    copy.edit("docs/on-disk-format.md", (r"^(\| `[a-z_]+` \|)", r"| `added` | TEXT | added by this copy |\n\1"))


def _write_migration(copy: Copy) -> str:
    """Return the migration, with each table as the copy's own tables print it."""
    script = "import sys; sys.path.insert(0, 'docs/printed'); import ddl; print(ddl.print_ddl())"
    printed = copy.run("-c", script)
    assert printed.returncode == 0, printed.stderr
    creates = {name: text for text, name in re.findall(r'"""(CREATE TABLE (\w+) .*?)"""', printed.stdout, re.DOTALL)}
    lines = [
        '"""One column more on each table."""',
        "from alembic import op",
        "from limpet.schema.migrations.reseal import rebuild, rebuild_unsealed",
        "from limpet.schema.seal import sealed_columns",
        f'revision, down_revision = "{NEXT}", "{SCHEMA_REVISION}"',
        "def upgrade():",
    ]
    for table, text in creates.items():
        if table == "alembic_version":
            continue
        create = text.replace(f"CREATE TABLE {table} ", f"CREATE TABLE {table}_new ", 1)
        columns = re.findall(r'^    "?(\w+)"? (?:TEXT|INTEGER)', text, re.MULTILINE)
        old = tuple(name for name in columns if name not in {"added", "checksum"})
        if table in SEALS:
            lines.append(
                f"    rebuild(op.get_bind(), {table!r}, {create!r}, sealed_columns({table!r}, down_revision),"
                f" sealed_columns({table!r}, revision), lambda row: {{'added': 'old'}})"
            )
        else:
            new = {name: "old" for name in columns if name == "added"}
            lines.append(f"    rebuild_unsealed(op.get_bind(), {table!r}, {create!r}, {old!r}, {new!r})")
    return "\n".join(lines) + "\n"
