"""A thread that is slow, line by line, misses nothing: what another thread does in between is seen."""

import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from limpet.engine import Engine
from limpet.engine.starters import Exit
from limpet.engine.starters.process import ProcessStarter
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


SLOW = ("/lifecycle/watcher.py", "/lifecycle/runtime.py", "/lifecycle/container.py")
SECONDS_A_LINE = 0.003
"""A program that does nothing ends sooner than two lines are over."""


def pause(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
    if not frame.f_code.co_filename.endswith(SLOW):
        return None
    if event == "line":
        time.sleep(SECONDS_A_LINE)
    return pause


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
