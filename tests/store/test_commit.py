"""Group commit: order, fairness, errors and interrupts, for threads, for tasks, and for both at once."""

import asyncio
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.engine import Store, errors
from limpet.engine.aio import AsyncStore
from limpet.engine.database import Changes
from limpet.engine.database.sqlite.writer import Writer
from limpet.engine.store.commit import Committer, Request
from limpet.engine.store.draft import Draft
from limpet.schema import Status
from limpet.schema.events import EventKind
from limpet.schema.rows import StatusRow
from tests.conftest import in_thread, wait_until
from tests.records import RUNNING, metadata, sandbox


@pytest.fixture
def store(state_dir: str) -> Iterator[Store]:
    with Store.open(state_dir) as opened:
        opened.add_sandbox(sandbox())
        for name in "abcd":
            opened.add(metadata(name), RUNNING)
        yield opened


def bump(old: Status) -> Status:
    return replace(old, exit_code=old.exit_code + 1)


class Gated:
    """A commit function that waits until it is let go, and remembers its batches."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.batches: list[list[object]] = []
        self.fail: BaseException | None = None

    def __call__(self, requests: Sequence[Request]) -> None:
        self.entered.release()
        assert self.go.acquire(timeout=30)
        if self.fail is not None:
            raise self.fail
        self.batches.append([request.apply() for request in requests])
        for request, value in zip(requests, self.batches[-1], strict=True):
            request.result = value


def queue_up(committer: Committer, gated: Gated, count: int) -> list[tuple[threading.Thread, list[object]]]:
    """One caller commits and is held; `count` more come meanwhile, in order."""
    callers = [in_thread(lambda: committer.run(Request(lambda: 0)))]
    assert gated.entered.acquire(timeout=30)
    for number in range(1, count + 1):
        callers.append(in_thread(lambda number=number: committer.run(Request(lambda: number))))  # type: ignore[misc]
        wait_until(lambda: len(committer._queue) == number, "the caller to queue up")
    return callers


def test_callers_that_come_during_a_commit_ride_in_the_next_in_order() -> None:
    """A lone caller commits alone; all who come meanwhile form one batch, in the order in which they came."""
    gated = Gated()
    committer = Committer(gated)
    callers = queue_up(committer, gated, 40)
    gated.go.release(2)
    for number, (thread, outcome) in enumerate(callers):
        thread.join(30)
        assert outcome == [number]
    assert gated.batches == [[0], list(range(1, 41))]
    committer.close()


def test_an_idle_committer_sleeps() -> None:
    """Its thread runs for each batch, and not once for as long as nobody asks for anything."""
    before = set(os.listdir("/proc/self/task"))
    gated = Gated()
    committer = Committer(gated)
    callers = queue_up(committer, gated, 1)
    gated.go.release(2)
    for thread, _ in callers:
        thread.join(30)
    wait_until(lambda: len(set(os.listdir("/proc/self/task")) - before) == 1, "its thread to be the only new one")
    (server,) = set(os.listdir("/proc/self/task")) - before

    def count_waits() -> int:
        told = Path(f"/proc/self/task/{server}/status").read_text()
        return int(told.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    counts = [count_waits()]
    while len(counts) < 10 and counts[-2:] != counts[-1:] * 2:
        time.sleep(0.1)
        counts.append(count_waits())
    assert len(counts) < 10, counts
    committer.close()


class Interrupted(Request):
    """A request whose caller is interrupted when it begins to wait, as soon as `when` is true."""

    __slots__ = ("when",)

    def __init__(self, when: Callable[[Request], bool]) -> None:
        super().__init__(lambda: "made")
        self.when: Callable[[Request], bool] | None = when

    def wait(self) -> None:
        if self.when is not None:
            wait_until(lambda: self.when(self), "the moment")  # type: ignore[misc]
            self.when = None
            raise KeyboardInterrupt
        super().wait()


def interrupt_in_queue(gated: Gated, request: Interrupted) -> tuple[threading.Thread, list[object]]:
    """Put `request` behind a commit that is going on; return its caller."""
    committer = Committer(gated)
    leader, _ = in_thread(lambda: committer.run(Request(lambda: "leader")))
    assert gated.entered.acquire(timeout=30)
    caller = in_thread(lambda: committer.run(request))
    if request.when is not None and not request.when(request):
        wait_until(lambda: len(committer._queue) == 1, "the caller to queue up")
        gated.go.release()
        leader.join(30)
    return caller


def test_who_was_interrupted_before_the_batch_is_withdrawn() -> None:
    """A request that is still queued when its caller is interrupted is never committed."""
    gated = Gated()
    thread, outcome = interrupt_in_queue(gated, Interrupted(lambda _: True))
    thread.join(30)
    assert isinstance(outcome[0], KeyboardInterrupt)
    gated.go.release(2)
    wait_until(lambda: gated.batches, "the commit that was going on")
    assert not gated.entered.acquire(timeout=0.1), "the request was committed though its caller had raised"


def test_who_was_interrupted_amid_the_batch_raises_when_its_outcome_is_known() -> None:
    """A request that was taken is on its way to the disk: its caller waits for it, and raises then."""
    gated = Gated()
    request = Interrupted(lambda request: request.taken)
    thread, outcome = interrupt_in_queue(gated, request)
    assert gated.entered.acquire(timeout=30)
    wait_until(lambda: request.when is None, "the interrupt")
    thread.join(0.1)
    assert thread.is_alive(), "it raised while its change was still to come"
    gated.go.release()
    thread.join(30)
    assert isinstance(outcome[0], KeyboardInterrupt)
    assert request.result == "made"


def test_nobody_waits_for_a_turn_that_an_interrupt_cut_off() -> None:
    """A turn whose block was never left is given up when it is collected; until then its thread may close the store."""
    gated = Gated()
    gated.go.release(9)
    committer = Committer(gated)
    turn = committer.turn()
    turn.__enter__()
    other, outcome = in_thread(lambda: committer.run(Request(lambda: "made")))
    wait_until(lambda: committer._queue, "the other caller")
    with pytest.raises(errors.InvalidStateError):
        committer.run(Request(lambda: "would wait for itself"))
    del turn  # as when the traceback is gone
    other.join(30)
    assert outcome == ["made"]
    turn = committer.turn()
    turn.__enter__()
    committer.close()
    with pytest.raises(errors.ClosedError):
        committer.run(Request(lambda: "late"))


def test_without_threads_callers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the committer thread cannot be started every change is made, and once it can be, batches form again."""

    def refuse(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    gated = Gated()
    gated.go.release(9)
    committer = Committer(gated)
    with monkeypatch.context() as patch:
        patch.setattr("_thread.start_new_thread", refuse)
        with committer.turn(), pytest.raises(errors.StoreError, match="RLIMIT_NPROC"):
            in_this_thread(lambda: committer.submit(Request(lambda: 0)))
    with committer.turn():
        outcomes = []
        with monkeypatch.context() as patch:
            patch.setattr(Committer, "_can_queue", lambda _: False)
            outcomes = [in_thread(lambda number=number: committer.run(Request(lambda: number))) for number in range(4)]  # type: ignore[misc]
            time.sleep(0.05)
    for number, (thread, outcome) in enumerate(outcomes):
        thread.join(30)
        assert outcome == [number]
    assert sorted(gated.batches) == [[number] for number in range(4)]
    gated.batches.clear()
    with committer.turn():
        callers = [in_thread(lambda: committer.run(Request(lambda: "again"))) for _ in range(3)]
        wait_until(lambda: len(committer._queue) == 3, "the callers to queue up")
    for thread, outcome in callers:
        thread.join(30)
        assert outcome == ["again"]
    assert gated.batches == [["again"] * 3]
    committer.close()


def in_this_thread(call: Callable[[], object]) -> object:
    """Call from a thread that has no turn, and raise what it raises."""
    thread, outcome = in_thread(call)
    thread.join(30)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


@pytest.mark.parametrize("place", ["_take_batch", "_commit_taken", "_answer_taken", "_is_over"])
def test_the_committer_thread_outlives_its_failures(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails in the committer thread, before or after each of its steps: everybody gets an answer, once."""
    for is_after in (False, True):
        gated = Gated()
        gated.go.release(99)
        committer = Committer(gated)
        failures = [MemoryError(), ValueError("anything")]
        step = getattr(Committer, place)

        def fail(self: Committer, step: Callable[[Committer], object] = step, is_after: bool = is_after) -> object:
            if failures and not is_after:
                raise failures.pop()
            done = step(self)
            if failures:
                raise failures.pop()
            return done

        with monkeypatch.context() as patch:
            patch.setattr(Committer, place, fail)
            with committer.turn():
                callers = [in_thread(lambda: committer.run(Request(lambda: "made"))) for _ in range(3)]
                wait_until(lambda: len(committer._queue) == 3, "the callers to queue up")
            for thread, outcome in callers:
                thread.join(30)
                assert outcome == ["made"], f"{place}, {is_after=}"
            committer.close()
        assert [value for batch in gated.batches for value in batch] == ["made"] * 3


def test_memory_that_is_wanting_for_good_is_told_to_all() -> None:
    """A batch that fails for want of memory is tried again, and not for ever."""
    tries = []

    def commit(requests: Sequence[Request]) -> None:
        if len(requests) > 1:
            tries.append(len(requests))
            raise MemoryError
        requests[0].result = requests[0].apply()

    committer = Committer(commit)
    with committer.turn():
        callers = [in_thread(lambda: committer.run(Request(lambda: 1))) for _ in range(3)]
        wait_until(lambda: len(committer._queue) == 3, "the callers to queue up")
    for thread, outcome in callers:
        thread.join(30)
        assert isinstance(outcome[0], MemoryError)
    assert committer.run(Request(lambda: 2)) == 2
    assert len(tries) > 1
    committer.close()


def test_a_failed_commit_fails_every_member_and_the_next_goes_on() -> None:
    """Whatever the commit raises is raised by each member of its batch; later requests are not touched by it."""
    gated = Gated()
    committer = Committer(gated)
    callers = queue_up(committer, gated, 5)
    gated.fail = errors.StoreError("disk on fire")
    gated.go.release(2)
    for thread, outcome in callers:
        thread.join(30)
        assert isinstance(outcome[0], errors.StoreError)
    gated.fail = None
    gated.go.release()
    assert committer.run(Request(lambda: "fine")) == "fine"
    committer.close()


def test_close_lets_the_waiting_be_committed_and_refuses_the_rest() -> None:
    """Closing strands nobody: who waits gets an outcome, who comes later gets ClosedError."""
    gated = Gated()
    committer = Committer(gated)
    callers = queue_up(committer, gated, 8)
    closing, closed = in_thread(committer.close)
    gated.go.release(10)
    closing.join(30)
    assert closed == [None]
    for number, (thread, outcome) in enumerate(callers):
        thread.join(30)
        assert outcome == [number]
    with pytest.raises(errors.ClosedError):
        committer.run(Request(lambda: 1))


def test_who_closes_again_waits_for_nobody() -> None:
    """The committer thread has ended after the first closing: the second does not ask it for an answer."""
    gated = Gated()
    gated.go.release(9)
    committer = Committer(gated)
    with committer.turn():
        thread, outcome = in_thread(lambda: committer.run(Request(lambda: "made")))
        wait_until(lambda: committer._queue, "the caller to queue up")
    thread.join(30)
    for _ in range(2):
        closing, closed = in_thread(committer.close)
        closing.join(30)
        assert (outcome, closed) == (["made"], [None])
        wait_until(lambda: not committer._is_served, "the committer thread to end")


class SeenIdle(Committer):
    """Each thread's first look finds it idle: they have all looked before the first of them went on."""

    def __init__(self, commit: Callable[[Sequence[Request]], None]) -> None:
        super().__init__(commit)
        self.mine = threading.local()

    def _is_idle(self) -> bool:
        is_first, self.mine.has_looked = not hasattr(self.mine, "has_looked"), True
        return is_first or super()._is_idle()


def test_callers_who_waited_for_the_same_right_form_batches_from_then_on() -> None:
    """Who finds nobody committing goes ahead without the queue; that many do so at once does not become a habit."""
    sizes: list[int] = []

    def commit(requests: Sequence[Request]) -> None:
        time.sleep(0.0005)
        sizes.append(len(requests))

    committer = SeenIdle(commit)
    with committer.turn():
        callers = [in_thread(lambda: [committer.run(Request(lambda: 0)) for _ in range(50)]) for _ in range(8)]
        wait_until(committer._next.locked, "the callers to look")
    for thread, outcome in callers:
        thread.join(30)
        assert outcome == [[None] * 50]
    committer.close()
    assert sum(sizes) == 8 * 50
    assert len(sizes) <= 8 * 50 / 2, "no batches"


def test_who_goes_ahead_waits_for_one_batch() -> None:
    """Though the queue is never empty, the thread that serves it lets go first who waits for the right itself."""
    batches: list[int] = []
    stop = threading.Event()

    def commit(requests: Sequence[Request]) -> None:
        batches.append(len(requests))
        wait_until(lambda: bool(committer._queue) or stop.is_set(), "the next to queue up")

    def keep_asking() -> None:
        while not stop.is_set():
            if len(committer._queue) < 2:
                committer.submit(Request(lambda: 0))

    committer = SeenIdle(commit)
    feeder, _ = in_thread(keep_asking)
    for _ in range(5):
        wait_until(lambda: len(batches) > 10, "batches")
        batches.clear()
        thread, outcome = in_thread(lambda: committer.run(Request(lambda: 0)))
        thread.join(5)
        if not outcome:
            stop.set()
        assert outcome == [None], "it waited until nobody else asked"
    stop.set()
    feeder.join(30)
    committer.close()


def test_nobody_starves(store: Store) -> None:
    """While 15 threads never stop, a 16th gets each of its changes through."""
    stop = threading.Event()

    def storm(k: int) -> None:
        while not stop.is_set():
            store.update("abc"[k % 3], bump)

    threads = [threading.Thread(target=storm, args=(k,)) for k in range(15)]
    for thread in threads:
        thread.start()
    thread, outcome = in_thread(lambda: [store.update("d", bump).exit_code for _ in range(100)])
    thread.join(60)
    stop.set()
    for each in threads:
        each.join()
    assert outcome == [list(range(1, 101))]


def test_threads_and_tasks_together_lose_nothing(store: Store, state_dir: str) -> None:
    """Threads, tasks of two loops and transactions on the same containers: every increment is counted."""

    async def tasks() -> None:
        front = AsyncStore(store)

        async def one(k: int) -> None:
            for i in range(20):
                await front.update("abcd"[(k + i) % 4], bump)
                with pytest.raises(errors.InvalidInputError):
                    await front.checkpoint("a", replace(RUNNING, pid=-1))
                await front.transact(lambda draft: [draft.update(name, bump) for name in "ab"] and None)  # type: ignore[arg-type]

        await asyncio.gather(*(one(k) for k in range(20)))

    def turns() -> None:
        for _ in range(20):
            with store.transaction() as draft:
                for name in "abcd":
                    draft.update(name, bump)

    def singles(k: int) -> None:
        for i in range(50):
            store.update("abcd"[(k + i) % 4], bump)

    calls = [lambda: asyncio.run(tasks())] * 2 + [turns] * 2 + [lambda k=k: singles(k) for k in range(8)]
    running = [in_thread(call) for call in calls]
    for thread, outcome in running:
        thread.join(100)
        assert outcome == [None]
    expected = 2 * 20 * 20 * 3 + 2 * 20 * 4 + 8 * 50
    assert sum(store.status(name).exit_code for name in "abcd") == expected
    store.close()
    with Store.open(state_dir) as again:
        assert sum(u.record.status.exit_code for u in again.unsettled()) == expected


def test_a_cancelled_task_is_not_left_in_doubt(store: Store) -> None:
    """After a cancelled call has ended, the change is made or it never will be."""

    async def main() -> None:
        front = AsyncStore(store)
        for turn in range(100):
            calls = [asyncio.create_task(front.update("abcd"[k % 4], bump)) for k in range(8)]
            await asyncio.sleep(0 if turn % 2 else 0.0002)
            for call in calls[::2]:
                call.cancel()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(not isinstance(r, Exception) or isinstance(r, asyncio.CancelledError) for r in results)
            seen = [store.status(name) for name in "abcd"]
            await asyncio.sleep(0.0005)
            assert [store.status(name) for name in "abcd"] == seen

    asyncio.run(main())


def test_an_error_reaches_the_task_that_made_it(store: Store) -> None:
    """Tasks get the errors that threads get, and a transaction of theirs is whole or not at all."""

    async def main() -> None:
        front = AsyncStore(store)

        def half(draft: object) -> None:
            draft.update("a", bump)  # type: ignore[attr-defined]
            draft.update("nobody", bump)  # type: ignore[attr-defined]

        results = await asyncio.gather(
            front.update("nobody", bump),
            front.transact(half),
            front.add(metadata("a")),
            front.update("b", bump),
            return_exceptions=True,
        )
        kinds = [type(result) for result in results]
        assert kinds == [errors.NotFoundError, errors.NotFoundError, errors.AlreadyExistsError, Status]

    asyncio.run(main())
    assert (store.status("a").exit_code, store.status("b").exit_code) == (0, 1)


@pytest.mark.parametrize("goes_on", [False, True])
def test_interrupted_while_it_reads_a_commit_back(
    state_dir: str, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    """It asks again before the next change; closed at once it leaves no note, and the next opening has all it needs."""

    def fail(writer: Writer, changes: Changes) -> None:
        execute(writer, changes)
        raise KeyboardInterrupt

    def fail_again(*_: object) -> bool:
        raise KeyboardInterrupt

    execute = Writer._execute
    store = Store.open(state_dir)
    store.add_sandbox(sandbox())
    store.add(metadata("a"), RUNNING)
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_execute", fail)
        patch.setattr(Writer, "_find", fail_again)
        with pytest.raises(KeyboardInterrupt):
            store.update("a", bump)
    if goes_on:
        assert store.update("a", bump).exit_code == 2
    store.close()
    with Store.open(state_dir) as again:
        assert again.unsettled()[0].record.status.exit_code == 1 + goes_on


def test_a_commit_that_is_found_after_a_failure_is_flushed_anew(
    store: Store, state_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read back may be in memory alone: it counts once it is in the database itself, by another way."""

    def fail(writer: Writer, changes: Changes) -> None:
        execute(writer, changes)
        raise sqlite3.OperationalError("disk I/O error")

    execute = Writer._execute
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_execute", fail)
        assert store.update("a", bump).exit_code == 1
    without_wal = shutil.copy(f"{state_dir}/store.db", tmp_path)
    with closing(sqlite3.connect(without_wal)) as database:
        assert database.execute("SELECT exit_code FROM container_status WHERE id = 'a'").fetchone() == (1,)


def test_a_change_that_memory_was_wanting_for_leaves_no_half_of_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One change of a batch fails between its rows: it alone gets the MemoryError, the others are made."""

    def fail(draft: Draft, kind: EventKind, key: str, row: StatusRow | None, status: Status) -> None:
        if key == "new":
            raise MemoryError
        note(draft, kind, key, row, status)

    note = Draft._note
    monkeypatch.setattr(Draft, "_note", fail)
    with store.transaction():
        calls = [lambda: store.update("a", bump), lambda: store.add(metadata("new")), lambda: store.update("b", bump)]
        callers = []
        for number, call in enumerate(calls):
            callers.append(in_thread(call))
            wait_until(lambda: len(store._committer._queue) == number + 1, "the caller to queue up")
    for thread, _ in callers:
        thread.join(30)
    assert [type(outcome[0]) for _, outcome in callers] == [Status, MemoryError, Status]
    assert (store.status("a").exit_code, store.status("b").exit_code, "new" in store) == (1, 1, False)


@contextmanager
def busy(store: Store) -> Iterator[None]:
    """Another thread has a transaction while the block runs."""
    begun, over = threading.Event(), threading.Event()

    def hold() -> None:
        with store.transaction():
            begun.set()
            over.wait(30)

    thread, _ = in_thread(hold)
    begun.wait(30)
    yield
    over.set()
    thread.join(30)


def test_a_loop_that_is_closed_stops_nobody_else(store: Store) -> None:
    """A loop ends over a pending change, before it is told: the changes of all others are made."""
    loop = asyncio.new_event_loop()
    with busy(store):
        task = loop.create_task(AsyncStore(store).update("a", bump))
        loop.run_until_complete(asyncio.sleep(0))
        wait_until(lambda: store._committer._queue, "the task's change")
        other, outcome = in_thread(lambda: store.update("b", bump).exit_code)
        wait_until(lambda: len(store._committer._queue) == 2, "the thread's change")
        loop.close()
    other.join(30)
    assert outcome == [1]
    assert store.status("a").exit_code == 1
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    task._coro.close()  # type: ignore[attr-defined]


def test_a_task_that_is_cancelled_at_the_end_of_its_loop_is_not_waited_for(store: Store) -> None:
    """An interrupt ends the loop just before it tells a task; asyncio cancels what is left, and comes to its end."""

    async def main() -> None:
        await AsyncStore(store).update("a", bump)

    loop = asyncio.new_event_loop()
    with busy(store):
        task = loop.create_task(main())
        loop.run_until_complete(asyncio.sleep(0))
    wait_until(lambda: store.status("a").exit_code == 1, "the change")
    loop._ready.clear()  # type: ignore[attr-defined]  # what an interrupt in the loop itself may lose
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(asyncio.wait_for(asyncio.gather(task), 10))
    loop.close()


def test_interrupts_while_committing_leave_memory_and_disk_agreed(state_dir: str) -> None:
    """A thousand signals whose handler raises, at any instruction: what is on disk is what memory says."""
    script = f"""
import os, signal, sys, threading, time
from tests.store.test_commit import *
class Interrupt(Exception): pass
def interrupt(*_):
    if is_armed: raise Interrupt
caught, is_armed = 0, False
signal.signal(signal.SIGALRM, interrupt)
store = Store.open({state_dir!r}); store.add_sandbox(sandbox()); store.add(metadata("a"), RUNNING)
other = threading.Thread(target=lambda: [store.update("a", lambda old: old) for _ in range(1500)]); other.start()
while caught < 1000:
    try:
        try:
            is_armed = True
            # Again after a while: what is raised in a callback of the collector, Python drops.
            signal.setitimer(signal.ITIMER_REAL, 0.0001 + (caught % 17) * 0.00005, 0.1)
            while True:
                store.update("a", bump)
        finally:
            is_armed = False
    except Interrupt:  # or another, just before it was disarmed
        caught += 1
    except errors.OutcomeUnknownError:
        break
signal.setitimer(signal.ITIMER_REAL, 0)
other.join()
said = store.status("a").exit_code
try: store.close()
except Interrupt: pass
with Store.open({state_dir!r}) as again:
    print(said, again.unsettled()[0].record.status.exit_code, caught)
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    said, found, caught = map(int, result.stdout.split())
    assert said == found > 0
    assert caught > 20


@pytest.mark.long
def test_sigkill_while_threads_and_tasks_write(state_dir: str) -> None:
    """Killed at a random instant under load, again and again: nothing acknowledged is missing or half there."""
    script = f"""
import asyncio, os, sys, threading
from tests.store.test_commit import *
store = Store.open({state_dir!r})
start = int(sys.argv[1])
if not start:
    store.add_sandbox(sandbox())
    for k in range(12): store.add(metadata(f"c{{k}}"), RUNNING)
def thread(k):
    for i in range(start, start + 100000):
        store.checkpoint(f"c{{k}}", replace(RUNNING, pid=i + 1)); os.write(1, b"c%d %d\\n" % (k, i + 1))
async def task(front, k):
    for i in range(start, start + 100000):
        await front.checkpoint(f"c{{k}}", replace(RUNNING, pid=i + 1)); os.write(1, b"c%d %d\\n" % (k, i + 1))
async def main():
    front = AsyncStore(store)
    await asyncio.gather(*(task(front, k) for k in range(4, 8)))
def pair():
    for i in range(start, start + 100000):
        with store.transaction() as draft:
            for k in range(8, 12): draft.update(f"c{{k}}", lambda old: replace(old, pid=i + 1))
        os.write(1, b"c8 %d\\n" % (i + 1))
for k in range(4): threading.Thread(target=thread, args=(k,)).start()
threading.Thread(target=pair).start()
asyncio.run(main())
"""
    floor: dict[str, int] = {}
    for round_ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(round_ * 100000)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(50)]
        time.sleep(0.01 * round_)
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines()
        process.wait()
        process.stdout.close()
        for line in lines:
            name, _, value = line.decode().partition(" ")
            if value.strip():
                floor[name] = max(floor.get(name, 0), int(value))
        with Store.open(state_dir) as store:
            found = {u.record.id: u.record.status.pid for u in store.unsettled()}
        assert all(found[name] >= value for name, value in floor.items())
        assert len({found[f"c{k}"] for k in range(8, 12)}) == 1
        assert os.path.exists(state_dir)


def test_memory_that_takes_no_change_makes_nobody_wait_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change is durable and is said to be; all who change something get an error, and the next mends it."""

    def refuse(*_: object) -> None:
        raise RuntimeError("nothing can be noted")

    monkeypatch.setattr("limpet.engine.store.store._APPLY_PAUSE_SECONDS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(store.fleet, "note", refuse)
        for name, what in (("a", "^this change"), ("b", "^nothing of this change was written; the one before")):
            thread, outcome = in_thread(partial(store.update, name, bump))
            thread.join(20)
            assert isinstance(outcome[0], errors.StoreError)
            assert re.match(f"{what} is durable, but memory does not take it.*nothing can be noted", str(outcome[0]))
    store.update("c", bump)
    assert [store.status(name).exit_code for name in "abc"] == [1, 0, 1]
