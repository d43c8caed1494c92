"""The engine for asyncio: many tasks, few threads, and steps that are whole whatever is cancelled."""

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from limpet import AsyncEngine, AsyncStore, Engine, Store, errors
from limpet.engine import AsyncContainer, AsyncSandbox, Container
from limpet.engine.aio import answers
from limpet.schema import ContainerState
from tests.conftest import in_thread, is_running, wait_until
from tests.failures import Failing

MANY = 120
THREADS = 60
"""More than the workers of an engine, and its other threads."""
Kind = Any  # mypy finds nothing in common that could be opened
KINDS = (AsyncStore, AsyncEngine)
Body = Callable[[AsyncEngine, AsyncSandbox], Coroutine[Any, Any, None]]


def config(name: str, *command: str, **fields: object) -> dict[str, object]:
    return {"metadata": {"name": name}, "image": {"image": "host"}, "command": list(command), **fields}


def run(state_dir: str, body: Body) -> None:
    async def main() -> None:
        async with AsyncEngine.open(state_dir) as engine:
            pod = await engine.create_sandbox({"metadata": {"name": "pod"}})
            try:
                await body(engine, pod)
            finally:
                if not engine.store.is_closed:
                    await pod.remove(force=True, timeout=0)

    asyncio.run(main())


async def few_threads() -> None:
    """Wait until no more than an engine's workers are left: those that are in a step have a thread for it as well."""
    await asyncio.to_thread(wait_until, lambda: len(os.listdir("/proc/self/task")) < THREADS, "threads to end")


def test_a_whole_life(state_dir: str) -> None:
    """Created, started, ended, read, released, deleted, as tests of threads have it."""

    async def body(engine: AsyncEngine, pod: AsyncSandbox) -> None:
        command = ("sh", "-c", "for n in $(seq 400); do echo $n; done; exit 3")
        container = await engine.create_container(config("one", *command, log_path="one.log", labels={"a": "b"}), pod)
        assert (container.name, container.labels, container.sandbox_id) == ("one", {"a": "b"}, pod.id)
        assert await engine.get("one") == container
        assert await engine.list(state="created") == [container]
        assert await pod.containers() == [container]
        assert (await container.start()).state is not ContainerState.CREATED  # it may have ended already
        assert (await container.wait(20)).exit_code == container.exit_code == 3
        assert (await container.cri_status()).exit_code == 3
        with pytest.raises(errors.InvalidStateError, match="only a CREATED"):
            await container.start()
        await container.release()
        lines = [entry.text async for entry in container.read_log()]
        assert [int(line) for line in lines] == list(range(1, 401))
        told = [one.state.name for one in await engine.history("one")]
        assert told == ["UNKNOWN", "CREATED", "RUNNING", "EXITED", "EXITED"]
        assert await container.delete() is True
        assert await container.delete() is False
        assert await pod.delete() is True

    run(state_dir, body)


def test_many_tasks_wait_without_a_thread_for_each(state_dir: str) -> None:
    """As many tasks as containers wait for them; other tasks are served meanwhile, and each end is told."""

    async def body(engine: AsyncEngine, pod: AsyncSandbox) -> None:
        async def wait_long(container: AsyncContainer) -> int:
            return (await container.wait()).exit_code

        made = await asyncio.gather(
            *(engine.create_container(config(f"c{n}", "sh", "-c", f"sleep 600; exit {n}"), pod) for n in range(MANY))
        )
        await asyncio.gather(*(container.start() for container in made))
        waiting = [asyncio.create_task(wait_long(container)) for container in made]
        await asyncio.sleep(0.1)
        await few_threads()
        assert await asyncio.to_thread(lambda: "served") == "served"
        other = await engine.create_container(config("other", "true"), pod)
        await other.start()
        assert (await other.wait(20)).exit_code == 0
        await asyncio.gather(*(container.stop(0) for container in made))
        assert await asyncio.gather(*waiting) == [137] * MANY

    run(state_dir, body)


@pytest.mark.long
def test_many_stops_take_the_time_of_one(state_dir: str) -> None:
    """More stops at once than there are threads, of programs that use up their time: none waits for another's."""

    async def body(engine: AsyncEngine, pod: AsyncSandbox) -> None:
        ready = Path(state_dir).parent / "ready"
        ready.mkdir()
        made = [
            await engine.create_container(
                config(f"c{n}", "sh", "-c", f"trap '' TERM; : > {ready}/{n}; while :; do sleep 1; done"), pod
            )
            for n in range(50)
        ]
        await asyncio.gather(*(container.start() for container in made))
        await asyncio.to_thread(wait_until, lambda: len(list(ready.iterdir())) == 50, "the traps")
        began = time.monotonic()
        stops = [asyncio.create_task(container.stop(6)) for container in made]
        await asyncio.sleep(1)
        await few_threads()
        assert all(container.state is ContainerState.RUNNING for container in made)
        assert {status.state for status in await asyncio.gather(*stops)} == {ContainerState.EXITED}
        assert time.monotonic() - began < 4 * 6  # 16 threads that wait for 50 stops would take this

    run(state_dir, body)


