"""What a node has written reaches the fleet: all of it, once, in order, whatever happens to either meanwhile."""

import asyncio
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import pytest
from msgspec.structs import replace

from limpet import AsyncStore, Engine, Store, errors
from limpet.engine.database import Changes
from limpet.engine.database.sqlite.extract import ROWS, Extractor
from limpet.engine.fleet import Shipper, batch, shipper
from limpet.engine.fleet.address import Address, Connection
from limpet.engine.fleet.rows import _texts, escape, from_record
from limpet.schema import Status
from limpet.schema.rows import EventRow
from limpet.schema.status import end
from tests.conftest import EngineProcess, wait_until
from tests.fleet.conftest import Base, Cluster
from tests.records import RUNNING, metadata, sandbox

Rows = Mapping[str, set[tuple[Any, ...]]]


def local_rows(state_dir: str, node: str = "n7") -> Rows:
    """All rows of the node's own database that are to be in the fleet."""
    extractor = Extractor(f"{state_dir}/store.db", node)
    try:
        keys = extractor.extract_keys()
        found = extractor.extract(list(keys.events), lambda _: keys.rows)
    finally:
        extractor.close()
    return {
        "event": set(map(tuple, found.events)),
        **{table: set(map(tuple, found.rows.get(table, ()))) for table in ROWS},
    }


def fleet_rows(base: Base, node: str = "n7") -> Rows:
    """The same of the fleet."""
    classes = {table: row_class for table, (row_class, _) in ROWS.items()} | {"event": EventRow}
    return {
        table: {
            tuple(from_record(row_class, row))
            for row in base.ask(f"SELECT {', '.join(row_class._fields)} FROM limpet.{table} WHERE node = %s", node)
        }
        for table, row_class in classes.items()
    }


def wait_sent(store: Store) -> None:
    def is_sent() -> bool:
        assert store.fleet_lag is not None
        return store.fleet_lag.seconds == 0

    wait_until(is_sent, f"everything to be sent ({store.fleet_lag})")


def with_extra(**extra: object) -> Status:
    return replace(RUNNING, extra=extra)


