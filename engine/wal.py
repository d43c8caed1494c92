"""Examine a SQLite write-ahead log before SQLite opens it.

SQLite stops at the first frame whose checksum fails and silently forgets all that follow, also transactions
that were acknowledged. Under `synchronous=FULL` with one writer at most one transaction, the last, can
legally be torn: it was not acknowledged yet. So more than one commit after the first bad frame is proof of
damage. The format is that of https://sqlite.org/fileformat2.html#the_write_ahead_log.
"""

import struct
from collections.abc import Iterator
from typing import BinaryIO

from limpet.schema.errors import StoreDamagedError

_HEADER = struct.Struct(">8I")  # magic, version, page size, checkpoint, salt 1, salt 2, checksum 1, checksum 2
_FRAME = struct.Struct(">6I")  # page, size of the database after commit or 0, salt 1, salt 2, checksums
_MAGIC = 0x377F0682  # its lowest bit says that checksums read big-endian words
_VERSION = 3007000
_DEFAULT_PAGE_SIZE = 4096


def examine_wal(path: str) -> None:
    """Raise StoreDamagedError if the WAL at `path` proves that acknowledged commits would be lost.

    Only to be called while nobody in this process has the database open. A missing or empty WAL is fine.
    """
    try:
        with open(path, "rb") as file:
            lost = count_lost_commits(file)
    except FileNotFoundError:
        return
    if lost:
        raise StoreDamagedError(
            f"{path}: a frame in the middle is damaged, and at least {lost} acknowledged"
            f" {'commit' if lost == 1 else 'commits'} after it would be lost. Copy the state directory away,"
            " then restore a backup; or move the -wal file away to go on with the older state"
        )


def count_lost_commits(wal: BinaryIO) -> int:
    """Return how many acknowledged commits, at least, lie behind the first frame that SQLite would reject.

    Reads frame by frame: a WAL may be larger than memory.
    """
    header = wal.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return 0
    magic, version, page_size, _, *salts_and_checksum = _HEADER.unpack(header)
    salts = tuple(salts_and_checksum[:2])
    order = ">" if magic & 1 else "<"
    checksum = _checksum(header[:-8], (0, 0), order)
    if magic & ~1 != _MAGIC or version != _VERSION or checksum != tuple(salts_and_checksum[2:]):
        return _count_behind_damaged_header(wal, page_size)
    sound = True
    commits = 0
    for frame in _read_frames(wal, page_size):
        _, commit_size, *rest = _FRAME.unpack_from(frame)
        if sound:
            checksum = _checksum(frame[:8], checksum, order)
            checksum = _checksum(frame[_FRAME.size :], checksum, order)
            sound = tuple(rest) == (*salts, *checksum)
        if not sound and _differ_by_a_bit(rest[:2], salts):
            commits += commit_size != 0
    # The last of them may be a transaction that a power cut tore before anybody was told of it.
    return max(0, commits - 1)


def _differ_by_a_bit(found: list[int], salts: tuple[int, ...]) -> bool:
    """Say whether these are the salts, give or take one flipped bit: another generation's differ in many."""
    return sum((one ^ other).bit_count() for one, other in zip(found, salts, strict=True)) <= 1


def _read_frames(wal: BinaryIO, page_size: int) -> Iterator[bytes]:
    """Yield each frame that is whole."""
    while len(frame := wal.read(_FRAME.size + page_size)) == _FRAME.size + page_size:
        yield frame


def _count_behind_damaged_header(wal: BinaryIO, page_size: int) -> int:
    """Count the commits of the first frame's generation in a WAL whose header is not valid.

    A header is written whole, within one sector, and flushed before its first frame: a crash leaves the old one
    or the new one. So a header that is neither has been damaged since, and the frames behind it were current.
    """
    if page_size not in {512 << power for power in range(8)}:
        page_size = _DEFAULT_PAGE_SIZE  # the field itself is damaged
    salts = b""
    commits = 0
    for frame in _read_frames(wal, page_size):
        salts = salts or frame[8:16]
        if frame[8:16] != salts or not any(salts):
            break
        commits += _FRAME.unpack_from(frame)[1] != 0
    return max(0, commits - 1)


def _checksum(data: bytes, start: tuple[int, int], order: str) -> tuple[int, int]:
    first, second = start
    words = iter(struct.unpack(f"{order}{len(data) // 4}I", data))
    for one, other in zip(words, words, strict=True):
        first += one + second  # of which the higher bits do no harm until the end, and a mask costs time
        second = (second + other + first) & 0xFFFFFFFF
    return first & 0xFFFFFFFF, second
