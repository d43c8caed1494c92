"""A database that is read without the lock of its state directory, and left as it is.

A plain reader makes a -wal and a -shm file if there are none, and cannot remove them. So while there is no WAL,
the file is read as it lies, and what was read is believed only if no engine has opened it meanwhile. Beside a WAL,
that of a live engine or of a dead one, SQLite's own way is the right one; it may rebuild the -shm file, which
holds nothing that lasts.
"""

import os
from collections.abc import Callable
from typing import TypeVar

from limpet.engine.database.sqlite.reader import Reader
from limpet.engine.state.presence import is_there
from limpet.schema.errors import LimpetError, StoreError

_Answer = TypeVar("_Answer")
_Fingerprint = tuple[int, ...]


class Source:
    """One node's records, for questions of any kind."""

    def __init__(self, path: str, node: str) -> None:
        self._path = path
        self._node = node
        fingerprint = _read_fingerprint(path)
        self._reader = Reader(path, node) if fingerprint is None else _StillReader(path, node, fingerprint)

    def ask(self, question: Callable[[Reader], _Answer]) -> _Answer:
        """Return the answer to `question`, which may be asked a second time. What it raises passes through."""
        reader = self._reader
        if not isinstance(reader, _StillReader):
            return question(reader)
        try:
            answer = question(reader)
        except LimpetError:
            if reader.is_still():
                raise
        else:
            if reader.is_still():
                return answer
        reader.close()
        self._reader = Reader(self._path, self._node)
        return question(self._reader)

    def close(self) -> None:
        """Close the database."""
        self._reader.close()


class _StillReader(Reader):
    """Reads a file that nobody has open: no locks, no WAL."""

    def __init__(self, path: str, node: str, fingerprint: _Fingerprint) -> None:
        super().__init__(path, node, immutable=True)
        self._fingerprint = fingerprint

    def is_still(self) -> bool:
        """Say whether nobody has opened the file since."""
        return _read_fingerprint(self._path) == self._fingerprint

    def copy_to(self, target_path: str) -> None:
        """Copy the database as `Reader.copy_to` does, or raise StoreError if the copy may be a mixture."""
        super().copy_to(target_path)
        if not self.is_still():
            raise StoreError(f"{self._path}: an engine has opened it meanwhile; run it again")


def _read_fingerprint(path: str) -> _Fingerprint | None:
    """Return what changes with the file; None where it has a WAL, and so more to it. Raises StoreError."""
    try:
        found = os.stat(path)
        if is_there(path + "-wal"):
            return None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{error.filename or path}: {error.strerror}") from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
