"""Examine a SQLite write-ahead log before SQLite opens it.

SQLite stops at the first frame whose checksum fails and silently forgets all that follow, also transactions
that were acknowledged. Under `synchronous=FULL` with one writer at most one transaction, the last, can
legally be torn: it was not acknowledged yet. So more than one commit after the first bad frame is proof of
damage. The format is that of https://sqlite.org/fileformat2.html#the_write_ahead_log.
"""

import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from limpet.engine.state.descriptors import system_errors_told
from limpet.schema.errors import StoreDamagedError

_HEADER = struct.Struct(">8I")  # magic, version, page size, checkpoint, salt 1, salt 2, checksum 1, checksum 2
_FRAME = struct.Struct(">6I")  # page, size of the database after commit or 0, salt 1, salt 2, checksums
_MAGIC = 0x377F0682  # its lowest bit says that checksums read big-endian words
_VERSION = 3007000
_DEFAULT_PAGE_SIZE = 4096
_PAGE_SIZES = frozenset(512 << power for power in range(8))


class Tail(NamedTuple):
    """What lies behind the last commit of a WAL that SQLite accepts, and is of the same generation."""

    commits: int
    """How many commits, at least: the last may be one that a power cut tore before anybody was told of it."""
    is_torn: bool
    """True if there is anything. The WAL must be begun anew before the next commit: one that is torn over the remains
    of another may look like two of them, and so like damage."""


def examine_wal(path: str) -> Tail:
    """Look at the WAL at `path`, and return its tail. A missing or empty one is fine.

    Raises StoreDamagedError if it proves that acknowledged commits would be lost, StateDirectoryError or ResourcesError
    if it cannot be read now. Only to be called while nobody in this process has the database open.
    """
    with system_errors_told("what was written last cannot be read"):
        try:
            with open(path, "rb") as file:
                tail = find_tail(file)
        except FileNotFoundError:
            return Tail(0, is_torn=False)
    lost = tail.commits - 1
    if lost > 0:
        raise StoreDamagedError(
            f"{path}: a frame in the middle is damaged, and at least {lost} acknowledged"
            f" {'commit' if lost == 1 else 'commits'} after it would be lost. Copy the state directory away,"
            " then restore a backup; or move the -wal file away to go on with the older state"
        )
    return tail


def find_tail(wal: BinaryIO) -> Tail:
    """Return what lies behind the last commit that SQLite accepts. Frame by frame: a WAL may be larger than memory."""
    header = wal.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return Tail(0, is_torn=False)
    magic, version, page_size, _, *salts_and_checksum = _HEADER.unpack(header)
    salts = tuple(salts_and_checksum[:2])
    order = ">" if magic & 1 else "<"
    checksum = _checksum(header[:-8], (0, 0), order)
    is_format_known = magic & ~1 == _MAGIC and version == _VERSION and page_size in _PAGE_SIZES
    if not is_format_known or checksum != tuple(salts_and_checksum[2:]):
        commits = _count_behind_damaged_header(wal, page_size)
        return Tail(commits, is_torn=bool(commits))
    sound = True
    commits = 0
    is_torn = False
    for frame in _read_frames(wal, page_size):
        if len(frame) < _FRAME.size:
            return Tail(commits, is_torn=True)  # of what generation it is cannot be said
        _, commit_size, *rest = _FRAME.unpack_from(frame)
        is_whole = len(frame) == _FRAME.size + page_size
        if sound and is_whole:
            checksum = _checksum(frame[:8], checksum, order)
            checksum = _checksum(frame[_FRAME.size :], checksum, order)
        sound = sound and is_whole and tuple(rest) == (*salts, *checksum)
        if sound:
            is_torn = commit_size == 0
        elif _differ_by_a_bit(rest[:2], salts):
            is_torn = True
            commits += is_whole and commit_size != 0
    return Tail(commits, is_torn)


def _differ_by_a_bit(found: list[int], salts: tuple[int, ...]) -> bool:
    """Say whether these are the salts, give or take one flipped bit: another generation's differ in many."""
    return sum((one ^ other).bit_count() for one, other in zip(found, salts, strict=True)) <= 1


def _read_frames(wal: BinaryIO, page_size: int) -> Iterator[bytes]:
    """Yield each frame; the last may not be whole."""
    while frame := wal.read(_FRAME.size + page_size):
        yield frame


def _count_behind_damaged_header(wal: BinaryIO, page_size: int) -> int:
    """Count the commits of the first frame's generation in a WAL whose header is not valid.

    A header is written whole, within one sector, and flushed before its first frame: a crash leaves the old one
    or the new one. So a header that is neither has been damaged since, and the frames behind it were current.
    """
    if page_size not in _PAGE_SIZES:
        page_size = _DEFAULT_PAGE_SIZE  # the field itself is damaged
    salts = b""
    commits = 0
    for frame in _read_frames(wal, page_size):
        if len(frame) < _FRAME.size + page_size:
            break
        salts = salts or frame[8:16]
        if frame[8:16] != salts or not any(salts):
            break
        commits += _FRAME.unpack_from(frame)[1] != 0
    return commits


def _checksum(data: bytes, start: tuple[int, int], order: str) -> tuple[int, int]:
    first, second = start
    words = iter(struct.unpack(f"{order}{len(data) // 4}I", data))
    for one, other in zip(words, words, strict=True):
        first += one + second  # of which the higher bits do no harm until the end, and a mask costs time
        second = (second + other + first) & 0xFFFFFFFF
    return first & 0xFFFFFFFF, second
