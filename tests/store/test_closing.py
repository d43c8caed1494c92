"""Closing, in order or not: what is acknowledged is found, whoever closes, how often, and whatever interrupts it."""

import gc
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.engine import Engine, Store, errors
from limpet.engine.database import Changes
from limpet.engine.database.sqlite import examine_wal
from limpet.engine.database.sqlite.writer import Writer
from limpet.engine.store.rows import Rows
from tests.conftest import DEADLINE_SECONDS, in_thread, wait_until
from tests.records import RUNNING, metadata, sandbox

ROOT = Path(__file__).parents[2]


def run(script: str, state_dir: str) -> subprocess.CompletedProcess[str]:
    prelude = "import gc, os, signal, sys, threading\nfrom limpet.engine import Store\nfrom tests.records import *\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + script, state_dir],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )


@pytest.mark.parametrize(
    "end",
    [
        "",  # the interpreter collects it
        "store = None; gc.collect()",
        "store._database.records.close(); store._database = store._journal = store._committer = None",
        "store.close(); store.close()",
        "threading.Thread(target=lambda: store.transaction().__enter__(), daemon=True).start(); store.close()",
        "class Late:\n    def __del__(self): store_.close()\nstore_ = store; late = Late()",
    ],
)
def test_a_store_that_nobody_closes_loses_nothing(state_dir: str, end: str) -> None:
    """However a store's life ends, the WAL is only removed with the owner's note: the next opening has everything."""
    done = run(
        "store = Store.open(sys.argv[1]); store.add_sandbox(sandbox()); store.add(metadata('a'), RUNNING)\n" + end,
        state_dir,
    )
    assert done.returncode == 0, done.stderr
    with Store.open(state_dir) as store:
        assert "a" in store


def test_a_store_that_is_lost_leaves_no_lock(state_dir: str) -> None:
    """What an interrupt between `open` and its assignment loses is collected when the same process opens again."""
    done = run("gc.disable(); Store.open(sys.argv[1]); Store.open(sys.argv[1]).close()", state_dir)
    assert done.returncode == 0, done.stderr


def test_two_close_at_once(tmp_path: Path) -> None:
    """One closes, the other returns when that is done; descriptors of others with the same numbers stay open."""
    for round_ in range(10):
        engine = Engine.open(str(tmp_path / str(round_)))
        barrier = threading.Barrier(3)
        callers = [in_thread(lambda: (barrier.wait(), engine.close())) for _ in range(2)]
        barrier.wait()
        ours = [os.open("/dev/null", os.O_RDONLY) for _ in range(100)]
        for thread, outcome in callers:
            thread.join(30)
            assert isinstance(outcome[0], tuple), outcome
        for descriptor in ours:
            os.close(descriptor)  # raises OSError if somebody else has closed it


def test_closed_while_others_call(state_dir: str) -> None:
    """Calls that the closing overtakes raise ClosedError, or are made; nothing else."""
    store = Store.open(state_dir)
    store.add_sandbox(sandbox())
    store.add(metadata("a"), RUNNING)
    made = [0]

    def work(call: Callable[[], object]) -> object:
        while True:
            try:
                call()
                made[0] += 1
            except errors.LimpetError as error:
                return type(error)

    calls: list[Callable[[], object]] = [
        lambda: store.checkpoint("a", RUNNING),
        lambda: store.history("a"),
        lambda: store.list(name="a"),
        lambda: store.transaction().__enter__(),
    ]
    callers = [in_thread(lambda call=call: work(call)) for call in calls]  # type: ignore[misc]
    wait_until(lambda: made[0] > 20, "some calls")
    store.close()
    for thread, outcome in callers:
        thread.join(30)
        assert outcome == [errors.ClosedError]


