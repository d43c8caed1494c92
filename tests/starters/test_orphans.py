"""What is left of a keeper where orphans come to the engine's process: all of it is reaped, and nothing else."""

import os
import select
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from limpet import Engine, errors
from limpet.engine.starters import orphans
from limpet.engine.starters.contract import Prepared
from limpet.engine.starters.process import ProcessStarter
from limpet.engine.starters.process.client import KeeperClient
from tests.conftest import wait_until
from tests.starters.host import list_children, make
from tests.starters.keepers import kill
from tests.starters.test_spare import _IMPATIENT

ANCHOR, KEEPER = "limpet-anchor", "limpet-keeper"


@pytest.fixture
def children() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Children of the host program that have ended, which nobody else may reap; one led a session of its own."""
    begun = [subprocess.Popen(["sh", "-c", "exit 7"], start_new_session=number == 1) for number in range(2)]
    yield begun
    assert [each.wait() for each in begun] == [7, 7]


def is_reaped(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


@pytest.mark.usefixtures("subreaper", "children")
@pytest.mark.parametrize("killed", [(), (ANCHOR,), (KEEPER,), (ANCHOR, KEEPER)])
def test_what_is_left_of_a_keeper_is_reaped(
    state_dir: str, monkeypatch: pytest.MonkeyPatch, killed: tuple[str, ...]
) -> None:
    """Each keeper left three zombies behind, more when it was killed, until the host program ended."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", _IMPATIENT)
    before = list_children()
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        for number in range(2):
            container = make(engine, f"c{number}", "echo", "hello", log_path="log")
            pid = container.start().pid
            assert container.wait(timeout=10).exit_code == 0
            wait_until(partial(is_reaped, pid), "the keeper to take note of that")
            assert list_children() > before
            kill(state_dir, *killed)
    wait_until(lambda: list_children() <= before, "all to be reaped")


class QuickEnds:
    """An epoll that tells of an end before the one who asks for it goes on, as on a machine with many processors."""

    def __init__(self) -> None:
        self._real, self._told = select.epoll(), threading.Event()
        self.is_waited_for, self.is_quick = threading.Event(), False

    def register(self, descriptor: int, events: int) -> None:
        self._real.register(descriptor, events)
        assert not self.is_quick or self._told.wait(20)

    def unregister(self, descriptor: int) -> None:
        self._real.unregister(descriptor)
        self._told.set()

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        self.is_waited_for.set()
        return self._real.poll(timeout)


def test_one_that_has_ended_is_reaped_at_once() -> None:
    """Its end can be seen before it is noted what to do then: the thread that reaps ended, and nothing was reaped."""
    reaper, ends = orphans._Reaper(), QuickEnds()
    reaper._ends = cast("select.epoll", ends)
    running, ended = (subprocess.Popen(["sleep", seconds]) for seconds in ("1000", "0"))
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    try:
        reaper.add(os.pidfd_open(running.pid), 0)  # so that the thread is there
        assert ends.is_waited_for.wait(20)
        ends.is_quick = True
        reaper.add(os.pidfd_open(ended.pid), 0)
        wait_until(lambda: is_reaped(ended.pid), "it to be reaped")
    finally:
        running.kill()
    wait_until(lambda: is_reaped(running.pid), "the other one to be reaped")
    assert (running.wait(), ended.wait()) == (0, 0)  # as what nobody can tell any more


@pytest.mark.usefixtures("subreaper", "children")
def test_what_is_left_of_one_that_could_not_begin_is_reaped(tmp_path: Path) -> None:
    before = list_children()
    directory = tmp_path / "keeper"
    directory.mkdir(mode=0o700)
    (directory / "journal").mkdir()  # which it cannot read
    with pytest.raises(errors.KeeperError, match="journal"):
        KeeperClient(str(directory)).take(begin=True)
    wait_until(lambda: list_children() <= before, "all to be reaped")


@pytest.mark.usefixtures("subreaper", "children")
def test_containers_that_come_to_us_are_reaped(state_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of their keepers were killed: the code is the program's, and nothing is left of it, nor of what it began."""
    before = list_children()
    real = ProcessStarter.go

    def go(self: ProcessStarter, prepared: Prepared) -> None:
        kill(state_dir, ANCHOR, KEEPER)
        real(self, prepared)

    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        script = f"sleep 0.1 & while [ ! -e {tmp_path}/go ]; do sleep 0.01; done; exit $1"
        started = [make(engine, f"c{number}", "sh", "-c", script, "sh", str(number)) for number in range(3)]
        for container in started:
            container.start()
        kill(state_dir, ANCHOR, KEEPER)
        (tmp_path / "go").touch()
        assert [container.wait(20).exit_code for container in started] == [0, 1, 2]
        never = make(engine, "never", "true")
        with monkeypatch.context() as patch:
            patch.setattr(ProcessStarter, "go", go)
            with pytest.raises(errors.StartError):
                never.start()
        wait_until(lambda: list_children() <= before, "all to be reaped")
