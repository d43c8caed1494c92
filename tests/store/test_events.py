"""The log of changes and whoever watches it: every event once, in order, without a gap, and no other."""

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet import AsyncStore, Snapshot, Store, errors
from limpet.engine.database.sqlite import event_log
from limpet.engine.drill.old_database import make_old_database
from limpet.engine.inspection.check import find_store_damage
from limpet.engine.store import Request, Watch, feed
from limpet.schema import ContainerState
from limpet.schema.events import Event, EventKind
from limpet.schema.sandbox_status import SandboxState
from tests.conftest import in_thread, wait_until
from tests.records import RUNNING, metadata, sandbox

ENDED = replace(RUNNING, pid=0, finished_at=9, exit_code=3, reason="Error", message="no")


def at_hand(watch: Watch) -> list[Event]:
    """Return what the watch has without waiting."""
    return list(iter(lambda: watch.next(0), None))


def kinds(events: list[Event]) -> list[str]:
    return [event.kind.value for event in events]


@pytest.fixture
def plain(state_dir: str) -> Iterator[Store]:
    """A store on disk with the sandbox "s"."""
    with Store.open(state_dir) as opened:
        opened.add_sandbox(sandbox())
        yield opened


@pytest.fixture
def small_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the log keep no more than twenty events."""
    monkeypatch.setattr(event_log, "KEPT_EVENTS", 20)
    monkeypatch.setattr(event_log, "PRUNED_AT_ONCE", 4)


def test_each_change_is_an_event(store: Store) -> None:
    """Every kind of change is told with what it made of the record; a checkpoint that changes none of it is not."""
    watch = store.watch()
    store.add(metadata("a", tier="web"), RUNNING)
    assert store.list().revision == store.list(name="a").revision == store.revision == 2
    store.checkpoint("a", replace(RUNNING, pid=8, message="still here"))
    store.checkpoint("a", replace(RUNNING, paused=True))
    store.checkpoint("a", replace(RUNNING, extra={"round": 1}))
    store.checkpoint("a", replace(RUNNING, stop_requested_at=5, stop_deadline=6))
    store.checkpoint("a", replace(ENDED, extra={"round": 2}))
    store.delete("a")
    store.update_sandbox("s", lambda status: replace(status, stopped_at=7, reason="Stopped"))
    store.update_sandbox("s", lambda status: status)
    store.delete_sandbox("s")
    store.put("lease", "k", {"any": "value"})
    store.delete_item("lease", "k")
    found = at_hand(watch)
    assert kinds(found) == [
        *("added", "paused", "paused", "extra", "intent", "extra"),
        *("state", "intent", "extra", "deleted"),
        *("sandbox-changed", "sandbox-deleted", "item-put", "item-deleted"),
    ]
    assert [event.revision for event in found] == list(range(2, 16))
    added, ended, deleted = found[0], found[6], found[9]
    assert added.status == RUNNING
    assert (ended.state, ended.exit_code, ended.number, ended.seq) == (ContainerState.EXITED, 3, 2, added.seq + 5)
    assert [event.commit for event in found[6:9]] == [10, 10, 10] or found[6].commit == found[8].commit
    assert deleted.status == replace(ENDED, extra={"round": 2})
    assert (deleted.name, deleted.sandbox_id, deleted.labels) == ("a", "s", {"tier": "web"})
    assert (found[10].state, found[10].reason) == (SandboxState.NOTREADY, "Stopped")
    assert (found[12].name, found[12].id, found[12].seq) == ("lease", "k", found[12].revision)
    assert store.revision == 15
    assert at_hand(watch) == []


def test_a_transaction_is_told_from_its_neighbours(store: Store) -> None:
    """The events of one caller are consecutive and share `commit`, also where one flush was for many callers."""
    for name in "abc":
        store.add(metadata(name), RUNNING)
    watch = store.watch()
    requests: list[Request] = []

    def submit() -> None:
        for name in "abc":
            requests.append(Request(lambda draft, key=name: draft.replace(key, ENDED)))
            store.submit(requests[-1])

    with store.transaction() as draft:
        draft.add(metadata("d"), RUNNING)
        draft.delete("d")
        draft.add(metadata("d"), RUNNING)
        thread, _ = in_thread(submit)
        thread.join(30)
    for request in requests:
        request.wait()
    found = at_hand(watch)
    assert kinds(found) == ["added", "deleted", "added", "state", "state", "state"]
    assert [event.commit - found[0].revision for event in found] == [2, 2, 2, 3, 4, 5]
    assert [event.is_last for event in found] == [False, False, True, True, True, True]
    assert [one.number for one in store.history("d")] == [1]


def test_what_fails_leaves_no_event_and_no_gap(store: Store) -> None:
    """A change that is refused, or taken back, is not in the log; the next one has the next number."""
    watch = store.watch()
    with pytest.raises(errors.InvalidInputError):
        store.add(metadata("a"), replace(RUNNING, pid=-1))
    with pytest.raises(ValueError, match="no"), store.transaction() as draft:
        draft.add(metadata("a"), RUNNING)
        raise ValueError("no")
    with store.transaction() as draft, pytest.raises(ValueError, match="half"), draft.savepoint():
        draft.add(metadata("b"), RUNNING)
        raise ValueError("half")
    store.add(metadata("c"))
    assert [(event.id, event.revision) for event in at_hand(watch)] == [("c", 2)]


def test_filters_are_those_of_lists(store: Store) -> None:
    """By id, name, sandbox, labels and kind; a deleted container is still known by what it was called."""
    store.add_sandbox(sandbox("t"))
    store.add(metadata("alpha", tier="web"), RUNNING)
    store.add(metadata("beta", "t", tier="db"), RUNNING)
    store.delete("alpha")
    for asked, wanted in (
        ({"id": "al"}, ["alpha", "alpha"]),
        ({"name": "beta"}, ["beta"]),
        ({"sandbox_id": "t"}, ["t", "beta"]),
        ({"labels": {"tier": "web"}}, ["alpha", "alpha"]),
        ({"kinds": ["deleted", EventKind.SANDBOX_ADDED]}, ["s", "t", "alpha"]),
    ):
        watch = store.watch(0, **asked)
        assert [event.id for event in at_hand(watch)] == wanted, asked
        assert watch.revision == store.revision  # what was passed over is not looked at again
    with pytest.raises(errors.InvalidInputError, match="unheard"):
        store.watch(kinds=["unheard"])


def test_since(store: Store) -> None:
    """A watch begins after any revision that there was; one that is to come, or is none, is refused."""
    for name in "abc":
        store.add(metadata(name))
    listed = store.list()
    store.delete("b")
    assert [(event.id, event.kind) for event in at_hand(store.watch(listed.revision))] == [("b", EventKind.DELETED)]
    assert len(at_hand(store.watch(0))) == 5
    assert at_hand(store.watch(5)) == at_hand(store.watch()) == []
    for wrong in (6, -1, "2", True, 1.0):
        with pytest.raises(errors.InvalidInputError, match="since"):
            store.watch(wrong)  # type: ignore[arg-type]


def test_waiting(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits gets the next event at once, whichever thread makes it, and ClosedError when the store closes."""
    monkeypatch.setattr(feed, "_NET_SECONDS", 60.0)  # by itself it does not look before the test is over
    watch = store.watch()
    thread, outcome = in_thread(watch.next)
    time.sleep(0.05)
    began = time.monotonic()
    store.add(metadata("a"))
    thread.join(30)
    assert isinstance(outcome[0], Event)
    assert time.monotonic() - began < 30
    began = time.monotonic()
    assert watch.next(0.01) is None
    assert time.monotonic() - began < 30
    others = [in_thread(lambda: next(store.watch())) for _ in range(5)]
    wait_until(lambda: len(store._bells._wakers) == 5, "all to wait")
    store.close()
    for thread, outcome in others:
        thread.join(30)
        assert isinstance(outcome[0], errors.ClosedError)
    with pytest.raises(errors.ClosedError):
        watch.next(0)


