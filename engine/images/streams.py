"""Bytes on their way in: hashed as they pass, and decompressed piece by piece, never whole in memory."""

import gzip
import zlib
from typing import IO, Protocol, cast

import zstandard

from limpet.engine.images.limits import Budget
from limpet.engine.images.oci import Compression, Descriptor, hasher
from limpet.schema.errors import InvalidInputError

CHUNK_BYTES = 1 << 20

_MAX_ZSTD_WINDOW = 128 << 20
"""What the zstd tool itself accepts without being asked for more memory."""


class ByteStream(Protocol):
    """What can be read from, once."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none at the end."""
        ...


class HashingReader:
    """Passes a stream on, and keeps the count and the hash of what it passed."""

    def __init__(self, stream: ByteStream, digest: str) -> None:
        """Hash with the algorithm of `digest`, which is what is hoped for."""
        self._stream = stream
        self._hash = hasher(digest)
        self._algorithm = digest.partition(":")[0]
        self.size = 0

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none at the end."""
        data = self._stream.read(size)
        self._hash.update(data)
        self.size += len(data)
        return data

    def drain(self) -> None:
        """Read what is left, for the sake of the hash."""
        while self.read(CHUNK_BYTES):
            pass

    @property
    def digest(self) -> str:
        """The digest of what was read so far."""
        return f"{self._algorithm}:{self._hash.hexdigest()}"


def require_match(blob: Descriptor, read: HashingReader) -> None:
    """Raise InvalidInputError unless what was read, to its end, is the blob."""
    if read.size != blob.size:
        raise InvalidInputError(
            f"blob {blob.digest} has {read.size} bytes where it was read, but its image says {blob.size}"
        )
    if read.digest != blob.digest:
        raise InvalidInputError(f"blob {blob.digest} is damaged: its content has the digest {read.digest}")


class Decompressor:
    """A stream decompressed. InvalidInputError where it is damaged or cut off, or exceeds the budget."""

    def __init__(self, stream: ByteStream, compression: Compression, budget: Budget) -> None:
        self._budget = budget
        self._compression = compression
        self._stream = _open(stream, compression)

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none at the end."""
        try:
            data = self._stream.read(size)
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError) as error:
            raise InvalidInputError(f"is no whole {self._compression.value} stream: {error}") from error
        self._budget.take_bytes(len(data))
        return data


def _open(stream: ByteStream, compression: Compression) -> ByteStream:
    if compression is Compression.GZIP:
        # Read from front to back, GzipFile asks for nothing but read().
        return gzip.GzipFile(fileobj=cast(IO[bytes], stream), mode="rb")
    if compression is Compression.ZSTD:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
        return decompressor.stream_reader(cast(IO[bytes], stream), read_across_frames=True, closefd=False)
    return stream


_MAGIC = {b"\x1f\x8b": Compression.GZIP, b"\x28\xb5\x2f\xfd": Compression.ZSTD}


def sniff(beginning: bytes) -> Compression:
    """Tell by its first bytes how a file is compressed."""
    return next((how for magic, how in _MAGIC.items() if beginning.startswith(magic)), Compression.NONE)