def test_a_sandbox_is_stopped_and_removed(state_dir: str) -> None:
    """Stopped, it is NOTREADY at once and takes nothing new; removed with force, all that was in it is gone."""

    async def body(engine: AsyncEngine, pod: AsyncSandbox) -> None:
        made = [await engine.create_container(config(f"c{n}", "sleep", "600"), pod) for n in range(4)]
        pids = [(await container.start()).pid for container in made[:3]]
        with pytest.raises(errors.InvalidStateError):
            await pod.remove()
        before = pod.state
        await pod.stop(0)
        assert [before.name, pod.state.name] == ["READY", "NOTREADY"]
        assert not any(map(is_running, pids))
        with pytest.raises(errors.InvalidStateError):
            await engine.create_container(config("late", "true"), pod)
        assert await pod.remove(force=True)
        assert await pod.remove(force=True) is False
        assert await engine.list() == []

    run(state_dir, body)


def test_one_that_is_held_up_starves_no_other(state_dir: str) -> None:
    """A step of one container cannot go on, and many tasks ask for more of it: the others' steps are done."""

    async def body(engine: AsyncEngine, pod: AsyncSandbox) -> None:
        held = await engine.create_container(config("held", "sleep", "600"), pod)
        other = await engine.create_container(config("other", "true"), pod)
        with engine.engine.exclusive(held.id):  # by this thread, as by any
            tasks = [asyncio.create_task(held.start()) for _ in range(60)]
            tasks += [asyncio.create_task(held.release()) for _ in range(60)]
            await asyncio.sleep(0.2)
            await asyncio.wait_for(other.start(), 20)
            assert (await other.wait(20)).exit_code == 0
            await asyncio.wait_for(other.remove(), 20)
            await few_threads()
            for task in tasks[1:]:
                task.cancel()
            results = await asyncio.wait_for(asyncio.gather(*tasks[1:], return_exceptions=True), 20)
            assert {type(result) for result in results} == {asyncio.CancelledError}  # taken back: they never begin
            states = [held.state]
        await tasks[0]
        assert [*states, held.state] == [ContainerState.CREATED, ContainerState.RUNNING]

    run(state_dir, body)


def test_a_cancelled_task_leaves_its_step_whole(state_dir: str) -> None:
    """Wherever a life is cancelled, nothing is half done when the task has ended, and nothing is still to come."""

    async def body(engine: AsyncEngine, pod: AsyncSandbox) -> None:
        chance = random.Random(7)
        bundles = Path(state_dir, "containers")
        states = set()
        for turn in range(40):

            async def live(name: str = f"c{turn}") -> None:
                container = await engine.create_container(config(name, "sleep", "600"), pod, id=name)
                await container.start()
                await container.stop(0)

            task = asyncio.create_task(live())
            await asyncio.sleep(chance.uniform(0, 0.04))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            found = await engine.list(id=f"c{turn}")
            assert (bundles / f"c{turn}").exists() == bool(found)
            for container in found:
                status = container.status
                states.add(status.state.name)
                if status.state is ContainerState.RUNNING and not status.stop_requested_at:
                    assert is_running(status.pid)
                await container.remove(force=True, timeout=0)
        assert "UNKNOWN" not in states

    run(state_dir, body)


