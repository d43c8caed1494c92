"""Expiry of containers and sandboxes: never early, also when a clock jumps, and made up for after a reopening."""

import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet import Store
from limpet.engine import Container, Engine, errors
from limpet.engine.inspection.check import check_state
from limpet.engine.lifecycle.releasing import release_expired
from limpet.engine.lifecycle.stopping import expire
from limpet.recovery.thread import Thread
from limpet.schema import ContainerState, Status
from limpet.schema.deadline import SET_BACK_NS, Deadline, DeadlineKind
from limpet.schema.sandbox_status import SandboxStatus
from tests.conftest import is_running, wait_until
from tests.intent.test_restart import settle
from tests.records import metadata, sandbox

SECOND = 10**9
HOUR = 3600 * SECOND


def make(engine: Engine, *command: str, name: str = "job", expires_at: int = 0, restart: str = "no") -> Container:
    if not engine.list_sandboxes():
        engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod")
    config = {"metadata": {"name": name}, "image": {"image": "host"}, "command": list(command)}
    return engine.create_container(config, "pod", expires_at=expires_at, restart=restart)


def soon(seconds: float = 0.5) -> int:
    return time.time_ns() + int(seconds * SECOND)


def is_gone(engine: Engine, sandbox_id: str) -> bool:
    return sandbox_id not in engine.store.sandbox_ids


def test_what_expired_is_stopped_and_released(engine: Engine) -> None:
    """Not before its time, with its stop signal, and for the reason Expired; how it ended is kept."""
    container = make(engine, "sh", "-c", "trap 'exit 5' TERM; touch up; while :; do sleep 0.01; done")
    container.start()
    wait_until(Path(container.metadata.root_dir, "working", "up").exists, "it to be ready")
    due = soon()
    container.renew(due)
    status = container.wait(20)
    assert time.time_ns() >= due
    assert status.exit_code == 5
    wait_until(lambda: container.status.released, "it to be released")
    assert (container.status.reason, container.status.exit_code) == ("Expired", 5)
    wait_until(lambda: not Path(container.metadata.root_dir).exists(), "its bundle to be gone")


@pytest.mark.parametrize(("script", "code"), [("{}", 137), ("({}) & wait", 143)], ids=["runs on", "has left something"])
def test_a_stop_that_would_take_longer_is_hurried(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, script: str, code: int
) -> None:
    """What was given an hour to stop has the grace of an expiry once its time is over, and is released then."""
    monkeypatch.setattr("limpet.engine.lifecycle.stopping.DEFAULT_STOP_TIMEOUT_SECONDS", 0.5)
    stubborn = "trap '' TERM; touch up; while :; do sleep 0.01; done"
    container = make(engine, "sh", "-c", script.format(stubborn), expires_at=soon(2))
    due = container.status.expires_at
    container.start()
    wait_until(Path(container.metadata.root_dir, "working", "up").exists, "it to be ready")
    container.begin_stop(3600)
    wait_until(lambda: container.status.released, "it to be released")
    assert time.time_ns() >= due + SECOND // 2
    assert container.status.exit_code == code


@pytest.mark.parametrize("start", [False, True])
def test_what_does_not_run_is_released_when_it_expires(engine: Engine, start: bool) -> None:
    """Created or ended, it is released; nothing else becomes of it."""
    container = make(engine, "true", expires_at=time.time_ns() + HOUR, restart="on-failure")
    if start:
        container.start()
        container.wait(20)
    assert not container.status.released
    container.renew(soon(0.2))
    wait_until(lambda: container.status.released, "it to be released")
    assert container.status.reason == "Expired"


def test_an_expired_one_is_not_restarted(engine: Engine) -> None:
    """Its policy would; its time is over."""
    container = make(engine, "sleep", "1000", restart="always")
    container.start()
    container.renew(soon(0.2))
    wait_until(lambda: container.status.released, "it to be released")
    settle(engine)
    assert len(engine.list()) == 1


