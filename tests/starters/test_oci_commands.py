"""The files of a command in a container, and what the next engine does with those of one that was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from limpet.engine.starters.oci import commands
from limpet.engine.starters.oci.commands import CommandFiles, end_left, find_left
from limpet.engine.starters.oci.run_directory import RunDirectory
from limpet.recovery.host import identify, open_pidfd, read_stat
from limpet.schema.errors import InvalidStateError
from tests.conftest import wait_until
from tests.starters.oci import PROCESSES, is_over

PROCESS: dict[str, Any] = {"args": ["first"], "env": ["A=b"], "cwd": "/work", "terminal": False, "user": {"uid": 5}}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "config.json").write_text(json.dumps({"process": PROCESS, "root": {"path": str(tmp_path)}}))
    return RunDirectory(str(tmp_path))


@pytest.mark.parametrize(
    ("size", "env", "changed"),
    [
        (None, ["A=b"], {"terminal": False, "env": ["A=b"]}),
        ((0, 0), ["A=b"], {"terminal": True, "env": ["A=b", "TERM=xterm"]}),
        ((24, 0), ["A=b"], {"terminal": True, "env": ["A=b", "TERM=xterm"]}),
        ((24, 80), ["TERM="], {"terminal": True, "env": ["TERM="], "consoleSize": {"height": 24, "width": 80}}),
        (
            (1, 2),
            ["XTERM=y"],
            {"terminal": True, "env": ["XTERM=y", "TERM=xterm"], "consoleSize": {"height": 1, "width": 2}},
        ),
    ],
)
def test_what_is_to_be_run(
    run: RunDirectory, size: tuple[int, int] | None, env: list[str], changed: dict[str, Any]
) -> None:
    """As the container's own process, but for its arguments and its terminal; nobody else may read it."""
    Path(run.join("config.json")).write_text(json.dumps({"process": {**PROCESS, "env": env}}))
    files = CommandFiles.write(run, ["ls", "-l"], size)
    assert json.loads(Path(files.process).read_text()) == {**PROCESS, "args": ["ls", "-l"], **changed}
    assert os.stat(files.process).st_mode & 0o777 == 0o600
    assert files.arguments("one") == ["exec", "--process", files.process, "--pid-file", files.pid, "one"]
    console = files.arguments("one", has_door=True)
    assert console[-3:-1] == ["--console-socket", os.path.basename(files.process).replace(".json", ".sock")]
    for _ in range(2):
        files.remove()
        assert os.listdir(run.path) == ["config.json"]


def test_without_a_config_there_is_no_command(tmp_path: Path) -> None:
    """It was removed, or is damaged."""
    for text in (None, "{", "[]", "{}"):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(InvalidStateError, match=r"its config\.json cannot be read"):
            CommandFiles.write(RunDirectory(str(tmp_path)), ["ls"], None)


