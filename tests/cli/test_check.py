"""`limpet check` finds each kind of damage; a state directory that cannot be used is refused in one clear line."""

import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from limpet.engine import Engine
from limpet.engine.inspection.check import has_wal_reset_bug
from tests.cli.conftest import Jobs, Limpet, photograph
from tests.conftest import PACKAGES, find_interpreter


def make_state(state_dir: str) -> None:
    with Engine.open(state_dir) as engine:
        sandbox = engine.create_sandbox({"metadata": {"name": "jobs"}})
        config = {"metadata": {"name": "one"}, "image": {"image": "host"}, "command": ["true"]}
        engine.create_container(config, sandbox.id, id="one")


def sql(state_dir: Path, statement: str) -> None:
    connection = sqlite3.connect(state_dir / "store.db")
    connection.execute(statement)
    connection.commit()
    connection.close()


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def replace_by_other_database(state_dir: Path) -> None:
    (state_dir / "store.db").unlink()
    sql(state_dir, "CREATE TABLE other (x)")


def forget_close(state_dir: Path) -> None:
    path = state_dir / "owner.json"
    path.write_text(path.read_text().replace('"closed":true', '"closed":false'))


def replace_by_file(state_dir: Path) -> None:
    shutil.rmtree(state_dir)
    state_dir.write_text("not a directory")


def replace_by_foreign(state_dir: Path) -> None:
    shutil.rmtree(state_dir)
    state_dir.mkdir()
    (state_dir / "notes.txt").touch()


def empty(state_dir: Path) -> None:
    shutil.rmtree(state_dir)
    state_dir.mkdir()