def test_many_threads_and_watchers(store: Store) -> None:
    """Beside many writers each watcher gets every event once, in order."""
    store.add(metadata("a"), RUNNING)
    first = store.revision

    def write(number: int) -> None:
        for turn in range(10):
            store.add(metadata(f"c{number}-{turn}"))

    def follow() -> list[int]:
        with store.watch(first) as watch:
            return [next(watch).revision for _ in range(80)]

    watchers = [in_thread(follow) for _ in range(4)]
    writers = [in_thread(lambda number=number: write(number)) for number in range(8)]  # type: ignore[misc]
    for thread, _ in writers + watchers:
        thread.join(60)
    for _, outcome in watchers:
        assert outcome[0] == list(range(first + 1, first + 81))


def test_tasks_watch_without_threads(state_dir: str) -> None:
    """Hundreds of tasks get every event; one that is cancelled has missed nothing; closing ends the others."""

    async def main() -> None:
        async with await AsyncStore.open(state_dir) as store:
            await store.add_sandbox(sandbox())
            got: list[list[int]] = [[] for _ in range(200)]

            async def follow(mine: list[int]) -> None:
                watch = store.watch(0)
                while True:
                    mine.append((await anext(watch)).revision)

            tasks = [asyncio.create_task(follow(mine)) for mine in got]
            threads = threading.active_count() + 40  # of the loop's own pool, at the beginning
            for number in range(10):
                await store.add(metadata(f"c{number}"))
            cancelled = store.watch(store.store.revision)
            waiting = asyncio.create_task(anext(cancelled))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await store.add(metadata("last"))
            assert (await asyncio.wait_for(anext(cancelled), 20)).id == "last"
            async with asyncio.timeout(30):
                while any(len(mine) < 12 for mine in got):
                    await asyncio.sleep(0.01)
            assert threading.active_count() < threads
            assert all(mine == list(range(1, 13)) for mine in got)
            with pytest.raises(errors.InvalidInputError):
                await anext(store.watch(99))
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} == {errors.ClosedError}
        assert not store.store._bells._wakers, "who waits no more is forgotten"

    asyncio.run(main())


