"""A process that ends, or is reaped, between any two steps of a look at it has ended: it is nothing else."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from msgspec.structs import replace

from limpet.engine.starters.oci.exits import (
    Program,
    is_monitor_alive,
    is_process,
    observe_program,
    read_cgroups,
    read_program,
)
from limpet.engine.starters.oci.probe import BundleWitness
from limpet.engine.starters.oci.run_directory import Processes, make_run_directory
from limpet.engine.starters.pidfds import adopt_process
from limpet.recovery import Process
from limpet.recovery.host import ask_for_pidfs, identify, observe_process, open_pidfd
from limpet.schema import errors
from tests.conftest import wait_until
from tests.starters.oci import PROCESSES

MOST = 1000
"""So many C functions no look calls."""
SLEEP = os.stat("/bin/sleep")


@contextmanager
def process(*, is_proven: bool) -> Iterator[tuple["subprocess.Popen[bytes]", Processes]]:
    """Yield a process that runs, and what was written down of it as of a container, whose conmon has ended."""
    with subprocess.Popen(["/bin/sleep", "1000"]) as made:
        try:
            wait_until(lambda: read_program(made.pid) == (SLEEP.st_dev, SLEEP.st_ino), "it to be executed")
            with open_pidfd(made.pid) as pidfd:
                identity = identify(made.pid, pidfd)
            if not is_proven:
                identity = replace(identity, pidfd_inode=0)  # as before Linux 6.9
            yield made, replace(PROCESSES, init=identity, cgroups=read_cgroups(made.pid))
        finally:
            made.kill()


def look_amid_its_end(
    look: Callable[[Processes], object], at: int, *, is_proven: bool, is_reaped: bool
) -> tuple[object, bool]:
    """Return what the look says of a process that ends right before its C call with this number, and whether it did."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "c_call"
        if event == "c_call" and calls == at:
            sys.setprofile(None)
            ended.kill()
            os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
            if is_reaped:
                ended.wait()

    with process(is_proven=is_proven) as (ended, processes):
        sys.setprofile(count)
        try:
            said = look(processes)
        finally:
            sys.setprofile(None)
        return said, calls >= at


def adopt(processes: Processes) -> bool:
    def why_not(pidfd: int) -> str:
        return "" if is_process(processes.init, pidfd, processes.cgroups) else "it is another"

    try:
        os.close(adopt_process(processes.init, why_not))
    except errors.NotFoundError:
        return False
    return True


LOOKS: dict[str, tuple[Callable[[Processes], object], set[object], set[object]]] = {
    "process": (
        lambda processes: observe_process(processes.init)[0],
        {Process.ALIVE, Process.UNPROVEN},
        {Process.ENDED, Process.GONE},
    ),
    "program": (observe_program, {Program.EXECUTED}, {Program.ENDED}),
    "monitor": (lambda processes: is_monitor_alive(replace(processes, monitor=processes.init)), {True}, {False}),
    "adoption": (adopt, {True}, {True, False}),
}


@pytest.mark.parametrize("is_reaped", [False, True], ids=["zombie", "reaped"])
@pytest.mark.parametrize("is_proven", [True, False], ids=["proven", "unproven"])
@pytest.mark.parametrize("name", LOOKS)
def test_what_ends_amid_a_look_is_seen_before_or_after_its_end(name: str, is_proven: bool, is_reaped: bool) -> None:
    """It is not hidden, no stranger, and no error: wherever in the look it ends."""
    look, before, after = LOOKS[name]
    ask_for_pidfs()  # remembers its answer
    for at in range(1, MOST):
        said, was_amid = look_amid_its_end(look, at, is_proven=is_proven, is_reaped=is_reaped)
        assert said in before | after, at
        if at == 1:
            assert said in after
        if not was_amid:
            assert said in before
            break
    else:
        pytest.fail("the look is endless")


@pytest.mark.parametrize("is_reaped", [False, True], ids=["zombie", "reaped"])
@pytest.mark.parametrize("is_proven", [True, False], ids=["proven", "unproven"])
def test_what_its_bundle_says_of_what_ends_amid_the_look(tmp_path: Path, is_proven: bool, is_reaped: bool) -> None:
    """Nobody has seen how: its conmon has ended before. So nothing is known, or it was seen alive before."""
    (tmp_path / "one").mkdir()
    run = make_run_directory(str(tmp_path / "one"))
    run.mark("executed")

    def look(processes: Processes) -> object:
        run.write_processes(processes)
        said = BundleWitness(str(tmp_path))("one", processes.init)
        return said and said.process

    for at in range(1, MOST):
        said, was_amid = look_amid_its_end(look, at, is_proven=is_proven, is_reaped=is_reaped)
        assert said in {None, Process.MONITOR_GONE}, at
        if not was_amid:
            assert said is Process.MONITOR_GONE
            break


def test_what_is_reaped_while_its_pidfd_is_opened_is_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a number that is given back at that moment older kernels say EINVAL, as of a thread's; then it is nobody's."""
    opened = os.pidfd_open

    def reap_amid(pid: int) -> int:
        if ended.returncode is None:
            ended.kill()
            ended.wait()
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(pid)

    with process(is_proven=True) as (ended, processes):
        monkeypatch.setattr(os, "pidfd_open", reap_amid)
        assert observe_process(processes.init)[0] is Process.GONE


def test_what_cannot_be_looked_at_has_not_ended() -> None:
    """The last free descriptor is its pidfd's: nothing is said of it then, nor of its conmon, nor of who it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with process(is_proven=False) as (alive, processes):
        next_one = os.dup(0)
        os.close(next_one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_one + 1, hard))
        try:
            said = [refusal(observe_program, processes), refusal(is_monitor_alive, alone(processes))]
            seen = observe_process(processes.init)[0]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert alive.poll() is None
    assert said == [os.strerror(errno.EMFILE)] * 2
    assert seen is Process.HIDDEN


def alone(processes: Processes) -> Processes:
    return replace(processes, monitor=processes.init)


def refusal(look: Callable[[Processes], object], processes: Processes) -> str:
    with pytest.raises(OSError, match=rf"pid {processes.init.pid}: ") as caught:
        look(processes)
    return str(caught.value.strerror).partition(": ")[2]
