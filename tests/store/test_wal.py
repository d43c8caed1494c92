"""The examination of the WAL: no damage that costs acknowledged commits passes, and no legal WAL is refused."""

import sqlite3
import struct
from io import BytesIO
from pathlib import Path

import pytest

from limpet.engine.database.sqlite.wal import find_tail

Files = tuple[bytes, bytes]
"""A database file and its WAL, as a kill leaves them."""


def write_commits(path: Path, commits: int, checkpoint_at: int) -> Files:
    """Make a database whose WAL holds commits, those before `checkpoint_at` as leftovers of an older generation."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = wal")
    connection.execute("PRAGMA synchronous = full")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, payload TEXT)")
    for number in range(commits):
        if number == checkpoint_at:
            connection.execute("PRAGMA wal_checkpoint(RESTART)")
        connection.execute("INSERT INTO t VALUES (?, ?)", (number, "x" * (number % 5) * 900))
    files = path.read_bytes(), Path(f"{path}-wal").read_bytes()
    connection.close()
    return files


@pytest.fixture(scope="module", params=[0, 9], ids=["first generation", "over an older generation"])
def killed(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Files:
    return write_commits(tmp_path_factory.mktemp("wal") / "w.db", 16, request.param)


def test_a_sound_wal_passes(killed: Files) -> None:
    """What SQLite wrote, and any prefix of it that a kill may leave, is no damage."""
    wal = killed[1]
    for length in range(0, len(wal) + 1, 97):
        assert find_tail(BytesIO(wal[:length])).commits == 0


@pytest.mark.long
def test_a_flip_that_loses_commits_is_found(killed: Files, tmp_path: Path) -> None:
    """Wherever one bit flips: if SQLite then forgets more than the last commit, the examination says so."""
    database, wal = killed
    kept = count_rows(tmp_path / "w.db", database, wal)
    missed = []
    for where in (*range(32), *range(32, len(wal), 61)):
        damaged = bytearray(wal)
        damaged[where] ^= 1 << (where % 8)
        found = count_rows(tmp_path / "w.db", database, bytes(damaged))
        told = find_tail(BytesIO(damaged)).commits > 1
        if kept - found > 1 and not told:
            missed.append(where)
        assert not (kept == found and told), f"false alarm at {where}"
    assert not missed


@pytest.mark.parametrize("page_size", [0, 1, 3, 511, 1000, 131072, 2**32 - 1])
def test_a_page_size_that_is_none(killed: Files, tmp_path: Path, page_size: int) -> None:
    """A sound checksum over a page size that SQLite would not have: SQLite forgets the WAL, and that is told."""
    database, wal = killed
    header = wal[:8] + page_size.to_bytes(4) + wal[12:24]
    order = ">" if wal[3] & 1 else "<"
    spoilt = header + struct.pack(">2I", *wal_checksum(header, order)) + wal[32:]
    assert count_rows(tmp_path / "w.db", database, spoilt) == count_rows(tmp_path / "w.db", database, b"")
    assert find_tail(BytesIO(spoilt)).commits > 1


def wal_checksum(data: bytes, order: str) -> tuple[int, int]:
    """Return the checksum of a WAL's header, by the format's description."""
    one = other = 0
    for first, second in struct.iter_unpack(f"{order}2I", data):
        one = (one + first + other) % 2**32
        other = (other + second + one) % 2**32
    return one, other


def count_rows(path: Path, database: bytes, wal: bytes) -> int:
    """Let SQLite itself recover, and count what it finds."""
    Path(f"{path}-shm").unlink(missing_ok=True)
    path.write_bytes(database)
    Path(f"{path}-wal").write_bytes(wal)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        return int(connection.execute("SELECT count(*) FROM t").fetchone()[0])
    except sqlite3.DatabaseError:
        return 0
    finally:
        connection.close()
