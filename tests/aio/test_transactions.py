"""Transactions of tasks: whole or not at all, the only writer, and in nobody's way once they have ended."""

import asyncio
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from limpet import AsyncStore, Store, errors
from limpet.schema import Status
from tests.conftest import in_thread, wait_until
from tests.records import RUNNING, metadata, sandbox


@pytest.fixture
def store(state_dir: str) -> Iterator[Store]:
    with Store.open(state_dir) as opened:
        opened.add_sandbox(sandbox())
        for name in "ab":
            opened.add(metadata(name), RUNNING)
        yield opened


def bump(status: Status) -> Status:
    return replace(status, exit_code=status.exit_code + 1)


def codes(store: Store) -> list[int]:
    return [store.status(name).exit_code for name in "ab"]


def test_a_transaction_is_in_the_log_of_changes(store: Store) -> None:
    """Its changes are events, of one commit."""

    async def main() -> None:
        before = store.revision
        async with AsyncStore(store).transaction() as draft:
            draft.put("k", "one", 1, None)
            draft.put("k", "two", 2, None)
        rows = store.load_events(before, 9).rows
        assert [(row.id, row.last_revision) for row in rows] == [("one", before + 2), ("two", before + 2)]

    asyncio.run(main())


def test_a_transaction_is_whole_or_not_at_all(store: Store) -> None:
    """All of it is seen at its end; what raises in it, or is cancelled, changes nothing."""

    async def main() -> None:
        front = AsyncStore(store)
        async with front.transaction() as draft:
            draft.update("a", bump)
            await asyncio.sleep(0.01)
            draft.update("b", bump)
            assert codes(store) == [0, 0]
        assert codes(store) == [1, 1]
        with pytest.raises(ZeroDivisionError):
            async with front.transaction() as draft:
                draft.update("a", bump)
                _ = 1 / 0

        async def hang() -> None:
            async with front.transaction() as draft:
                draft.update("a", bump)
                await asyncio.sleep(600)

        task = asyncio.create_task(hang())
        await asyncio.sleep(0.05)
        behind = asyncio.create_task(hang())
        await asyncio.sleep(0.05)
        for one in (behind, task):
            one.cancel()
        await asyncio.gather(task, behind, return_exceptions=True)
        assert codes(store) == [1, 1]
        await front.update("a", bump)

    asyncio.run(main())
    store.update("b", bump)
    assert codes(store) == [2, 2]


def test_a_call_that_would_wait_for_itself_is_refused(store: Store) -> None:
    """Within the block the store refuses its own task, and makes those of others wait."""

    async def main() -> None:
        front = AsyncStore(store)
        async with front.transaction() as draft:
            with pytest.raises(errors.InvalidStateError, match="draft"):
                await front.update("a", bump)
            with pytest.raises(errors.InvalidStateError, match="draft"):
                async with front.transaction():
                    pass
            with pytest.raises(errors.InvalidStateError, match="draft"):
                await front.close()
            thread, outcome = in_thread(lambda: store.update("b", bump).exit_code)
            await asyncio.to_thread(wait_until, lambda: store._committer._queue, "the thread's change")
            draft.update("b", bump)

            async def later() -> None:
                await asyncio.sleep(0.2)
                await front.update("a", bump)

            other = asyncio.create_task(later())
            assert not outcome
        await other
        await asyncio.to_thread(thread.join, 20)
        assert outcome == [2]
        assert codes(store) == [1, 2]

    asyncio.run(main())


def test_many_transactions_lose_nothing(store: Store) -> None:
    """Tasks of two loops and threads take turns, and every change counts."""

    async def main() -> None:
        front = AsyncStore(store)

        async def one() -> None:
            for _ in range(10):
                async with front.transaction() as draft:
                    for name in "ab":
                        draft.update(name, bump)
                await front.update("a", bump)

        await asyncio.gather(*(one() for _ in range(8)))

    threads = [in_thread(lambda: asyncio.run(main())) for _ in range(2)]
    threads += [in_thread(lambda: [store.update("b", bump) for _ in range(80)] and None) for _ in range(2)]
    for thread, outcome in threads:
        thread.join(60)
        assert outcome == [None]
    assert codes(store) == [320, 320]


def test_a_loop_that_ends_in_a_transaction_holds_up_nobody(store: Store) -> None:
    """A loop that is stopped over an open block gives the right to write back."""
    loop = asyncio.new_event_loop()

    async def hang() -> None:
        async with AsyncStore(store).transaction() as draft:
            draft.update("a", bump)
            await asyncio.sleep(600)

    task = loop.create_task(hang())
    loop.run_until_complete(asyncio.sleep(0.05))
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    thread, outcome = in_thread(lambda: store.update("a", bump).exit_code)
    thread.join(20)
    assert outcome == [1]
