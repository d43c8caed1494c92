"""Threads and tasks that are slow, line by line, where they talk: no answer, no event and no end is lost between two.

The front for asyncio, the watchers of the log, and the commands' socket.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import pytest

from limpet import AsyncEngine, Engine, Snapshot, Store
from limpet.engine.control import ask_live
from limpet.engine.control.requests import Done, Wait
from tests.conftest import in_thread
from tests.records import metadata, sandbox

SECONDS_A_LINE = 0.001
EVENTS = 3


@contextmanager
def slowed(folders: Sequence[str], is_slow: Callable[[str], bool] = bool) -> Iterator[None]:
    """Let threads that begin in here pause at each line below `folders`, if their name says so."""

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if not any(each in frame.f_code.co_filename for each in folders):
            return None
        if event == "line" and is_slow(threading.current_thread().name):
            time.sleep(SECONDS_A_LINE)
        return trace

    threading.settrace(trace)
    try:
        yield
    finally:
        threading.settrace(None)


@pytest.mark.parametrize("which", ["writer", "watcher", ""], ids=["the writer", "the watcher", "both"])
def test_each_event_is_seen_however_slow_a_thread_is(state_dir: str, which: str) -> None:
    """A watch of the store, and one beside it as another process has it, give each event once, in order."""
    with Store.open(state_dir) as store, Snapshot.open(state_dir) as snapshot:
        store.add_sandbox(sandbox())
        watches = [store.watch(), snapshot.watch(store.revision)]
        found: list[list[str]] = [[], []]

        def read(index: int) -> None:
            threading.current_thread().name = "watcher"
            while len(found[index]) < EVENTS:
                event = watches[index].next(10)
                assert event is not None, f"{found[index]} and no more"
                found[index].append(event.id)

        def write() -> None:
            threading.current_thread().name = "writer"
            for number in range(EVENTS):
                store.add(metadata(f"c{number}"))

        with slowed(("/engine/store/", "/inspection/feed.py", "/state/bell.py"), lambda name: which in name):
            begun = [in_thread(call) for call in (partial(read, 0), partial(read, 1), write)]
            for thread, _ in begun:
                thread.join(20)
        assert [outcome for _, outcome in begun] == [[None]] * 3
        assert found == [[f"c{number}" for number in range(EVENTS)]] * 2


def test_a_command_is_answered_however_slow_the_engine_is(state_dir: str) -> None:
    """Each of several that ask at once gets its own answer."""
    with slowed(("/engine/control/",)), Engine.open(state_dir) as engine:
        pod = engine.create_sandbox({"metadata": {"name": "pod"}})
        for code in range(3):
            config = {"metadata": {"name": f"c{code}"}, "image": {"image": "host"}}
            engine.create_container(config | {"command": ["sh", "-c", f"exit {code}"]}, pod, id=f"c{code}").start()
        asked = [in_thread(partial(ask_live, state_dir, Wait(id=f"c{code}"))) for code in range(3)]
        for thread, _ in asked:
            thread.join(20)
        answers = [answer for _, outcome in asked for answer in outcome]
    assert [answer.status.exit_code for answer in answers if isinstance(answer, Done)] == [0, 1, 2], answers


def test_an_awaited_end_is_seen_however_slow_its_loop_and_its_threads_are(state_dir: str) -> None:
    """Tasks that wait are told, though each line of the front takes about as long as the program."""

    async def live() -> list[int]:
        async with AsyncEngine.open(state_dir) as engine:
            pod = await engine.create_sandbox({"metadata": {"name": "pod"}})
            config = {"metadata": {"name": "c"}, "image": {"image": "host"}, "command": ["false"]}
            container = await engine.create_container(config, pod)
            await container.start()
            ended = await asyncio.gather(*(container.wait(10) for _ in range(3)))
            await container.release()
            return [status.exit_code for status in ended]

    with slowed(("/engine/aio/",)):
        thread, outcome = in_thread(lambda: asyncio.run(live()))
        thread.join(30)
    assert outcome == [[1, 1, 1]]
