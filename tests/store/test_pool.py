"""The connections that read: one for each read, whatever becomes of the others, and always to the same database."""

import os
import resource
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from limpet.engine.database.sqlite.pool import Pool
from limpet.engine.state.names import DATABASE
from limpet.engine.store import Store
from limpet.schema.errors import ClosedError, StoreError
from tests.conftest import in_thread
from tests.records import RUNNING, metadata, sandbox

_COUNT = "SELECT count(*) FROM container_status"


@pytest.fixture
def store(state_dir: str) -> Iterator[Store]:
    with Store.open(state_dir) as opened:
        opened.add_sandbox(sandbox())
        opened.add(metadata("a"), RUNNING)
        yield opened


@pytest.fixture
def pool(store: Store) -> Iterator[Pool]:
    opened = Pool(store.directory.join(DATABASE), immutable=False)
    yield opened
    opened.close()


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def read_link(descriptor: str) -> str:
    with suppress(OSError):  # that of the directory of descriptors itself
        return os.readlink(f"/proc/self/fd/{descriptor}")
    return ""


def test_a_few_stay_open_and_none_after_the_end(pool: Pool, store: Store) -> None:
    """However many read at once, one more does not wait for the others.

    SQLite keeps a closed connection's file, for the next one, as long as there is a lock on it.
    """
    before = count_descriptors()
    for _ in range(3):
        with ExitStack() as held:
            lent = [held.enter_context(pool.lend()) for _ in range(7)]
            assert len(set(map(id, lent))) == 7
            assert [one.execute(_COUNT).fetchone() for one in lent] == [(1,)] * 7
        assert count_descriptors() == before + 6 + 4, "the database seven times, its WAL four times"
    pool.close()
    assert count_descriptors() == before + 6
    store.close()
    assert not [path for path in map(read_link, os.listdir("/proc/self/fd")) if path.startswith(store.directory.path)]
    with pytest.raises(ClosedError), pool.lend():
        pass


def test_closing_waits_for_a_read_and_not_for_ever(pool: Pool) -> None:
    """A read that is under way when it is closed ends as it should, and its connection is closed then."""
    with pool.lend() as connection:
        thread, outcome = in_thread(pool.close)
        thread.join(0.1)
        assert thread.is_alive(), "the read is waited for"
        thread.join(30)
        assert outcome == [None]
        assert connection.execute(_COUNT).fetchone() == (1,)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute(_COUNT)


def test_an_interrupted_instant_ends(pool: Pool, store: Store) -> None:
    """A transaction that nobody has ended would keep the WAL for ever, and every later one from beginning."""
    with pytest.raises(KeyboardInterrupt), pool.lend() as connection:
        connection.execute("BEGIN")
        raise KeyboardInterrupt
    with pool.lend_for_an_instant() as connection:
        before = connection.execute("SELECT seq FROM container_status").fetchone()
        store.update("a", lambda old: old)
        store.checkpoint("a", RUNNING)
        assert connection.execute("SELECT seq FROM container_status").fetchone() == before
    with pool.lend_for_an_instant() as connection:
        assert connection.execute("SELECT seq FROM container_status").fetchone() > before


def test_another_database_in_its_place_is_not_read(pool: Pool, store: Store, tmp_path: Path) -> None:
    """The first connection goes on with the file that it has; a second one would be to the other, and is not opened."""
    path = store.directory.path
    shutil.copytree(path, tmp_path / "copy")
    with pool.lend() as connection:
        os.rename(path, tmp_path / "moved")
        os.rename(tmp_path / "copy", path)
        thread, outcome = in_thread(pool.take)
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(30)
    assert outcome == [connection], "it waited for the one that there is"
    pool.give_back(connection)
    os.rename(path, tmp_path / "copy")
    os.rename(tmp_path / "moved", path)


def test_without_descriptors_the_next_read_waits_for_the_last(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is always the connection that is open; who is amid a read with it, on the same thread, gets an error."""
    monkeypatch.setattr("limpet.engine.database.sqlite.pool.BUSY_TIMEOUT_SECONDS", 0.05)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pool.lend() as connection:
        connection.execute(_COUNT).fetchone()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        try:
            with pytest.raises(StoreError), pool.lend():
                pass
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with pool.lend() as again:
        assert again is connection
