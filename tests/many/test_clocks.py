"""Clocks that jump: whatever they say, states, verdicts, order and what is kept are the same."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from limpet.engine import Engine
from limpet.recovery.host import read_machine_clock
from limpet.schema import ContainerState
from tests.conftest import wait_until
from tests.engine_lives import Start, rule_of, start_one

CLOCKS = """
import itertools, json, os, sys, time
state_dir, clock, act = sys.argv[1:]
HOUR, NOW, END = 3600 * 10**9, time.time_ns(), 2**63 - 1 - 10**18  # Linux sets no clock beyond 2232
ticks = itertools.count()
time.time_ns = {
    "right": time.time_ns,
    "before 1970": lambda: -HOUR * next(ticks),
    "ever earlier": lambda: NOW - HOUR * next(ticks),
    "the last days": lambda: END + next(ticks),
    "to and fro": lambda: (0, END, NOW)[next(ticks) % 3],
}[clock]
time.time = lambda: time.time_ns() / 10**9
"""
LIFE = """
from limpet.engine import Engine
engine = Engine.open(state_dir)
sandbox = engine.create_sandbox({"metadata": {"name": "jobs"}})
def make(name, *command):
    config = {"metadata": {"name": name}, "image": {"image": "host"}, "command": list(command)}
    return engine.create_container(config, sandbox.id, id=name)
if act == "live":
    make("new", "true")
    ended = make("ended", "sh", "-c", "exit 3"); ended.start(); ended.wait(20)
    released = make("released", "true"); released.start(); released.wait(20); released.release()
    deleted = make("deleted", "true"); deleted.release(); deleted.delete()
    for name in ("runs", "dies"):
        make(name, "sleep", "1000").start()
    os.mkdir(f"{state_dir}/containers/strange", 0o700)
    with open(f"{state_dir}/containers/strange/precious", "x"): pass
    print(engine.get("dies").status.pid, flush=True)
    time.sleep(600)
"""
END = """
from limpet.engine import Engine
with Engine.open(state_dir) as engine:
    found = {one.id: [one.state.name, one.status.exit_code, one.status.reason] for one in engine.list()}
    rules = {one.id: one.rule for one in engine.recovery.findings}
    runs = engine.get("runs")
    stopped = runs.stop(5)
    history = {one.id: [step.state.name for step in engine.store.history(one.id)] for one in engine.list()}
    for one in engine.list():
        if one.state.name == "EXITED" and not one.status.released: one.release()
    print(json.dumps([found, rules, stopped.exit_code, history]))
"""


def live_and_recover(state_dir: str, clock: str) -> object:
    """Live a life by a clock, be killed, and return what the next engine with such a clock says."""
    engine = subprocess.Popen(
        [sys.executable, "-c", CLOCKS + LIFE, state_dir, clock, "live"], stdout=subprocess.PIPE, text=True
    )
    pid = int(engine.stdout.readline())  # type: ignore[union-attr]
    engine.kill()
    engine.wait()
    engine.stdout.close()  # type: ignore[union-attr]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the process to be reaped")
    command = [sys.executable, "-c", CLOCKS + END, state_dir, clock, "end"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def told_by_the_right_clock(tmp_path_factory: pytest.TempPathFactory) -> object:
    return live_and_recover(str(tmp_path_factory.mktemp("clock") / "state"), "right")


@pytest.mark.parametrize(
    "clock",
    [
        "before 1970",
        "to and fro",
        *(pytest.param(one, marks=pytest.mark.long) for one in ("ever earlier", "the last days")),
    ],
)
def test_what_is_said_depends_on_no_clock(state_dir: str, clock: str, told_by_the_right_clock: object) -> None:
    """Two engines that live by a wrong clock say of every container what two say that live by the right one."""
    assert live_and_recover(state_dir, clock) == told_by_the_right_clock
    kept = list(Path(state_dir).glob("quarantine/strange*/precious"))
    assert len(kept) == 1
    for command in (("ps", "--all"), ("inspect", "runs"), ("history", "dies"), ("check",), ("recover",)):
        limpet = [sys.executable, "-m", "limpet", "--state-dir", state_dir]
        shown = subprocess.run([*limpet, *command], capture_output=True, text=True, check=False)
        assert (shown.returncode, shown.stderr) == (0, ""), command


AS_ROOT = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
IN_ANOTHER_TIME = ["unshare", *AS_ROOT, "--time", "--boottime", "100000", "--fork", sys.executable]
LOOK = """
import sys
from limpet.recovery.host import read_machine_clock
from msgspec.structs import replace
from limpet.engine.inspection.snapshot import Snapshot
from limpet.recovery.host import observe_process
with Snapshot.open(sys.argv[1]) as look:
    view = look.get("one")
identity = view.checkpoint.identity
without_inode = replace(identity, pidfd_inode=0)
later = replace(without_inode, start_ticks=identity.start_ticks + 2)
seen = [observe_process(one)[0].value for one in (identity, without_inode, later)]
print(read_machine_clock(), view.status.state.name, *seen)
"""


@pytest.mark.usefixtures("namespaces")
@pytest.mark.skipif(not os.path.exists("/proc/self/ns/time"), reason="time namespaces need Linux 5.6")
def test_another_time_namespace(state_dir: str, engine_process: Start) -> None:
    """Seen from where processes seem to have started at another time, a survivor is no stranger."""
    pid = start_one(engine_process, "sleep", "1000")
    for prefix in [sys.executable], IN_ANOTHER_TIME:
        result = subprocess.run([*prefix, "-c", LOOK, state_dir], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        machine_clock, state, *found = result.stdout.split()
        assert 0 <= read_machine_clock() - int(machine_clock) < 60 * 10**9, "it is the same clock for all"
        assert (state, *found) == ("RUNNING", "alive", "unproven", "stranger")
    with Engine.open(state_dir) as engine:
        assert rule_of(engine) == "survivor"
        assert engine.get("one").state is ContainerState.RUNNING
        assert engine.get("one").status.pid == pid
