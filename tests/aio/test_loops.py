"""Event loops that come and go around one engine or store: none is kept, and none leaves anything behind."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from limpet import AsyncEngine, AsyncStore, Engine, Store
from limpet.engine.aio.answers import Step, wait_for
from limpet.engine.lifecycle.container import Container
from limpet.engine.store import StoreFeed
from limpet.schema.events import Event, EventKind
from tests.conftest import in_thread, wait_until
from tests.records import metadata, sandbox


@pytest.fixture
def store(state_dir: str) -> Iterator[Store]:
    with Store.open(state_dir) as opened:
        opened.add_sandbox(sandbox())
        opened.add(metadata("c"))
        yield opened


@pytest.fixture
def container(engine: Engine) -> Container:
    """A container that runs."""
    engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod")
    config = {"metadata": {"name": "c"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
    made = engine.create_container(config, "pod", id="c")
    made.start()
    return made


def leave_amid(begin: Callable[[], Any]) -> None:
    """Begin something in a loop that is closed before it is over, as by a program that does not end its tasks."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # it tells that its task was destroyed

    async def begin_it() -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(begin())
        for _ in range(3):
            await asyncio.sleep(0)
        assert not task.done()
        return task

    left = loop.run_until_complete(begin_it())
    loop.close()
    assert left.get_loop() is loop


def test_a_loop_that_is_over_is_not_kept(store: Store) -> None:
    """As of a program that has one for each request: what tasks wait by goes with them."""
    front, loops = AsyncStore(store), weakref.WeakSet[asyncio.AbstractEventLoop]()

    async def use() -> Event | None:
        loops.add(asyncio.get_running_loop())
        watch = front.watch(kinds=[EventKind.ITEM_PUT])
        waiting = asyncio.create_task(watch.next(20))
        await asyncio.sleep(0)
        await front.put("kind", "key", 1)
        return await waiting

    for _ in range(5):
        assert asyncio.run(use()) is not None
    gc.collect()
    assert not loops
    assert not front._bells


def test_a_watch_needs_no_thread_of_the_programs_own_pool(store: Store) -> None:
    """Which may be full of calls that wait, perhaps for what the watch is to tell."""
    is_over = threading.Event()

    async def watch() -> Event | None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        loop.run_in_executor(None, is_over.wait)
        try:
            return await AsyncStore(store).watch(0).next(20)
        finally:
            is_over.set()

    event = asyncio.run(watch())
    assert event is not None
    assert event.revision == 1


def test_who_waits_in_a_loop_that_was_closed_is_forgotten(engine: Engine, container: Container) -> None:
    """At the next change of the container, and others are told of that."""
    front = AsyncEngine(engine)

    async def wait() -> object:
        return await (await front.get("c")).wait()

    leave_amid(container.wait_async)
    thread, outcome = in_thread(lambda: asyncio.run(wait()))
    wait_until(lambda: len(engine._runtime._bells["c"]) == 2, "both to wait")
    container.stop(0)
    thread.join(20)
    assert outcome == [container.status]
    assert not engine._runtime._bells


def test_an_error_that_comes_as_its_task_is_cancelled_is_not_told_as_lost() -> None:
    """asyncio says of one that nobody asks for that it was never retrieved."""
    told: list[object] = []

    def fail() -> None:
        raise ValueError("told to nobody")

    async def cancel_late() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
        step = Step(fail)
        waiting = asyncio.create_task(wait_for(step))
        await asyncio.sleep(0)
        waiting.cancel()
        step.run()  # the loop hears of it once the task has
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        await asyncio.sleep(0)

    asyncio.run(cancel_late())
    gc.collect()
    assert told == []


def test_a_signal_handlers_own_timeout_comes_to_the_task(
    engine: Engine, container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for that of the wait, which has none."""

    def interrupt(*_: object) -> bool:
        raise TimeoutError("the caller's own")

    looks = iter((StoreFeed.has_news, interrupt))
    front = AsyncEngine(engine)

    async def wait() -> None:
        await front.store.watch().next()

    with monkeypatch.context() as patched:
        patched.setattr(StoreFeed, "has_news", lambda *given: next(looks)(*given))  # noqa: PLW0108  # one for each call
        with pytest.raises(TimeoutError, match="the caller's own"):
            asyncio.run(wait())
    with monkeypatch.context() as patched:
        patched.setattr(Container, "_is_over", interrupt)
        with pytest.raises(TimeoutError, match="the caller's own"):
            asyncio.run(container.wait_async())
