"""A container's life on a real host: images, command lines, logs, signals, and what is refused."""

import asyncio
import math
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from limpet.engine import AsyncEngine, Container, Engine, errors
from limpet.engine.lifecycle import patience
from limpet.engine.lifecycle.life import Life
from limpet.engine.lifecycle.starting import fail_start
from limpet.engine.lifecycle.stopping import expire, needs_stop
from limpet.engine.starters import Exit, Launch, Prepared
from limpet.engine.starters.environment import merge_environment
from limpet.engine.starters.process import ProcessStarter
from limpet.engine.store import Store
from limpet.schema import ContainerState, ImageConfig, ImageName, MountType, ProcessIdentity
from limpet.schema.command_line import choose_args
from limpet.schema.cri import parse_container_config
from limpet.schema.status import Status
from limpet.testing import FakeStarter
from tests.conftest import in_thread, is_running, read_output, wait_until


def config(name: str, *command: str, **fields: object) -> dict[str, object]:
    return {"metadata": {"name": name}, "image": {"image": "host"}, "command": list(command), **fields}


def make(engine: Engine, *command: str, name: str = "one", **fields: object) -> Container:
    if not engine.list_sandboxes():
        engine.create_sandbox({"metadata": {"name": "pod", "uid": "u", "namespace": "n"}}, id="pod")
    return engine.create_container(config(name, *command, **fields), "pod")


def test_a_whole_life(engine: Engine) -> None:
    """Created, started, ended, released, deleted: each state, its CRI status and its log as users expect them."""
    container = make(engine, "sh", "-c", "echo out; echo err >&2; exit 3", log_path="one.log")
    assert container.state is ContainerState.CREATED
    assert container.cri_status().started_at == 0
    container.start()
    status = container.wait(20)
    assert (status.state, status.exit_code, status.reason, status.pid) == (ContainerState.EXITED, 3, "Error", 0)
    assert not engine._runtime._bells, "who waits no more is forgotten"
    assert status.created_at <= status.started_at <= status.finished_at
    told = container.cri_status()
    assert (told.state, told.exit_code, told.reason) == ("CONTAINER_EXITED", 3, "Error")
    assert told.finished_at == status.finished_at
    log = Path(container.metadata.log_path)
    assert sorted(read_output(container, 2)) == ["err", "out"]  # of two pipes, whose order nobody knows
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert [one.state.name for one in engine.store.history(container.id)] == ["UNKNOWN", "CREATED", "RUNNING", "EXITED"]
    with pytest.raises(errors.InvalidStateError, match="EXITED; only a CREATED"):
        container.start()
    container.release()
    container.release()
    assert not os.path.lexists(container.metadata.root_dir)
    container.delete()
    with pytest.raises(errors.NotFoundError):
        _ = container.status
    engine.get_sandbox("pod").delete()


@pytest.mark.parametrize("act", ["stop", "expire", "pause"])
def test_an_end_that_is_written_down_amid_a_step_is_not_overwritten(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """No step keeps the watcher out: the reason stays that of the end; what has ended is not paused, and not asked."""
    container = make(engine, "sleep", "1000")
    container.renew(expires_at := time.time_ns() + 10**15)
    container.start()
    pid, update = container.status.pid, Store.update

    def update_late(self: Store, key: str, fn: Callable[[Status], Status]) -> Status:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: container.status.finished_at, "the end to be written down")
        return update(self, key, fn)

    monkeypatch.setattr(Store, "update", update_late)
    if act == "expire":
        expire(container.life, expires_at)
    elif act == "stop":
        assert container.stop(5).exit_code == 137
    else:
        with suppress(errors.UnsupportedError), pytest.raises(errors.InvalidStateError, match="EXITED; only one that"):
            container.pause()
    status = container.status
    assert (status.reason, status.message, status.paused, status.stop_requested_at) == ("Error", "", False, 0)


class Undying(FakeStarter):
    """Its processes take no signal, as one does not that hangs in the kernel."""

    def signal(self, container_id: str, identity: ProcessIdentity, number: int, *, only_session: bool = False) -> int:
        return 1