def test_what_goes_or_comes_amid_a_comparison_is_never_there_by_halves(
    base: Base, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are compared by one look, and sent as the next finds them: a container is there with its status, or not."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        for name in "abc":
            store.add(metadata(name), RUNNING)
        wait_sent(store)
        store.delete("c")
        wait_sent(store)
    with Store.open(state_dir, node="n7") as store:
        store.checkpoint("a", with_extra(turn=1))
        store.delete("b")
    is_open, has_changed = threading.Event(), threading.Event()
    halves: list[object] = []
    load_keys, write_batch = batch.load_keys, batch.write_batch

    def load_and_change(connection: Connection, node: str) -> Any:
        found = load_keys(connection, node)
        assert is_open.wait(30)
        if not has_changed.is_set():
            has_changed.set()
            store.delete("a")  # whose status alone differs
            store.add(metadata("b"), RUNNING)  # which is to be deleted there
        return found

    def write_and_look(*arguments: Any, **options: Any) -> Any:
        written = write_batch(*arguments, **options)
        halves.extend(
            base.ask(
                "SELECT container.id, status.id FROM limpet.container"
                " FULL JOIN limpet.container_status AS status USING (node, id)"
                " WHERE container.id IS NULL OR status.id IS NULL"
            )
        )
        return written

    monkeypatch.setattr(batch, "load_keys", load_and_change)
    monkeypatch.setattr(batch, "write_batch", write_and_look)
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        is_open.set()
        assert has_changed.wait(30)
        wait_sent(store)
        assert halves == []
        assert fleet_rows(base) == local_rows(state_dir)


def test_all_that_is_written_arrives(base: Base, state_dir: str) -> None:
    """Rows of every kind, changed and deleted, texts of every kind, and checkpoints that write no event."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        for key in "abc":
            store.add(metadata(key), with_extra(text="\x00\x1a\x1a0\u2028\U0001f41a"))
        store.put("lease", "k", "\x00")
        store.put("lease", "gone", 1)
        wait_sent(store)
        assert fleet_rows(base) == local_rows(state_dir)
        store.update("a", lambda status: end(status, 3, finished_at=9, message="\x00\x1a1"))
        store.delete("b")
        store.delete_item("lease", "gone")
        before = store.revision
        store.update("c", lambda status: replace(status, pid=4711))  # no event tells of it
        assert store.revision == before
        wait_sent(store)
        assert fleet_rows(base) == local_rows(state_dir)
        assert base.ask("SELECT revision, is_whole FROM limpet.fleet_node") == [(store.revision, True)]


def test_what_was_written_without_a_fleet_arrives_too(base: Base, state_dir: str) -> None:
    """A store that joins late, or again, sends what is missing, and takes away what is not there any more."""
    with Store.open(state_dir, node="n7") as store:
        store.add_sandbox(sandbox())
        for number in range(600):
            store.add(metadata(f"c{number:03}"), RUNNING)
    for change in (lambda store: None, lambda store: store.delete("c001"), lambda store: store.put("k", "k", 1)):
        with Store.open(state_dir, node="n7") as store:
            change(store)
            store.update("c000", lambda status: replace(status, pid=status.pid + 1))
        with Store.open(state_dir, node="n7", fleet=base.url) as store:
            wait_sent(store)
        assert fleet_rows(base) == local_rows(state_dir)


def test_an_id_that_is_used_again_replaces_the_old_one(base: Base, state_dir: str) -> None:
    """Numbers that begin anew are newer nevertheless."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        for number in range(20):
            store.update("a", lambda status, n=number: replace(status, pid=n + 2))  # type: ignore[misc]
            store.put("k", "k", number)
        wait_sent(store)
        with store.transaction() as draft:
            draft.delete("a")
            draft.delete_item("k", "k", None)
        store.add(metadata("a"), with_extra(again=True))
        store.put("k", "k", "again")
        wait_sent(store)
        assert fleet_rows(base) == local_rows(state_dir)


def test_nothing_waits_for_a_fleet_that_is_away(base: Base, cluster: Cluster, state_dir: str) -> None:
    """The node goes on; the lag tells; once the fleet is back everything arrives, in order."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        wait_sent(store)
        cluster.kill()
        try:
            began = time.monotonic()
            for number in range(300):
                store.add(metadata(f"c{number:03}"), RUNNING)
            took = time.monotonic() - began
            wait_until(lambda: store.fleet_lag and store.fleet_lag.error, "the trouble to be told")
            assert store.fleet_lag is not None
            assert store.fleet_lag.revisions == 300
            assert store.fleet_lag.seconds > 0
        finally:
            cluster.start()
        wait_sent(store)
        assert fleet_rows(base) == local_rows(state_dir)
        assert took < 20


def test_a_cut_connection_costs_nothing(base: Base, state_dir: str) -> None:
    """Connections that the server ends again and again are made again, and nothing is missing or twice."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        for number in range(200):
            store.add(metadata(f"c{number:03}"), RUNNING)
            if number % 20 == 10:
                base.cut_connections()
        wait_sent(store)
        assert fleet_rows(base) == local_rows(state_dir)


def test_who_is_cut_again_and_again_does_not_pause_longer(base: Base, state_dir: str) -> None:
    """A proxy that ends connections now and then costs a moment each time, not more and more."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        wait_sent(store)
        took = []
        for pid in range(6):
            base.ask(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name LIKE 'limpet n7%%'"
            )
            began = time.monotonic()
            store.update("a", partial(replace, pid=pid))
            wait_sent(store)
            took.append(time.monotonic() - began)
        assert took[-1] < 2, took  # it was 6 s


@pytest.mark.parametrize(
    "by_hand", ["DELETE FROM limpet.fleet_node", "UPDATE limpet.container_status SET fleet_epoch = 99"]
)
def test_rows_of_an_epoch_that_nobody_had_are_replaced(base: Base, state_dir: str, by_hand: str) -> None:
    """Somebody has removed the node's own row, or altered others: they look newer than all that it will send."""
    for opening in range(3):
        with Store.open(state_dir, node="n7", fleet=base.url) as store:
            if not opening:
                store.add_sandbox(sandbox())
                store.add(metadata("a"), RUNNING)
            store.update("a", lambda status: replace(status, pid=status.pid + 1))
            wait_sent(store)
    base.ask(by_hand)
    with Store.open(state_dir, node="n7") as store:
        store.update("a", lambda status: replace(status, pid=4711))
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        wait_sent(store)
    assert fleet_rows(base) == local_rows(state_dir)


def test_sync_returns_when_the_fleet_has_it(base: Base, cluster: Cluster, state_dir: str) -> None:
    """Every change is there when its call returns; while the fleet is away it is an error of its own."""
    with Store.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync", fleet_timeout=30) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        assert fleet_rows(base) == local_rows(state_dir)
        for number in range(20):
            store.update("a", lambda status, n=number: replace(status, pid=n + 2))  # type: ignore[misc]
            assert base.ask("SELECT pid FROM limpet.container_status") == [(number + 2,)]
        with store.transaction() as draft:
            draft.put("k", "k", 1, None)
        assert fleet_rows(base) == local_rows(state_dir)
    cluster.kill()
    try:
        with Store.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync", fleet_timeout=0.2) as store:
            with pytest.raises(errors.FleetUnknownError, match="durable on this node"):
                store.put("k", "unknown", 1)
            assert store.find("k", "unknown") is not None
    finally:
        cluster.start()


def test_an_engine_in_sync_mode_is_not_cut_in_two(base: Base, cluster: Cluster, state_dir: str) -> None:
    """While the fleet is away an engine still makes containers, whole; the call says what is not known."""
    with Engine.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync", fleet_timeout=30) as engine:
        made = engine.create_sandbox({"metadata": {"name": "s", "uid": "u", "namespace": "n"}})
        assert [row[0] for row in base.ask("SELECT id FROM limpet.sandbox")] == [made.id]
        cluster.kill()
        try:
            engine.store.fleet._timeout = 0.2
            with pytest.raises(errors.FleetUnknownError):
                engine.create_sandbox({"metadata": {"name": "t", "uid": "u", "namespace": "n"}}, id="whole")
            assert engine.get_sandbox("whole").bundle is not None
        finally:
            cluster.start()
        engine.store.fleet._timeout = 30
        engine.create_sandbox({"metadata": {"name": "v", "uid": "u", "namespace": "n"}})
        assert fleet_rows(base) == local_rows(state_dir)


def test_tasks_wait_for_the_fleet_too(base: Base, state_dir: str) -> None:
    """In sync mode a task goes on once the fleet has its change, and its transaction."""

    async def work() -> None:
        async with AsyncStore.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync", fleet_timeout=30) as store:
            for number in range(5):
                await store.put("k", "k", number)
                assert base.ask("SELECT value FROM limpet.item") == [(str(number),)]
            async with store.transaction() as draft:
                draft.put("k", "t", 7, None)
            assert base.ask("SELECT value FROM limpet.item WHERE key = 't'") == [("7",)]
            assert store.fleet_lag is not None
            assert store.fleet_lag[::2] == (0, "")

    asyncio.run(work())
    with Store.open(state_dir, node="n7") as alone:
        assert alone.fleet_lag is None


@pytest.mark.parametrize("timeout", [float("inf"), 1e12, 10**400], ids=["infinite", "long", "longer"])
def test_the_fleet_may_be_waited_for_for_ever(base: Base, state_dir: str, timeout: float) -> None:
    """By threads, alone and in a queue, and by tasks."""
    with Store.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync", fleet_timeout=timeout) as store:
        store.put("k", "k", 0)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: store.put("k", str(number), number), range(20)))
        tasks = AsyncStore(store)

        async def work() -> None:
            await asyncio.gather(*(tasks.put("t", str(number), number) for number in range(20)))

        asyncio.run(work())
        assert base.ask("SELECT count(*) FROM limpet.item") == [(41,)]