def test_a_cancelled_removal_of_a_sandbox_is_over_when_its_task_is(
    state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has begun of one container is waited for, though another's was taken back; repeating it finishes it."""
    begun, may_go_on = list[str](), threading.Event()

    def remove_late(container: Container, **how: Any) -> bool:
        begun.append(container.id)
        assert may_go_on.wait(20)
        return remove(container, **how)

    async def body(engine: AsyncEngine, pod: AsyncSandbox) -> None:
        for n in range(20):  # more than there are threads; with a policy each is removed by itself
            await engine.create_container(config(f"c{n}", "true"), pod, restart="always")
        await pod.stop(0)
        removal = asyncio.create_task(pod.remove())
        await asyncio.to_thread(wait_until, lambda: begun, "a removal to begin")
        removal.cancel()
        done, _ = await asyncio.wait([removal], timeout=0.5)
        may_go_on.set()
        assert not done
        await asyncio.wait([removal])
        assert removal.cancelled()
        left = {container.id for container in await engine.list()}
        assert left
        assert left.isdisjoint(begun)
        assert await pod.remove()
        assert await engine.list() == []

    remove = Container.remove
    monkeypatch.setattr(Container, "remove", remove_late)
    run(state_dir, body)


def test_closing_wakes_all_who_wait(state_dir: str) -> None:
    """The engine is closed under tasks that wait: they get ClosedError, and the containers run on."""

    async def main() -> int:
        engine = await AsyncEngine.open(state_dir)
        pod = await engine.create_sandbox({"metadata": {"name": "pod"}})
        container = await engine.create_container(config("one", "sleep", "600"), pod, id="one")
        pid = (await container.start()).pid
        waiting = [asyncio.create_task(container.wait()) for _ in range(20)]
        stopping = asyncio.create_task(container.wait(600))
        await asyncio.sleep(0.05)
        await engine.close()
        await engine.close()
        for result in await asyncio.gather(*waiting, stopping, return_exceptions=True):
            assert isinstance(result, errors.ClosedError)
        with pytest.raises(errors.ClosedError):
            await engine.get("one")
        return pid

    pid = asyncio.run(main())
    assert is_running(pid)
    with Engine.open(state_dir) as engine:
        assert engine.get("one").remove(force=True, timeout=0)


@pytest.mark.parametrize("kind", KINDS)
def test_each_way_to_open(kind: Kind, state_dir: str) -> None:
    """Awaited, in `async with`, as a task, and after a wait; each closes for the next."""

    async def main() -> None:
        opened = await kind.open(state_dir)
        with pytest.raises(errors.StateDirectoryLockedError):
            await kind.open(state_dir)
        waiting = asyncio.create_task(kind.open(state_dir, wait=30))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        await opened.close()
        async with await waiting as again:
            assert not (again.store if isinstance(again, AsyncEngine) else again).is_closed
        async with kind.open(Path(state_dir), node="other") as third:
            assert third is not opened
        with pytest.raises(errors.InvalidInputError):
            await kind.open(state_dir, wait=-1)
        kind.open(state_dir)  # never awaited, and so never opened

    asyncio.run(main())
    Store.open(state_dir).close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cancelled_opening_leaves_the_directory_free(kind: Kind, state_dir: str) -> None:
    """Cancelled while it opens or waits for the lock: once the task has ended, another can open."""

    async def main() -> None:
        for turn in range(10):
            task = asyncio.create_task(kind.open(state_dir))
            await asyncio.sleep(0.004 * turn)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await (await task).close()
            Store.open(state_dir).close()
        with Store.open(state_dir):
            task = asyncio.create_task(kind.open(state_dir, wait=600))
            await asyncio.sleep(0.3)
            task.cancel()
            began = time.monotonic()
            await asyncio.gather(task, return_exceptions=True)
            assert time.monotonic() - began < 10
        Store.open(state_dir).close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_close_is_done_whenever_its_task_is_cancelled(kind: Kind, state_dir: str) -> None:
    """Cancelled by itself at the end of its block, or a second time as it closes: another can open."""

    async def by_itself() -> None:
        async with kind.open(state_dir) as opened:
            kept.append(opened)
            asyncio.current_task().cancel()  # type: ignore[union-attr]

    async def twice() -> None:
        async def hold() -> None:
            async with kind.open(state_dir) as opened:
                kept.append(opened)
                await asyncio.sleep(600)

        task = asyncio.create_task(hold())
        while len(kept) < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0)  # it has begun to close
        task.cancel()
        await task

    kept: list[Any] = []  # or collecting them as garbage might close them
    for main in (by_itself, twice):
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(main())
        Store.open(state_dir).close()


def test_threads_and_tasks_use_one_engine(engine: Engine) -> None:
    """What a thread does beside them is seen by tasks of two loops, and the other way round."""
    pod = engine.create_sandbox({"metadata": {"name": "pod"}})
    front = AsyncEngine(engine)

    async def live(name: str) -> int:
        container = await front.create_container(config(name, "sh", "-c", "exit 5"), pod)
        await container.start()
        return (await container.wait(20)).exit_code

    async def many(prefix: str) -> list[int]:
        return await asyncio.gather(*(live(f"{prefix}{number}") for number in range(10)))

    threads = [in_thread(lambda prefix=prefix: asyncio.run(many(prefix))) for prefix in "ab"]  # type: ignore[misc]
    container: Container = engine.create_container(config("c", "sleep", "600"), pod)
    container.start()
    for thread, outcome in threads:
        thread.join(60)
        assert outcome == [[5] * 10]
    assert asyncio.run(stop(front, container.id)) is ContainerState.EXITED
    assert len(engine.list(state="exited")) == 21


