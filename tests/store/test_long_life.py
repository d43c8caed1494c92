"""A store that lives long: its WAL stays small whoever reads, and what has ended stays on disk until asked for."""

import itertools
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from msgspec.structs import replace

from limpet.engine import Store, recover
from limpet.engine.database.sqlite import connection as database_settings
from limpet.engine.database.sqlite import open_database
from limpet.engine.drill.opening import replace_pragmas
from limpet.schema import ContainerState, Reason
from tests.records import RUNNING, metadata, sandbox

ENDED = replace(RUNNING, pid=0, finished_at=3, reason="Completed")
WAL_BYTES = 1 << 18


@pytest.fixture
def small_wal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow the WAL less than SQLite's own checkpoints do, so that a short stream shows what a long one does."""
    monkeypatch.setattr("limpet.engine.database.sqlite.writer.WAL_BYTES", WAL_BYTES)
    pragmas = replace_pragmas(journal_size_limit=(str(WAL_BYTES), WAL_BYTES))
    monkeypatch.setattr("limpet.engine.store.store.open_database", partial(open_database, pragmas=pragmas))


@contextmanager
def overlapping_readers(path: str) -> Iterator[None]:
    """Keep one of two read transactions open at any time: each ends only when the other has begun anew."""
    stop, begun = threading.Event(), (threading.Semaphore(0), threading.Semaphore(0))

    def read(me: int) -> None:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None) as connection:
            while not stop.is_set():
                connection.execute("BEGIN")
                connection.execute("SELECT count(*) FROM container_status").fetchone()
                begun[me].release()
                while not stop.is_set() and not begun[1 - me].acquire(timeout=0.05):
                    pass
                connection.execute("COMMIT")
        connection.close()

    threads = [threading.Thread(target=read, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def make_store(state_dir: str) -> Store:
    store = Store.open(state_dir)
    store.add_sandbox(sandbox())
    store.add(metadata("a"), RUNNING)
    return store


@pytest.mark.long
@pytest.mark.usefixtures("small_wal")
def test_the_wal_is_bounded_though_somebody_always_reads(state_dir: str) -> None:
    """Readers who overlap never leave SQLite a moment to begin the WAL anew; the writer takes one."""
    with make_store(state_dir) as store, overlapping_readers(f"{state_dir}/store.db"):
        sizes = []
        for turn in range(1500):
            store.checkpoint("a", replace(RUNNING, pid=turn))
            sizes.append(os.stat(f"{state_dir}/store.db-wal").st_size)
        assert max(sizes) < 3 * WAL_BYTES, f"{max(sizes)} bytes, for {1500 * 4120} written"
    with Store.open(state_dir) as store:
        assert store.status("a").pid == 1499


@pytest.mark.usefixtures("small_wal")
def test_a_reader_that_stays_delays_nobody_for_long(state_dir: str) -> None:
    """While one reads without end, commits go on and are tried less and less; afterwards the WAL shrinks again."""
    with make_store(state_dir) as store:
        reader = sqlite3.connect(f"file:{state_dir}/store.db?mode=ro", uri=True, isolation_level=None)
        reader.execute("BEGIN")
        (before,) = reader.execute("SELECT seq FROM container_status").fetchone()
        with mock.patch(
            "limpet.engine.database.sqlite.writer.restart_wal", wraps=database_settings.restart_wal
        ) as restart:
            for turn in range(1500):
                store.checkpoint("a", replace(RUNNING, pid=turn))
            assert 1 <= restart.call_count < 10
        assert reader.execute("SELECT seq FROM container_status").fetchone() == (before,)
        reader.execute("COMMIT")
        reader.close()
        for turn in itertools.count(1500):
            store.checkpoint("a", replace(RUNNING, pid=turn))
            if os.stat(f"{state_dir}/store.db-wal").st_size <= WAL_BYTES:
                break
            assert turn < 20_000, "the WAL never shrank"


def fill(state_dir: str, names: list[str]) -> None:
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        for name in names:
            store.add(metadata(name), ENDED)
        store.add(metadata("runs"), RUNNING)


def damage(state_dir: str, change: str) -> None:
    with sqlite3.connect(f"{state_dir}/store.db") as connection:
        connection.execute(f"UPDATE container_status SET {change}")
    connection.close()
    Path(state_dir, "owner.json").unlink()


@pytest.mark.parametrize(
    "change", ["exit_code = 7 WHERE id = 'b'", "message = CAST(x'ff' AS TEXT) WHERE id = 'b'"], ids=["value", "utf-8"]
)
def test_a_damaged_row_of_a_container_that_has_ended(state_dir: str, change: str) -> None:
    """It is found when it is asked for, alone or with all, and stands in nobody's way."""
    fill(state_dir, ["a", "b"])
    damage(state_dir, change)
    for ask_alone in (True, False):
        with Store.open(state_dir) as store:
            if ask_alone:
                assert store.status("b").reason == Reason.DAMAGED
            states = {record.id: record.status.state for record in store.list()}
            assert states == {
                "a": ContainerState.EXITED,
                "b": ContainerState.UNKNOWN,
                "runs": ContainerState.UNKNOWN,
            }
            assert store.is_damaged("b")
            report = recover(store)
            assert next(finding.rule for finding in report.findings if finding.id == "b") == "damaged"


def test_a_flipped_end_does_not_hide_what_runs(state_dir: str) -> None:
    """A damaged row that says of a container with a process that it has ended is looked at when the store opens."""
    fill(state_dir, ["a"])
    damage(state_dir, "finished_at = 4 WHERE id = 'runs'")
    with Store.open(state_dir) as store:
        report = recover(store)
        assert [(finding.id, finding.rule) for finding in report.findings] == [("runs", "damaged")]


def test_more_than_a_few_are_read_at_once(state_dir: str) -> None:
    """A list of many ended containers asks the database once, one container asks for its own row."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        with store.transaction() as draft:
            for number in range(1200):
                draft.add(metadata(f"c{number}"), ENDED)
    statements: list[str] = []
    with Store.open(state_dir) as store:
        with store._records._pool.lend() as connection:  # type: ignore[attr-defined]
            connection.set_trace_callback(statements.append)
        assert store.status("c7").reason == "Completed"
        assert len(store.list(state=ContainerState.EXITED)) == 1200
        assert len(store.list()) == 1200
        assert len(statements) == 2, statements
        store.update("c8", lambda status: replace(status, message="seen"))
        assert [record.id for record in store.list() if record.status.message == "seen"] == ["c8"]