def test_tasks_that_wait_for_too_long_are_told(base: Base, state_dir: str) -> None:
    """Each task waits for as long as it is to, whenever it began; one timer minds them all, again and again."""

    async def work() -> None:
        async with AsyncStore.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync", fleet_timeout=0.4) as store:
            wait_sent(store.store)  # what connects and makes the schema may take its time

            async def put(number: int) -> tuple[float, BaseException | None]:
                await asyncio.sleep(number % 3 / 5)
                began = time.monotonic()
                try:
                    await store.put("k", str(number), number)
                except errors.FleetUnknownError as error:
                    return time.monotonic() - began, error
                return time.monotonic() - began, None

            for _ in range(2):
                with base.cluster.connect(base.name) as connection, connection.transaction():
                    connection.execute("SELECT FROM limpet.fleet_node FOR UPDATE")
                    answers = await asyncio.gather(*map(put, range(60)))
                assert all(error is not None and 0.4 <= took < 20 for took, error in answers)
                wait_sent(store.store)
                async with asyncio.timeout(20):  # on a busy machine 0.4 s may be too few for a fleet that answers
                    while (await put(0))[1] is not None:
                        pass

    asyncio.run(work())


@pytest.mark.long
@pytest.mark.timeout(300)
def test_killed_at_random_it_loses_nothing(base: Base, cluster: Cluster, state_dir: str) -> None:
    """Engine, database and connections are killed at random; what sync mode acknowledged is there, in order, once."""
    chance, written = random.Random(1), 0
    script = (
        "from limpet import errors\n"
        "from tests.records import RUNNING, metadata, sandbox\n"
        f"store = Store.open(state_dir, node='n7', fleet={base.url!r}, fleet_ack='sync', fleet_timeout=30)\n"
        "if 's' not in store.sandbox_ids: store.add_sandbox(sandbox())\n"
        "number = len(store.list_items('k'))\n"
        "while True:\n"
        "    store.put('k', f'{number:06}', number)\n"
        "    say(number)\n"
        "    number += 1\n"
    )
    for _ in range(6):
        process = EngineProcess(state_dir, script)
        acknowledged: list[int] = []
        for _ in range(chance.randrange(1, 60)):
            acknowledged.append(int(process.read()[0]))
            blow = chance.randrange(40)
            if blow == 0:
                cluster.kill()
                cluster.start()
            elif blow < 3:
                base.cut_connections()
        process.kill()
        written = acknowledged[-1]
        keys = [int(row[0]) for row in base.ask("SELECT key FROM limpet.item ORDER BY key")]
        assert keys == list(range(len(keys)))
        assert len(keys) > written
        revisions = [row[0] for row in base.ask("SELECT revision FROM limpet.event ORDER BY revision")]
        assert revisions == list(range(1, len(revisions) + 1))
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        wait_sent(store)
    assert fleet_rows(base) == local_rows(state_dir)


