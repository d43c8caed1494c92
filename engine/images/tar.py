"""Reads a tar file as a stream: ustar, PAX and GNU headers, in bounded memory, without trusting its content.

The standard library's reader treats a damaged header in the middle as the end of the archive, and reads an
extended header of any size into memory. Neither is acceptable for an untrusted layer. Sources: POSIX.1-2017
(pax), and the GNU tar manual, "Basic Tar Format".
"""

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from limpet.engine.images.limits import Budget
from limpet.engine.images.sparse import Pieces, is_sparse, sparse_map
from limpet.engine.images.streams import ByteStream
from limpet.engine.images.tar_fields import (
    clamp_time,
    decimal,
    number,
    pax_records,
    require_checksum,
    show,
    time_ns,
    until_nul,
)
from limpet.schema.errors import InvalidInputError

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20
"""The limit for one extended header (PAX records, a long name): what Go's archive/tar accepts."""

_CHUNK = 1 << 20
_XATTR = b"SCHILY.xattr."
_MAX_OWNER = (1 << 32) - 2
"""The kernel reads the next higher number as "leave it unchanged"."""


class Kind(Enum):
    """The type of a member."""

    FILE = "file"
    HARD_LINK = "hard link"
    SYMLINK = "symbolic link"
    CHARACTER_DEVICE = "character device"
    BLOCK_DEVICE = "block device"
    DIRECTORY = "directory"
    FIFO = "fifo"


_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"S": Kind.FILE,
    b"1": Kind.HARD_LINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER_DEVICE,
    b"4": Kind.BLOCK_DEVICE,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}


class Attributes(NamedTuple):
    """A file's attributes besides its name and content."""

    mode: int
    """The twelve permission bits."""
    uid: int
    gid: int
    mtime_ns: int | None
    """Nanoseconds since the epoch; None for the time of creation."""
    xattrs: dict[bytes, bytes]


class Member(NamedTuple):
    """One entry of a tar file."""

    name: bytes
    kind: Kind
    attributes: Attributes
    link: bytes
    """The target of a hard link or symbolic link, as written."""
    size: int
    """The file's size as read, holes included; 0 if it is not a file."""
    pieces: Pieces
    """(offset in the file, length) of each piece in the archive, in this order."""
    position: int
    """The position of the first piece in the archive."""
    device: tuple[int, int] = (0, 0)
    """A device node's major and minor number."""


Chunks = Iterator[tuple[int, bytes]]
"""Offsets in a file, each with the data there; between them are holes."""


def read_tar(stream: ByteStream, budget: Budget) -> Iterator[tuple[Member, Chunks]]:
    """Yield each member with its data, which must be read before the next member is requested, or not at all.

    Raises InvalidInputError if the stream is not a well-formed tar file, or exceeds the budget. Ends at the end
    marker, or if the stream ends after a complete member; the rest is not read.
    """
    source = _Source(stream)
    while (header := _read_headers(source, budget)) is not None:
        member, end = _make_member(source, *header)
        budget.take_bytes(member.size - sum(length for _, length in member.pieces))
        yield member, _read_pieces(source, member.pieces)
        source.skip(end - source.position)


class _Source:
    """The stream with its position; a read is complete or fails."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self.position = 0

    def read(self, size: int) -> bytes:
        """Return `size` bytes, fewer only at the end."""
        data = b""
        while len(data) < size and (part := self._stream.read(size - len(data))):
            data += part
        self.position += len(data)
        return data

    def read_whole(self, size: int) -> bytes:
        data = self.read(size)
        if len(data) < size:
            raise InvalidInputError(f"the tar file ends after {self.position} bytes, in the middle of a member")
        return data

    def skip(self, size: int) -> None:
        while size:
            size -= len(self.read_whole(min(size, _CHUNK)))


def _read_headers(source: _Source, budget: Budget) -> tuple[bytes, dict[bytes, bytes]] | None:
    """Read up to the next member's own header; return it with the extensions before it, None at the end."""
    extensions: dict[bytes, bytes] = {}
    while (block := source.read(BLOCK)).strip(b"\0"):
        if len(block) < BLOCK:
            raise InvalidInputError(f"the tar file ends after {source.position} bytes, in the middle of a header")
        budget.take_member()
        require_checksum(block)
        flag = block[156:157]
        if flag not in {b"x", b"g", b"L", b"K"}:
            return block, extensions
        size = number(block[124:136], "size")
        if not 0 <= size <= MAX_EXTENSION_BYTES:
            raise InvalidInputError(f"an extended header of {size} bytes; limpet reads at most {MAX_EXTENSION_BYTES}")
        if flag in extensions:
            raise InvalidInputError(f"two extended headers of type {flag.decode()} for one member")
        data = source.read_whole(size)
        source.skip(-size % BLOCK)
        if flag != b"g":  # global records describe no file; container tools skip them too
            extensions[flag] = data
    if extensions:
        raise InvalidInputError("an extended header without a member")
    if block and source.read(BLOCK).strip(b"\0"):
        raise InvalidInputError(f"the tar file goes on after one block of zeros, at {source.position} bytes")
    return None