def test_a_task_waits_so_long_for_an_event(state_dir: str) -> None:
    """What is there is given at once, whatever the limit; what comes in time is; without one there is None."""

    async def main() -> None:
        async with await AsyncStore.open(state_dir) as store:
            watch = store.watch(0)
            assert await watch.next(timeout=0) is None
            begun = time.monotonic()
            assert await watch.next(timeout=0.1) is None
            assert 0.09 < time.monotonic() - begun < 10
            waiting = asyncio.create_task(watch.next(timeout=60))
            await asyncio.sleep(0)
            await store.add_sandbox(sandbox())
            event = await waiting
            assert event is not None
            assert event.revision == 1
            await store.add(metadata("c"))
            late = await watch.next(timeout=0)
            assert late is not None
            assert late.id == "c"
            waiting = asyncio.create_task(watch.next(timeout=60))
            await asyncio.sleep(0)
        with pytest.raises(errors.ClosedError):
            await waiting

    asyncio.run(main())


def test_old_events_go_and_no_revision_comes_twice(small_log: None, state_dir: str) -> None:
    """The log is bounded; what a cursor missed is told; numbers go on after a restart; histories outlast the log."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("old"), RUNNING)
        store.checkpoint("old", ENDED)
        lazy = store.watch(0)
        assert lazy.next(0) is not None
        for number in range(40):
            store.add(metadata(f"c{number}"))
            store.delete(f"c{number}")
        store._memory.recent.clear()
        with pytest.raises(errors.CursorTooOldError, match="list anew") as caught:
            at_hand(store.watch(1))
        assert 83 - 24 <= caught.value.oldest <= 83 - 19
        kept = at_hand(store.watch(caught.value.oldest - 1))
        assert [event.revision for event in kept] == list(range(caught.value.oldest, 84))
        assert [one.number for one in store.history("old")] == [1, 2]
        assert store.revision == 83
    assert find_store_damage(state_dir) == []
    with closing(sqlite3.connect(f"{state_dir}/store.db")) as raw:
        assert raw.execute("SELECT count(*) FROM event").fetchone()[0] <= 27
    with Store.open(state_dir) as store:
        assert store.revision == 83
        store.delete("old")
        assert store.revision == 84
        store.add(metadata("old"))
        assert len(store.history("old")) == 1
    with Store.open(state_dir) as store:
        assert store.revision == 85
        with pytest.raises(errors.CursorTooOldError) as caught:
            store.watch(0)
    oldest = caught.value.oldest
    with closing(sqlite3.connect(f"{state_dir}/store.db")) as raw, raw:
        raw.execute("DELETE FROM event WHERE revision = ?", (oldest,))
    with Store.open(state_dir) as store, pytest.raises(errors.StoreDamagedError, match=f"event {oldest} is missing"):
        store.watch(oldest - 1)  # nothing that was pruned is wanted


def test_a_watcher_that_is_too_slow_is_told(small_log: None, plain: Store) -> None:
    """One that has fallen behind what is kept gets CursorTooOldError, not a gap."""
    watch = plain.watch()
    for number in range(20):
        plain.add(metadata(f"c{number}"))
        plain.delete(f"c{number}")
    plain._memory.recent.clear()
    with pytest.raises(errors.CursorTooOldError):
        watch.next(0)


def test_a_version_that_ran_ahead_of_the_log_never_comes_again(small_log: None, plain: Store) -> None:
    """What was deleted with such a version is remembered for as long as that takes, though its events have gone."""
    plain.add(metadata("a"), RUNNING)
    for turn in range(200):
        plain.checkpoint("a", replace(RUNNING, pid=turn))
    last = plain.get("a").version
    plain.delete("a")
    for number in range(20):
        plain.add(metadata(f"c{number}"))
        plain.delete(f"c{number}")
    assert plain.revision < last
    plain._memory.recent.clear()
    with pytest.raises(errors.CursorTooOldError):
        plain.watch(0)
    plain.add(metadata("a"), RUNNING)
    assert plain.get("a").version == last + 1


def test_events_expire(plain: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that are older than a week go with the next one, but the newest stays."""
    for number in range(10):
        plain.add(metadata(f"c{number}"))
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 8 * 24 * 3600 * 10**9)
    plain.delete("c3")
    plain._memory.recent.clear()
    with pytest.raises(errors.CursorTooOldError) as caught:
        plain.watch(0)
    assert caught.value.oldest == plain.revision == 12
    assert kinds(at_hand(plain.watch(11))) == ["deleted"]
    assert [one.number for one in plain.history("c4")] == [1]