def test_changes_from_many_threads_arrive(base: Base, state_dir: str) -> None:
    """Threads that write at once, with and without events, leave the fleet as the node is."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        numbers = count()

        def work() -> None:
            for _ in range(40):
                number = next(numbers)
                store.add(metadata(f"c{number:03}"), RUNNING)
                store.update(f"c{number:03}", lambda status: replace(status, pid=77))
                if number % 3 == 0:
                    store.delete(f"c{number:03}")

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_sent(store)
        assert fleet_rows(base) == local_rows(state_dir)


class Sender:
    """Sends by hand what a node has at an instant, as a shipper would."""

    def __init__(self, base: Base, state_dir: str, directory: str = "d") -> None:
        from limpet.engine.fleet.upgrade import require_schema

        self.extractor = Extractor(f"{state_dir}/store.db", "n7")
        address = Address(base.url)
        self.connection = address.open()
        self.connection.autocommit = True
        require_schema(address, self.connection)
        self.held = batch.claim(self.connection, "n7", directory, "/somewhere")

    def read(self, key: str) -> Any:
        return self.extractor.extract((0, 1000), lambda _: {"container": [(key,)], "container_status": [(key,)]})

    def send(self, found: Any) -> bool:
        return batch.write_batch(self.connection, self.held, found)


@pytest.mark.parametrize("is_broken", [False, True])
def test_what_is_late_changes_nothing(
    base: Base, state_dir: str, rewrite: Callable[..., None], *, is_broken: bool
) -> None:
    """A batch that comes after a newer one, of the same revision, changes nothing; without its guard it would."""
    if is_broken:
        rewrite("UPSERT", lambda text: text.partition(" WHERE (excluded")[0])
    with Store.open(state_dir, node="n7") as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        sender = Sender(base, state_dir)
        late = sender.read("a")
        store.update("a", lambda status: replace(status, pid=5))
        newer = sender.read("a")
        for found in (newer, newer, late):
            assert sender.send(found)
        assert (base.ask("SELECT pid FROM limpet.container_status") == [(5,)]) is not is_broken
        store.delete("a")
        gone = sender.read("a")
        assert sender.send(gone)
        assert not sender.send(late)
        assert base.ask("SELECT id FROM limpet.container_status") == []
        sender.extractor.close()
        sender.connection.close()


def test_the_same_amid_its_own_commit_changes_nothing(base: Base, state_dir: str) -> None:
    """What is sent again while the server is still at it sees what that has written, though it was not there before."""
    with Store.open(state_dir, node="n7") as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        first, again = Sender(base, state_dir), Sender(base, state_dir)
        first.held = again.held
        late = first.read("a")
        store.update("a", lambda status: replace(status, pid=5))
        newer = first.read("a")
        assert late.newest == newer.newest
        with ThreadPoolExecutor(1) as pool:
            with first.connection.transaction():
                assert first.send(newer)
                sent = pool.submit(again.send, late)
                is_waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
                wait_until(lambda: bool(base.ask(is_waiting, base.name)), "the other to wait")
            assert sent.result(10)
        assert base.ask("SELECT pid FROM limpet.container_status") == [(5,)]
        assert len(base.ask("SELECT revision FROM limpet.event")) == len(newer.events)
        for sender in (first, again):
            sender.extractor.close()
            sender.connection.close()


@pytest.mark.parametrize("is_opened_first", [True, False])
def test_rows_too_long_for_one_statement_arrive_together(
    base: Base, state_dir: str, monkeypatch: pytest.MonkeyPatch, *, is_opened_first: bool
) -> None:
    """A server takes 1 GB in a message. Whether changes are sent or all rows are compared, no viewer sees a part."""
    monkeypatch.setattr(batch, "_MOST_CHARACTERS", 4000)
    lengths: list[int] = []
    execute = Connection.execute

    def measure(self: Connection, statement: Any, values: Any = None, **options: Any) -> Any:
        lengths.append(sum(len(str(value)) for value in values.values()) if isinstance(values, dict) else 0)
        return execute(self, statement, values, **options)

    monkeypatch.setattr(Connection, "execute", measure)
    url = base.url if is_opened_first else ""
    with Store.open(state_dir, node="n7", fleet=url) as store:
        store.add_sandbox(sandbox())
        with store.transaction() as draft:
            for number in range(12):
                draft.add(metadata(f"c{number:02}", text="x" * (9000 if number == 5 else 100 * number)), RUNNING)
            draft.put("k", "k", "v" * 2000)
        with store.transaction() as draft:
            draft.delete("c01")
            for number in range(2, 12):
                draft.update(f"c{number:02}", lambda status: replace(status, message="m" * 1500))
        if is_opened_first:
            wait_sent(store)
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        wait_sent(store)
        assert fleet_rows(base) == local_rows(state_dir)
        assert base.ask("SELECT count(DISTINCT xmin::text) FROM limpet.container") == [(1,)]
    assert max(lengths) < 20_000  # one row alone is longer: its config has its labels, too


def test_an_array_holds_any_text(base: Base) -> None:
    """Whatever is a quote, an escape, a separator or a NULL to PostgreSQL or to us, alone and together."""
    plain: list[str | None] = ["", "NULL", "null", "{", "},", ' "', "\\", '\\"', "\\\\n"]
    plain += ["\n\t\r\x01\x7f", "\u2028\U0001f41a", "'", "%s"]
    marked: list[str | None] = ["\0", "\x1a", "\x1aN", '"\x1aN"', "\x1a0\0\0", "\0,\0"]
    cases: list[list[str | None]] = [[each] for each in marked]
    cases += [[""], plain, [*plain, None], marked, [None, *marked, *plain, None]]
    for texts in cases:
        ((found,),) = base.ask("SELECT %s::text[]", _texts(texts))
        assert found == [None if text is None else escape(text) for text in texts]


@pytest.mark.parametrize("is_broken", [False, True])
def test_an_old_epoch_changes_nothing(
    base: Base, state_dir: str, rewrite: Callable[..., None], *, is_broken: bool
) -> None:
    """Whoever was taken over from is told by whom, and changes nothing; without the check it would."""
    if is_broken:
        rewrite("_BEGIN", lambda text: text.replace("epoch = %(epoch)s", "%(epoch)s > 0"))
    with Store.open(state_dir, node="n7") as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        old = Sender(base, state_dir)
        new = Sender(base, state_dir)
        if is_broken:
            assert old.send(old.read("a"))
        else:
            with pytest.raises(errors.FleetFencedError, match=f"process {os.getpid()} on .* with '/somewhere'"):
                old.send(old.read("a"))
            with pytest.raises(errors.FleetFencedError):
                batch.beat(old.connection, old.held)
        assert len(base.ask("SELECT id FROM limpet.container")) == is_broken
        assert new.send(new.read("a"))
        for sender in (old, new):
            sender.extractor.close()
            sender.connection.close()


def test_callers_who_come_back_share_a_transaction(base: Base, state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who came too late for a sending waits for those whom it answered: they call again at once."""
    monkeypatch.setattr(shipper, "_PART", 1e4)
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
    Store.open(state_dir, node="n7").close()
    sender = Shipper(Address(base.url), f"{state_dir}/store.db", "n7", ("of-a-test", state_dir), dict, is_awaited=True)
    sender.start()
    try:
        sender.wait(30)
        answered: list[str] = []

        def call(name: str) -> threading.Thread:
            def wait() -> None:
                sender.note(Changes(), 0)
                sender.wait(30)
                answered.append(name)

            thread = threading.Thread(target=wait)
            thread.start()
            return thread

        with base.cluster.connect(base.name) as connection, connection.transaction():
            connection.execute("SELECT FROM limpet.fleet_node FOR UPDATE")
            first = call("first")
            wait_until(lambda: bool(base.ask(waiting, base.name)), "the first to be sent")
            late = [call("second"), call("third")]
            wait_until(lambda: sender._waiting == 3, "all to wait")
        first.join()
        late[0].join(0.3)
        assert answered == ["first"]
        call("first again").join()
        for thread in late:
            thread.join()
        assert sorted(answered) == ["first", "first again", "second", "third"]
    finally:
        sender.close()