def _make_member(source: _Source, block: bytes, extensions: dict[bytes, bytes]) -> tuple[Member, int]:
    """Build a member; return it with the position of the next header."""
    pax = pax_records(extensions.get(b"x", b""))
    name = pax.get(b"GNU.sparse.name") or pax.get(b"path") or until_nul(extensions.get(b"L", b"")) or _name(block)
    link = pax.get(b"linkpath") or until_nul(extensions.get(b"K", b"")) or until_nul(block[157:257])
    flag = block[156:157]
    kind = _KINDS.get(flag)
    if kind is None:
        raise InvalidInputError(f"member {show(name)}: unknown member type {flag!r}")
    if flag == b"\0" and name.endswith(b"/"):
        kind = Kind.DIRECTORY  # tar's form of a directory before ustar
    attributes = _attributes(block, pax)
    if kind is not Kind.FILE:
        device = (0, 0)
        if kind in {Kind.CHARACTER_DEVICE, Kind.BLOCK_DEVICE}:
            device = number(block[329:337], "device number"), number(block[337:345], "device number")
        return Member(name, kind, attributes, link, 0, [], source.position, device), source.position
    stored = decimal(pax[b"size"], "size") if b"size" in pax else number(block[124:136], "size")
    if stored < 0:
        raise InvalidInputError(f"member {show(name)}: invalid size {stored}")
    size, pieces, start = stored, [(0, stored)], source.position
    if is_sparse(flag, pax):
        size, pieces = sparse_map(block, pax, lambda: source.read_whole(BLOCK))
        if flag == b"S":  # its map precedes the data; with a PAX header it is part of the data
            start = source.position
        if sum(length for _, length in pieces) != start + stored - source.position:
            raise InvalidInputError(f"member {show(name)}: a sparse map that does not match its {stored} bytes")
    end = start + stored + -stored % BLOCK
    return Member(name, kind, attributes, link, size, pieces, source.position), end


def _name(block: bytes) -> bytes:
    name, prefix = until_nul(block[:100]), until_nul(block[345:500])
    # Only POSIX has a prefix here: GNU ("ustar" and two spaces) stores other fields.
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _attributes(block: bytes, pax: dict[bytes, bytes]) -> Attributes:
    mtime = time_ns(pax[b"mtime"]) if b"mtime" in pax else number(block[136:148], "mtime") * 10**9
    owner = [
        decimal(pax[b"uid"], "uid") if b"uid" in pax else number(block[108:116], "uid"),
        decimal(pax[b"gid"], "gid") if b"gid" in pax else number(block[116:124], "gid"),
    ]
    if not all(0 <= each <= _MAX_OWNER for each in owner):
        raise InvalidInputError(f"a tar header with owner {owner}; uid and gid must be from 0 to {_MAX_OWNER}")
    return Attributes(
        mode=number(block[100:108], "mode") & 0o7777,
        uid=owner[0],
        gid=owner[1],
        mtime_ns=clamp_time(mtime),
        xattrs={key.removeprefix(_XATTR): value for key, value in pax.items() if key.startswith(_XATTR)},
    )


def _read_pieces(source: _Source, pieces: Pieces) -> Chunks:
    for offset, length in pieces:
        done = 0
        while done < length:
            chunk = source.read_whole(min(length - done, _CHUNK))
            yield offset + done, chunk
            done += len(chunk)