async def stop(front: AsyncEngine, container_id: str) -> ContainerState:
    return (await (await front.get(container_id)).stop(0)).state


@pytest.mark.parametrize("part", ["settle", "put", "_on_done"])
@pytest.mark.parametrize("at", range(1, 4))
def test_a_failure_of_a_workers_own_keeps_no_task_waiting(
    state_dir: str, monkeypatch: pytest.MonkeyPatch, part: str, at: int
) -> None:
    """For want of memory, say: each of many steps of one container has an outcome, and so have those after it."""

    async def body(engine: AsyncEngine, pod: AsyncSandbox) -> None:
        failing = Failing({at})
        container = await engine.create_container(config("one", "true"), pod)
        place = answers if part == "settle" else container._workers._quick
        with monkeypatch.context() as patched:
            patched.setattr(place, part, failing(getattr(place, part)))
            async with asyncio.timeout(20):
                steps = [container.renew(2**62 + number) for number in range(4)]
                outcomes = await asyncio.gather(*steps, return_exceptions=True)
        assert failing.calls >= at
        assert all(not isinstance(each, BaseException) or isinstance(each, MemoryError) for each in outcomes)
        async with asyncio.timeout(20):
            assert (await container.renew(2**62)).expires_at == 2**62

    run(state_dir, body)


@pytest.mark.parametrize(("opens", "given"), [("open_command", (["true"],)), ("attach", ())])
def test_a_session_that_a_cancelled_task_does_not_get_is_closed(
    state_dir: str, monkeypatch: pytest.MonkeyPatch, opens: str, given: tuple[object, ...]
) -> None:
    """Nobody else could: its command would run on, with descriptors of this process."""
    begun, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    class Opened:
        def close(self) -> None:
            closed.set()

    def open_it(*_: object, **__: object) -> Opened:
        begun.set()
        assert go_on.wait(20)
        return Opened()

    monkeypatch.setattr(Container, opens, open_it)

    async def body(engine: AsyncEngine, pod: AsyncSandbox) -> None:
        container = await engine.create_container(config("one", "true"), pod)
        task = asyncio.create_task(getattr(container, opens)(*given))
        await asyncio.to_thread(begun.wait, 20)
        task.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed.is_set()

    run(state_dir, body)


def test_an_id_that_is_no_text_is_refused_as_without_asyncio(state_dir: str) -> None:
    """Also one that no dict can have as a key."""
    wrong: Any = []

    async def body(engine: AsyncEngine, pod: AsyncSandbox) -> None:
        for begin in (engine.create_container, engine.add_container):
            with pytest.raises(errors.InvalidInputError, match="id"):
                await begin(config("job", "true"), pod, id=[pod.id])  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidInputError, match="id"):
            await engine.create_sandbox({"metadata": {"name": "other"}}, id=[pod.id])  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidInputError, match="id"):
            await engine.delete(wrong)

    run(state_dir, body)


@pytest.mark.parametrize("names", ["PATH", 7])
def test_what_is_no_list_of_names_is_refused_as_without_asyncio(state_dir: str, names: Any) -> None:
    """A text is not taken for the names of its letters."""

    async def open_it() -> None:
        async with AsyncEngine.open(state_dir, inherit_env=names):
            pass

    with pytest.raises(errors.InvalidInputError, match="inherit_env"):
        asyncio.run(open_it())


def test_names_that_can_be_read_once_are_read_at_each_try(state_dir: str) -> None:
    """While another has the state directory open, the opening is tried again and again."""

    async def open_it() -> list[str]:
        opening = asyncio.ensure_future(begin())
        await asyncio.sleep(0.5)
        first.close()
        engine = await opening
        pod = await engine.create_sandbox({"metadata": {"name": "pod"}})
        job = await engine.create_container(config("job", "sh", "-c", "echo $ONCE", log_path="job.log"), pod)
        await job.start()
        await job.wait(timeout=10)
        said = [entry.text.decode() async for entry in job.read_log()]
        await pod.remove(force=True)
        await engine.close()
        return said

    async def begin() -> AsyncEngine:
        return await AsyncEngine.open(state_dir, inherit_env=iter(["ONCE"]), wait=20)

    os.environ["ONCE"] = "read"
    first = Engine.open(state_dir)
    try:
        assert asyncio.run(open_it()) == ["read\n"]
    finally:
        del os.environ["ONCE"]
        first.close()
