"""`limpet logs`: a container's output, beside a live engine and without one."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from limpet.engine import Engine
from limpet.engine.cli import limpet as group
from tests.cli.conftest import Limpet
from tests.conftest import wait_until
from tests.starters.keepers import find_keepers

LINES = (
    "2026-01-31T12:00:01.000000000Z stdout F one\n"
    "2026-01-31T12:00:02.000000000Z stderr F wrong\n"
    "2026-01-31T12:00:03.000000005Z stdout P tw\n"
    "2026-01-31T12:00:04.000000000Z stdout F o\n"
)


def make(engine: Engine, logs: Path, key: str, *command: str) -> Path:
    sandbox = engine.create_sandbox({"metadata": {"name": key}, "log_directory": str(logs)})
    config = {"metadata": {"name": key}, "image": {"image": "host"}, "command": command, "log_path": f"{key}.log"}
    return Path(engine.create_container(config, sandbox.id, id=key).metadata.log_path)


def test_logs_prints_each_stream_where_it_belongs(state_dir: str, limpet: Limpet, tmp_path: Path) -> None:
    """stdout goes to stdout, stderr to stderr; options choose lines, and print when they were written."""
    with Engine.open(state_dir) as engine:
        path = make(engine, tmp_path / "logs", "c", "true")
        path.parent.mkdir(exist_ok=True)
        path.write_text(LINES)
        for _ in ("with a live engine", "without one"):
            done = limpet("logs", "c")
            assert (done.returncode, done.stdout, done.stderr) == (0, "one\ntwo\n", "wrong\n")
            engine.close()
    assert limpet.ok("logs", "c", "--stream", "stdout", "--tail", "1") == "two\n"
    assert limpet.ok("logs", "c", "--stream", "stderr") == ""
    assert limpet.ok("logs", "c", "-n", "0") == ""
    assert limpet.ok("logs", "c", "--since", "2026-01-31T13:00:03+01:00") == "two\n"
    assert limpet.ok("logs", "c", "--since", "1h") == ""
    assert limpet.ok("logs", "c", "-t").splitlines() == [
        "2026-01-31T12:00:01.000000000Z one",
        "2026-01-31T12:00:03.000000005Z two",
    ]
    assert limpet("logs", "c", "--since", "yesterday").returncode == 2
    assert limpet("logs", "c", "--since", f"{'9' * 5000}h").returncode == 2
    with path.open("a") as log:
        log.write("2026-01-31T12:00:05.000000000Z stdout P not finished")
        assert limpet.ok("logs", "c", "-n", "1") == "two\n"  # it is just being written
        log.write("\n")
    assert limpet.ok("logs", "c", "-n", "1") == "not finished"
    assert limpet.ok("logs", "c", "-n", "0") == ""
    path.write_text(LINES)
    assert limpet.ok("logs", "c", "-n", "9" * 400) == "one\ntwo\n"


def test_logs_says_why_there_are_none(state_dir: str, limpet: Limpet, tmp_path: Path) -> None:
    """No container, no log_path, no log yet: status 3, and what is missing. A link in its place: status 1."""
    with Engine.open(state_dir) as engine:
        path = make(engine, tmp_path / "logs", "c", "true")
        config = {"metadata": {"name": "n"}, "image": {"image": "host"}, "command": ["true"]}
        engine.create_container(config, engine.list_sandboxes()[0].id, id="none")
    for key, words in (("x", "'x'"), ("none", "no log_path"), ("c", "does not exist")):
        done = limpet("logs", key)
        assert done.returncode == 3
        assert words in done.stderr
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("/etc/passwd")
    done = limpet("logs", "c")
    assert (done.returncode, done.stdout) == (1, "")
    assert str(path) in done.stderr


@pytest.mark.parametrize("options", [(), ("--follow",)])
def test_logs_of_what_has_just_ended_has_all(state_dir: str, tmp_path: Path, options: Sequence[str]) -> None:
    """What is on its way to the log is waited for, as while the process that copies it gets no processor."""
    with Engine.open(state_dir) as engine:
        path = make(engine, tmp_path / "logs", "c", "sh", "-c", f"echo begun; read line < {tmp_path}/go; echo last")
        os.mkfifo(tmp_path / "go")
        engine.get("c").start()
        wait_until(lambda: path.exists() and "begun" in path.read_text(), "the first line")
        os.kill(find_keepers(state_dir)["limpet-copier"], signal.SIGSTOP)  # it goes on a moment later
        (tmp_path / "go").write_text("\n")
        engine.get("c").wait(20)
        assert CliRunner().invoke(group, ["-s", state_dir, "logs", *options, "c"]).output == "begun\nlast\n"


def test_logs_follows_until_the_container_has_ended(state_dir: str, tmp_path: Path) -> None:
    """--follow prints what is written, and ends with the container."""
    os.mkfifo(tmp_path / "go")
    with Engine.open(state_dir) as engine:
        make(engine, tmp_path / "logs", "c", "sh", "-c", f"echo begun; read line < {tmp_path}/go; echo last")
        engine.get("c").start()
        seen = tmp_path / "seen"
        with seen.open("wb") as file:
            follower = subprocess.Popen(
                [sys.executable, "-m", "limpet", "-s", state_dir, "logs", "-f", "c"], stdout=file
            )
        wait_until(lambda: seen.read_text() == "begun\n", "the first line")
        (tmp_path / "go").write_text("\n")
        assert follower.wait(30) == 0
        assert seen.read_text() == "begun\nlast\n"
