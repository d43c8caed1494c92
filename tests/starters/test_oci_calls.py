"""Calls of the runtime that an engine which was killed has left: the next one ends those, and nothing else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from limpet.engine.starters.oci import calls
from tests.conftest import wait_until
from tests.starters.oci import is_over

ENGINE = """
import subprocess, sys, time
from limpet.engine.starters.oci import calls
with calls.held(sys.argv[1]) as lock:
    inside = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], cwd=sys.argv[1], pass_fds=[lock],
                              start_new_session=True, stdout=subprocess.PIPE)
    print(inside.pid, inside.stdout.readline().decode().strip(), flush=True)
    time.sleep(1000)
"""


def test_a_call_of_a_dead_engine_is_ended(tmp_path: Path) -> None:
    """With what it has started; whoever only works in the directory, or only has it open, is let alone."""
    with subprocess.Popen([sys.executable, "-c", ENGINE, str(tmp_path)], stdout=subprocess.PIPE) as engine:
        assert engine.stdout is not None
        left = [int(each) for each in engine.stdout.readline().split()]
        engine.kill()
    descriptor = os.open(tmp_path, os.O_RDONLY)
    orphan = ["sh", "-c", "setsid sleep 1000 >/dev/null & echo $!"]
    works = int(subprocess.run(orphan, cwd=tmp_path, stdout=subprocess.PIPE, check=True).stdout)
    has_open = int(subprocess.run(orphan, stdout=subprocess.PIPE, check=True, pass_fds=[descriptor]).stdout)
    os.close(descriptor)
    try:
        calls.end_left(str(tmp_path))
        wait_until(lambda: all(map(is_over, left)), "the call to end")
        assert not is_over(works)
        assert not is_over(has_open)
        calls.end_left(str(tmp_path))
    finally:
        for pid in (works, has_open):
            os.kill(pid, signal.SIGKILL)


def test_our_own_calls_are_let_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are another thread's: waited for, and told if they take too long."""
    monkeypatch.setattr(calls, "_END_SECONDS", 0.2)
    with calls.held(str(tmp_path)) as lock:
        begun = subprocess.Popen(["sleep", "1000"], cwd=tmp_path, pass_fds=[lock], start_new_session=True)
    try:
        calls.end_left(str(tmp_path))
        assert begun.poll() is None
        assert "does not end" in caplog.text
        caplog.clear()
    finally:
        begun.kill()
        begun.wait()
    calls.end_left(str(tmp_path))
    assert caplog.text == ""


def test_many_may_be_under_way_at_once(tmp_path: Path) -> None:
    """Each has the lock with the others."""
    with calls.held(str(tmp_path)) as one, calls.held(str(tmp_path)) as other:
        assert one != other
