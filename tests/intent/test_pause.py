"""Pausing: all processes of a container are frozen, durably, and go on when they should."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from limpet.engine import Container, Engine, errors
from limpet.engine.starters.process.cgroups import freezer
from limpet.recovery import Process
from limpet.schema import ContainerState
from limpet.testing import FakeStarter
from tests.conftest import EngineProcess, is_running, wait_until
from tests.engine_lives import LIVE, rule_of
from tests.recovery.test_crash_windows import DIE

Start = Callable[[str], EngineProcess]
COUNT = "while :; do echo x >> ../../../ticks; sleep 0.01; done"
STARTER = "limpet.engine.starters.process.starter:ProcessStarter"


def can_freeze() -> bool:
    """Say whether this process may make a cgroup that freezes."""
    for parent, kind in freezer._find_parents(0):
        path = os.path.join(parent, f"limpet-probe-{os.getpid()}")
        try:
            os.mkdir(path)
            found = os.path.exists(os.path.join(path, kind.file))
            os.rmdir(path)
        except OSError:
            continue
        if found:
            return True
    return False


pytestmark = pytest.mark.skipif(not can_freeze(), reason="no cgroup here freezes")


def make(engine: Engine, command: str = COUNT, name: str = "one") -> Container:
    if not engine.list_sandboxes():
        engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod")
    config = {"metadata": {"name": name}, "image": {"image": "host"}, "command": ["sh", "-c", command]}
    container = engine.create_container(config, "pod", id=name)
    container.start()
    return container


def ticks(state_dir: str) -> int:
    path = Path(state_dir, "ticks")
    return path.stat().st_size if path.exists() else 0


def ticks_on(state_dir: str, seconds: float = 0.3) -> bool:
    """Say whether the container does anything."""
    before = ticks(state_dir)
    time.sleep(seconds)
    return ticks(state_dir) != before


@pytest.fixture(params=["cgroup.freeze", "freezer.state"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pause by each version of cgroups that is here."""
    wanted: str = request.param
    real = freezer._read_parents

    def only(pid: int) -> object:
        return [(path, each) for path, each in real(pid) if each.file == wanted]

    if not only(0):
        pytest.skip(f"no {wanted} here")
    monkeypatch.setattr(freezer, "_read_parents", only)
    freezer._remember_parents.cache_clear()
    return wanted


