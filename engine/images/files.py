"""The files of an image layout, read from a directory or a tar archive."""

import os
import stat
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import BinaryIO, NamedTuple, Protocol

from limpet.engine.images.layer import clean_path
from limpet.engine.images.limits import Budget
from limpet.engine.images.oci import Compression
from limpet.engine.images.streams import CHUNK_BYTES, SNIFFED_BYTES, ByteStream, Decompressor, sniff
from limpet.engine.images.tar import Kind, read_tar
from limpet.schema.errors import InvalidInputError
from limpet.schema.layout import TEMPORARY_PREFIX

_CURE = "give an OCI image layout, a directory or a tar archive (plain, gzip or zstd)"


class Files(Protocol):
    """The source of a layout's files."""

    def find(self, name: str) -> Hashable | None:
        """Return where the file `name`, relative to the layout, is; None if there is no such file.

        Two names of one file, such as a link and what it leads to, are at the same place.
        """
        ...

    def open(self, name: str) -> AbstractContextManager[ByteStream]:
        """Open a file for reading. Raises InvalidInputError if there is no such file."""
        ...


@contextmanager
def open_files(path: str, scratch: str) -> Iterator[Files]:
    """Open the layout at `path`: a directory, or an archive, which is decompressed into `scratch` if compressed.

    The decompressed file has no name and disappears with this process. Raises InvalidInputError.
    """
    try:
        # O_NONBLOCK: opening a named pipe would otherwise wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInputError(f"cannot be opened: {getattr(error, 'strerror', None) or error}; {_CURE}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if not stat.S_ISDIR(mode):
            raise InvalidInputError(f"neither a directory nor a file; {_CURE}")
        yield _Directory(os.fsdecode(path))
        return
    budget = Budget()
    with os.fdopen(descriptor, "rb") as file:
        compression = sniff(file.read(SNIFFED_BYTES))
        file.seek(0)
        if compression is Compression.NONE:
            yield _read_archive(file, budget)
            return
        with tempfile.TemporaryFile(dir=scratch, prefix=TEMPORARY_PREFIX) as spool:
            stream = Decompressor(file, compression, budget)
            while chunk := stream.read(CHUNK_BYTES):
                spool.write(chunk)
            yield _read_archive(spool, budget)


def _read_archive(file: BinaryIO, budget: Budget) -> "_Archive":
    try:
        return _Archive(file, budget)
    except InvalidInputError as error:
        raise InvalidInputError(f"{error}; {_CURE}") from error


class _Directory:
    """A layout in a directory."""

    def __init__(self, path: str) -> None:
        self._path = path

    def find(self, name: str) -> Hashable | None:
        try:
            status = os.stat(self._where(name))
        except OSError:
            return None
        return status.st_dev, status.st_ino

    @contextmanager
    def open(self, name: str) -> Iterator[ByteStream]:
        try:
            descriptor = os.open(self._where(name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise InvalidInputError(f"{name} cannot be opened: {error.strerror}") from error
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InvalidInputError(f"{name} is not a file")
            yield file

    def _where(self, name: str) -> str:
        return os.path.join(self._path, _clean(name))


def _clean(name: str) -> str:
    """Return a name that a document gives a file as its path in the layout. Raises InvalidInputError."""
    return os.fsdecode(clean_path(os.fsencode(name)))


class _Place(NamedTuple):
    """The position of a file's content in an archive."""

    position: int
    size: int


class _Archive:
    """A layout in an uncompressed tar file."""

    def __init__(self, file: BinaryIO, budget: Budget) -> None:
        self._file = file
        self._places: dict[str, _Place | str] = {}
        file.seek(0)
        for member, _ in read_tar(file, budget):
            name = clean_path(member.name)
            budget.take_name(name)
            if member.kind is Kind.FILE and member.pieces == [(0, member.size)]:
                self._places[os.fsdecode(name)] = _Place(member.position, member.size)
            elif member.kind is Kind.SYMLINK:  # docker save stores a repeated layer as a link
                target = os.path.join(os.path.dirname(name), member.link)
                self._places[os.fsdecode(name)] = os.path.normpath(os.fsdecode(target))
            elif member.kind is Kind.HARD_LINK:  # tar's form of a file that it has already, as from a deduplicated disk
                place = self._find(os.fsdecode(clean_path(member.link)))
                if place is not None:
                    self._places[os.fsdecode(name)] = place

    def find(self, name: str) -> Hashable | None:
        return self._find(_clean(name))

    @contextmanager
    def open(self, name: str) -> Iterator[ByteStream]:
        place = self._find(_clean(name))
        if place is None:
            raise InvalidInputError(f"{name} is not in the archive")
        yield _Slice(self._file, place)

    def _find(self, name: str) -> _Place | None:
        place = self._places.get(name)
        if isinstance(place, str):
            place = self._places.get(place)
        return place if isinstance(place, _Place) else None


class _Slice:
    """A part of a file."""

    def __init__(self, file: BinaryIO, place: _Place) -> None:
        self._file = file
        self._left = place.size
        file.seek(place.position)

    def read(self, size: int, /) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data