def test_a_terminal_comes_through_a_door(tmp_path: Path) -> None:
    """Also where the path is longer than the address of a socket may be."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    (deep / "config.json").write_text(json.dumps({"process": PROCESS}))
    files = CommandFiles.write(RunDirectory(str(deep)), ["ls"], (1, 1))
    name = files.arguments("one", has_door=True)[-2]
    with files.listen():
        assert (deep / name).is_socket()
        code = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, name], cwd=deep, check=True, timeout=20)
    files.remove()
    assert not (deep / name).exists()


def test_a_pid_is_read_once_it_is_there(run: RunDirectory) -> None:
    """0 before."""
    files = CommandFiles.write(run, ["ls"], None)
    assert files.read_pid() == 0
    Path(files.pid).write_text("4711")
    assert files.read_pid() == 4711
    files.remove()


def test_why_a_command_was_not_executed(run: RunDirectory) -> None:
    """Asked only where it ended as a failed execve does; what may be on a mount is not said to be missing."""
    Path(run.join("garbage")).write_text("garbage")
    os.chmod(run.join("garbage"), 0o755)
    files = CommandFiles.write(run, ["/garbage"], None)
    assert "exec format error" in files.find_flaw(1)
    assert files.find_flaw(0) == files.find_flaw(2) == files.find_flaw(127) == ""
    files.remove()
    files = CommandFiles.write(run, ["/none"], None)
    assert files.find_flaw(1) == ""
    files.remove()


def test_those_of_dead_engines_are_found(run: RunDirectory, tmp_path: Path) -> None:
    """By their files, each once; not those of this one that are under way."""
    files = CommandFiles.write(run, ["ls"], None)
    for name in ("exec-b.json", "exec-b.pid", "exec-a.sock", "other-c.json"):
        (tmp_path / name).touch()
    found = find_left([run, RunDirectory(str(tmp_path / "none")), RunDirectory(str(tmp_path / "exec-b.json"))])
    assert [(each.path, os.path.basename(left.process)) for each, left in found] == [
        (run.path, "exec-a.json"),
        (run.path, "exec-b.json"),
    ]
    files.remove()
    end_left(found, lambda _: "name", lambda _: True)
    assert sorted(os.listdir(run.path)) == ["config.json", "other-c.json"]


ORPHAN = """
import subprocess, sys
print(subprocess.Popen(["sleep", "1000"], cwd=sys.argv[1], start_new_session=True, stdout=2).pid)
"""


def leave(directory: Path) -> int:
    """Begin a process in a directory that is nobody's child, in a session of its own; return its pid."""
    begun = subprocess.run([sys.executable, "-c", ORPHAN, str(directory)], check=True, stdout=subprocess.PIPE)
    return int(begun.stdout)


def test_the_runtime_of_one_is_ended(run: RunDirectory, tmp_path: Path) -> None:
    """It works in the directory of the start, in a session of its own; who works elsewhere is somebody else."""
    (tmp_path / "exec-a.json").touch()
    (tmp_path / "elsewhere").mkdir()
    runtime, other = leave(tmp_path), leave(tmp_path / "elsewhere")
    own = subprocess.Popen(["sleep", "1000"], cwd=tmp_path, start_new_session=True)
    try:
        end_left(find_left([run]), lambda _: "name", lambda _: True)
        wait_until(lambda: is_over(runtime), "the runtime to end")
        assert not is_over(other)
        assert own.poll() is None
    finally:
        os.kill(other, signal.SIGKILL)
        own.kill()
        own.wait()
    assert commands._under_way == set()


@pytest.mark.parametrize("is_ours", [True, False])
def test_one_whose_runtime_was_killed_is_ended(run: RunDirectory, tmp_path: Path, *, is_ours: bool) -> None:
    """By its pid, if that is one of the container's and was not there before it was asked for; by no wall clock.

    In a copy of a state directory it is the original's, which has not ended.
    """
    (tmp_path / "elsewhere").mkdir()
    older = leave(tmp_path / "elsewhere")
    with open_pidfd(os.getpid()) as pidfd:
        run.write_processes(replace(PROCESSES, init=identify(os.getpid(), pidfd), cgroups=(), has_own_pids=True))
    wait_until(lambda: age_of(older) > 1, "it to be older")
    files = [CommandFiles.write(run, ["sleep", "1000"], None) for _ in range(2)]
    commands._under_way.clear()  # they are another engine's, which was killed
    for each in files:
        os.utime(each.process, (time.time() + 3600,) * 2)  # the wall clock was set back since
    command = leave(tmp_path / "elsewhere")
    for each, pid in zip(files, (older, command), strict=True):
        Path(each.pid).write_text(str(pid))
    try:
        end_left(find_left([run]), lambda _: "name", lambda _: is_ours)
        assert find_left([run]) == []
        if is_ours:
            wait_until(lambda: is_over(command), "the command to end")
        else:
            time.sleep(0.2)
        assert not is_over(older)
        assert is_over(command) is is_ours
    finally:
        for each in (older, *(() if is_ours else (command,))):
            os.kill(each, signal.SIGKILL)


def age_of(pid: int) -> float:
    """Return how many seconds ago a process was begun."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(read_stat(pid)[19]) / os.sysconf("SC_CLK_TCK")