def test_an_expiry_that_nobody_would_see_to_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread is to be had, a renewal says so before anything is written."""

    def fail(thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    container = make(engine, "true")
    monkeypatch.setattr(Thread, "start", fail)
    for one in (container, engine.get_sandbox("pod")):
        with pytest.raises(errors.ResourcesError, match="thread"):
            one.renew(time.time_ns() + HOUR)
    assert (container.status.expires_at, engine.store.sandbox_status("pod").expires_at) == (0, 0)


def test_a_renewal_puts_it_off_and_is_durable(state_dir: str) -> None:
    """Renewed before its time it runs on, also in the next engine; 0 is for ever; an earlier time holds, too."""
    with Engine.open(state_dir) as engine:
        container = make(engine, "sleep", "1000")
        container.start()
        container.renew(soon())
        later = time.time_ns() + HOUR
        assert container.renew(later).expires_at == later
        settle(engine, 1.0)
        assert container.state is ContainerState.RUNNING
    with Engine.open(state_dir) as engine:
        (container,) = engine.list()
        assert container.status.expires_at == later
        assert container.renew(0).expires_at == 0
        container.renew(soon(0.1))
        wait_until(lambda: container.status.released, "it to be released")
        with pytest.raises(errors.InvalidStateError, match="renew"):
            container.renew(time.time_ns() + HOUR)


def test_what_expired_while_nobody_was_there_goes_at_the_next_opening(state_dir: str) -> None:
    """The engine is closed before the time, and opened after it; before it nothing is touched."""
    with Engine.open(state_dir) as engine:
        one, two = make(engine, "sleep", "1000"), make(engine, "sleep", "1000", name="two")
        one.start()
        two.start()
        one.renew(soon(0.3))
        two.renew(time.time_ns() + HOUR)
        pid, other = one.status.pid, two.status.pid
    time.sleep(0.5)
    assert is_running(pid)
    with Engine.open(state_dir) as engine:
        wait_until(lambda: engine.get(one.id).status.released, "it to be released")
        assert not is_running(pid)
        assert is_running(other)
        engine.get(two.id).stop(0)


@pytest.mark.parametrize("value", [-1, 1.5, True, 2**63, "soon", None, 1_800_000_000, 1_800_000_000_000_000])
def test_what_is_no_time_is_refused(engine: Engine, value: object) -> None:
    """Before anything is written, wherever a time may be given."""
    container = make(engine, "true")
    for call in (
        lambda: container.renew(value),  # type: ignore[arg-type]
        lambda: engine.get_sandbox("pod").renew(value),  # type: ignore[arg-type]
        lambda: make(engine, "true", name="two", expires_at=value),  # type: ignore[arg-type]
        lambda: engine.create_sandbox({"metadata": {"name": "q"}}, expires_at=value),  # type: ignore[arg-type]
    ):
        with pytest.raises(errors.InvalidInputError, match="nanoseconds"):
            call()
    assert len(engine.list()) == len(engine.list_sandboxes()) == 1


def test_an_expired_sandbox_goes_with_its_containers(state_dir: str) -> None:
    """NOTREADY first, then its containers are stopped, released and deleted, then itself; others are left alone."""
    with Engine.open(state_dir) as engine:
        sandbox = engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod", expires_at=time.time_ns() + HOUR)
        engine.create_sandbox({"metadata": {"name": "other"}}, id="other")
        running = make(engine, "sleep", "1000", restart="always")
        running.start()
        make(engine, "true", name="created")
        config = {"metadata": {"name": "job"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
        outside = engine.create_container(config, "other")
        outside.start()
        pid = running.status.pid
        sandbox.renew(soon(0.2))
        wait_until(lambda: is_gone(engine, "pod"), "the sandbox to be removed")
        assert not is_running(pid)
        assert [one.id for one in engine.list()] == [outside.id]
        assert sorted(path.name for path in Path(state_dir, "containers").iterdir()) == [outside.id]
        outside.stop(0)


def test_a_sandbox_that_expired_while_nobody_was_there_goes_at_the_next_opening(state_dir: str) -> None:
    """Renewed it stays; not renewed it is gone soon after the opening."""
    with Engine.open(state_dir) as engine:
        for name in ("pod", "kept"):
            engine.create_sandbox({"metadata": {"name": name}}, id=name, expires_at=time.time_ns() + HOUR)
        make(engine, "sleep", "1000").start()
        engine.get_sandbox("pod").renew(soon(0.4))
    time.sleep(0.5)
    with Engine.open(state_dir) as engine:
        wait_until(lambda: is_gone(engine, "pod"), "the sandbox to be removed")
        assert [one.id for one in engine.list_sandboxes()] == ["kept"]
        assert not engine.list()


def test_a_sandbox_that_is_over_is_not_renewed(engine: Engine) -> None:
    """The caller learns that it is too late."""
    sandbox = engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod")
    container = make(engine, "sh", "-c", "trap '' TERM; touch up; while :; do sleep 0.01; done")
    container.start()
    wait_until(Path(container.metadata.root_dir, "working", "up").exists, "it to be ready")
    sandbox.renew(soon(0.2))
    wait_until(lambda: container.status.stop_requested_at, "it to be stopped")
    with pytest.raises(errors.InvalidStateError, match="Expired"):
        sandbox.renew(time.time_ns() + HOUR)
    with pytest.raises(errors.InvalidStateError, match="renew"):
        container.renew(time.time_ns() + HOUR)
    container.stop(0)
    wait_until(lambda: is_gone(engine, "pod"), "the sandbox to be removed")


# Clocks


def test_a_deadline_waits_for_both_clocks() -> None:
    """As much time as was left has to pass, and the wall clock has to agree; set back, for a minute more at most."""
    deadline = Deadline.begin(100 * SECOND, wall=90 * SECOND, boot=5 * SECOND)
    assert deadline.left(wall=90 * SECOND, boot=5 * SECOND) == 10 * SECOND
    assert deadline.left(wall=10**6 * SECOND, boot=6 * SECOND) == 9 * SECOND, "set forward, nothing is nearer"
    assert deadline.left(wall=100 * SECOND, boot=15 * SECOND) == 0
    assert deadline.left(wall=99 * SECOND, boot=15 * SECOND) == SECOND
    assert 0 < deadline.left(wall=0, boot=15 * SECOND) <= SET_BACK_NS, "set back, it is put off"
    assert deadline.left(wall=0, boot=15 * SECOND + SET_BACK_NS) == 0, "and not for ever"
    over = Deadline.begin(100 * SECOND, wall=200 * SECOND, boot=5 * SECOND)
    assert over.left(wall=200 * SECOND, boot=5 * SECOND) == 0


def test_a_clock_that_is_set_forward_ends_nothing_early(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour's lease survives a clock that jumps by a day, until it is renewed."""
    container = make(engine, "sleep", "1000", expires_at=time.time_ns() + HOUR)
    container.start()
    settle(engine, 0.2)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + 24 * HOUR)
    engine._runtime.note_container(container.id)  # as if something of it had changed
    settle(engine, 0.3)
    assert container.state is ContainerState.RUNNING
    container.renew(time.time_ns() + SECOND // 2)
    wait_until(lambda: container.status.released, "it to be released at its new time")


def test_a_clock_that_is_set_forward_while_nobody_is_there_ends_nothing_early(
    state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock of the boot hours are left, also for the engine after the next one; so they are of a stop's grace.

    The next attempt of one that is restarted has the time of the one before it.
    """
    real, due = time.time_ns, time.time_ns() + HOUR
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod", expires_at=due)
        kept = make(engine, "sleep", "1000", expires_at=due)
        stopping = make(engine, "sh", "-c", "trap '' TERM; touch up; while :; do sleep 0.01; done", name="stopping")
        restarted = make(engine, "sleep", "1000", name="restarted", expires_at=due, restart="always")
        for one in (kept, stopping, restarted):
            one.start()
        wait_until(Path(stopping.metadata.root_dir, "working", "up").exists, "it to be ready")
        stopping.begin_stop(3600)
    monkeypatch.setattr(time, "time_ns", lambda: real() + 24 * HOUR)
    for _ in range(2):
        with Engine.open(state_dir) as engine:
            os.kill(max(engine.list(name="restarted"), key=attempt_of).status.pid, signal.SIGKILL)
            settle(engine, 0.3)
            assert not engine.get_sandbox("pod").status.stopped_at
            assert engine.get(kept.id).state is ContainerState.RUNNING
            assert is_running(engine.get(stopping.id).status.pid), "it has an hour to stop"
            wait_until(
                lambda: max(engine.list(name="restarted"), key=attempt_of).state is ContainerState.RUNNING,
                "the restart",
            )
    with Engine.open(state_dir) as engine:
        engine.get(kept.id).renew(time.time_ns() + SECOND // 5)
        wait_until(lambda: engine.get(kept.id).status.released, "it to be released at its new time")
        engine.get(stopping.id).stop(0)
        for one in engine.list(name="restarted"):
            one.stop(0)


def attempt_of(container: Container) -> int:
    return container.metadata.config.metadata.attempt


def test_after_a_reboot_the_wall_clock_tells_and_then_the_new_boots(
    state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left then is written down by the new boot's clock, so that the wall clock counts once for each boot."""
    due = time.time_ns() + 2 * HOUR
    real, left = time.time_ns, (DeadlineKind.EXPIRY, "job", due)
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox("pod"))
        store.add(metadata("job", "pod"), Status(created_at=1, expires_at=due))
        assert HOUR < store.time_left(*left) <= 2 * HOUR
    monkeypatch.setattr("limpet.engine.store.deadlines.read_boot_id", lambda: "another boot")
    monkeypatch.setattr(time, "time_ns", lambda: real() + HOUR)
    for _ in range(2):
        with Store.open(state_dir) as store:
            assert 0 < store.time_left(*left) <= HOUR
        monkeypatch.setattr(time, "time_ns", lambda: real() + 24 * HOUR)


def test_a_deadline_that_is_damaged_leaves_the_wall_clock(state_dir: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is told when the store is opened, and by a check; a wrong one is believed by nobody."""
    due = time.time_ns() + HOUR
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox("pod"))
        store.add(metadata("job", "pod"), Status(created_at=1, expires_at=due))
    with closing(sqlite3.connect(Path(state_dir, "store.db"))) as database, database:
        assert database.execute("UPDATE deadline SET boot_at = 9000000000000000000").rowcount == 1
    assert [each for each in check_state(state_dir).problems if "deadline of 'job'" in str(each)]
    with Store.open(state_dir) as store:
        assert "expiry deadline of 'job'" in caplog.text
        assert 0 < store.time_left(DeadlineKind.EXPIRY, "job", due) <= HOUR


def test_deadlines_go_with_what_they_are_of(state_dir: str) -> None:
    """Of what is released, deleted, or renewed for ever no row is left; nor of a transaction that failed."""

    def count() -> int:
        with closing(sqlite3.connect(f"file:{state_dir}/store.db?mode=ro", uri=True)) as database:
            return int(database.execute("SELECT count(*) FROM deadline").fetchone()[0])

    due = time.time_ns() + HOUR
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox("pod"), SandboxStatus(expires_at=due))
        for name in ("released", "deleted", "renewed"):
            store.add(metadata(name, "pod"), Status(created_at=1, expires_at=due))
        assert count() == 4
        store.update("released", lambda old: replace(old, finished_at=1, released=True))
        store.delete("deleted")
        store.update("renewed", lambda old: replace(old, expires_at=0, stop_requested_at=1, stop_deadline=due))
        assert count() == 2
        with pytest.raises(ZeroDivisionError), store.transaction() as draft:
            draft.delete("renewed")
            draft.update_sandbox("pod", lambda old: replace(old, expires_at=due // 0))
        assert count() == 2
        assert store.time_left(DeadlineKind.EXPIRY, "released", due), "it is asked, though no row tells"
        store.delete("renewed")
        store.delete("released")
        store.delete_sandbox("pod")
        assert count() == 0
        assert not store._memory.deadlines._known


def test_a_clock_that_is_set_back_keeps_nothing_for_ever(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that has passed decides, and what a wall clock behind it puts off is bounded."""
    monkeypatch.setattr("limpet.schema.deadline.SET_BACK_NS", SECOND // 2)
    container = make(engine, "sleep", "1000")
    container.start()
    container.renew(soon())
    settle(engine, 0.1)  # it is seen by the clock that is right
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 24 * HOUR)
    wait_until(lambda: container.status.released, "it to be released")


def test_a_restarts_delay_is_not_lengthened_by_a_clock_that_is_set_back(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end was recorded before the clock was set back by a day; the restart comes as soon."""
    container = make(engine, "sleep", "0.2", restart="always")
    container.start()
    real = time.time_ns
    container.wait(20)
    monkeypatch.setattr(time, "time_ns", lambda: real() - 24 * HOUR)
    wait_until(lambda: len(engine.list()) > 1, "the restart")


def test_what_was_started_just_now_is_not_released_under_its_feet(engine: Engine) -> None:
    """Looked at before its start, and released after it: that is not done; nor is anything to what was renewed."""
    container = make(engine, "sleep", "1000")
    due = time.time_ns() + HOUR
    container.renew(due)
    container.start()
    release_expired(container.life, due)
    assert (container.state, container.status.released) == (ContainerState.RUNNING, False)
    container.renew(due + 1)
    expire(container.life, due)
    assert not container.status.stop_requested_at