@contextmanager
def held(base: Base) -> Iterator[None]:
    """Nothing that is sent is answered while the block runs."""
    with base.cluster.connect(base.name) as connection, connection.transaction():
        connection.execute("SELECT FROM limpet.fleet_node FOR UPDATE")
        yield


def test_what_was_told_needs_no_collector(base: Base, state_dir: str) -> None:
    """Calls in sync mode, told or given up, are freed at once: a collector with much to do takes a fifth of a round."""
    with Store.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync", fleet_timeout=30) as store:
        store.add_sandbox(sandbox())
        for number in range(8):
            store.add(metadata(f"c{number}"), RUNNING)

        async def change() -> None:
            tasks = AsyncStore(store)
            for turn in range(1, 21):
                await asyncio.gather(*(tasks.checkpoint(f"c{number}", with_extra(turn=turn)) for number in range(8)))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda turn: store.checkpoint(f"c{turn % 8}", with_extra(turn=turn)), range(160)))
            gc.collect()
            gc.disable()
            try:
                list(pool.map(lambda turn: store.checkpoint(f"c{turn % 8}", with_extra(turn=-turn)), range(160)))
                of_threads = gc.collect()
                asyncio.run(change())
                of_tasks = gc.collect()
            finally:
                gc.enable()
    assert of_threads < 160
    assert of_tasks < 160 + 100  # a loop leaves some


