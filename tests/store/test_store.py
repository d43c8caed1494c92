"""The store's promises: durable, atomic, one writer, and nothing that is damaged is believed."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.engine import Engine, Store, errors, recover
from limpet.engine.inspection.snapshot import Snapshot
from limpet.schema import ContainerState, ProcessIdentity, Status
from tests.conftest import EngineProcess
from tests.records import RUNNING, Blind, metadata, sandbox


@pytest.fixture
def store(state_dir: str) -> Iterator[Store]:
    with Store.open(state_dir) as opened:
        opened.add_sandbox(sandbox())
        yield opened


def test_state_survives_closing_but_the_unknown_flag_is_never_written(state_dir: str, store: Store) -> None:
    """Every field comes back, except `unknown`: no column and no JSON on disk has it."""
    identity = ProcessIdentity(pid=7, start_ticks=8, boot_id="b", pidfd_inode=9, pid_namespace=10)
    status = Status(
        pid=7,
        created_at=1,
        started_at=2,
        reason="r",
        message="m\n\u2603",
        identity=identity,
        unapplied={"tty": "no terminal here"},
        stop_requested_at=3,
        stop_deadline=4,
    )
    store.add(metadata("a"), status)
    store.checkpoint("a", replace(status, unknown=True, message="doubt"))
    assert store.status("a").state is ContainerState.UNKNOWN
    recover(store, probe=Blind())
    store.close()
    with sqlite3.connect(f"{state_dir}/store.db") as raw:
        columns = {
            row[1]
            for (t,) in raw.execute("SELECT name FROM sqlite_master")
            for row in raw.execute(f"PRAGMA table_info({t})")
        }
        dump = "\n".join(raw.iterdump())
    raw.close()
    assert "unknown" not in columns
    assert '"unknown"' not in dump
    assert "doubt" not in dump
    with Store.open(state_dir) as again:
        found = again.status("a")
        assert found.state is ContainerState.UNKNOWN  # not verified by this opening
        (unsettled,) = again.unsettled()
        assert unsettled.record.status == status


# --- one writer, and what happens to those who are not -------------------------------------------------------------


def test_second_opener_is_told_who_holds_it(state_dir: str, engine_process: Callable[[str], EngineProcess]) -> None:
    """A second engine gets an error that names the holder's pid at once, and the first is not disturbed."""
    process = engine_process("engine = Engine.open(state_dir); say('open'); time.sleep(999)")
    process.read()
    with pytest.raises(errors.StateDirectoryLockedError, match=str(process.pid)) as caught:
        Engine.open(state_dir)
    assert caught.value.holder_pid == process.pid
    process.kill()
    Engine.open(state_dir).close()


def test_use_after_close_and_after_fork(state_dir: str) -> None:
    """A closed store, and a store in a forked child, refuse clearly; the parent goes on."""
    store = Store.open(state_dir)
    store.add_sandbox(sandbox())
    store.add(metadata("a"), RUNNING)
    script = "ok"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        told = b""
        for call in (lambda: store.get("a"), lambda: store.checkpoint("a", RUNNING), store.list):
            try:
                call()
                told += b"worked "
            except errors.ClosedError:
                told += b"refused "
        store.close()
        os.write(write, told)
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100) == b"refused refused refused ", script
    os.close(read)
    os.close(write)
    store.checkpoint("a", replace(RUNNING, pid=8))
    store.close()
    store.close()
    for call in (lambda: store.get("a"), lambda: store.checkpoint("a", RUNNING), store.list, store.last_report):  # type: ignore[assignment]
        with pytest.raises(errors.ClosedError):
            call()


