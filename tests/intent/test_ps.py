"""`limpet ps` says what was decided of a container: stopping, paused, restarting."""

import json
import re
import subprocess
import sys
import time

import pytest

from limpet.engine import Engine
from limpet.schema import ContainerState
from tests.conftest import wait_until
from tests.intent.test_pause import can_freeze
from tests.intent.test_restart import make, wait_for_attempt


def ps(engine: Engine, *options: str) -> str:
    command = [sys.executable, "-m", "limpet", "ps", "--state-dir", engine.store.directory.path, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.long
def test_what_waits_is_shown_with_its_time(engine: Engine) -> None:
    """It has exited, and is listed nevertheless; stopped, it is not any more."""
    make(engine, "sh", "-c", "exit 1").start()
    waiting = wait_for_attempt(engine, 7, ContainerState.EXITED)  # 12.8 s to the next
    shown = ps(engine)
    assert re.search(r"exit 1, \d+s ago; restarting in 1?\ds", shown), shown
    (document,) = json.loads(ps(engine, "--output", "json"))["containers"]
    assert document["id"] == waiting.id
    assert document["restart_at"].endswith("Z")
    waiting.stop()
    assert "restarting" not in ps(engine, "--all")
    assert waiting.id[:12] not in ps(engine)


def test_stopping_and_paused_are_told(engine: Engine) -> None:
    """Both run, as the CRI sees it; what is going on comes first."""
    stubborn = make(engine, "sh", "-c", "trap '' TERM; touch up; while :; do sleep 0.01; done", restart="no")
    stubborn.start()
    wait_until(lambda: stubborn.status.started_at, "it to run")
    time.sleep(0.2)
    stubborn.begin_stop(60)
    assert "RUNNING" in ps(engine)
    assert "stopping, up " in ps(engine)
    stubborn.stop(0)
    if not can_freeze():
        pytest.skip("no cgroup here freezes")
    paused = make(engine, "sleep", "1000", name="paused")
    paused.start()
    paused.pause()
    assert "paused, up " in ps(engine)
    (document,) = json.loads(ps(engine, "--output", "json"))["containers"]
    assert document["paused"] is True