def test_whoever_waits_in_vain_is_told_in_time(base: Base, state_dir: str) -> None:
    """Threads and tasks that share a batch are each told that it is durable here; nothing is kept for them then."""
    told: list[str] = []
    with Store.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync", fleet_timeout=30) as store:
        store.put("k", "first", 1)
        store.fleet._timeout = 3

        def call(number: int) -> None:
            try:
                store.put("k", f"thread {number}", number)
            except errors.FleetUnknownError as error:
                told.append(str(error))

        async def call_all() -> list[BaseException | None]:
            tasks = AsyncStore(store)
            calls = [asyncio.ensure_future(tasks.put("k", f"task {number}", number)) for number in range(8)]
            hasty = asyncio.ensure_future(tasks.put("k", "hasty", 1))
            while store.find("k", "hasty") is None:
                await asyncio.sleep(0.001)
            hasty.cancel()
            began = time.monotonic()
            await asyncio.wait([hasty])
            assert hasty.cancelled()
            assert time.monotonic() - began < 2.5, "who is cancelled waits for no fleet"
            return [found.exception() for found in (await asyncio.wait(calls))[0]]

        with held(base):
            threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
            with store.fleet.later(), store.transaction() as draft:
                draft.put("k", "turn", 1, None)
                for thread in threads:
                    thread.start()
                wait_until(lambda: len(store._committer._queue) == 8, "all to wait for the committer thread")
            found = asyncio.run(call_all())
            for thread in threads:
                thread.join(20)
            assert len(told) == 8
            assert all("durable on this node" in text and "after 3 s" in text for text in told)
            assert len(found) == 8
            assert all(isinstance(error, errors.FleetUnknownError) for error in found)
            assert store.fleet._shipper is not None
            assert (store.fleet._shipper._waiting, len(store.fleet._shipper._promises)) == (0, 0)
        store.fleet._timeout = 30
        store.put("k", "last", 1)
        assert fleet_rows(base) == local_rows(state_dir)


