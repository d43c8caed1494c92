"""The starter's seam: an engine runs its whole life on any starter, and one sick container spoils no other."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet import Engine, Snapshot, Store, errors, recover
from limpet.recovery import Boot, HostProbe, Observation, Process, Subject
from limpet.recovery.looks import look_at_all
from limpet.schema import ContainerState, ProcessIdentity, Reason
from limpet.testing import FakeStarter
from tests.conftest import wait_until
from tests.records import RUNNING, metadata, sandbox

SANDBOX = {"metadata": {"name": "jobs"}}


def config(name: str) -> dict[str, object]:
    return {"metadata": {"name": name}, "image": {"image": "host"}, "command": ["true"]}


@pytest.fixture
def fake() -> FakeStarter:
    return FakeStarter()


@pytest.fixture
def engine(state_dir: str, fake: FakeStarter) -> Iterator[Engine]:
    with Engine.open(state_dir, starter=fake) as opened:
        opened.create_sandbox(SANDBOX, id="jobs")
        yield opened


def test_a_whole_life_without_a_process(engine: Engine, fake: FakeStarter) -> None:
    """create, start, end, release, delete: each step is as durable as with processes, and no process is made."""
    children = set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())
    container = engine.create_container(config("one"), "jobs")
    assert container.metadata.starter == "fake"
    assert container.start().state is ContainerState.RUNNING
    assert fake.is_running(container.id)
    fake.end(container.id, 3)
    status = container.wait(timeout=10)
    assert (status.exit_code, status.reason) == (3, Reason.ERROR)
    container.release()
    container.delete()
    assert engine.list() == []
    assert set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()) == children


def test_stop_and_failing_starts(engine: Engine, fake: FakeStarter) -> None:
    """stop sends the stop signal, then SIGKILL; a start that fails is EXITED with 128, and the next one works."""
    container = engine.create_container(config("stubborn"), "jobs")
    container.start()
    fake.ends_on = frozenset({9})  # type: ignore[arg-type]
    assert container.stop(0.05).exit_code == 128 + 9
    assert fake.signals(container.id) == [15, 9]
    fake.fail_next_start("no such program")
    failing = engine.create_container(config("failing"), "jobs")
    with pytest.raises(errors.StartError, match="no such program"):
        failing.start()
    assert (failing.status.exit_code, failing.status.reason) == (128, Reason.START_ERROR)
    assert engine.create_container(config("next"), "jobs").start().state is ContainerState.RUNNING


def test_containers_outlive_their_engine(state_dir: str, fake: FakeStarter) -> None:
    """The next engine asks the same starter: what runs is adopted, what ended meanwhile has its exit code."""
    with Engine.open(state_dir, starter=fake) as first:
        first.create_sandbox(SANDBOX, id="jobs")
        for name in ("alive", "ended"):
            first.create_container(config(name), "jobs", id=name).start()
    fake.end("ended", 4)
    with Engine.open(state_dir, starter=fake) as second:
        assert second.get("alive").state is ContainerState.RUNNING
        assert second.get("ended").status.exit_code == 4
        fake.end("alive", 5)
        assert second.get("alive").wait(timeout=10).exit_code == 5


class EndsAsItIsAdopted(FakeStarter):
    """Its containers end after they were seen alive, and before somebody watches them."""

    def adopt(self, container_id: str, identity: ProcessIdentity) -> int:
        self.end(container_id, 4)
        raise errors.NotFoundError(f"process {identity.pid}: No such process")


def test_what_ends_between_the_look_and_the_watch_is_looked_at_once_more(state_dir: str) -> None:
    """Its end is told, and its policy followed; it does not stay Unknown until somebody asks for another recovery."""
    fake = EndsAsItIsAdopted()
    with Engine.open(state_dir, starter=fake) as first:
        first.create_sandbox(SANDBOX, id="jobs")
        first.create_container(config("one"), "jobs", id="one").start()
        first.create_container(config("again"), "jobs", id="again", restart="always").start()
    with Engine.open(state_dir, starter=fake) as second:
        one = second.get("one").status
        assert (one.state, one.exit_code) == (ContainerState.EXITED, 4), one
        assert {each.state for each in second.recovery.findings} == {"EXITED"}
        wait_until(lambda: len(second.list(name="again")) == 2, "the next attempt")


def test_an_engine_leaves_other_starters_containers_alone(state_dir: str, fake: FakeStarter) -> None:
    """A container is started by the starter that it was made for, and no other one says that it has ended."""
    with Engine.open(state_dir) as real:
        real.create_sandbox(SANDBOX, id="jobs")
        running = real.create_container({**config("real"), "command": ["sleep", "1000"]}, "jobs", id="real")
        pid = running.start().pid
    with Engine.open(state_dir, starter=fake) as other:
        status = other.get("real").status  # nobody here would see it end
        assert (status.state, status.exit_code, status.pid) == (ContainerState.UNKNOWN, 0, pid), status
        assert "cannot be watched" in status.message
        other.create_container(config("fake"), "jobs", id="fake")
    with Engine.open(state_dir) as real:
        assert real.get("real").state is ContainerState.RUNNING
        with pytest.raises(errors.InvalidStateError, match="made for the starter 'fake'"):
            real.get("fake").start()
        assert real.get("real").stop(1).exit_code == 143


class Hanging:
    """A probe that hangs for some containers, fails for others, and sees the rest gone."""

    def __init__(self, *hanging: str) -> None:
        self.hanging = hanging
        self.released = threading.Event()

    def observe(self, container: Subject) -> Observation:
        if container.id in self.hanging:
            self.released.wait(60)
        if container.id == "rude":
            raise SystemExit("not my business")
        if container.id == "absurd":
            return Observation(boot=Boot.SAME, process=Process.ENDED, exit_code=1 << 40)
        return Observation(boot=Boot.SAME, process=Process.GONE)


def test_a_look_that_hangs_or_raises_spoils_its_own_container(state_dir: str) -> None:
    """Looks have a deadline: those that hang are Unknown after it, with that reason, and all others have verdicts."""
    probe = Hanging("h1", "h2", "h3")
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        names = ["a", "h1", "b", "h2", "c", "h3", "rude", "absurd", "d"]
        for name in names:
            store.add(metadata(name), RUNNING)
        began = time.monotonic()
        report = recover(store, probe=probe, look_timeout=0.5)
        took = time.monotonic() - began
        probe.released.set()
        said = {finding.id: (finding.state, finding.problem) for finding in report.findings}
        for name in names:
            if name.startswith("h"):
                assert said[name] == ("UNKNOWN", "no answer within 0.5 s")
                assert "no answer within 0.5 s" in store.status(name).message
            elif name == "rude":
                assert said[name] == ("UNKNOWN", "SystemExit: not my business")
            elif name == "absurd":
                assert said[name][0] == "UNKNOWN"
                assert "exit_code" in said[name][1]
            else:
                assert said[name] == ("EXITED", "")
        assert took < 20  # side by side: one deadline, not one for each


def test_threads_are_bounded_and_none_is_left(state_dir: str) -> None:
    """However many looks hang, so many threads and no more wait for them; quick looks take one, which ends."""
    before = set(threading.enumerate())  # one of an earlier test may still be ending
    subjects = [type("Subject", (), {"id": f"c{number}"})() for number in range(200)]
    assert all(seen.observation for seen in look_at_all(subjects, Hanging(), timeout_seconds=5))
    assert set(threading.enumerate()) <= before
    probe = Hanging(*(subject.id for subject in subjects))
    seen = look_at_all(subjects, probe, timeout_seconds=0.1)
    assert len(set(threading.enumerate()) - before) <= 64
    assert all(one.observation is None and one.problem for one in seen)
    assert sum("no answer" in one.problem for one in seen) == 64
    probe.released.set()
    wait_until(lambda: set(threading.enumerate()) <= before, "the threads to end")


def test_stop_of_an_unknown_container_looks_at_it_alone(state_dir: str) -> None:
    """stop settles its own container: no other is looked at, and no directory that nobody owns is moved."""
    looked_at: list[str] = []

    class Probe(HostProbe):
        def observe(self, container: Subject) -> Observation:
            looked_at.append(container.id)
            return super().observe(container)

    with Engine.open(state_dir) as engine:
        engine.create_sandbox(SANDBOX, id="jobs")
        for name in ("one", "other"):
            engine.create_container({**config(name), "command": ["sleep", "1000"]}, "jobs", id=name).start()
            with engine.store.transaction() as draft:
                draft.doubt(name, (Reason.UNVERIFIED, "a look failed"))
        stray = Path(state_dir, "containers", "stray")
        stray.mkdir()
        setattr(engine, "_probe", lambda: Probe(f"{state_dir}/containers"))  # noqa: B010
        number = engine.recovery.number
        assert engine.get("one").stop(2).exit_code == 143
        assert looked_at == ["one"]
        assert stray.exists()
        assert engine.get("other").state is ContainerState.UNKNOWN
        assert engine.recovery.number == number
        assert engine.get("other").stop(2).exit_code == 143


def test_a_look_beside_an_engine_has_a_deadline_too(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Snapshot.list` looks side by side: one that raises is Unknown, and the others are seen as they are."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        for name in ("rude", "a"):
            store.add(metadata(name), RUNNING)
    with Snapshot.open(state_dir) as snapshot:
        monkeypatch.setattr(snapshot, "_probe", Hanging())
        said = {view.id: view.status.message for view in snapshot.list()}
        assert "SystemExit: not my business" in said["rude"]
        assert "its process has ended" in said["a"]


def test_a_deleted_sandbox_stops_nobody_elses_containers(engine: Engine, fake: FakeStarter) -> None:
    """An object of a sandbox that is gone has no containers, whichever other sandbox's id begins with its own."""
    gone = engine.create_sandbox({"metadata": {"name": "job"}}, id="job")
    running = engine.create_container(config("one"), "jobs")
    running.start()
    assert gone.containers() == []
    gone.delete()
    assert gone.containers() == []
    gone.stop(0.1)
    assert fake.is_running(running.id)