def test_rows_that_cannot_be_loaded(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An opening that fails after it has claimed the database leaves it as it is, and no descriptor."""

    def fail(*_: object) -> None:
        raise errors.StoreError("the disk fails")

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "keep", fail)
        with pytest.raises(errors.StoreError, match="the disk fails"):
            Store.open(state_dir)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert os.path.getsize(f"{state_dir}/store.db-wal")
    with Store.open(state_dir):
        pass


def test_a_reader_that_leaves_while_the_store_is_closed(state_dir: str) -> None:
    """It keeps the WAL from being emptied, and is gone before the WAL would be removed: the next opening has it."""
    store = Store.open(state_dir)
    store.add_sandbox(sandbox())
    reader = sqlite3.connect(f"file:{state_dir}/store.db?mode=ro", uri=True, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM node").fetchall()
    store.add(metadata("a"), RUNNING)
    store._journal._connection.execute("PRAGMA busy_timeout = 100")  # type: ignore[attr-defined]
    close = Writer.close

    def leave_before(writer: Writer, before_unlink: Callable[[], None] | None = None) -> None:
        close(writer, before_unlink)
        reader.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "close", leave_before)
        store.close()
    del store
    gc.collect()
    with Store.open(state_dir) as again:
        assert "a" in again


def test_what_is_read_back_is_flushed_anew(state_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that failed and is there nevertheless may be in memory only: it is moved, with a flush of its own."""
    store = Store.open(state_dir)
    store.add_sandbox(sandbox())
    execute = Writer._execute

    def fail(writer: Writer, changes: Changes) -> None:
        execute(writer, changes)
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_execute", fail)
        store.add(metadata("a"), RUNNING)
    shutil.copy(f"{state_dir}/store.db", tmp_path / "without-wal.db")
    copy = sqlite3.connect(f"file:{tmp_path}/without-wal.db?immutable=1", uri=True)
    assert copy.execute("SELECT count(*) FROM container").fetchone() == (1,)
    copy.close()
    store.close()


def test_remains_of_a_failed_commit_are_not_kept(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit is torn, and not there: the WAL begins anew, so that the remains are not taken for damage later."""
    store = Store.open(state_dir)
    store.add_sandbox(sandbox())
    wal = Path(f"{state_dir}/store.db-wal")

    def tear(*_: object) -> None:
        frame = 24 + 4096
        with wal.open("ab") as file:  # frames whose checksums do not match, of this generation
            file.write((wal.read_bytes()[-frame:-100] + bytes(100)) * 40)
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_execute", tear)
        with pytest.raises(errors.StoreError):
            store.add(metadata("a"), RUNNING)
    store.add(metadata("b"), RUNNING)
    assert not examine_wal(str(wal)).is_torn
    store.close()


def test_a_backup_wants_a_path(tmp_path: Path) -> None:
    """A number would be a descriptor, bytes a path of another kind."""
    with Store.open(str(tmp_path / "state")) as store:
        for wrong in (5, None, b"backup.db"):
            with pytest.raises(errors.InvalidInputError, match="give a path"):
                store.back_up(wrong)  # type: ignore[arg-type]


def test_two_backups_to_one_name(tmp_path: Path) -> None:
    """One of them is acknowledged, and is there; the other raises AlreadyExistsError."""
    stores = []
    for number in range(2):
        stores.append(Store.open(str(tmp_path / f"state-{number}")))
        for name in range(number + 1):
            stores[-1].add_sandbox(sandbox(f"s{name}"))
    for round_ in range(10):
        target = tmp_path / f"backup-{round_}.db"
        barrier = threading.Barrier(2)
        callers = [in_thread(lambda store=store: (barrier.wait(), store.back_up(str(target)))[1]) for store in stores]  # type: ignore[misc]
        for thread, _ in callers:
            thread.join(30)
        outcomes = [outcome[0] for _, outcome in callers]
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["AlreadyExistsError", "NoneType"]
        copy = sqlite3.connect(target)
        assert copy.execute("SELECT count(*) FROM sandbox").fetchone() == (outcomes.index(None) + 1,)
        copy.close()
    for store in stores:
        store.close()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_space_is_given_back(state_dir: str) -> None:
    """A database that was large once is small again after all is deleted, and it was closed."""
    annotations = {"note": "x" * 4000}
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        with store.transaction() as draft:
            for number in range(1000):
                small = metadata(f"c{number}")
                draft.add(replace(small, config=replace(small.config, annotations=annotations)), RUNNING)
    assert os.path.getsize(f"{state_dir}/store.db") > 4 << 20
    with Store.open(state_dir) as store, store.transaction() as draft:
        for number in range(999):
            draft.delete(f"c{number}")
    assert os.path.getsize(f"{state_dir}/store.db") < 2 << 20  # the log of changes is kept
    with Store.open(state_dir) as store:
        assert [record.id for record in store.list()] == ["c999"]


def test_a_store_whose_commit_is_in_doubt_does_not_say_that_it_is_closed(state_dir: str) -> None:
    """What it is asked then, it refuses with what happened: nobody has closed it, and it has no connection any more."""
    files, descriptors = resource.getrlimit(resource.RLIMIT_FSIZE), resource.getrlimit(resource.RLIMIT_NOFILE)
    store = Store.open(state_dir)
    store.add_sandbox(sandbox())
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, files[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, descriptors[1]))  # nor can the database be opened anew
    try:
        with pytest.raises(errors.OutcomeUnknownError):
            store.add(metadata("a"), RUNNING)
        for ask in (lambda: store.add(metadata("b"), RUNNING), lambda: store.delete_sandbox("s")):
            with pytest.raises(errors.OutcomeUnknownError, match=r"the commit failed .* until the store is opened"):
                ask()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, descriptors)
        resource.setrlimit(resource.RLIMIT_FSIZE, files)
    store.close()
    with Store.open(state_dir) as again:
        assert list(again.sandbox_ids) == ["s"]


def test_a_wal_that_cannot_be_read_is_an_error_of_ours(tmp_path: Path) -> None:
    """Where the disk, or a security module, refuses it: the error says which file, and what the system says."""
    with pytest.raises(errors.StateDirectoryError, match=f"{tmp_path}.*Is a directory"):
        examine_wal(str(tmp_path))