# What is done to a sound state; the status of ps and of recover; words in what they say.
UNUSABLE: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "missing": (shutil.rmtree, 3, "does not exist"),
    "empty": (empty, 3, "no engine has opened it"),
    "a file": (replace_by_file, 1, "is not a directory"),
    "not ours": (replace_by_foreign, 1, "'notes.txt'"),
    "no database any more": (lambda path: (path / "store.db").unlink(), 6, "is missing"),
    "not a database": (lambda path: overwrite(path / "store.db", 0, b"#" * 100), 6, "not a database"),
    "truncated": (lambda path: os.truncate(path / "store.db", 5000), 6, "malformed"),
    "another program's database": (replace_by_other_database, 6, "not one of limpet's"),
    "newer": (lambda path: sql(path, "UPDATE alembic_version SET version_num = '9999'"), 6, "newer"),
    "WAL gone": (forget_close, 6, "store.db-wal is missing"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_state_directories(limpet: Limpet, name: str) -> None:
    """All verbs refuse with the same status and one line on stderr; those that only look leave it as it is."""
    make_state(limpet.state_dir)
    damage, status, words = UNUSABLE[name]
    damage(Path(limpet.state_dir))
    before = photograph(os.path.dirname(limpet.state_dir))
    assert limpet("check").returncode == status
    for args in (("ps",), ("recover", "--dry-run"), ("recover",)):
        assert photograph(os.path.dirname(limpet.state_dir)) == before
        done = limpet(*args)
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        assert done.stderr.startswith("limpet: ")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


def test_an_older_schema_is_upgraded_by_recover_alone(limpet: Limpet) -> None:
    """What only reads leaves an older database alone and says what to do."""
    make_state(limpet.state_dir)
    sql(Path(limpet.state_dir), "UPDATE alembic_version SET version_num = '0001'")
    done = limpet("ps")
    assert done.returncode == 6
    assert "which upgrades it" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_another_users_state(limpet: Limpet) -> None:
    """Root may read the state of another user, and leaves it as it is; changes are refused without a live engine."""
    make_state(limpet.state_dir)
    for path in (limpet.state_dir, *map(str, Path(limpet.state_dir).rglob("*"))):
        os.chown(path, 12345, 12345, follow_symlinks=False)
    before = photograph(limpet.state_dir)
    for line in ("ps -a", "check", "pods", "images", "info", "top", "inspect one", "history one", "events"):
        limpet.ok(*line.split())
    for line in ("recover", "stop one", "rm one", "run -d host true", "prune"):
        done = limpet(*line.split())
        assert done.returncode == 1
        assert "belongs to user 12345" in done.stderr
    assert photograph(limpet.state_dir) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("line", ["ps", "stop one", "run -d host true", "load image.tar"])
def test_a_state_of_another_user_is_told_to_be_that(line: str) -> None:
    """Also by the verbs that make a state directory where there is none."""
    interpreter = find_interpreter(12345)
    if not interpreter:
        pytest.skip("another user cannot read this installation")
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        make_state(os.path.join(place, "state"))
        script = "import os\nos.setgroups([]); os.setgid(12345); os.setuid(12345)\nfrom limpet.engine.cli import main\n"
        script += f"main(['-s', {place + '/state'!r}, *{line.split()}])"
        done = subprocess.run(
            [interpreter, "-c", script], capture_output=True, text=True, cwd="/", env=PACKAGES, timeout=60, check=False
        )
    assert "belongs to user 0, you are user 12345" in done.stderr


FOUND: dict[str, tuple[Callable[[Path], object], int, str, str]] = {
    "open directory": (lambda path: path.chmod(0o755), 7, "directory", "chmod 700"),
    "open database": (lambda path: (path / "store.db").chmod(0o644), 7, "directory", "chmod 600"),
    "linked lock": (
        lambda path: ((path / "lock").rename(path / "images" / "l"), (path / "lock").symlink_to("images/l")),
        7,
        "directory",
        "symbolic link",
    ),
    "flipped record": (lambda path: sql(path, "UPDATE container_status SET pid = 1"), 6, "records", "checksum"),
    "lost status": (lambda path: sql(path, "DELETE FROM container_status"), 6, "records", "missing"),
    "lost container": (lambda path: sql(path, "DELETE FROM container"), 6, "database", "missing row"),
    "lost bundle": (lambda path: shutil.rmtree(path / "containers" / "one"), 7, "bundles", "is absent"),
    "half a bundle": (lambda path: (path / "containers/one/config.json").unlink(), 7, "bundles", "is partial"),
    "foreign bundle": (
        lambda path: (path / "containers/one/.limpet.json").write_text(
            '{"limpet":"container","id":"two","node":"local"}'
        ),
        7,
        "bundles",
        "is foreign",
    ),
    "stray bundle": (lambda path: (path / "containers" / "two").mkdir(), 7, "bundles", "has no row in the store"),
    "stray link": (lambda path: (path / "sandboxes" / "x").symlink_to("/"), 7, "bundles", "quarantine"),
}


@pytest.mark.parametrize("name", FOUND)
def test_check_finds(limpet: Limpet, name: str) -> None:
    """Each kind of damage is found under the aspect it belongs to, and the exit status tells which kind."""
    make_state(limpet.state_dir)
    damage, status, aspect, words = FOUND[name]
    damage(Path(limpet.state_dir))
    problems = limpet.json("check", status=status)["check"]["problems"]
    assert any(problem["aspect"] == aspect and words in problem["message"] for problem in problems), problems
    assert f"WRONG  {aspect}" in limpet.ok("check", status=status)


def test_check_of_a_sound_state(limpet: Limpet, jobs: Jobs) -> None:
    """Nothing is wrong with a state that is in use, nor with one whose engine was killed."""
    for _ in range(2):
        report = limpet.json("check")["check"]
        assert report["problems"] == []
        assert list(report["checked"]) == ["directory", "wal", "database", "records", "bundles"]
        assert sqlite3.sqlite_version in report["notes"][0]
        assert report["holder"] == (None if jobs.engine.is_over() else jobs.engine.pid)
        if not jobs.engine.is_over():
            jobs.engine.kill()


def test_damaged_wal_after_a_crash(limpet: Limpet, jobs: Jobs, state_dir: str) -> None:
    """A damaged WAL would make SQLite forget acknowledged commits: it is refused, and check names it."""
    jobs.engine.kill()
    wal = Path(state_dir, "store.db-wal")
    overwrite(wal, 32 + 24 + 100, b"\xff\xff\xff\xff")
    assert limpet("ps").returncode == 6
    report = limpet.json("check", status=6)["check"]
    assert [problem["aspect"] for problem in report["problems"]] == ["wal"]
    assert "database" not in report["checked"]


def test_recover_says_what_is_unresolved(limpet: Limpet, state_dir: str) -> None:
    """recover ends with 7 while a container stays UNKNOWN, and names the rule and the reason."""
    make_state(state_dir)
    shutil.rmtree(Path(state_dir, "containers", "one"))
    done = limpet("recover")
    assert done.returncode == 7
    assert "created-no-bundle" in done.stdout
    assert "cannot be started" in done.stdout


def test_recover_of_an_interrupted_create_is_resolved(limpet: Limpet, state_dir: str) -> None:
    """A container that was never created holds nothing: there is nothing to resolve."""
    with Engine.open(state_dir) as engine:
        sandbox = engine.create_sandbox({"metadata": {"name": "jobs"}})
        engine.add_container({"metadata": {"name": "one"}, "image": {"image": "host"}}, sandbox.id)
    assert "new-empty" in limpet.ok("recover")
    assert "never created" in limpet.ok("ps")


@pytest.mark.parametrize("version", ["3.7.0", "3.40.1", "3.44.5", "3.45.0", "3.50.6", "3.51.0", "3.51.2"])
def test_versions_with_the_wal_reset_bug(version: str) -> None:
    """Versions from 3.7.0 to 3.51.2 have the bug, but for two that were mended."""
    assert has_wal_reset_bug(parse(version))


@pytest.mark.parametrize("version", ["3.6.23", "3.44.6", "3.44.9", "3.50.7", "3.51.3", "3.52.0", "4.0.0"])
def test_versions_without_the_wal_reset_bug(version: str) -> None:
    """Older ones, 3.44.6, 3.50.7 and all from 3.51.3 on do not have it."""
    assert not has_wal_reset_bug(parse(version))


def parse(version: str) -> tuple[int, int, int]:
    major, minor, patch = map(int, version.split("."))
    return major, minor, patch