def test_a_log_of_large_events_is_short(plain: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long labels and messages are, what is kept of them all is bounded, also over a restart."""
    monkeypatch.setattr(event_log, "KEPT_CHARACTERS", 100_000)
    state_dir = plain.directory.path
    for turn in range(2):
        for number in range(60):
            plain.add(metadata(f"c{turn}-{number}", note="x" * 4000))
            plain.delete(f"c{turn}-{number}")
        plain.close()
        with closing(sqlite3.connect(f"{state_dir}/store.db")) as raw:
            (kept,) = raw.execute("SELECT sum(length(labels)) FROM event").fetchone()
        assert 80_000 < kept < 110_000
        plain = Store.open(state_dir)
    assert len(at_hand(plain.watch(plain.revision - 20))) == 20
    monkeypatch.setattr(event_log, "KEPT_CHARACTERS", 0)
    for number in range(20):
        plain.add(metadata(f"d{number}"))
        plain.delete(f"d{number}")
    plain._memory.recent.clear()
    assert kinds(at_hand(plain.watch(plain.revision - 1))) == ["deleted"]  # the newest stays
    with pytest.raises(errors.CursorTooOldError):
        plain.watch(plain.revision - 2)
    plain.close()
    assert find_store_damage(state_dir) == []


def test_a_history_keeps_64_where_the_log_is_shorter(small_log: None, plain: Store) -> None:
    """Of a container that changes often its history has the newest 64 state changes, and no more are on disk."""
    plain.add(metadata("busy"), RUNNING)
    for turn in range(150):
        plain.checkpoint("busy", RUNNING if turn % 2 else ENDED)
    assert [one.number for one in plain.history("busy")] == list(range(88, 152))
    plain.delete("busy")
    plain.add(metadata("busy"))
    assert [one.number for one in plain.history("busy")] == [1]
    path = plain.directory.join("store.db")
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT count(*) FROM event WHERE id = 'busy'").fetchone()[0] <= 27


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("UPDATE event SET exit_code = 4 WHERE revision = 3", "event 3 of 'a' does not match"),
        ("UPDATE event SET labels = CAST(x'ff61' AS TEXT) WHERE revision = 3", "event 3 of 'a' does not match"),
        ("DELETE FROM event WHERE revision = 3", "event 3 is missing"),
    ],
)
def test_damage_is_told(state_dir: str, damage: str, message: str) -> None:
    """What was before is given; then the damage is told, by watch, check and history; a later revision goes on."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        store.checkpoint("a", ENDED)
        store.add(metadata("b"))
    with closing(sqlite3.connect(f"{state_dir}/store.db")) as raw, raw:
        assert raw.execute(damage).rowcount == 1
    with Store.open(state_dir) as store, Snapshot.open(state_dir) as snapshot:
        for watch in (store.watch(0), snapshot.watch(0)):
            assert kinds([next(watch), next(watch)]) == ["sandbox-added", "added"]
            for _ in range(2):
                with pytest.raises(errors.StoreDamagedError, match=message):
                    at_hand(watch)
        assert kinds(at_hand(store.watch(3))) == ["added"]
        if "missing" not in message:
            with pytest.raises(errors.StoreDamagedError, match="history is damaged"):
                store.history("a")
        assert len(store.history("b")) == 1
    assert any("event" in each or "history" in each for each in find_store_damage(state_dir))


def test_another_process_is_woken(plain: Store, state_dir: str) -> None:
    """A snapshot's watch is woken by each commit, and does not keep the WAL from beginning anew."""
    plain.add(metadata("a"), RUNNING)
    with Snapshot.open(state_dir) as snapshot:
        watch = snapshot.watch()
        assert snapshot.revision == snapshot.list().revision == 2
        waits = []
        for turn in range(10):
            thread, outcome = in_thread(watch.next)
            time.sleep(0.02)
            began = time.monotonic()
            plain.checkpoint("a", RUNNING if turn % 2 else ENDED)
            thread.join(30)
            waits.append(time.monotonic() - began)
            assert isinstance(outcome[0], Event)
            assert outcome[0].revision == 3 + turn
        assert sorted(waits)[5] < 1  # without a ring it looks every two seconds
        plain.checkpoint("a", replace(RUNNING, message="no event"))
        for number in range(300):
            plain.put("big", f"{number % 3}", "x" * 60000)
        assert Path(f"{state_dir}/store.db-wal").stat().st_size < 6 << 20
        thread, outcome = in_thread(lambda: snapshot.watch().next(20))
        assert thread.join(30) is None
        assert outcome[0].revision == 3  # type: ignore[attr-defined]
        waiting, ends = in_thread(lambda: [event for event in watch if event.revision < 0])
        time.sleep(0.05)
    waiting.join(30)
    assert isinstance(ends[0], errors.ClosedError)


def test_engines_come_and_go_while_it_is_watched(state_dir: str) -> None:
    """A watch that began while no engine was there goes on with the next ones."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
    with Snapshot.open(state_dir) as snapshot, snapshot.watch(0) as watch:
        assert kinds(at_hand(watch)) == ["sandbox-added"]
        for name in "abc":
            thread, outcome = in_thread(lambda: watch.next(30))
            with Store.open(state_dir) as store:
                store.add(metadata(name))
                thread.join(30)
            assert isinstance(outcome[0], Event)
            assert outcome[0].id == name
        Path(f"{state_dir}/store.db").rename(f"{state_dir}/moved.db")
        with pytest.raises(errors.StoreReplacedError):
            watch.next(0)


def test_old_histories_move_into_the_log(state_dir: str) -> None:
    """An older database's state changes become events in the order of the clock, each container's own in theirs."""
    os.mkdir(state_dir, 0o700)
    path = f"{state_dir}/store.db"
    make_old_database(path, "0005")
    with closing(sqlite3.connect(path)) as raw, raw:
        raw.execute("INSERT INTO node VALUES ('local', 1, 1), ('other', 1, 1)")
        for node, key, number, at, state in (
            ("local", "a", 1, 10, 0),
            ("local", "a", 2, 40, 1),
            ("local", "a", 3, 20, 2),  # the clock was set back
            ("local", "b", 7, 30, 1),  # what was before is not kept any more
            ("other", "a", 1, 5, 0),
        ):
            row = (node, key, number, number, at, state, 0, "", "ü")
            raw.execute("INSERT INTO transition VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    with Store.open(state_dir) as store:
        found = at_hand(store.watch(0))
        assert [(event.id, event.number, event.kind.value) for event in found] == [
            ("a", 1, "added"),
            ("b", 7, "state"),
            ("a", 2, "state"),
            ("a", 3, "state"),
        ]
        assert [event.revision for event in found] == [event.commit for event in found] == [1, 2, 3, 4]
        assert {(event.message, event.status) for event in found} == {("ü", None)}
        store.add_sandbox(sandbox())
        assert store.revision == 5
    with Store.open(state_dir, node="other") as store:
        assert [event.id for event in at_hand(store.watch(0))] == ["a"]
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT count(*) FROM sqlite_master WHERE name = 'transition'").fetchone() == (0,)
