"""What can be done with an OCI container that runs; a starter that cannot do it says so."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limpet import Engine, errors
from limpet.engine import Container
from limpet.engine.starters.oci import OciStarter, abilities
from limpet.engine.starters.oci.cgroups import list_directories
from limpet.schema import ContainerState
from limpet.schema.cri import LinuxContainerResources
from tests.conftest import find_processes, is_running, read_output, wait_until
from tests.starters.oci import RUNTIMES, config, each_runtime, processes_of

COUNT = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done"


@pytest.fixture(params=RUNTIMES)
def counting(request: pytest.FixtureRequest, shared: Engine) -> Iterator[Container]:
    """A container that writes numbers."""
    linux = {"resources": {"memory_limit_in_bytes": str(64 << 20), "cpu_shares": "512"}}
    fields = {"linux": linux, "envs": [{"key": "GIVEN", "value": "yes"}]}
    container = shared.create_container(config(f"c{time.monotonic_ns()}", COUNT, **fields), request.param)
    container.start()
    yield container
    if container.state is ContainerState.RUNNING:
        container.stop(0)
    container.release()


@each_runtime
def test_pause_one_that_starts_programs_all_the_time(shared: Engine, runtime: str) -> None:
    """All of it is frozen when that returns, as where its shell waits for a child by vfork that is frozen already."""
    script = "for i in 1 2 3; do (while :; do /bin/true; done) & done; wait"
    container = shared.create_container(config(f"c{time.monotonic_ns()}", script), runtime)
    container.start()
    processes = processes_of(shared.store.directory.path, container.id)
    found = dict(list_directories(processes.cgroups, os.path.basename(processes.cgroup)))
    for _ in range(20):
        container.pause()
        if "freezer" in found:
            assert Path(found["freezer"], "freezer.state").read_text() == "FROZEN\n"
        else:
            assert "frozen 1" in Path(found[""], "cgroup.events").read_text()
        container.resume()
    container.stop(0)
    container.release()


def test_a_command_that_leaves_something_behind(counting: Container) -> None:
    """It has ended, and is not said to be at work: runc waits for whoever has the output open, and crun does not."""
    left = ["/bin/sh", "-c", "sleep 1000 & echo begun; exit 3"]
    if counting.metadata.starter == "runc":
        with pytest.raises(
            errors.WaitTimeoutError, match=r"'/bin/sh' has ended, but what it has started .* after 1.5 s"
        ):
            counting.execute(left, timeout=1.5)
        with pytest.raises(errors.WaitTimeoutError, match=r"'sleep' had not ended after 0.5 s"):
            counting.execute(["sleep", "1000"], timeout=0.5)
    else:
        done = counting.execute(left, timeout=20)
        assert (done.code, done.output) == (3, b"begun\n")


def test_execute(counting: Container) -> None:
    """Code, output and error apart, in the container's own world; with a deadline, and a reason where none starts."""
    done = counting.execute(["/bin/sh", "-c", "echo $GIVEN; hostname >/dev/null; echo bad >&2; exit 3"])
    assert (done.code, done.output, done.error, done.is_cut) == (3, b"yes\n", b"bad\n", False)
    with pytest.raises(errors.StartError, match=r"(?i)not found|no such file") as caught:
        counting.execute(["/no/such/program"])
    assert "level=" not in str(caught.value)
    wrong: Any
    for wrong in ("ls -l", [], ["echo", "a\0b"], ["echo", "\udcff"], ["echo", 1], None):
        with pytest.raises(errors.InvalidInputError, match=r"^args"):
            counting.execute(wrong)
        with pytest.raises(errors.InvalidInputError, match=r"^args"):
            counting.open_command(wrong)
    with pytest.raises(errors.StartError, match="argument list too long"):
        counting.execute(["/bin/echo", *["x" * 1000] * 3000])
    with pytest.raises(errors.WaitTimeoutError, match="after 0 s"):
        counting.execute(["sleep", f"4713{os.getpid()}"], timeout=0)
    with pytest.raises(errors.WaitTimeoutError, match="after 1 s"):
        counting.execute(["sleep", f"4713{os.getpid()}"], timeout=1)
    wait_until(lambda: not find_processes("sleep", f"4713{os.getpid()}"), "the command to be gone")
    counting.stop(0)
    with pytest.raises(errors.InvalidStateError, match="it must be RUNNING"):
        counting.execute(["true"])