def test_an_interrupted_caller_waits_for_no_fleet(base: Base, state_dir: str) -> None:
    """It raises as soon as what it has written is durable here."""

    class Interrupt(Exception):  # noqa: N818
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    with Store.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync", fleet_timeout=30) as store:
        store.put("k", "first", 1)
        begun, before = threading.Event(), signal.signal(signal.SIGUSR1, interrupt)

        def hold() -> None:
            with store.fleet.later(), store.transaction() as draft:
                draft.put("k", "turn", 1, None)
                begun.set()
                wait_until(lambda: len(store._committer._queue) == 1, "the other to be queued")
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.1)

        try:
            with held(base):
                thread = threading.Thread(target=hold)
                thread.start()
                assert begun.wait(20)
                began = time.monotonic()
                with pytest.raises(Interrupt):
                    store.put("k", "interrupted", 1)
                assert time.monotonic() - began < 15
                thread.join()
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert store.find("k", "interrupted") is not None


def test_no_memory_ends_no_sending(base: Base, state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused wherever the sending thread is, also where it tells of that: everybody is told, and it goes on."""
    refused: list[str] = []
    monkeypatch.setattr(shipper, "_FIRST_PAUSE", 0.005)
    monkeypatch.setattr(shipper, "_LONGEST_PAUSE", 0.05)
    with Store.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync", fleet_timeout=30) as store:
        store.put("k", "first", 1)

        def refuse(name: str) -> None:
            act = getattr(Shipper, name)

            def act_later(self: Shipper, *arguments: Any) -> Any:
                if threading.current_thread().name == "limpet-fleet" and refused.count(name) < 2:
                    refused.append(name)
                    raise MemoryError
                return act(self, *arguments)

            monkeypatch.setattr(Shipper, name, act_later)

        for name in ("_tell_waiters", "_take", "_confirm"):
            refuse(name)
            with ThreadPoolExecutor(4) as pool:
                for each in [pool.submit(store.put, "k", f"{name}-{number}", 1) for number in range(4)]:
                    each.result(60)
            assert refused.count(name) == 2
        assert fleet_rows(base) == local_rows(state_dir)


@pytest.mark.parametrize("has_begun", [True, False])
def test_an_opening_that_fails_leaves_nothing_that_sends(
    base: Base, state_dir: str, monkeypatch: pytest.MonkeyPatch, *, has_begun: bool
) -> None:
    """An interrupt comes as the thread begins, or there are no more threads: a node that is closed is not alive."""

    def start(thread: threading.Thread) -> None:
        if has_begun:
            threading.Thread.start(thread)
            raise KeyboardInterrupt
        raise RuntimeError("can't start new thread")

    def is_gone() -> bool:
        return not any(thread.name == "limpet-fleet" for thread in threading.enumerate())

    with monkeypatch.context() as patch:
        patch.setattr("limpet.recovery.thread.Thread.start", start)
        with pytest.raises(KeyboardInterrupt if has_begun else errors.ResourcesError):
            Store.open(state_dir, node="n7", fleet=base.url)
    wait_until(is_gone, "the thread to end")
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.put("k", "k", 1)
        wait_sent(store)
