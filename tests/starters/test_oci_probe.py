"""What a bundle tells of a container's process: with real processes that stand for a first process and its conmon."""

import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.engine.starters.oci import probe
from limpet.engine.starters.oci.exits import read_cgroups, read_program
from limpet.engine.starters.oci.probe import BundleWitness
from limpet.engine.starters.oci.run_directory import Processes, RunDirectory, make_run_directory
from limpet.recovery.evidence import Process
from limpet.recovery.host import identify, open_pidfd, read_stat
from limpet.recovery.probe import Witnessed
from limpet.schema.identity import ProcessIdentity
from tests.conftest import wait_until
from tests.starters.oci import PROCESSES


class Bundle:
    """A bundle in which one start is written down, and its two processes."""

    def __init__(self, containers_dir: Path) -> None:
        self.containers_dir = containers_dir
        self.init, self.monitor = (subprocess.Popen(["/bin/sleep", "1000"]) for _ in range(2))
        pids = (self.init.pid, self.monitor.pid)
        wait_until(lambda: {read_program(pid) for pid in pids} == {sleep()}, "both to be executed")
        (containers_dir / "one").mkdir()
        self.run: RunDirectory = make_run_directory(str(containers_dir / "one"))
        self.processes = self.write(held_program=(1, 2))

    def write(self, held_program: tuple[int, int]) -> Processes:
        init, monitor = identity_of(self.init), identity_of(self.monitor)
        self.processes = replace(PROCESSES, init=init, monitor=monitor, held_program=held_program, cgroups=())
        self.run.write_processes(self.processes)
        return self.processes

    def look(self, *, is_owner: bool = False) -> Witnessed | None:
        return BundleWitness(str(self.containers_dir), is_owner=is_owner)("one", self.processes.init)

    def end(self, process: "subprocess.Popen[bytes]") -> None:
        process.kill()
        process.wait()

    def tell_end(self, code: int) -> None:
        path = Path(self.run.join("exit"))
        path.write_text(str(code))
        path.chmod(0o600)


def sleep() -> tuple[int, int]:
    found = os.stat("/bin/sleep")
    return found.st_dev, found.st_ino


def identity_of(process: "subprocess.Popen[bytes]") -> ProcessIdentity:
    with open_pidfd(process.pid) as pidfd:
        return identify(process.pid, pidfd)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bundle]:
    monkeypatch.setattr(probe, "_EXIT_FILE_SECONDS", 0.1)
    monkeypatch.setattr(probe, "_START_SECONDS", 0.1)
    made = Bundle(tmp_path)
    yield made
    for each in (made.init, made.monitor):
        made.end(each)


def test_one_that_runs(bundle: Bundle) -> None:
    """With its conmon, or without; whatever is left of its start."""
    bundle.run.mark("executed")
    assert bundle.look() == Witnessed(Process.ALIVE)
    bundle.run.mark("starting")
    with open(bundle.run.join("starting"), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert bundle.look() == Witnessed(Process.ALIVE)
    bundle.end(bundle.monitor)
    assert bundle.look() == Witnessed(Process.MONITOR_GONE)


def test_one_that_is_being_started(bundle: Bundle) -> None:
    """By an engine that is gone: nothing is said before that is over."""
    bundle.run.mark("starting")
    with open(bundle.run.join("starting"), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = bundle.look()
        assert found is not None
        assert found.process is Process.UNPROVEN
        assert "still under way" in found.detail
    assert bundle.look() == Witnessed(Process.ALIVE)


def test_one_that_is_held(bundle: Bundle) -> None:
    """It has executed the runtime, and not its program; also if it was let go, and has not come so far."""
    bundle.write(held_program=sleep())
    assert bundle.look() == Witnessed(Process.HELD)
    bundle.run.mark("starting")
    assert bundle.look() == Witnessed(Process.HELD)


def test_one_that_has_ended(bundle: Bundle) -> None:
    """As its conmon has written it down; while that lives, and has not, nothing is known; then nobody will tell."""
    bundle.run.mark("executed")
    bundle.end(bundle.init)
    found = bundle.look()
    assert found is not None
    assert found.process is Process.UNPROVEN
    bundle.tell_end(7)
    found = bundle.look()
    assert found is not None
    assert (found.process, found.exit_code, found.is_out_of_memory) == (Process.ENDED, 7, False)
    os.unlink(bundle.run.join("exit"))
    bundle.end(bundle.monitor)
    assert bundle.look() is None


def test_one_that_had_run_out_of_memory_before_a_reboot(bundle: Bundle) -> None:
    """conmon's file tells, for nobody's cgroups are those of then."""
    bundle.run.mark("executed")
    bundle.run.mark("oom")
    bundle.tell_end(137)
    before = {name: replace(getattr(bundle.processes, name), boot_id="before") for name in ("init", "monitor")}
    bundle.processes = replace(bundle.processes, **before)
    bundle.run.write_processes(bundle.processes)
    found = bundle.look()
    assert found is not None
    assert (found.process, found.exit_code, found.is_out_of_memory) == (Process.ENDED, 137, True)


def test_one_that_was_never_let_go(bundle: Bundle) -> None:
    """Its program never ran, whatever became of it; so says its mark, too."""
    bundle.end(bundle.init)
    found = bundle.look()
    assert found is not None
    assert found.process is Process.NEVER_RAN
    bundle.run.mark("executed")
    bundle.run.mark("never-ran")
    found = bundle.look()
    assert found is not None
    assert found.process is Process.NEVER_RAN


@pytest.mark.parametrize("is_owner", [False, True])
def test_a_conmon_that_was_stopped_is_continued_by_its_engine(bundle: Bundle, is_owner: bool) -> None:
    """If the container has ended, which it is to write down; a reader changes nothing."""
    bundle.run.mark("executed")
    bundle.monitor.send_signal(signal.SIGSTOP)
    wait_until(lambda: read_stat(bundle.monitor.pid)[0] == b"T", "the conmon to stop")
    assert bundle.look(is_owner=is_owner) == Witnessed(Process.ALIVE)
    assert read_stat(bundle.monitor.pid)[0] == b"T"
    bundle.end(bundle.init)
    bundle.look(is_owner=is_owner)
    if is_owner:
        wait_until(lambda: read_stat(bundle.monitor.pid)[0] != b"T", "the conmon to go on")
    assert (read_stat(bundle.monitor.pid)[0] == b"T") is not is_owner


def test_what_the_record_does_not_name(bundle: Bundle) -> None:
    """Whether a program runs that a start has left; nothing of what is no OCI container's, or of another's."""
    look = BundleWitness(str(bundle.containers_dir))
    assert look("one", None) == Witnessed(Process.ALIVE)
    init, cgroups = bundle.processes.init, read_cgroups(bundle.init.pid)
    before_6_9 = replace(bundle.processes, init=replace(init, pidfd_inode=0), cgroups=cgroups)
    bundle.run.write_processes(before_6_9)  # where its cgroup shows which one it is
    assert look("one", None) == Witnessed(Process.ALIVE)
    bundle.write(held_program=sleep())
    assert look("one", None) is None
    bundle.write(held_program=(1, 2))
    bundle.end(bundle.init)
    assert look("one", None) is None
    (bundle.containers_dir / "two").mkdir()
    assert look("two", None) is look("two", bundle.processes.init) is None
    assert look("one", bundle.processes.monitor) is None