def test_pause_and_resume(counting: Container, shared: Engine) -> None:
    """Frozen, nothing is written; and that is durable; SIGKILL ends one that is frozen."""
    wait_until(lambda: read_output(counting, 1), "a number")
    assert counting.pause().paused
    assert counting.pause().paused
    before = -1
    for _ in range(20):  # what was written before is on its way
        if before == (before := len(read_output(counting, 1))):
            break
        time.sleep(0.4)
    assert len(read_output(counting, 1)) == before
    assert not counting.resume().paused
    wait_until(lambda: len(read_output(counting, 1)) > before, "more numbers")
    counting.pause()
    assert counting.stop(0.2).exit_code == 137
    assert not counting.status.paused


def test_measure_and_change_limits(counting: Container, shared: Engine) -> None:
    """What it uses is told; limits change while it runs, the others stay, and the status has all of them."""
    used = counting.measure()
    assert used.cpu_ns is not None
    assert used.cpu_ns > 0
    assert used.memory_bytes is not None
    assert 0 < used.memory_bytes < 64 << 20
    assert used.processes in {1, 2, None}
    status = counting.change_limits(LinuxContainerResources(memory_limit_in_bytes=48 << 20))
    assert status.resources is not None
    assert (status.resources.requested.memory_limit_in_bytes, status.resources.requested.cpu_shares) == (48 << 20, 512)
    lines = processes_of(shared.store.directory.path, counting.id).cgroups
    if os.path.isdir("/sys/fs/cgroup/memory"):
        path = next(line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory")
        found = Path(f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes").read_text()
    else:
        path = next(line.split(":", 2)[2] for line in lines if line.startswith("0::"))
        found = Path(f"/sys/fs/cgroup{path}/memory.max").read_text()
    assert int(found) == 48 << 20
    with pytest.raises(errors.InvalidInputError, match="limits cannot be changed"):
        counting.change_limits(LinuxContainerResources(memory_limit_in_bytes=4096))
    assert counting.status.resources == status.resources


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_log_that_cannot_be_begun_anew_costs_no_conmon(shared: Engine, tmp_path: Path, runtime: str) -> None:
    """It ends where it cannot open one, and the container's end is seen by nobody: it is not asked to."""
    logs = tmp_path / "logs"
    sandbox = shared.create_sandbox(
        {"metadata": {"name": f"logs-{runtime}"}, "log_directory": str(logs)}, runtime_handler=runtime
    )
    container = shared.create_container(config("one", "sleep 1000"), sandbox)
    container.start()
    monitor = processes_of(shared.store.directory.path, container.id).monitor.pid
    container.reopen_log()
    (logs / "one.log").unlink()
    (logs / "one.log").mkdir()
    with pytest.raises(errors.InvalidStateError, match="a directory has the log's name"):
        container.reopen_log()
    (logs / "one.log").rmdir()
    first = logs / "one.log.tmp"
    for make, remove in (
        (first.mkdir, first.rmdir),
        (lambda: first.symlink_to("other"), first.unlink),
        (lambda: first.write_text("another's log"), first.unlink),
    ):
        make()
        with pytest.raises(errors.InvalidStateError, match=r"conmon makes it as 'one\.log\.tmp' first"):
            container.reopen_log()
        remove()
    first.touch()  # as a conmon leaves it that was killed
    container.reopen_log()
    assert (logs / "one.log").is_file()
    shutil.rmtree(logs)
    logs.mkdir()
    with pytest.raises(errors.InvalidStateError, match="it was removed, or replaced"):
        container.reopen_log()
    assert is_running(monitor)
    container.stop(0)
    sandbox.remove(force=True)


def test_the_log_and_its_rotation(counting: Container, shared: Engine) -> None:
    """The CRI's format, read by `limpet logs`; renamed and reopened, no line is lost."""
    path = Path(counting.metadata.log_path)
    wait_until(lambda: len(read_output(counting, 1)) > 2, "numbers")
    time_, stream, kind, text = path.read_text().splitlines()[0].split(" ", 3)
    assert (stream, kind, text) == ("stdout", "F", "1")
    assert "T" in time_
    old = path.rename(f"{path}.20260101-000000")
    counting.reopen_log()
    wait_until(lambda: path.exists() and path.read_text(), "more numbers in the new log")
    counting.stop(0)
    lines = [line.split(" ", 3)[3] for each in (old, path) for line in each.read_text().splitlines()]
    assert lines == [str(number + 1) for number in range(len(lines))]
    said = subprocess.run(
        [sys.executable, "-m", "limpet", "--state-dir", shared.store.directory.path, "logs", counting.id],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.split()[-3:] == lines[-3:]
    with pytest.raises(errors.InvalidStateError):
        counting.reopen_log()


def test_a_log_whose_container_ends_as_it_is_reopened(counting: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is said at once, and not that somebody who is attached may hold conmon up."""
    monkeypatch.setattr(abilities, "tell_conmon", lambda *_: counting.stop(0))  # conmon ends before it reads that
    os.rename(counting.metadata.log_path, f"{counting.metadata.log_path}.1")
    begun = time.monotonic()
    with pytest.raises(errors.InvalidStateError, match="its conmon has ended"):
        counting.reopen_log()
    assert time.monotonic() - begun < 4


def test_a_log_that_was_not_renamed_stays(counting: Container) -> None:
    """No line of it is lost, as often as it is asked for: conmon would put a new one in its place."""
    wait_until(lambda: len(read_output(counting, 1)) > 2, "numbers")
    for _ in range(3):
        counting.reopen_log()
    count = len(read_output(counting, 1))
    wait_until(lambda: len(read_output(counting, 1)) > count, "more numbers")
    counting.stop(0)
    lines = read_output(counting, 1)
    assert lines == [str(number + 1) for number in range(len(lines))]


def test_a_starter_that_cannot(state_dir: str) -> None:
    """Host processes are not measured, nor entered; each is an UnsupportedError that names starter and wish."""
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "a"}}, id="a")
        fields = {
            "metadata": {"name": "one"},
            "image": {"image": "host"},
            "command": ["sleep", "1000"],
            "log_path": "x",
        }
        container = engine.create_container(fields, "a")
        container.start()
        for wish in (
            container.measure,
            lambda: container.execute(["true"]),
            lambda: container.change_limits(LinuxContainerResources()),
        ):
            with pytest.raises(errors.UnsupportedError, match="the starter 'process' cannot"):
                wish()
        container.stop(0)


def test_a_frozen_one_is_released(counting: Container) -> None:
    """Its first process is killed behind the engine's back while it is frozen: what is left of it is ended."""
    counting.pause()
    assert counting.status.pid
    os.kill(counting.status.pid, signal.SIGKILL)
    assert counting.stop(5).exit_code == 137
    counting.release()


def test_what_is_asked_of_one_that_has_just_ended(shared: Engine) -> None:
    """Nobody has written down yet that it has: the caller's limits are not to blame, nor is runc; crun does it all."""
    container = shared.create_container(config(f"c{time.monotonic_ns()}", "sleep 1000"), "runc")
    status, starter = container.start(), container.life.starter
    assert status.identity is not None
    assert isinstance(starter, OciStarter)
    os.kill(status.pid, signal.SIGKILL)
    container.wait(20)
    with pytest.raises(errors.InvalidStateError, match="ended"):
        starter.change_limits(container.id, status.identity, LinuxContainerResources(cpu_shares=99))
    with pytest.raises(errors.InvalidStateError, match="ended"):
        starter.freeze(container.id, status.identity)
    container.release()
