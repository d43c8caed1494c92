"""Sparse files in tar: where their pieces are. GNU's four formats all give a list of (offset, length).

Source: the GNU tar manual, "Storing Sparse Files": the header type S of GNU tar, and the PAX records
GNU.sparse.* in versions 0.0, 0.1 and 1.0.
"""

from collections.abc import Callable
from itertools import pairwise

from limpet.engine.images.tar_fields import decimal, number
from limpet.schema.errors import InvalidInputError

MAX_PIECES = 1 << 16
"""The limit for one file."""
MAX_MAP_BLOCKS = 4096

Pieces = list[tuple[int, int]]
ReadBlock = Callable[[], bytes]
"""Returns the archive's next 512 bytes."""


def is_sparse(flag: bytes, pax: dict[bytes, bytes]) -> bool:
    """Return whether a file's header marks it as sparse."""
    return flag == b"S" or any(key.startswith(b"GNU.sparse.") for key in pax)


def sparse_map(block: bytes, pax: dict[bytes, bytes], read_block: ReadBlock) -> tuple[int, Pieces]:
    """Return the file's size, holes included, and its pieces. If the map is in the data, read it from there.

    Raises InvalidInputError if the map is invalid or does not fit the file.
    """
    if block[156:157] == b"S":
        size, pieces = number(block[483:495], "real size"), _header_map(block, read_block)
    else:
        size = decimal(pax.get(b"GNU.sparse.realsize") or pax.get(b"GNU.sparse.size", b""), "real size")
        if pax.get(b"GNU.sparse.major") == b"1":
            pieces = _pairs(_data_map(read_block))
        else:
            pieces = _pairs([decimal(text, "map") for text in _split(pax.get(b"GNU.sparse.map", b""))])
    _require_fit(size, pieces)
    return size, pieces


def _header_map(block: bytes, read_block: ReadBlock) -> Pieces:
    pieces = _entries(block, 386, 4)
    more = block[482] != 0
    while more and len(pieces) < MAX_PIECES:
        extension = read_block()
        pieces += _entries(extension, 0, 21)
        more = extension[504] != 0
    return pieces


def _entries(block: bytes, start: int, count: int) -> Pieces:
    fields = [block[start + 24 * i : start + 24 * i + 24] for i in range(count)]
    return [(number(f[:12], "sparse offset"), number(f[12:], "sparse length")) for f in fields if f[0]]


def _data_map(read_block: ReadBlock) -> list[int]:
    """Read the map of format 1.0: decimal lines in whole blocks, a count followed by that many pairs."""
    data = read_block()
    count = decimal(data.partition(b"\n")[0], "sparse map")
    if not 0 <= count <= MAX_PIECES:
        raise InvalidInputError(f"a sparse file of {count} pieces; limpet reads at most {MAX_PIECES}")
    blocks = [data]
    lines = data.count(b"\n")
    while lines < 1 + 2 * count and len(blocks) < MAX_MAP_BLOCKS:
        blocks.append(read_block())
        lines += blocks[-1].count(b"\n")
    return [decimal(line, "sparse map") for line in b"".join(blocks).split(b"\n")[1 : 1 + 2 * count]]


def _split(text: bytes) -> list[bytes]:
    return text.split(b",") if text else []


def _pairs(numbers: list[int]) -> Pieces:
    if len(numbers) % 2:
        raise InvalidInputError("a sparse map whose last offset has no length")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _require_fit(size: int, pieces: Pieces) -> None:
    if len(pieces) > MAX_PIECES:
        raise InvalidInputError(f"a sparse file of {len(pieces)} pieces; limpet reads at most {MAX_PIECES}")
    marks = [0, *(mark for offset, length in pieces for mark in (offset, offset + length)), size]
    if any(earlier > later for earlier, later in pairwise(marks)):
        raise InvalidInputError(f"a sparse file of {size} bytes whose pieces overlap or lie outside the file")
