"""Restart policies on real processes: what is restarted, what is not, and what is left of the attempts."""

import os
import sqlite3
import subprocess
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.engine import Container, Engine, Sandbox, Store, errors
from limpet.engine.drill.small_image import make_archive
from limpet.engine.lifecycle.attempts import add_next, find_follower, find_place
from limpet.engine.starters import Launch, Prepared
from limpet.recovery.intents import Place
from limpet.schema import ContainerState, restart
from limpet.schema.cri import LinuxContainerResources
from limpet.schema.identity import ProcessIdentity
from limpet.schema.image import ImageName
from limpet.schema.sandbox_status import SandboxReason, stop_sandbox
from limpet.schema.status import Resources
from limpet.testing import FakeStarter
from tests.conftest import is_running, wait_until
from tests.records import metadata, sandbox


def make(engine: Engine, *command: str, name: str = "job", restart: str = "always", **fields: object) -> Container:
    if not engine.list_sandboxes():
        engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod")
    config = {"metadata": {"name": name}, "image": {"image": "host"}, "command": list(command), **fields}
    return engine.create_container(config, "pod", restart=restart)


def attempts(engine: Engine, name: str = "job") -> dict[int, Container]:
    """Return the attempts of a name that are there, by number."""
    found = {}
    for container in engine.list(name=name):
        with suppress(errors.NotFoundError):  # deleted just now
            found[container.metadata.config.metadata.attempt] = container
    return dict(sorted(found.items()))


def wait_for_attempt(engine: Engine, number: int, state: ContainerState = ContainerState.RUNNING) -> Container:
    """Wait until an attempt is in a state, and return it."""

    def is_there() -> bool:
        try:
            found = attempts(engine)
            return number in found and found[number].state is state
        except errors.NotFoundError:  # deleted just now
            return False

    wait_until(is_there, f"attempt {number} to be {state.name}")
    return attempts(engine)[number]


def settle(engine: Engine, seconds: float = 0.5) -> None:
    """Give a restart that should not come the time to come."""
    wait_until(lambda: engine.list() is not None, "the engine to answer")
    time.sleep(seconds)


def test_a_failure_is_restarted_up_to_the_policys_number(engine: Engine) -> None:
    """`on-failure:2`: three runs, the delay doubled each time, and the newest two attempts are kept."""
    make(engine, "sh", "-c", "exit 3", restart="on-failure:2").start()
    last = wait_for_attempt(engine, 2, ContainerState.EXITED)
    wait_until(lambda: list(attempts(engine)) == [1, 2], "the first attempt to be deleted")
    settle(engine)
    assert list(attempts(engine)) == [1, 2]
    kept = attempts(engine)[1]
    assert [one.metadata.restart_count for one in (kept, last)] == [1, 2]
    assert [one.metadata.restart_delay for one in (kept, last)] == [10**8, 2 * 10**8]
    assert last.status.exit_code == 3
    began, ended = last.status.started_at, kept.status.finished_at
    assert began - ended >= 2 * 10**8
    assert len({kept.id, last.id}) == 2
    assert len(os.listdir(Path(last.metadata.root_dir).parent)) == 2, "the deleted attempts' bundles are gone"


def test_success_ends_on_failure_and_not_always(engine: Engine) -> None:
    """Exit code 0: `on-failure` leaves it at that, `always` goes on."""
    make(engine, "true", restart="on-failure", name="once").start()
    make(engine, "true", restart="always").start()
    wait_for_attempt(engine, 2, ContainerState.EXITED)
    assert list(attempts(engine, "once")) == [0]


def test_what_is_the_runtimes_own_is_carried_along(engine: Engine) -> None:
    """Labels, extra, sandbox, policy and expiry are those of the attempt before."""
    expires_at = time.time_ns() + 3600 * 10**9
    first = make(engine, "sh", "-c", "exit 1", labels={"app": "x"}, log_path="job.log")
    first.renew(expires_at)
    engine.store.update(first.id, lambda old: replace(old, extra={"own": [1, 2]}))
    first.start()
    second = wait_for_attempt(engine, 1, ContainerState.EXITED)
    assert second.status.extra == {"own": [1, 2]}
    assert second.status.expires_at == expires_at
    assert second.metadata.config.labels == {"app": "x"}
    assert second.metadata.sandbox_id == first.metadata.sandbox_id
    assert second.metadata.restart_policy == "always"
    assert second.metadata.log_path == first.metadata.log_path
    second.stop()