def test_a_fork_leaves_every_store_to_the_parent(tmp_path: Path) -> None:
    """Nothing fails in the child, which Python would only print, and not before the last store is left alone."""
    script = (
        "import os; from limpet import Store; from limpet.engine.database.sqlite import connection\n"
        f"stores = [Store.open(f'{tmp_path}/{{name}}') for name in 'abc']\n"
        "if os.fork() == 0: print(len(connection._kept), flush=True); os._exit(0)\n"
        "os.wait(); [store.close() for store in stores]\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stderr == ""
    assert int(ran.stdout) == 6, "of each store, the connection that writes and the one that reads"


def test_a_writer_that_was_overtaken_is_fenced(store: Store, state_dir: str) -> None:
    """A lock is no fence: once another epoch has begun, the older store may not write any more."""
    store.add(metadata("a"), RUNNING)
    with sqlite3.connect(f"{state_dir}/store.db") as raw:
        raw.execute("UPDATE node SET epoch = epoch + 1")
    raw.close()
    for _ in range(2):
        with pytest.raises(errors.StoreFencedError):
            store.checkpoint("a", replace(RUNNING, pid=8))
    assert store.status("a").pid == 7


@pytest.mark.parametrize("name", ["store.db", "store.db-wal"])
@pytest.mark.parametrize("how", ["unlinked", "replaced"])
def test_files_replaced_under_a_live_store(store: Store, state_dir: str, name: str, how: str) -> None:
    """Nothing is acknowledged into a file that is not there any more."""
    store.add(metadata("a"), RUNNING)
    path = Path(state_dir, name)
    content = path.read_bytes() if how == "replaced" else b""
    path.unlink()
    if how == "replaced":
        path.write_bytes(content)
    with pytest.raises(errors.StoreReplacedError):
        store.checkpoint("a", replace(RUNNING, pid=8))
    assert store.status("a").pid == 7
    with pytest.raises(errors.StoreReplacedError):
        store.checkpoint("a", replace(RUNNING, pid=9))


# --- what may be found on disk -------------------------------------------------------------------------------------


def killed_store(state_dir: str, changes: int = 6) -> None:
    """Leave a state directory as a killed engine does: with a WAL that holds acknowledged commits."""
    script = (
        "import os, sys\nfrom limpet import Store\nfrom msgspec.structs import replace\n"
        "from tests.records import RUNNING, metadata, sandbox\n"
        "store = Store.open(sys.argv[1]); store.add_sandbox(sandbox()); store.add(metadata('a'), RUNNING)\n"
        f"for i in range({changes}): store.checkpoint('a', replace(RUNNING, pid=i + 1))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, state_dir], cwd=Path(__file__).parents[2], check=False)
    assert result.returncode == -signal.SIGKILL


def test_acknowledged_survives_sigkill(state_dir: str) -> None:
    """What was acknowledged before a SIGKILL is there afterwards."""
    killed_store(state_dir)
    with Store.open(state_dir) as store:
        assert store.unsettled()[0].record.status.pid == 6


def test_a_flipped_bit_in_the_wal_is_reported_not_swallowed(state_dir: str) -> None:
    """A damaged frame with acknowledged commits behind it: refused, and nothing on disk is changed by that."""
    killed_store(state_dir)
    wal = Path(state_dir, "store.db-wal")
    content = bytearray(wal.read_bytes())
    content[len(content) // 2] ^= 1
    wal.write_bytes(content)
    before = {path.name: path.read_bytes() for path in Path(state_dir).glob("store.db*")}
    with pytest.raises(errors.StoreDamagedError, match="acknowledged"):
        Store.open(state_dir)
    assert {path.name: path.read_bytes() for path in Path(state_dir).glob("store.db*")} == before


def bad_wal_removed(state: Path) -> None:
    (state / "store.db-wal").unlink()


def bad_database_removed(state: Path) -> None:
    (state / "store.db").unlink()


def bad_database_truncated(state: Path) -> None:
    for name in ("store.db-wal", "store.db-shm"):
        (state / name).unlink()
    (state / "owner.json").unlink()
    os.truncate(state / "store.db", 5000)


def bad_database_not_one(state: Path) -> None:
    (state / "store.db").write_bytes(b"not a database" * 1000)


def bad_older_copy(state: Path) -> None:
    with sqlite3.connect(state / "store.db") as raw:
        raw.execute("UPDATE node SET epoch = 0")
    raw.close()
    (state / "store.db-wal").touch()


def bad_newer_schema(state: Path) -> None:
    with sqlite3.connect(state / "store.db") as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    raw.close()
    (state / "store.db-wal").touch()


def bad_foreign(state: Path) -> None:
    for path in state.glob("store.db*"):
        path.unlink()
    (state / "owner.json").unlink()
    with sqlite3.connect(state / "store.db") as raw:
        raw.execute("CREATE TABLE theirs (a)")
    raw.close()


@pytest.mark.parametrize(
    ("spoil", "error", "word"),
    [
        (bad_wal_removed, errors.StoreDamagedError, "store.db-wal is missing"),
        (bad_database_removed, errors.StoreDamagedError, "is missing"),
        (bad_database_truncated, errors.StoreDamagedError, "restore a backup"),
        (bad_database_not_one, errors.StoreDamagedError, "not a database"),
        (bad_older_copy, errors.StoreDamagedError, "older than when"),
        (bad_newer_schema, errors.StoreTooNewError, "9999"),
        (bad_foreign, errors.StoreDamagedError, "not one of limpet's"),
    ],
)
def test_a_bad_state_directory_is_refused_and_left_alone(
    state_dir: str, spoil: Callable[[Path], None], error: type[Exception], word: str
) -> None:
    """Each kind of damage has a clear error, and is the same afterwards."""
    killed_store(state_dir)
    spoil(Path(state_dir))
    files = [path for path in Path(state_dir).iterdir() if path.is_file() and path.name != "lock"]
    before = {path.name: path.read_bytes() for path in files if not path.name.endswith("-shm")}
    with pytest.raises(error, match=word):
        Store.open(state_dir)
    after = {path.name: path.read_bytes() for path in files if not path.name.endswith("-shm")}
    assert after == before


@pytest.mark.parametrize("mode", [0o755, 0o2770, 0o750])
def test_a_directory_that_its_platform_opens_to_others_is_closed_each_time(state_dir: str, mode: int) -> None:
    """systemd's StateDirectory= and Kubernetes' fsGroup set the mode at every start: each opening is like the first."""
    Path(state_dir).mkdir()
    for _ in range(2):
        Path(state_dir).chmod(mode)
        with Store.open(state_dir):
            assert Path(state_dir).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("names", [["containers/"], ["containers/", "passwd"], ["lock"], ["lock", "images/"]])
def test_a_foreign_directory_is_left_as_it_is(tmp_path: Path, names: list[str]) -> None:
    """Directories called as limpet's, or a lock of another program: refused, and neither mode nor content changes."""
    foreign = tmp_path / "foreign"
    foreign.mkdir(mode=0o755)
    for name in names:
        (foreign / name).mkdir() if name.endswith("/") else (foreign / name).write_text("not ours")
    for look in (Store.open, Engine.open, Snapshot.open):
        with pytest.raises(errors.StateDirectoryError, match="contains no limpet state"):
            look(str(foreign))
    assert sorted(path.name for path in foreign.iterdir()) == sorted(name.rstrip("/") for name in names)
    assert foreign.stat().st_mode & 0o777 == 0o755
    assert all(path.read_text() == "not ours" for path in foreign.iterdir() if path.is_file())


@pytest.mark.parametrize("note", [b"", b"\0" * 60, b'{"p', b'{"pid": 12\0\0\0', b'{"pid": 12345, "pid_namespa'])
def test_a_lock_whose_note_did_not_reach_the_disk_whole_is_ours(tmp_path: Path, note: bytes) -> None:
    """It is never flushed: whoever was killed, or lost power, as it made the directory, leaves one that opens."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "lock").write_bytes(note)
    with Store.open(str(tmp_path / "state")) as store:
        assert not store.ids


@pytest.mark.parametrize("url", ["postgresql://host/db", "sqlite:///x", "file:/x", ":memory:"])
def test_a_url_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Nobody believes that the state is in a database, and it is in a directory of that name."""
    monkeypatch.chdir(tmp_path)
    for look in (Store.open, Engine.open, Snapshot.open):
        with pytest.raises(errors.InvalidInputError, match="not a path"):
            look(url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a link as another user")
def test_another_users_link_in_an_open_directory_is_not_followed(tmp_path: Path) -> None:
    """In a directory such as /tmp another user's link leads nowhere, also where the kernel would follow it."""
    sticky, target = tmp_path / "sticky", tmp_path / "target"
    sticky.mkdir()
    sticky.chmod(0o1777)
    target.mkdir(mode=0o755)
    os.symlink(target, sticky / "state")
    os.lchown(sticky / "state", 54321, 54321)
    for path in (sticky / "state", sticky / "state" / "below"):
        with pytest.raises(errors.StateDirectoryError):
            Engine.open(str(path))
    assert list(target.iterdir()) == []
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_link_of_ones_own_is_followed(tmp_path: Path) -> None:
    """An engine takes a link to a directory, also where that is still to be made."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    with Engine.open(str(tmp_path / "link")) as engine:
        assert engine.store.directory.path == str(tmp_path / "real")
    with Engine.open(str(tmp_path / "link" / "more" / "state")) as engine:
        assert engine.store.directory.path == str(tmp_path / "real" / "more" / "state")
    with Engine.open(str(tmp_path / "nowhere")) as engine:
        assert engine.store.directory.path == str(tmp_path / "missing")


def test_paths_that_cannot_be_a_state_directory(tmp_path: Path) -> None:
    """A file, a link, a directory of other things: named in the error, and not touched."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    for name in ("file", "link", "full"):
        with pytest.raises(errors.StateDirectoryError, match=name):
            Store.open(str(tmp_path / name))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "link", "real", "thesis.txt"]


@pytest.mark.usefixtures("namespaces")
def test_full_disk(tmp_path: Path) -> None:
    """On a full disk the caller gets DiskFullError, memory keeps the truth, and it goes on when there is space.

    What was written of a transaction that did not fit is not left behind the next one, to be taken for damage.
    """
    script = (
        "import os, sys, subprocess\nfrom limpet import Store, errors\nfrom msgspec.structs import replace\n"
        "from limpet.engine.database.sqlite.wal import find_tail\n"
        "from tests.records import RUNNING, metadata, sandbox\n"
        "state = sys.argv[1]; os.makedirs(state)\n"
        "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=600k,mode=700', 'none', state], check=True)\n"
        "store = Store.open(state); store.add_sandbox(sandbox()); store.add(metadata('a'), RUNNING)\n"
        "try: open(state + '/.tmp-ballast', 'wb', 0).write(b'x' * 10**6)\n"
        "except OSError: pass\n"
        "acknowledged, refused = 7, 0\n"
        "for i in range(8, 400):\n"
        "    try: store.checkpoint('a', replace(RUNNING, pid=i)); acknowledged = i\n"
        "    except errors.DiskFullError: refused += 1\n"
        "    assert store.status('a').pid == acknowledged\n"
        "assert refused\n"
        "os.truncate(state + '/.tmp-ballast', os.stat(state + '/.tmp-ballast').st_size - 49152)\n"
        "try:\n"
        "    with store.transaction() as draft:\n"
        "        for i in range(200): draft.add(metadata(f'c{i}'), RUNNING)\n"
        "    raise SystemExit('a part of it was to be written, not all')\n"
        "except errors.DiskFullError: pass\n"
        "os.unlink(state + '/.tmp-ballast')\n"
        "store.checkpoint('a', replace(RUNNING, pid=1000))\n"
        "with open(state + '/store.db-wal', 'rb') as wal: assert not find_tail(wal).is_torn\n"
        "store.close()\n"
        "with Store.open(state) as again: print(again.unsettled()[0].record.status.pid)\n"
        "try:\n"
        "    with open(state + '/ballast', 'wb', 0) as other:\n"
        "        while True: other.write(b'x' * 4096)\n"
        "except OSError: pass\n"
        "try: Store.open(state)\n"
        "except errors.DiskFullError as error: assert 'free some space' in str(error), error\n"
        "else: raise SystemExit('it was opened')\n"
    )
    flags = ["-m"] if os.geteuid() == 0 else ["-Urm"]
    command = ["unshare", *flags, sys.executable, "-c", script, str(tmp_path / "state")]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "1000"), result.stderr


def test_backup_is_whole_and_opens(store: Store, tmp_path: Path) -> None:
    """A backup taken under load opens as a store of its own, with what was acknowledged before."""
    store.add(metadata("a"), RUNNING)
    target = tmp_path / "elsewhere"
    target.mkdir(mode=0o700)
    store.back_up(str(target / "store.db"))
    with pytest.raises(errors.AlreadyExistsError):
        store.back_up(str(target / "store.db"))
    assert os.stat(target / "store.db").st_mode & 0o777 == 0o600
    assert os.listdir(target) == ["store.db"]
    with Store.open(str(target)) as copy:
        assert [record.id for record in copy.list()] == ["a"]


def test_state_is_private(store: Store, state_dir: str) -> None:
    """Directory 0700, files 0600, whatever the umask."""
    assert os.stat(state_dir).st_mode & 0o777 == 0o700
    for path in Path(state_dir).rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_doubts_are_copied_anew_only_once_they_change(state_dir: str) -> None:
    """Whoever sends them with each batch sees at once that they are the same, and never misses a change."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        for key in "ab":
            store.add(metadata(key), RUNNING)
    with Store.open(state_dir) as store:
        copy = store._memory.copy_doubts
        seen = [copy()]
        assert set(seen[0]) == {"a", "b"}
        for change, left in (
            (lambda: store.checkpoint("a", RUNNING), {"b"}),
            (lambda: store.doubt("a", ("Why", "that")), {"a", "b"}),
            (lambda: store.delete("b"), {"a"}),
        ):
            change()
            seen.append(copy())
            assert set(seen[-1]) == left
            store.put("k", "k", 1)
            store.add(metadata("new"))
            assert copy() is seen[-1]
            store.delete("new")
        assert [len(each) for each in seen] == [2, 1, 2, 1]


def test_what_was_added_is_not_read_back(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That could fail, for want of memory say, and nobody would know of a container that is there."""

    def refuse(*_: object) -> None:
        raise MemoryError

    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        with monkeypatch.context() as patch:
            patch.setattr("limpet.engine.store.memory.Memory.get", refuse)
            added = store.add(metadata("a"), RUNNING)
        read = store.get("a")
        assert (added.id, added.status, added.version) == (read.id, read.status, read.version)
        assert added.metadata == read.metadata == metadata("a")
