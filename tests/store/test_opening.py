"""What a store is opened on: a path, by one node or several, also where records are damaged."""

import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from limpet import Engine, Snapshot, Store, errors, recover
from limpet.engine.database.sqlite.wal import find_tail
from limpet.engine.drill.records import Answer
from limpet.recovery import Process
from limpet.schema import ProcessIdentity, Reason
from limpet.schema.status import end
from tests.conftest import EngineProcess
from tests.records import RUNNING, Blind, metadata, sandbox

NOT_PATHS = [
    "postgresql://user:secret@host/database",
    "postgresql+psycopg://host/database",
    "sqlite:///var/lib/limpet",
    "file:/var/lib/limpet",
    ":memory:",
    "",
    "~/state",
    b"/var/lib/limpet",
    None,
]


@pytest.mark.parametrize("value", NOT_PATHS)
def test_what_is_no_path_is_refused(value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL makes no directory; the error says what to give, and shows no password."""
    monkeypatch.chdir(tmp_path)
    for open_it in (Store.open, Engine.open, Snapshot.open):
        with pytest.raises(errors.InvalidInputError, match=r"give a path|not a path|expanduser") as caught:
            open_it(value)
        assert "secret" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_of_ours_has_the_number_of_a_standard_stream(state_dir: str, closed: str) -> None:
    """A host program that had none gives itself some later, by which it closes what has these numbers: no lock."""
    script = (
        "import os, sys\n"
        "from limpet import Store, errors\n"
        "store = Store.open(sys.argv[1])\n"
        "for number in range(3): os.dup2(os.open(os.devnull, os.O_RDWR), number)\n"
        "try: Store.open(sys.argv[1])\n"
        "except errors.StateDirectoryLockedError: sys.exit(7)\n"
    )
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", script, state_dir]
    assert subprocess.run(command, timeout=60, check=False).returncode == 7


def test_a_path_that_is_too_long_for_a_database_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    """By its length: SQLite says of it only that a file cannot be opened. What is accepted is opened."""
    above = tmp_path / ("d" * (478 - len(os.fsencode(tmp_path)) - 200)) / ("e" * 200)
    with Store.open(above) as store:
        assert not store.list()
    too_long = Path(f"{above}x")
    link = tmp_path / "link"
    link.symlink_to(too_long)
    for path in (too_long, link):
        with pytest.raises(errors.StateDirectoryError, match="has 481 bytes"):
            Store.open(path)
    assert not too_long.exists()
    above.rename(too_long)
    with pytest.raises(errors.StateDirectoryError, match="has 481 bytes"):
        Snapshot.open(too_long)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives its rights up")
def test_what_cannot_be_seen_any_more_is_not_said_to_be_replaced(state_dir: str) -> None:
    """As after the host program has become another user: nothing is acknowledged, and the reason is the true one."""
    script = (
        "import os, sys; from limpet import Store\n"
        "from tests.records import sandbox\n"
        "store = Store.open(sys.argv[1]); os.setgid(54321); os.setuid(54321)\n"
        "store.add_sandbox(sandbox('s'))\n"
    )
    told = subprocess.run([sys.executable, "-c", script, state_dir], capture_output=True, text=True, check=False)
    assert "StoreReplacedError" in told.stderr
    assert "cannot be seen any more (Permission denied)" in told.stderr


@pytest.mark.parametrize(
    "given",
    [
        {"wait": "soon"},
        {"wait": None},
        {"look_timeout": "long"},
        {"look_timeout": -1},
        {"fleet_timeout": "long"},
        {"starter": 5},
        {"runtimes": "runc"},
        {"runtimes": {"runc": "runc"}},
    ],
)
def test_an_engine_refuses_what_means_nothing_by_its_name(given: dict[str, Any], state_dir: str) -> None:
    """Nothing is made before that."""
    with pytest.raises(errors.InvalidInputError, match=next(iter(given))):
        Engine.open(state_dir, **given)
    assert not os.path.exists(state_dir)


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_is_no_directory(below: str, tmp_path: Path) -> None:
    """Where a file is in the way, each opening says so, and the file stays as it is."""
    (tmp_path / "file").write_text("mine")
    path = tmp_path / "file" / below
    for open_it in (Store.open, Engine.open, Snapshot.open):
        with pytest.raises(errors.StateDirectoryError, match=r"(?i)not a directory.*; (give|name) another"):
            open_it(path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["a:b", "c:", "http", "x=y", "100%"])
def test_a_name_with_odd_characters_is_a_path(name: str, tmp_path: Path) -> None:
    """Only what begins like a URL is taken for one, and SQLite opens the very file that is meant."""
    with Store.open(str(tmp_path / name)) as store:
        store.add_sandbox(sandbox())
    assert (tmp_path / name / "store.db").exists()
    assert os.listdir(tmp_path) == [name]


def test_a_limit_of_the_size_of_files_is_told(state_dir: str) -> None:
    """The disk has not failed; and nothing is in the way of the next opening, without the limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(errors.StoreError, match=r"8192 bytes \(RLIMIT_FSIZE\)"):
            Store.open(state_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    Store.open(state_dir).close()


def test_nodes_take_turns_in_one_directory(state_dir: str) -> None:
    """Each node has an epoch of its own: one that comes later is not taken for a database that has gone back."""
    for _ in range(2):
        for node in ("local", "n2"):
            with Store.open(state_dir, node=node) as store:
                if "s" not in store.sandbox_ids:
                    store.add_sandbox(sandbox())
    older = Path(state_dir, "store.db").read_bytes()
    Store.open(state_dir).close()
    Path(state_dir, "store.db").write_bytes(older)
    with pytest.raises(errors.StoreDamagedError, match="is older than"):
        Store.open(state_dir, node="n2")


def test_a_commit_that_a_kill_tore_is_gone_before_the_next(
    state_dir: str, engine_process: Callable[[str], EngineProcess]
) -> None:
    """Its remains would make another torn commit look like damage: the WAL is begun anew without them."""
    process = engine_process(
        "from tests.records import RUNNING, metadata, sandbox\n"
        "store = Store.open(state_dir); store.add_sandbox(sandbox())\n"
        "with store.transaction() as draft:\n"
        "    for number in range(100): draft.add(metadata(f'c{number}'), RUNNING)\n"
        "say('done'); time.sleep(60)\n"
    )
    process.read()
    process.kill()
    wal = Path(state_dir, "store.db-wal")
    os.truncate(wal, wal.stat().st_size - 100)
    with Store.open(state_dir) as store:
        assert (len(store), list(store.sandbox_ids)) == (0, ["s"])
        store.add(metadata("next"))
        with open(wal, "rb") as file:
            assert not find_tail(file).is_torn


def test_a_status_without_its_container_stops_no_other(state_dir: str) -> None:
    """A container whose metadata row is gone gets its verdict like the others, and can be deleted for good."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        for name in ("half", "whole"):
            store.add(metadata(name), RUNNING)
    with closing(sqlite3.connect(f"{state_dir}/store.db", isolation_level=None)) as raw:
        raw.execute("DELETE FROM container WHERE id = 'half'")  # foreign keys are off in this connection
    with Store.open(state_dir) as store:
        report = recover(store, probe=Answer(Process.GONE))
        assert {finding.id: finding.rule for finding in report.findings} == {
            "half": "exit-unseen",
            "whole": "exit-unseen",
        }
        with pytest.raises(errors.StoreDamagedError, match="its metadata is missing"):
            store.metadata("half")
        store.delete("half")
    with Store.open(state_dir) as store:
        assert [record.id for record in store.list()] == ["whole"]
        recover(store, probe=Blind())


def test_a_sandbox_whose_record_is_damaged_or_gone_is_not_forgotten(state_dir: str) -> None:
    """One that cannot be read, misses its status, or is known by its containers alone: each is said, and its name."""
    with Store.open(state_dir) as store:
        for name in ("gone", "half", "torn", "whole"):
            store.add_sandbox(sandbox(name))
            store.add(metadata(f"{name}-1", name))
        store.delete("torn-1")
    with closing(sqlite3.connect(f"{state_dir}/store.db", isolation_level=None)) as raw:
        raw.execute("DELETE FROM sandbox WHERE id = 'gone'")
        raw.execute("DELETE FROM sandbox_status WHERE id = 'half'")
        raw.execute("UPDATE sandbox SET created_at = 2 WHERE id = 'torn'")
    with Store.open(state_dir) as store:
        assert {one.id for one in store.list_sandboxes()} == {"whole"}
        assert {*store.sandbox_ids} == {"gone", "half", "torn", "whole"}
        for name, why in (("gone", "record is missing"), ("half", "status is missing"), ("torn", "checksum")):
            for look in (store.sandbox_status, store.get_sandbox):
                with pytest.raises(errors.StoreDamagedError, match=f"sandbox {name}: .*{why}"):
                    look(name)
        store.delete_sandbox("torn")
    with Store.open(state_dir) as store:
        assert {*store.damaged_sandboxes} == {"gone", "half"}


def test_a_row_that_is_gone_when_it_is_asked_for_is_damage(state_dir: str) -> None:
    """What has ended is read from the disk when somebody asks: one whose row has gone meanwhile is Unknown, at 0."""
    ended = end(RUNNING, 3, finished_at=9)
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        for name in ("gone", "kept"):
            store.add(metadata(name), RUNNING)
            store.checkpoint(name, ended)
    with Store.open(state_dir) as store:
        with closing(sqlite3.connect(f"{state_dir}/store.db", isolation_level=None)) as raw:
            raw.execute("DELETE FROM container_status WHERE id = 'gone'")
        record = store.get("gone")
        assert (record.status.unknown, record.status.reason, record.version) == (True, Reason.DAMAGED, 0)
        assert store.is_damaged("gone")
        assert store.get("kept").status == ended


def test_the_process_that_a_damaged_record_names_is_suspected_unless_another_names_it(state_dir: str) -> None:
    """A flipped bit elsewhere leaves it readable; what two records name is no more the one's than the other's."""
    named = [ProcessIdentity(pid=pid, start_ticks=9, boot_id="b", pidfd_inode=pid, pid_namespace=1) for pid in (7, 8)]
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        for name, identity in (("a", named[0]), ("b", named[1]), ("c", named[1]), ("d", None)):
            store.add(metadata(name), replace(RUNNING, identity=identity))
    with closing(sqlite3.connect(f"{state_dir}/store.db", isolation_level=None)) as raw:
        raw.execute("UPDATE container_status SET created_at = 3 WHERE id IN ('a', 'b', 'd')")
    with Store.open(state_dir) as store:
        assert [store.is_damaged(name) for name in "abcd"] == [True, True, False, True]
        assert [store.find_suspect(name) for name in "abcd"] == [named[0], None, None, None]


@pytest.mark.parametrize("content", [b"", bytes(12)])
def test_a_lock_that_a_power_cut_emptied_is_ours(tmp_path: Path, content: bytes) -> None:
    """A cut before the first database: of the lock, which is never flushed, only its length may be left."""
    (tmp_path / "lock").write_bytes(content)
    with Store.open(tmp_path) as store:
        assert len(store) == 0


def test_a_child_of_a_killed_engine_is_waited_for(
    state_dir: str, engine_process: Callable[[str], EngineProcess]
) -> None:
    """Killed as it began to start something: its child has the lock until it executes that, and is no other engine."""
    process = engine_process("""
import ctypes
libc = ctypes.CDLL(None)
store = Store.open(state_dir)
if not libc.fork():  # which Python is not told of, as of subprocess's
    libc.usleep(250_000)
    libc._exit(0)
say("begun")
time.sleep(1000)
""")
    process.read()
    process.kill()
    with Store.open(state_dir) as store:
        assert len(store) == 0