@pytest.mark.parametrize("policy", ["always", "unless-stopped", "on-failure"])
def test_nobodys_stop_is_undone(state_dir: str, policy: str) -> None:
    """One that was stopped stays so, now and after the next opening, whatever its policy."""
    with Engine.open(state_dir) as engine:
        container = make(engine, "sleep", "1000", restart=policy)
        container.start()
        assert container.stop(0).exit_code == 137
        settle(engine)
        assert list(attempts(engine)) == [0]
    with Engine.open(state_dir) as engine:
        settle(engine)
        assert list(attempts(engine)) == [0]


def test_a_stop_cancels_a_restart_that_waits(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between its end and its restart it is not restarted; that is durable."""
    with monkeypatch.context() as patch, Engine.open(state_dir) as engine:
        patch.setattr(restart, "FIRST_DELAY_NS", 60 * 10**9)
        container = make(engine, "sh", "-c", "exit 1")
        container.start()
        status = wait_for_attempt(engine, 0, ContainerState.EXITED).stop()
        assert (status.state, status.exit_code, status.reason) == (ContainerState.EXITED, 1, "Error")
        assert status.stop_requested_at
    with Engine.open(state_dir) as engine:  # which would restart it at once
        settle(engine, 1.0)
        assert list(attempts(engine)) == [0]


def test_what_waits_for_its_restart_says_when_and_is_not_pruned(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruning what has ended takes nothing that goes on; once it is stopped it does."""
    monkeypatch.setattr(restart, "FIRST_DELAY_NS", 60 * 10**9)
    make(engine, "sh", "-c", "exit 1").start()
    waiting = wait_for_attempt(engine, 0, ContainerState.EXITED)
    assert waiting.restart_at == waiting.status.finished_at + 60 * 10**9
    assert waiting.id not in engine.prune().containers
    waiting.stop()
    assert waiting.restart_at == 0
    assert waiting.id in engine.prune().containers


def test_a_stop_of_an_attempt_that_was_restarted_stops_the_next(engine: Engine) -> None:
    """Whoever holds the older attempt stops what runs under its name now."""
    first = make(engine, "sh", "-c", "[ -e ../../../ran ] && exec sleep 1000; touch ../../../ran; exit 1")
    first.start()
    second = wait_for_attempt(engine, 1)
    pid = second.status.pid
    assert first.stop(0).exit_code == 1
    assert second.status.exit_code == 137
    assert not is_running(pid)
    settle(engine)
    assert list(attempts(engine)) == [0, 1]


def test_what_waits_is_restarted_by_the_original_and_by_no_copy(
    state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is opened meanwhile, and again, leaves it alone; the original goes on with it."""
    with monkeypatch.context() as patch, Engine.open(state_dir) as engine:
        patch.setattr(restart, "FIRST_DELAY_NS", 60 * 10**9)
        make(engine, "sh", "-c", "exit 1").start()
        wait_for_attempt(engine, 0, ContainerState.EXITED)
    copy = f"{state_dir}-copy"
    subprocess.run(["cp", "-a", state_dir, copy], check=True)
    for _ in range(2):
        with Engine.open(copy) as engine:
            assert attempts(engine)[0].restart_at == 0
            settle(engine)
            assert list(attempts(engine)) == [0]
    with Engine.open(state_dir) as engine:
        wait_for_attempt(engine, 1, ContainerState.EXITED)


def test_what_was_released_or_deleted_is_not_restarted(state_dir: str) -> None:
    """Released while it waits, or deleted as the newest attempt: nothing comes after it, nor after a reopening."""
    with Engine.open(state_dir) as engine:
        container = make(engine, "sh", "-c", "exit 1")
        container.start()
        wait_for_attempt(engine, 3, ContainerState.EXITED).release()
        settle(engine, 1.0)
        assert max(attempts(engine)) == 3
        attempts(engine)[3].delete()
        settle(engine)
        assert list(attempts(engine)) == [2]
    with Engine.open(state_dir) as engine:
        settle(engine, 1.0)
        assert list(attempts(engine)) == [2]
        attempts(engine)[2].release()


def test_a_program_that_cannot_be_executed_counts_as_a_failure(engine: Engine) -> None:
    """The caller is told, and the policy tries again: up to its number."""
    container = make(engine, "/no/such/program", restart="on-failure:1")
    with pytest.raises(errors.StartError):
        container.start()
    last = wait_for_attempt(engine, 1, ContainerState.EXITED)
    assert last.status.reason == "StartError"
    settle(engine)
    assert list(attempts(engine)) == [0, 1]


def test_a_sandbox_that_is_not_ready_takes_no_new_attempt(engine: Engine) -> None:
    """NOTREADY comes between the end and the restart."""
    container = make(engine, "sleep", "0.3")
    container.start()
    engine.store.update_sandbox("pod", lambda old: stop_sandbox(old, SandboxReason.STOPPED, at=time.time_ns()))
    container.wait(20)
    settle(engine)
    assert list(attempts(engine)) == [0]


def test_a_sandbox_that_is_stopped_amid_a_restart_is_nothing_to_warn_of(
    state_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The attempt that was being started stays CREATED, and nothing is tried again and again."""

    class Late(FakeStarter):
        def prepare(self, launch: Launch) -> Prepared:
            if launch.metadata.config.metadata.attempt:
                engine.store.update_sandbox(
                    "pod", lambda old: stop_sandbox(old, SandboxReason.STOPPED, at=time.time_ns())
                )
            return super().prepare(launch)

    fake = Late()
    with Engine.open(state_dir, starter=fake) as engine:
        make(engine, "x").start()
        fake.end(attempts(engine)[0].id, 1)
        wait_until(lambda: engine.get_sandbox("pod").status.stopped_at, "the sandbox to be stopped")
        settle(engine)
        assert [one.state for one in attempts(engine).values()] == [ContainerState.EXITED, ContainerState.CREATED]
        assert not fake.is_running(attempts(engine)[1].id)
    assert not caplog.messages


@pytest.mark.usefixtures("namespaces")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has the namespaces by which daemons are told")
def test_daemons_of_the_attempt_before_are_gone_when_the_next_one_runs(engine: Engine) -> None:
    """What an attempt leaves behind does not run beside the next one."""
    daemon = 'setsid sh -c "sleep 1000" </dev/null >/dev/null 2>&1 & echo $! >> ../../../daemons'
    container = make(engine, "sh", "-c", f"[ -e ../../../daemons ] && exec sleep 1000; {daemon}; sleep 0.1; exit 1")
    container.start()
    wait_for_attempt(engine, 1)
    pids = [int(line) for line in Path(engine.store.directory.path, "daemons").read_text().split()]
    assert pids
    assert not any(is_running(pid) for pid in pids)


def test_a_policy_that_is_none_is_refused(engine: Engine) -> None:
    """Before anything is written, also where the record is added by the store alone."""
    with pytest.raises(errors.InvalidInputError, match="unless-stopped"):
        make(engine, "true", restart="sometimes")
    assert not engine.list()


def test_restarts_work_with_any_starter(state_dir: str) -> None:
    """A restart asks nothing of a starter that a start does not."""
    fake = FakeStarter()
    with Engine.open(state_dir, starter=fake) as engine:
        make(engine, "x").start()
        fake.end(attempts(engine)[0].id, 0)
        second = wait_for_attempt(engine, 1)
    with Engine.open(state_dir, starter=fake) as engine:
        fake.end(second.id, 7)
        wait_for_attempt(engine, 2)
        assert isinstance(engine.get_sandbox("pod"), Sandbox)


class Limiting(FakeStarter):
    """A fake that takes new limits."""

    def change_limits(self, container_id: str, identity: ProcessIdentity, limits: LinuxContainerResources) -> Resources:
        return Resources(requested=limits)


@pytest.mark.parametrize("linux", [None, {"resources": {"memory_limit_in_bytes": 64 << 20, "cpu_shares": 512}}])
def test_limits_that_were_changed_while_it_ran_are_carried_along(state_dir: str, linux: object) -> None:
    """As when a service that keeps running out of memory is given more: not what its config asked for at first."""
    fake = Limiting()
    with Engine.open(state_dir, starter=fake) as engine:
        first = make(engine, "any", linux=linux)
        first.start()
        first.change_limits(LinuxContainerResources(memory_limit_in_bytes=128 << 20))
        fake.end(first.id, 137)
        second = wait_for_attempt(engine, 1)
        assert second.status.resources == Resources(
            requested=LinuxContainerResources(memory_limit_in_bytes=128 << 20, cpu_shares=512 if linux else 0)
        )
        second.stop()


def load(engine: Engine, directory: Path, text: str) -> str:
    """Load an image `small:1` with a file that says so; return its digest."""
    archive = directory / "image.tar"
    archive.write_bytes(make_archive("small:1", {"text": text.encode()}))
    engine.images.load(str(archive))
    return engine.images.manifest(ImageName.parse("small:1")).digest


def test_an_attempt_is_of_the_image_that_has_the_name_now(state_dir: str, tmp_path: Path) -> None:
    """Its record names what was unpacked; one that was added before the name moved, and is made after, is refused."""
    fake = FakeStarter()
    with Engine.open(state_dir, starter=fake) as engine:
        digests = [load(engine, tmp_path, "old")]
        first = make(engine, "any", image={"image": "small:1"})
        config = {"metadata": {"name": "late"}, "image": {"image": "small:1"}, "command": ["any"]}
        late = engine.add_container(config, "pod")
        digests.append(load(engine, tmp_path, "new"))
        first.start()
        fake.end(first.id, 1)
        second = wait_for_attempt(engine, 1)
        found = [
            (one.metadata.image_manifest.digest, Path(one.metadata.root_dir, "rootfs", "text").read_text())
            for one in (first, second)
        ]
        assert found == list(zip(digests, ("old", "new"), strict=True))
        with pytest.raises(errors.NotFoundError, match=digests[1]):
            late.create()
        assert not os.path.exists(late.metadata.root_dir)
        second.stop()


def test_the_next_attempt_is_added_once_and_only_while_it_is_wanted(engine: Engine) -> None:
    """Two who decide the same at once add one attempt; a stop in between has none added."""
    container = make(engine, "sh", "-c", "exit 1", restart="on-failure:1")
    engine._runtime.timetable.close()  # nobody else adds any
    container.start()
    container.wait(20)
    first = add_next(engine._runtime, container.metadata)
    assert first is not None
    assert add_next(engine._runtime, container.metadata) is None
    stopped = engine.get(first).stop()
    assert (stopped.state.name, stopped.exit_code, stopped.reason) == ("EXITED", 128, "StartError")
    assert "stopped before it was made" in stopped.message
    assert engine.get(first).wait(1) == stopped
    with pytest.raises(errors.InvalidStateError):
        engine.get(first).create()
    assert add_next(engine._runtime, engine.get(first).metadata) is None
    other = make(engine, "sh", "-c", "exit 1", name="other")
    other.start()
    other.wait(20)
    other.stop()
    assert add_next(engine._runtime, other.metadata) is None


def test_all_outdated_attempts_go_whichever_is_looked_at_first(state_dir: str) -> None:
    """Engines were killed before they deleted any: the next one deletes all but the last two."""
    with Engine.open(state_dir) as engine:
        last = make(engine, "sh", "-c", "exit 1", restart="on-failure:7")
        engine._runtime.timetable.close()  # nobody else adds or deletes any
        for _ in range(7):
            last.start()
            last.wait(20)
            added = add_next(engine._runtime, last.metadata)
            assert added is not None
            last = engine.get(added)
            last.create()
        last.start()
        last.wait(20)
        assert len(attempts(engine)) == 8
    with Engine.open(state_dir) as engine:
        wait_until(lambda: list(attempts(engine)) == [6, 7], "the outdated ones to be deleted")
        settle(engine)
        assert list(attempts(engine)) == [6, 7]


def test_a_damaged_attempt_makes_none_before_it_outdated(state_dir: str) -> None:
    """Whether a policy has made it cannot be read: nothing is deleted, and no stop is passed on, on its word."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        first = replace(metadata("job"), restart_policy="always")
        for number in range(3):
            name = replace(first.config.metadata, attempt=number)
            config = replace(first.config, metadata=name)
            store.add(replace(first, id=f"job{number}", config=config, restart_count=number))
        assert find_place(store, store.metadata("job0")) is Place.OUTDATED
        assert find_follower(store, store.metadata("job0")) == "job1"
    with closing(sqlite3.connect(f"{state_dir}/store.db", isolation_level=None)) as raw:
        raw.execute("UPDATE container SET log_path = 'x' WHERE id = 'job1'")
    with Store.open(state_dir) as store:
        assert find_place(store, store.metadata("job0")) is Place.FOLLOWED
        assert find_follower(store, store.metadata("job0")) is None