def test_a_stop_that_ends_nothing_is_over_after_a_while(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says which process hangs, and the container is what it was: nothing has ended."""
    monkeypatch.setattr(patience, "_KILL_TIMEOUT_SECONDS", 0.2)
    starter = Undying()
    with Engine.open(state_dir, starter=starter) as engine:
        container = make(engine, "x")
        pid = container.start().pid
        with pytest.raises(errors.InvalidStateError, match=rf"process {pid}, .* has not ended .* after SIGKILL"):
            container.stop(0)
        assert container.state is ContainerState.RUNNING
        starter.end(container.id, 3)
        assert container.wait(20).exit_code == 3


class Forbidden(FakeStarter):
    """Its processes may not be killed by us, as one that has become root's."""

    def signal(self, container_id: str, identity: ProcessIdentity, number: int, *, only_session: bool = False) -> int:
        if number == signal.SIGKILL:
            raise errors.UnsupportedError("signal 9: Operation not permitted")
        return super().signal(container_id, identity, number, only_session=only_session)


def test_a_stop_says_why_nothing_could_be_killed(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process hangs, and no SIGKILL is on its way to any."""
    monkeypatch.setattr(patience, "_KILL_TIMEOUT_SECONDS", 0.2)
    starter = Forbidden()
    with Engine.open(state_dir, starter=starter) as engine:
        container = make(engine, "x")
        container.start()
        with pytest.raises(errors.InvalidStateError, match="it cannot be killed: signal 9: Operation not permitted"):
            container.stop(0)
        starter.end(container.id, 3)
        assert container.wait(20).exit_code == 3


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_what_a_callback_raises_keeps_no_end_from_others(
    engine: Engine, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """It is the host program's; those who wait for the same container, or for another, are told all the same."""

    def fail() -> None:
        raise error

    for name in ("one", "two"):
        container = make(engine, "sh", "-c", "read line < go; exit 3", name=name)
        os.mkfifo(Path(container.metadata.root_dir, "working", "go"))
        container.start()
        with container.notify(fail):
            thread, outcome = in_thread(container.wait)
            wait_until(lambda key=container.id: len(engine._runtime._bells[key]) == 2, "who waits")  # type: ignore[misc]
            Path(container.metadata.root_dir, "working", "go").write_text("\n")
            thread.join(20)
            assert (len(outcome), container.exit_code) == (1, 3)
    assert "has raised" in caplog.text


def test_nobody_waits_for_an_end_that_cannot_be_written_down_any_more(
    state_dir: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A state directory that was renamed under its engine: who waits is told, once; the next engine tells how."""
    with Engine.open(state_dir) as engine:
        container = make(engine, "sh", "-c", "read line < go; exit 7")
        os.mkfifo(Path(container.metadata.root_dir, "working", "go"))
        container.start()
        waiting = [in_thread(container.wait), in_thread(lambda: asyncio.run(container.wait_async()))]
        os.rename(state_dir, tmp_path / "moved")
        Path(tmp_path, "moved", "containers", container.id, "working", "go").write_text("\n")
        for thread, outcome in waiting:
            thread.join(20)
            assert isinstance(outcome[0], errors.StoreReplacedError), outcome
        with pytest.raises(errors.StoreReplacedError, match="has ended, and that cannot be recorded"):
            container.wait()
        assert container.state is ContainerState.UNKNOWN
    assert [record.message for record in caplog.records if "cannot be recorded" in record.message][1:] == []
    with Engine.open(tmp_path / "moved") as engine:
        assert engine.get(container.id).wait(20).exit_code == 7


def test_what_was_never_started_is_not_waited_for(engine: Engine) -> None:
    """Nobody would see it end; nor is a time that is none a limit. Threads and tasks are told the same."""
    container = make(engine, "true")
    for wait in (container.wait, lambda timeout: asyncio.run(container.wait_async(timeout))):
        with pytest.raises(errors.InvalidStateError, match="start it first"):
            wait(0)
        with pytest.raises(errors.InvalidInputError, match="seconds are needed"):
            wait(-1)


def test_a_link_that_comes_into_the_logs_path_is_not_followed(engine: Engine, tmp_path: Path) -> None:
    """Nothing below the sandbox's log directory is: between create and start somebody has put one there."""
    (tmp_path / "elsewhere/deeper").mkdir(parents=True)
    engine.create_sandbox({"metadata": {"name": "p"}, "log_directory": str(tmp_path / "logs")}, id="pod")
    container = make(engine, "true", log_path="below/deeper/out.log")
    (tmp_path / "logs").mkdir(exist_ok=True)
    (tmp_path / "logs/below").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.StartError, match="directories, not links"):
        container.start()
    assert os.listdir(tmp_path / "elsewhere/deeper") == []


def test_an_engine_whose_containers_run_on_sleeps(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """The kernel tells of ends: no thread looks by itself, and nothing is said of containers that nothing befalls."""

    def count_waits() -> dict[str, int]:
        counts = {}
        for thread in os.listdir("/proc/self/task"):
            told = Path(f"/proc/self/task/{thread}/status").read_text()
            counts[thread] = int(told.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
        counts.pop(str(threading.get_native_id()))
        return counts

    make(engine, "sleep", "1000").start()
    counts = [count_waits()]
    while len(counts) < 5 and counts[-2:] != counts[-1:] * 2:
        time.sleep(0.5)
        counts.append(count_waits())
    assert len(counts) < 5, counts
    assert not caplog.records


def test_an_end_has_the_time_at_which_it_was_seen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper sees it first, and its time is written down, not that at which the engine was told."""

    def read_exit(self: ProcessStarter, *args: object) -> object:
        seen.append(real(self, *args))  # type: ignore[arg-type]
        return seen[-1]

    seen: list[Exit | None] = []
    real = ProcessStarter.read_exit
    monkeypatch.setattr(ProcessStarter, "read_exit", read_exit)
    container = make(engine, "true")
    began = container.start().started_at
    finished_at = container.wait(20).finished_at
    told = [one.finished_at for one in seen if one is not None]
    assert told == [finished_at]
    assert began < finished_at < time.time_ns()


@pytest.mark.parametrize("front", ["thread", "task"])
def test_a_removal_by_force_stops_what_is_started_just_then(
    state_dir: str, monkeypatch: pytest.MonkeyPatch, front: str
) -> None:
    """As by its policy, right after it was seen that there is nothing to stop; that it runs is not a reason to stay."""

    def needs_stop_and_is_started(life: Life) -> bool:
        needs = needs_stop(life)
        if not started:
            started.append(Container(life.runtime, life.id).start().pid)
        return needs

    async def remove() -> bool:
        async with AsyncEngine.open(state_dir) as tasks:
            return await (await tasks.get("one")).remove(force=True, timeout=0)

    started: list[int] = []
    with Engine.open(state_dir) as engine:
        made = make(engine, "sleep", "1000")
        for module in ("lifecycle", "aio"):
            monkeypatch.setattr(f"limpet.engine.{module}.container.needs_stop", needs_stop_and_is_started)
        if front == "thread":
            assert made.remove(force=True, timeout=0)
    if front == "task":
        assert asyncio.run(remove())
    assert not is_running(started[0])
    with Store.open(state_dir) as store:
        assert store.list() == []


class Late(FakeStarter):
    """It knows how a process has ended only when it is asked for the third time."""

    asked = 0

    def read_exit(self, container_id: str, identity: ProcessIdentity, pidfd: int) -> Exit | None:
        self.asked += 1
        return super().read_exit(container_id, identity, pidfd) if self.asked > 2 else None


@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_is_set_cuts_no_wait_for_a_code(
    state_dir: str, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """By how long an end is known without its code: the wall clock says nothing of that, also if it jumps just then."""

    def jump() -> int:
        jumps.append(hours * 3600 * 10**9)
        return real() + sum(jumps)

    jumps: list[int] = []
    real = time.time_ns
    starter = Late()
    with Engine.open(state_dir, starter=starter) as engine:
        container = make(engine, "x")
        container.start()
        clock = SimpleNamespace(time_ns=jump, monotonic=time.monotonic, sleep=time.sleep)
        monkeypatch.setattr("limpet.engine.lifecycle.watcher.time", clock)
        starter.end(container.id, 3)
        assert container.wait(20).exit_code == 3
        assert starter.asked == 3
        assert jumps


def test_what_ended_without_being_created_is_not_created(engine: Engine) -> None:
    """A start that failed for good before the bundle was made: it stays EXITED, and nothing is made for it."""
    engine.create_sandbox({"metadata": {"name": "pod", "uid": "u", "namespace": "n"}}, id="pod")
    container = engine.add_container(config("one", "true"), "pod")
    fail_start(container.life, "its image is gone")
    ended = container.status
    with pytest.raises(errors.InvalidStateError, match="never created"):
        container.create()
    assert container.status == ended
    assert (ended.state, ended.exit_code, ended.created_at) == (ContainerState.EXITED, 128, 0)
    assert not os.path.lexists(container.metadata.root_dir)


def test_a_start_that_cannot_be_written_down_leaves_no_process(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sandbox was stopped meanwhile: the process that waited for its start is gone, and nothing has run."""

    def prepare(self: ProcessStarter, launch: Launch) -> Prepared:
        prepared = real(self, launch)
        waiting.append(prepared.identity.pid)
        engine.store.update_sandbox("pod", lambda old: replace(old, stopped_at=1))
        return prepared

    waiting: list[int] = []
    real = ProcessStarter.prepare
    container = make(engine, "touch", "ran")
    monkeypatch.setattr(ProcessStarter, "prepare", prepare)
    with pytest.raises(errors.InvalidStateError, match="pod"):
        container.start()
    (pid,) = waiting
    wait_until(lambda: not is_running(pid), "the waiting process to be gone")
    assert container.state is ContainerState.CREATED
    assert not Path(container.metadata.root_dir, "working", "ran").exists()


@pytest.mark.parametrize(
    ("image", "given", "expected"),
    [
        ((("e",), ("c",)), ((), ()), ["e", "c"]),
        ((("e",), ("c",)), ((), ("a",)), ["e", "a"]),
        ((("e",), ("c",)), (("x",), ()), ["x"]),
        ((("e",), ("c",)), (("x",), ("a",)), ["x", "a"]),
        (((), ("c",)), ((), ()), ["c"]),
        (((), ("c",)), ((), ("a",)), ["a"]),
    ],
)
def test_command_line_rule(image: tuple, given: tuple, expected: list[str]) -> None:  # type: ignore[type-arg]
    """Entrypoint, cmd, command and args combine by the four rows of the CRI's rule."""
    command, args = given
    asked = parse_container_config(config("n", *command, args=list(args)))
    assert choose_args(ImageConfig(entrypoint=image[0], cmd=image[1]), asked) == tuple(expected)


def test_nothing_to_run_is_refused(engine: Engine) -> None:
    """A container without a command is refused with what to do, and leaves nothing behind."""
    with pytest.raises(errors.InvalidInputError, match="give `command`"):
        make(engine)
    with pytest.raises(errors.InvalidInputError, match="its first argument, is ''"):
        make(engine, "", "argument")
    assert not engine.list()
    assert not os.listdir(engine.store.directory.join("containers"))


def test_environment_is_the_images_then_the_configs() -> None:
    """Each source overrides the one before it, and nothing of limpet's is in it."""
    asked = parse_container_config(
        config("n", "x", envs=[{"key": "B", "value": "config"}, {"key": "C", "value": "config"}])
    )
    merged = merge_environment(ImageConfig(env=("A=image", "B=image")), asked)
    assert merged == ("A=image", "B=config", "C=config")


def test_a_program_that_cannot_be_executed(engine: Engine) -> None:
    """EXITED, 128, StartError, with the reason; no process is left, and it can be released."""
    container = make(engine, "no-such-program")
    with pytest.raises(errors.StartError, match="'no-such-program': No such file"):
        container.start()
    status = container.status
    assert (status.state, status.exit_code, status.reason) == (ContainerState.EXITED, 128, "StartError")
    container.release()


def test_the_group_ends_with_its_leader(engine: Engine) -> None:
    """Each container leads its own process group, which does not outlive it."""
    container = make(engine, "sh", "-c", "sleep 1000 & echo $! > child; sleep 0.2; exit 0")
    pid = container.start().pid
    assert pid == 0 or os.getpgid(pid) == pid
    assert container.wait(20).reason == "Completed"
    child = int(Path(container.metadata.root_dir, "working", "child").read_text())
    wait_until(lambda: not is_running(child), "the child to be ended")


def test_a_stop_kills_no_later_container_with_its_id(engine: Engine) -> None:
    """One ends long before the time of its stop, is removed and made anew: what was to kill the old one spares it."""
    engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod")
    old = engine.create_container(config("one", "sleep", "1000"), "pod", id="one").start().identity
    assert old is not None
    stopped = engine.get("one")
    stopped.stop(0.3)
    stopped.remove()
    container = engine.create_container(config("one", "sleep", "1000"), "pod", id="one")
    assert container.start().state is ContainerState.RUNNING
    assert engine.starter.signal("one", old, signal.SIGKILL) == 0
    with pytest.raises(errors.WaitTimeoutError):
        container.wait(0.6)
    container.stop(0)


def test_stop_sends_the_stop_signal_then_kills(engine: Engine) -> None:
    """The config's stop signal is sent first; who ignores it is killed after the timeout."""
    polite = make(
        engine, "sh", "-c", "trap 'exit 9' USR1; touch up; while :; do sleep 0.01; done", stop_signal="SIGUSR1"
    )
    stubborn = make(engine, "sh", "-c", "trap '' TERM; touch up; while :; do sleep 0.01; done", name="two")
    for container in (polite, stubborn):
        container.start()
        wait_until(Path(container.metadata.root_dir, "working", "up").exists, "the trap to be set")
    assert polite.stop(20).exit_code == 9
    assert stubborn.stop(0.1).exit_code == 128 + signal.SIGKILL
    assert stubborn.stop().exit_code == 128 + signal.SIGKILL
    created = make(engine, "true", name="three")
    assert created.stop().state is ContainerState.CREATED


def test_a_stop_ends_a_process_whose_first_thread_has_gone(engine: Engine) -> None:
    """The kernel calls it a zombie, and it runs on: it has ended when its last thread has."""
    script = (
        "import ctypes, platform, threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "ctypes.CDLL(None).syscall({'x86_64': 60}.get(platform.machine(), 93), 0)"
    )
    container = make(engine, sys.executable, "-c", script)
    pid = container.start().pid
    wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z", "its first thread")
    assert container.state is ContainerState.RUNNING
    assert container.stop(20).exit_code == 143
    assert container.remove()


def test_running_cannot_be_released_or_deleted(engine: Engine) -> None:
    """What runs must be stopped first, and says so."""
    container = make(engine, "sleep", "1000")
    container.start()
    for step in (container.release, container.delete, container.start, container.create):
        with pytest.raises(errors.InvalidStateError, match="RUNNING"):
            step()
    assert container.state is ContainerState.RUNNING


def test_a_bundle_is_removed_of_what_needs_none(state_dir: str) -> None:
    """Not of a container that runs, has ended or may start, nor by an engine that is closed: another may have it."""
    with Engine.open(state_dir) as engine:
        container = make(engine, "sleep", "1000")
        with pytest.raises(errors.InvalidStateError, match="CREATED; stop and release it first"):
            container.remove_bundle()
        container.start()
        with pytest.raises(errors.InvalidStateError, match="RUNNING; stop and release it first"):
            container.remove_bundle()
    with pytest.raises(errors.ClosedError):
        container.remove_bundle()
    with Engine.open(state_dir) as later:
        again = later.get(container.id)
        assert os.path.exists(f"{again.metadata.root_dir}/config.json")
        again.stop(0)
        again.release()
        again.remove_bundle()


def test_the_log_outlives_the_engine(state_dir: str, engine_process) -> None:  # type: ignore[no-untyped-def]
    """Output goes on into the log while no engine runs; nothing blocks and nothing is lost."""
    process = engine_process(
        "engine = Engine.open(state_dir); s = engine.create_sandbox({'metadata': {'name': 'p'}})\n"
        "c = engine.create_container({'metadata': {'name': 'n'}, 'image': {'image': 'host'}, 'log_path': 'n.log',\n"
        "  'command': ['sh', '-c', 'i=0; while :; do i=$((i+1)); echo line $i; sleep 0.001; done']}, s.id)\n"
        "c.start(); say(c.metadata.log_path, c.status.pid); time.sleep(999)"
    )
    path, pid = process.read()
    process.kill()
    size = os.path.getsize(path)
    wait_until(lambda: os.path.getsize(path) > size + 1000, "the log to grow without an engine")
    os.killpg(int(pid), signal.SIGKILL)
    numbers = [int(line) for line in re.findall(r"^\S+ stdout F line (\d+)$", Path(path).read_text(), re.MULTILINE)]
    assert len(numbers) > 20
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_log_that_was_renamed_is_begun_anew(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As logrotate asks for it; one that was not renamed goes on, and no line is lost of either."""
    script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.001; done"
    pod = engine.create_sandbox({"metadata": {"name": "pod"}})
    fields = {"metadata": {"name": "n"}, "image": {"image": "host"}, "command": ["sh", "-c", script]}
    container = engine.create_container(fields | {"log_path": "n.log"}, pod)
    container.start()
    path = Path(container.metadata.log_path)
    wait_until(lambda: path.exists() and path.read_text().count("\n") > 5, "output")
    container.reopen_log()
    path.rename(f"{path}.20260101-000000")
    container.reopen_log()
    assert path.exists()
    wait_until(lambda: path.read_text().count("\n") > 5, "output in the new log")
    monkeypatch.setattr("limpet.engine.starters.process.starter._REOPEN_SECONDS", 0.2)
    elsewhere = path.parent.rename(f"{path.parent}-moved")
    with pytest.raises(errors.InvalidStateError, match="no new log was begun"):
        container.reopen_log()
    elsewhere.rename(path.parent)
    container.stop(0)
    numbers = [int(entry.text) for entry in container.read_log()]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("log_path", ["../out", "/abs", "a/../../out", "link/out", "", ".", "d/" + "x" * 233])
def test_log_paths_stay_in_the_log_directory(engine: Engine, tmp_path: Path, log_path: str) -> None:
    """A log path that would leave its directory, also through a link, is refused; an empty one means no log.

    So is a name that leaves no room for those of rotated logs: such a log grew without a limit.
    """
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "link").symlink_to(tmp_path)
    engine.create_sandbox({"metadata": {"name": "p"}, "log_directory": str(tmp_path / "logs")}, id="pod")
    if log_path == "":
        assert make(engine, "true", log_path="").metadata.log_path == ""
        assert make(engine, "true", name="two", log_path="x" * 232).metadata.log_path
    else:
        with pytest.raises(errors.InvalidInputError, match="log_path"):
            make(engine, "true", log_path=log_path)
    assert not list(tmp_path.rglob("out"))


@pytest.mark.parametrize("bad", ["", "a\0b", "a\nb", "x" * 10_000, " ", "a "])
def test_what_is_no_id_is_refused(engine: Engine, bad: str) -> None:
    """What cannot be printed, what is too long and spaces around an id are refused, and nothing is made."""
    engine.create_sandbox({"metadata": {"name": "p"}}, id="pod")
    with pytest.raises(errors.InvalidInputError, match="id "):
        engine.create_container(config("n", "true"), "pod", id=bad)
    with pytest.raises(errors.InvalidInputError, match="id "):
        engine.create_sandbox({"metadata": {"name": "q"}}, id=bad)
    assert os.listdir(engine.store.directory.join("containers")) == []


@pytest.mark.parametrize("bad", ["a/b", "..", "a\nb", "x" * 10_000])
def test_bad_names_are_refused(engine: Engine, bad: str) -> None:
    """A name is shown to people and to shells: separators and control characters are refused."""
    engine.create_sandbox({"metadata": {"name": "p"}}, id="pod")
    with pytest.raises(errors.InvalidInputError, match="name "):
        make(engine, "true", name=bad)


def test_names_are_reserved_until_deleted(engine: Engine) -> None:
    """A name and attempt are one container's in its sandbox, as in the CRI; a refused create leaves nothing."""
    first = make(engine, "true")
    with pytest.raises(errors.AlreadyExistsError, match="raise the attempt"):
        make(engine, "true")
    engine.create_container({**config("one", "true"), "metadata": {"name": "one", "attempt": 1}}, "pod")
    first.release()
    first.delete()
    make(engine, "true")
    assert len(os.listdir(engine.store.directory.join("containers"))) == 2


def test_image_is_missing(engine: Engine) -> None:
    """An unknown image is named, and nothing is left."""
    engine.create_sandbox({"metadata": {"name": "p"}}, id="pod")
    with pytest.raises(errors.NotFoundError, match="nope"):
        engine.create_container({**config("n", "true"), "image": {"image": "nope:1"}}, "pod")
    assert not engine.list()


def test_the_host_program_may_reap_children_itself(state_dir: str) -> None:
    """Exit codes are known even if the program around the engine ignores SIGCHLD or reaps every child."""
    script = f"""
import os, signal, threading, time
from limpet.engine import Engine
with Engine.open({state_dir!r}) as engine:
    s = engine.create_sandbox({{"metadata": {{"name": "p"}}}})
    def run(name):
        c = engine.create_container({{"metadata": {{"name": name}}, "image": {{"image": "host"}},
            "command": ["sh", "-c", "sleep 0.1; exit 6"]}}, s.id)
        c.start(); return c.wait(20).exit_code
    codes = [run("a")]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN); codes.append(run("b")); signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    def reap():
        while True:
            try: os.waitpid(-1, 0)
            except ChildProcessError: time.sleep(0.001)
    threading.Thread(target=reap, daemon=True).start()
    codes += [run("c"), run("d")]
    print(codes)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout
    assert told.strip() == "[6, 6, 6, 6]"


def test_steps_from_many_threads(engine: Engine) -> None:
    """Threads that race through the same steps: each step happens once, the losers are refused, nothing is left."""
    import threading

    containers = [make(engine, "sleep", "1000", name=f"c{k}") for k in range(4)]
    refused = []

    def race(k: int) -> None:
        container = engine.get(containers[k % 4].id)
        for step in (container.start, lambda: container.stop(5), container.release, container.delete):
            try:
                step()
            except (errors.InvalidStateError, errors.NotFoundError) as error:
                refused.append(error)

    threads = [threading.Thread(target=race, args=(k,)) for k in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert engine.list() == []
    assert len(refused) >= 4 * 3  # one start of four works; what is released or deleted may be so again
    assert os.listdir(engine.store.directory.join("containers")) == []


# --- images with layers --------------------------------------------------------------------------------------------

SCRIPT = (
    "cat /etc/motto; pwd; id -u; echo $FROM_IMAGE; "
    "echo x > /dev/null && read -r pid rest < /proc/self/stat && echo proc; ls /"
)


def load_image(engine: Engine, tmp_path: Path) -> ImageName:
    """Load an OCI image made of the host's shell and a few tools, with the libraries they need."""
    from tests import oci_layout

    members = [oci_layout.member("etc/motto", b"hold fast\n")]
    needed = set()
    for tool in ("sh", "cat", "ls", "id", "sleep"):
        path = subprocess.run(
            ["sh", "-c", f"command -v {tool}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        members.append(oci_layout.member(f"bin/{tool}", Path(path).read_bytes(), mode=0o755))
        needed |= set(
            re.findall(r"(/\S+)", subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout)
        )
    members += [oci_layout.member(lib.lstrip("/"), Path(lib).read_bytes(), mode=0o755) for lib in sorted(needed)]
    layout = oci_layout.Layout(tmp_path / "layout")
    image_config = {"Env": ["PATH=/bin", "FROM_IMAGE=yes"], "Entrypoint": ["sh", "-c"], "Cmd": [SCRIPT]}
    image_config["StopSignal"] = "SIGINT"  # type: ignore[assignment]
    layout.add_image([oci_layout.tar(*members)], "tools:1", configuration={"config": image_config})
    (name,) = engine.images.load(str(tmp_path / "layout"))
    return name


def run_image(engine: Engine, tmp_path: Path) -> list[str]:
    name = load_image(engine, tmp_path)
    engine.create_sandbox({"metadata": {"name": "p"}}, id="pod")
    container = engine.create_container(
        {"metadata": {"name": "n"}, "image": {"image": str(name)}, "log_path": "n.log"},
        "pod",
        mount_type=MountType.PLAIN,
    )
    assert container.metadata.stop_signal == "SIGINT"
    container.start()
    assert container.wait(20).exit_code == 0, read_output(container, 1)
    container.release()
    return read_output(container, len(EXPECTED) + 1)


EXPECTED = ["hold fast", "/", "0", "yes", "proc"]


@pytest.mark.usefixtures("namespaces")
def test_a_standard_image_runs_in_its_own_root(engine: Engine, tmp_path: Path) -> None:
    """An OCI image's program sees its own files as /, with /proc and /dev/null, and leaves no mount on the host."""
    lines = run_image(engine, tmp_path)
    assert lines[:5] == EXPECTED
    assert set(lines[5:]) <= {"bin", "dev", "etc", "lib", "lib64", "proc", "usr"}
    assert engine.store.directory.path not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.usefixtures("namespaces")
def test_a_standard_image_runs_as_an_ordinary_user(tmp_path: Path) -> None:
    """Without root it runs in user and mount namespaces, where it is root and nobody else."""
    script = (
        "import os, sys, pathlib\nfrom tests.engine.test_containers import *\n"
        "assert os.geteuid() != 0\n"
        "home = pathlib.Path(sys.argv[1])\n"
        "with Engine.open(str(home / 'state')) as engine: print(*run_image(engine, home), sep='\\n')\n"
    )
    # Root becomes an ordinary user, who has no rights but to its own files, in a user namespace.
    command = ["unshare", "-U", "--map-user=1000", "--map-group=1000"] if os.geteuid() == 0 else []
    command += [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:5] == EXPECTED


def test_a_failed_create_leaves_nothing(engine: Engine, tmp_path: Path) -> None:
    """If the image cannot be unpacked, neither row nor bundle is left, and the name is free again."""
    name = load_image(engine, tmp_path)
    engine.create_sandbox({"metadata": {"name": "p"}}, id="pod")
    for blob in Path(engine.store.directory.join("images")).rglob("blobs/*/*"):
        if blob.stat().st_size > 10_000:
            blob.write_bytes(blob.read_bytes()[::-1])
    asked = {"metadata": {"name": "n"}, "image": {"image": str(name)}}
    for _ in range(2):
        with pytest.raises(errors.StoreDamagedError):
            engine.create_container(asked, "pod")
    assert not engine.list()
    assert os.listdir(engine.store.directory.join("containers")) == []


def test_every_refusal_is_one_of_ours(engine: Engine) -> None:
    """Any step in any state either works or raises a LimpetError that says what to do; never anything else."""
    engine.create_sandbox({"metadata": {"name": "p"}}, id="pod")
    steps = ("create", "start", "stop", "release", "delete")
    told: list[str] = []
    for number, (first, second, third) in enumerate(product(steps, repeat=3)):
        container = engine.add_container(config(f"c{number}", "sleep", "1000"), "pod", id=f"c{number}")
        for step in (first, second, third):
            try:
                getattr(container, step)()
            except errors.LimpetError as error:
                told.append(str(error))
        time.sleep(0)
    assert told
    assert min(map(len, told)) > 20
    for container in engine.list():
        container.stop(0)


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, 1e300])
def test_a_timeout_that_is_none_is_refused(engine: Engine, seconds: float) -> None:
    """No time that cannot be written down is taken for a grace, and the container runs on."""
    sandbox = engine.create_sandbox({"metadata": {"name": "s"}})
    config = {"metadata": {"name": "c"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
    container = engine.create_container(config, sandbox.id)
    container.start()
    for call in (
        container.stop,
        container.wait,
        sandbox.stop,
        lambda timeout: container.remove(force=True, timeout=timeout),
    ):
        with pytest.raises(errors.InvalidInputError, match="seconds"):
            call(seconds)
    assert container.state is ContainerState.RUNNING