@pytest.fixture(autouse=True)
def _forget_parents(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Forget where a test has paused, and remove the cgroups of what it has not released."""
    yield
    freezer._remember_parents.cache_clear()
    for keeper in tmp_path.rglob("keeper"):
        found = keeper.parent.stat()
        for parent, _ in freezer._find_parents(0):
            for left in Path(parent).glob(f"limpet-pause-{found.st_dev:x}-{found.st_ino:x}-*"):
                left.rmdir()


def test_a_paused_one_does_nothing_until_it_is_resumed(engine: Engine, state_dir: str, kind: str) -> None:
    """Its children and what has left its session are frozen, too; its state stays RUNNING; twice is as once."""
    container = make(engine, f"setsid sh -c '{COUNT}' & ({COUNT}) & wait")
    wait_until(lambda: ticks(state_dir), "it to run")
    for _ in range(2):
        status = container.pause()
        assert (status.state, status.paused) == (ContainerState.RUNNING, True)
    assert container.cri_status().state == "CONTAINER_RUNNING"
    assert not ticks_on(state_dir)
    for _ in range(2):
        assert container.resume().paused is False
    assert ticks_on(state_dir)
    container.stop(0)
    container.release()
    found = os.stat(state_dir)
    begins = f"limpet-pause-{found.st_dev:x}-{found.st_ino:x}-"
    there = [name for _, names, _ in os.walk("/sys/fs/cgroup") for name in names]  # others may come and go meanwhile
    assert not [name for name in there if name.startswith(begins)], kind


def test_one_that_starts_programs_all_the_time(engine: Engine, kind: str) -> None:
    """It is frozen wherever it is, as where its shell waits for a child by vfork, which has not executed anything."""
    container = make(engine, "for i in 1 2 3; do (while :; do /bin/true; done) & done; wait")
    for _ in range(15):
        container.pause()
        container.resume()
    container.stop(0)
    assert container.exit_code == 137, kind


def test_stopping_a_paused_one_lets_it_end_by_itself(engine: Engine, state_dir: str, kind: str) -> None:
    """It goes on, gets its stop signal, and ends as it wants to."""
    container = make(engine, f"trap 'exit 5' TERM; {COUNT}")
    wait_until(lambda: ticks(state_dir), "it to run")
    container.pause()
    status = container.stop(10)
    assert (status.exit_code, status.paused) == (5, False), kind


def test_a_paused_one_can_be_killed(engine: Engine, state_dir: str, kind: str) -> None:
    """A stop without grace ends it, however it is frozen."""
    container = make(engine)
    wait_until(lambda: ticks(state_dir), "it to run")
    container.pause()
    assert container.stop(0).exit_code == 137, kind


def test_what_expires_while_it_is_paused_goes_on_to_end(engine: Engine, state_dir: str) -> None:
    """Its time is over: it is thawed, stopped and released."""
    container = make(engine, f"trap 'exit 5' TERM; {COUNT}")
    wait_until(lambda: ticks(state_dir), "it to run")
    container.pause()
    container.renew(time.time_ns() + 2 * 10**8)
    wait_until(lambda: container.status.released, "it to be released")
    assert container.status.exit_code == 5


def test_a_paused_one_stays_so_over_a_kill_of_the_engine(engine_process: Start, state_dir: str) -> None:
    """The next engine says that it is paused, and has seen it; it can be resumed."""
    process = engine_process(LIVE + f"c = make('one', 'sh', '-c', {COUNT!r}); c.start(); c.pause(); say(c.status.pid)")
    pid = int(process.read()[0])
    process.kill()
    with Engine.open(state_dir) as engine:
        assert rule_of(engine) == "survivor-paused"
        assert engine.recovery.findings[0].observation.process is Process.PAUSED
        container = engine.get("one")
        assert (container.state, container.status.paused) == (ContainerState.RUNNING, True)
        assert is_running(pid)
        assert not ticks_on(state_dir)
        container.resume()
        assert ticks_on(state_dir)
        container.stop(0)


@pytest.mark.parametrize(
    ("steps", "name", "is_paused"),
    [
        ("{die}; c.pause()", "freeze", True),
        ("c.pause(); {die}; c.resume()", "thaw", False),
    ],
)
def test_what_a_kill_cuts_short_is_finished(
    engine_process: Start, state_dir: str, steps: str, name: str, is_paused: bool
) -> None:
    """Written down and not done: the next engine freezes it, or lets it go on."""
    die = f"die({STARTER!r}, {name!r}, 'before')"
    process = engine_process(DIE + LIVE + f"c = make('one', 'sh', '-c', {COUNT!r}); c.start(); {steps.format(die=die)}")
    assert process.wait() == -signal.SIGKILL
    with Engine.open(state_dir) as engine:
        container = engine.get("one")
        assert container.status.paused is is_paused
        wait_until(lambda: ticks_on(state_dir) is not is_paused, "what was decided to be done")
        container.stop(0)


def test_a_stop_that_a_kill_cut_short_thaws(engine_process: Start, state_dir: str) -> None:
    """Asked to stop, and the engine is killed before it goes on: the next one ends it with its grace."""
    program = f"trap 'exit 5' TERM; {COUNT}"
    process = engine_process(
        DIE
        + LIVE
        + f"c = make('one', 'sh', '-c', {program!r}); c.start(); time.sleep(0.3); c.pause(); "
        + f"die({STARTER!r}, 'thaw', 'before'); c.stop()"
    )
    assert process.wait() == -signal.SIGKILL
    with Engine.open(state_dir) as engine:
        status = engine.get("one").wait(20)
        assert (status.exit_code, status.paused) == (5, False)


def test_what_cannot_be_paused_is_refused_with_the_reason(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not running, or nothing that freezes: refused, and not said to be paused."""
    container = make(engine, "sleep 1000")
    monkeypatch.setattr(freezer, "_find_parents", lambda _: ())
    with pytest.raises(errors.UnsupportedError, match="cannot be frozen"):
        container.pause()
    assert not container.status.paused
    container.stop(0)
    with pytest.raises(errors.InvalidStateError, match="cannot pause"):
        container.pause()
    assert ticks(state_dir) == 0


def test_a_starter_without_a_freezer_says_so(state_dir: str) -> None:
    """FakeStarter freezes nothing."""
    with Engine.open(state_dir, starter=FakeStarter()) as engine:
        container = make(engine)
        with pytest.raises(errors.UnsupportedError, match="'fake' cannot freeze"):
            container.pause()
        assert not container.status.paused


def test_another_state_directorys_container_of_the_same_id_is_left_alone(tmp_path: Path) -> None:
    """Two engines, one id: what the one pauses runs on in the other."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    with Engine.open(first) as one, Engine.open(second) as two:
        containers = [make(one), make(two)]
        wait_until(lambda: ticks(first) and ticks(second), "both to run")
        containers[0].pause()
        assert (ticks_on(first), ticks_on(second)) == (False, True)
        containers[1].pause()
        containers[1].resume()
        assert (ticks_on(first), ticks_on(second)) == (False, True)
        for container in containers:
            container.stop(0)
            container.release()
