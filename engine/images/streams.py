"""Input streams: hashed while they are read, and decompressed piece by piece, never held in memory as a whole."""

import gzip
import zlib
from typing import IO, Protocol, cast

import zstandard

from limpet.engine.images.limits import Budget
from limpet.engine.images.oci import Compression, Descriptor, hasher
from limpet.schema.errors import InvalidInputError

CHUNK_BYTES = 1 << 20

_MAX_ZSTD_WINDOW = 128 << 20
"""The zstd tool's own default limit."""


class ByteStream(Protocol):
    """A source that can be read once."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; b"" at the end."""
        ...


class HashingReader:
    """Passes a stream through, counting and hashing what was read."""

    def __init__(self, stream: ByteStream, digest: str) -> None:
        """Hash with the algorithm of `digest`, the expected digest."""
        self._stream = stream
        self._hash = hasher(digest)
        self._algorithm = digest.partition(":")[0]
        self.size = 0

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; b"" at the end."""
        data = self._stream.read(size)
        self._hash.update(data)
        self.size += len(data)
        return data

    def drain(self) -> None:
        """Read the rest, to complete the hash."""
        while self.read(CHUNK_BYTES):
            pass

    @property
    def digest(self) -> str:
        """The digest of the data read so far."""
        return f"{self._algorithm}:{self._hash.hexdigest()}"


def require_match(blob: Descriptor, read: HashingReader) -> None:
    """Check a stream that was read to its end. Raises InvalidInputError unless its size and digest are the blob's."""
    if read.size != blob.size:
        raise InvalidInputError(f"blob {blob.digest} has {read.size} bytes, but its image says {blob.size}")
    if read.digest != blob.digest:
        raise InvalidInputError(f"blob {blob.digest} is damaged: its content has the digest {read.digest}")


class Decompressor:
    """A decompressed stream. Raises InvalidInputError if it is damaged or truncated, or exceeds the budget."""

    def __init__(self, stream: ByteStream, compression: Compression, budget: Budget) -> None:
        self._budget = budget
        self._compression = compression
        self._stream = _open(stream, compression)

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; b"" at the end."""
        try:
            data = self._stream.read(size)
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError) as error:
            raise InvalidInputError(f"is damaged or truncated ({self._compression.value}): {error}") from error
        self._budget.take_bytes(len(data))
        return data


def _open(stream: ByteStream, compression: Compression) -> ByteStream:
    if compression is Compression.GZIP:
        # When read sequentially, GzipFile calls only read().
        return gzip.GzipFile(fileobj=cast(IO[bytes], stream), mode="rb")
    if compression is Compression.ZSTD:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
        return decompressor.stream_reader(cast(IO[bytes], stream), read_across_frames=True, closefd=False)
    return stream


_MAGIC = {b"\x1f\x8b": Compression.GZIP, b"\x28\xb5\x2f\xfd": Compression.ZSTD}

_UNREAD = {b"\xfd7zXZ\0": "xz", b"BZh91AY&SY": "bzip2", b"PK\3\4": "zip", b"\4\x22\x4d\x18": "lz4"}
"""What others are compressed with. "BZh" alone may begin the name of a tar file's first member."""

SNIFFED_BYTES = 10
"""What `sniff` needs of a file's beginning."""

_SKIPPED = frozenset(bytes((first,)) for first in range(0x50, 0x60))


def sniff(beginning: bytes) -> Compression:
    """Return how a file is compressed, judging by its first bytes.

    Raises InvalidInputError if it is by something that limpet does not read.
    """
    for magic, what in _UNREAD.items():
        if beginning.startswith(magic):
            raise InvalidInputError(f"is compressed with {what}, which limpet does not read; use gzip or zstd")
    if beginning[:1] in _SKIPPED and beginning[1:4] == b"\x2a\x4d\x18":  # zstd, too: RFC 8878, 3.1.2
        return Compression.ZSTD
    return next((how for magic, how in _MAGIC.items() if beginning.startswith(magic)), Compression.NONE)
