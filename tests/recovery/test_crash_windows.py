"""The engine is killed between any two steps of create, start, stop, release and recovery itself."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from limpet.engine import Engine
from limpet.schema import ContainerState
from tests.conftest import EngineProcess, is_running, wait_until
from tests.engine_lives import LIVE, rule_of

Start = Callable[[str], EngineProcess]

# Makes the process kill itself right before (or after) a function of the engine is called for the n-th time.
DIE = """
import importlib
def die(where, name, when, count=1):
    module = importlib.import_module(where.partition(":")[0])
    owner = getattr(module, where.partition(":")[2]) if ":" in where else module
    real, left = getattr(owner, name), [count]
    def call(*args, **kwargs):
        left[0] -= 1
        is_the_one = left[0] == 0  # others may be called meanwhile, on other threads
        if is_the_one and when == "before": os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if is_the_one and when == "after": os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)
"""
BUNDLE = "limpet.engine.lifecycle.bundle:ContainerBundle"
STARTER = "limpet.engine.starters.process.starter:ProcessStarter"
STORE = "limpet.engine.store.store:Store"

# Where the engine dies; what of; the rule that answers, the state it gives, and whether a bundle is left.
WINDOWS = [
    ("create", BUNDLE, "begin", "before", "new-empty", ContainerState.UNKNOWN, False),
    ("create", BUNDLE, "make", "after", "new-half-made", ContainerState.UNKNOWN, False),
    ("create", BUNDLE, "begin", "after", "new-half-made", ContainerState.UNKNOWN, False),
    ("create", BUNDLE, "finish", "before", "new-half-made", ContainerState.UNKNOWN, False),
    ("create", BUNDLE, "finish", "after", "new-half-made", ContainerState.UNKNOWN, False),
    ("create", STORE, "update", "after", "created", ContainerState.CREATED, True),
    ("start", STARTER, "prepare", "before", "created", ContainerState.CREATED, True),
    ("start", STARTER, "prepare", "after", "created", ContainerState.CREATED, True),
    ("start", STORE, "update", "before", "created", ContainerState.CREATED, True),
    ("start", STORE, "update", "after", "held", ContainerState.EXITED, True),
    ("start", STARTER, "go", "before", "held", ContainerState.EXITED, True),
    ("start", STARTER, "go", "after", "survivor", ContainerState.RUNNING, True),
    ("stop", STARTER, "signal", "before", "ending", ContainerState.EXITED, True),
    ("stop", STARTER, "signal", "after", "ending", ContainerState.EXITED, True),
    ("release", STORE, "update", "before", None, ContainerState.EXITED, True),
    ("release", STORE, "update", "after", "release-unfinished", ContainerState.EXITED, False),
    ("release", BUNDLE, "remove", "before", "release-unfinished", ContainerState.EXITED, False),
    ("release", BUNDLE, "remove", "after", None, ContainerState.EXITED, False),
    ("delete", STORE, "delete", "before", None, ContainerState.EXITED, False),
    ("delete", STORE, "delete", "after", None, None, False),
]
# A process that is ending is seen on its way out, or not any more; the keeper knows its exit code. What was held never
# ran, and a stop that was begun is carried on.
EXIT_CODES = {"held": 128, "ending": 128 + 15}
STEPS = {
    "create": "{die}; make('one', 'sh', '-c', 'touch ran; sleep 1000')",
    "start": "c = make('one', 'sh', '-c', 'touch ran; sleep 1000'); {die}; c.start()",
    "stop": "c = make('one', 'sleep', '1000'); c.start(); {die}; c.stop()",
    "release": "c = make('one', 'true'); c.start(); c.wait(); {die}; c.release()",
    "delete": "c = make('one', 'true'); c.start(); c.wait(); c.release(); {die}; c.delete()",
}


@pytest.mark.parametrize(
    ("step", "where", "name", "when", "rule", "state", "bundle"),
    WINDOWS,
    ids=[f"{step}-{when}-{name}" for step, _, name, when, *_ in WINDOWS],
)
def test_killed_in_the_middle(
    engine_process: Start,
    state_dir: str,
    step: str,
    where: str,
    name: str,
    when: str,
    rule: str | None,
    state: ContainerState | None,
    bundle: bool,
) -> None:
    """Each crash window has its rule; nothing runs that the store does not know; recovering twice says the same."""
    die = f"die({where!r}, {name!r}, {when!r})"
    process = engine_process(DIE + LIVE + STEPS[step].format(die=die))
    assert process.wait() == -9
    path = Path(state_dir, "containers", "one")
    with Engine.open(state_dir) as engine:
        if rule is None:
            assert not engine.recovery.findings
        elif rule in EXIT_CODES:
            if engine.recovery.findings or rule != "ending":  # its end may have been written before the kill
                assert rule_of(engine) in {"survivor", "exit-observed", "never-ran"}
            assert engine.get("one").wait(20).exit_code == EXIT_CODES[rule]
        else:
            assert rule_of(engine) == rule
        if state is None:
            assert not engine.list()
            assert not path.exists()
            return
        first = engine.get("one").status
        assert first.state is state
        assert path.exists() is bundle
        if state is ContainerState.RUNNING:
            assert is_running(first.pid)
        else:
            wait_until(lambda: not processes_of(path), "all processes of the container to be gone")
        if step == "start" and state is not ContainerState.RUNNING and name != "go":
            assert not (path / "working" / "ran").exists()
    with Engine.open(state_dir) as engine:
        assert engine.get("one").status == first
        if first.state is ContainerState.UNKNOWN:
            engine.get("one").create()
            assert engine.get("one").start().state is ContainerState.RUNNING
        engine.get("one").stop(1)


def processes_of(bundle: Path) -> list[int]:
    """Return the pids of those whose working directory is in the bundle, where a container's processes begin."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.readlink(f"/proc/{name}/cwd").startswith(f"{bundle}/"):
                found.append(int(name))
    return found


