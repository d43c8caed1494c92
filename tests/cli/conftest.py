"""What the tests of the command line share: running it as a process of its own, and a state with something in it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import EngineProcess, is_running, wait_until

MAKE_JOBS = """
engine = Engine.open(state_dir)
sandbox = engine.create_sandbox({"metadata": {"name": "jobs"}})
def make(name, *command):
    config = {"metadata": {"name": name}, "image": {"image": "host"}, "command": command, "labels": {"app": name}}
    return engine.create_container(config, sandbox.id, id=name)
alive, dying, new = (make(name, "sleep", "1000") for name in ("alive", "dying", "new"))
ended = make("ended", "sh", "-c", "exit 3")
for container in (alive, dying, ended):
    container.start()
ended.wait(30)
say(dying.status.pid, sandbox.id)
time.sleep(1000)
"""


class Jobs(NamedTuple):
    """A live engine with the containers "alive" and "dying" (both RUNNING), "new" (CREATED), "ended" (exit code 3)."""

    engine: EngineProcess
    dying_pid: int
    sandbox_id: str

    def kill_engine_then_one(self) -> None:
        """Kill the engine, then the process of "dying", so that nobody writes its end down."""
        self.engine.kill()
        os.killpg(self.dying_pid, signal.SIGKILL)
        wait_until(lambda: not is_running(self.dying_pid), "the container's end")


@pytest.fixture
def jobs(engine_process: Callable[[str], EngineProcess]) -> Jobs:
    """A live engine in another process, with containers in various states."""
    process = engine_process(MAKE_JOBS)
    pid, sandbox_id = process.read()
    return Jobs(process, int(pid), sandbox_id)


class Limpet:
    """Runs `limpet` on a state directory."""

    def __init__(self, state_dir: str) -> None:
        self.state_dir = state_dir

    def __call__(self, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run it, with nothing but `variables` and the state directory in its environment."""
        environment = {"PATH": os.environ["PATH"], "LIMPET_STATE_DIR": self.state_dir, **variables}
        return subprocess.run(
            [sys.executable, "-m", "limpet", *args],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def ok(self, *args: str, status: int = 0) -> str:
        """Run it, expect `status`, and return what it printed."""
        done = self(*args)
        assert done.returncode == status, done.stderr + done.stdout
        return done.stdout

    def json(self, *args: str, status: int = 0) -> Any:
        """Run it with -o json and return the document."""
        return json.loads(self.ok(*args, "-o", "json", status=status))


@pytest.fixture
def limpet(state_dir: str) -> Limpet:
    """The command line, as a process."""
    return Limpet(state_dir)


def photograph(directory: str) -> dict[str, tuple[int, int, int, int]]:
    """Return what identifies each entry and its content's version.

    The -shm file is left out: it is memory that SQLite's processes share, and holds nothing that lasts.
    """
    found = {}
    for path in [Path(directory), *Path(directory).rglob("*")]:
        seen = path.lstat()
        if not path.name.endswith("-shm"):
            found[str(path)] = (seen.st_ino, seen.st_mode, seen.st_size, seen.st_mtime_ns)
    return found
