"""SIGTERM to all there is, as when a unit or the machine is stopped: what ends by it has a witness."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from limpet import Engine
from limpet.engine.starters.process import find_facts
from limpet.recovery.host import read_stat
from tests.conftest import DEADLINE_SECONDS, wait_until
from tests.starters.host import make


def find_keepers(state_dir: str) -> set[int]:
    """Return the keeper, its anchor, and the anchor's other children."""
    keeper = find_facts(state_dir).keeper_pid
    assert keeper
    anchor = int(read_stat(keeper)[1])
    children = Path(f"/proc/{anchor}/task/{anchor}/children").read_text(encoding="ascii").split()
    assert str(keeper) in children
    return {anchor, *map(int, children)}


def is_there(pid: int) -> bool:
    """Say whether a process has not ended; what has, and has come to us, is reaped, as process 1 does it."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    with suppress(OSError):
        return read_stat(pid)[0] not in {b"Z", b"X"}
    return False


def await_ready(path: Path) -> None:
    wait_until(path.exists, f"{path} to be made")


@pytest.mark.usefixtures("subreaper")
@pytest.mark.parametrize("keepers_first", [False, True])
def test_what_ends_by_sigterm_beside_its_keeper_is_seen(state_dir: str, tmp_path: Path, keepers_first: bool) -> None:
    """Its code is told by the next engine, and no process of the keeper's stays once nothing is left for it."""
    ready = tmp_path / "ready"
    script = f"trap 'sleep 0.3; exit 7' TERM; touch {ready}; while :; do sleep 0.05; done"
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        container = make(engine, "one", "sh", "-c", script)
        container.start()
        pid = container.status.pid
        await_ready(ready)
        keepers = find_keepers(state_dir)
    for each in (*keepers, pid) if keepers_first else (pid, *keepers):
        os.kill(each, signal.SIGTERM)
    wait_until(lambda: not any(map(is_there, (pid, *keepers))), "the container and the keeper's processes to end")
    with Engine.open(state_dir) as engine:
        assert engine.get("one").status.exit_code == 7
        engine.get_sandbox("jobs").remove(force=True, timeout=0)


@pytest.mark.usefixtures("subreaper")
def test_a_keeper_that_was_sent_sigterm_goes_on_serving(state_dir: str, tmp_path: Path) -> None:
    """What runs on is looked after, what is started then is, too, and ends by SIGTERM itself."""
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        first = make(engine, "first", "sh", "-c", f"trap '' TERM; touch {tmp_path}/ready; exec sleep 600")
        first.start()
        await_ready(tmp_path / "ready")
        for each in find_keepers(state_dir):
            os.kill(each, signal.SIGTERM)
        time.sleep(0.2)
        second = make(engine, "second", "sleep", "600")
        second.start()
        os.kill(second.status.pid, signal.SIGTERM)
        assert second.wait(DEADLINE_SECONDS).exit_code == 128 + signal.SIGTERM
        assert first.stop(0.1).exit_code == 128 + signal.SIGKILL
        keepers = find_keepers(state_dir)
        engine.get_sandbox("jobs").remove(force=True, timeout=0)
    wait_until(lambda: not any(map(is_there, keepers)), "the keeper's processes to end")
