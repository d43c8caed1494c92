"""A thread that is slow, line by line, misses nothing: what another thread does in between is seen."""

import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from limpet.engine import Engine, Store
from limpet.engine.lifecycle import watcher
from limpet.engine.starters import Exit
from limpet.engine.starters.process import ProcessStarter
from limpet.schema import ContainerState
from limpet.schema.identity import ProcessIdentity
from tests.conftest import in_thread


class Late(ProcessStarter):
    """Knows how a process has ended only when it is asked again, as the keeper and conmon may."""

    def __init__(self) -> None:
        super().__init__()
        self._asked: set[str] = set()

    def read_exit(self, container_id: str, identity: ProcessIdentity, pidfd: int) -> Exit | None:
        if container_id not in self._asked:
            self._asked.add(container_id)
            return None
        return super().read_exit(container_id, identity, pidfd)


SLOW = ("/lifecycle/watcher.py", "/lifecycle/runtime.py", "/lifecycle/starting.py")
SECONDS_A_LINE = 0.003
"""A program that does nothing ends sooner than two lines are over."""


def pause(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
    if not frame.f_code.co_filename.endswith(SLOW):
        return None
    if event == "line":
        time.sleep(SECONDS_A_LINE)
    return pause


def test_an_end_that_is_written_down_is_not_doubted(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk was slow, and the thread that watches says so when the end is known, but not told to it yet."""
    monkeypatch.setattr(watcher, "_SLOW_SECONDS", 60.0)
    is_doubted, doubt, settle = threading.Event(), Store.doubt, watcher._Recording.settle

    def note(store: Store, *arguments: Any) -> None:
        doubt(store, *arguments)
        is_doubted.set()

    def settle_late(requests: Any) -> None:
        watcher._SLOW_SECONDS = 0.0  # it is written down by now
        requests[0].wake_watcher()
        is_doubted.wait(20)
        settle(requests)

    monkeypatch.setattr(Store, "doubt", note)
    monkeypatch.setattr(watcher._Recording, "settle", settle_late)
    with Engine.open(state_dir) as engine:
        sandbox = engine.create_sandbox({"metadata": {"name": "pod"}})
        config = {"metadata": {"name": "c"}, "image": {"image": "host"}, "command": ["false"]}
        container = engine.create_container(config, sandbox)
        container.start()
        assert container.wait(30).exit_code == 1
        assert is_doubted.is_set()
        assert container.state is ContainerState.EXITED


@pytest.mark.parametrize("which", ["the watcher's thread", "each thread but the watcher's", "each thread"])
def test_an_end_is_seen_however_slow_a_thread_is(state_dir: str, which: str) -> None:
    """Whichever of the threads is slow, the end of a program that does nothing is known in time."""

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        is_watcher = threading.current_thread().name == "limpet-watch"
        if is_watcher != (which == "the watcher's thread") and which != "each thread":
            return None
        return pause(frame, event, argument)

    def live() -> None:
        with Engine.open(state_dir, starter=Late()) as engine:
            sandbox = engine.create_sandbox({"metadata": {"name": "pod"}})
            config = {"metadata": {"name": "c"}, "image": {"image": "host"}, "command": ["false"]}
            container = engine.create_container(config, sandbox)
            container.start()
            assert container.wait(30).exit_code == 1
            container.release()
            container.delete()

    threading.settrace(trace)
    try:
        thread, outcome = in_thread(live)  # the main thread has its steps done by threads that are not traced
        thread.join()
    finally:
        threading.settrace(None)
    assert outcome == [None]