RECOVERY = [
    ("limpet.engine.reconcile.recovery_pass", "examine_all", "after"),
    ("limpet.engine.store.store:Store", "_write", "before"),
    ("limpet.engine.store.store:Store", "_write", "after"),
    ("limpet.engine.engine:Engine", "_adopt", "before"),
    ("limpet.engine.engine:Engine", "_remove_bundle", "before"),
    ("limpet.engine.engine:Engine", "_remove_bundle", "after"),
    ("limpet.engine.engine:Engine", "_end_leftovers", "before"),
    ("limpet.engine.reconcile.sweep", "_move_aside", "before"),
    ("limpet.engine.reconcile.sweep", "_move_aside", "after"),
]


@pytest.mark.parametrize(("where", "name", "when"), RECOVERY, ids=[f"{when}-{name}" for _, name, when in RECOVERY])
def test_recovery_killed_and_run_again(engine_process: Start, state_dir: str, where: str, name: str, when: str) -> None:
    """A recovery pass that is killed at any step, and run again, says what an undisturbed one would have said."""
    process = engine_process(
        DIE
        + LIVE
        + "a = make('alive', 'sleep', '1000'); a.start(); make('created', 'true')\n"
        + "g = make('gone', 'sh', '-c', 'sleep 1000 & exec sleep 1000'); g.start()\n"
        + "r = make('released', 'true'); r.start(); r.wait()\n"
        + "say(g.status.pid); die('limpet.engine.lifecycle.bundle:ContainerBundle', 'remove', 'before'); r.release()"
    )
    gone = int(process.read()[0])
    process.wait()
    os.kill(gone, 9)
    wait_until(lambda: not os.path.exists(f"/proc/{gone}"), "the container to end and to be reaped")
    Path(state_dir, "containers", "orphan").mkdir()
    Path(state_dir, "containers", "orphan", "file").touch()
    assert engine_process(DIE + f"die({where!r}, {name!r}, {when!r})\nEngine.open(state_dir)").wait() == -9
    with Engine.open(state_dir) as engine:
        states = {container.id: container.state.name for container in engine.list()}
        assert states == {"alive": "RUNNING", "created": "CREATED", "gone": "EXITED", "released": "EXITED"}
        assert engine.get("gone").status.exit_code == 128 + 9
        assert engine.get("released").status.exit_code == 0
        assert sorted(os.listdir(f"{state_dir}/containers")) == ["alive", "created", "gone"]
        assert len(os.listdir(f"{state_dir}/quarantine")) == 1
        wait_until(lambda: not processes_of(Path(state_dir, "containers", "gone")), "what was left to be ended")
        engine.get("alive").stop(1)
