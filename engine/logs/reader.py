"""Reads a container's log: the rotated files, oldest first, then the log itself, then what is written to it."""

import errno
import os
import re
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from limpet.engine.logs.entries import Entry, Joiner, parse
from limpet.engine.state.beneath import open_parent_beneath
from limpet.engine.state.descriptors import is_of_handler, to_limpet_error
from limpet.schema.errors import LimpetError, NotFoundError, StateDirectoryError, quote_path

_BLOCK = 1 << 16
_ROTATED = r"\.[0-9]{8}-[0-9]{6}(\.[0-9]{6})?"
_MORE_LINES = 16
"""So many lines before the last ones are read too: where reading begins, parts of a line may be missing."""
_LOOK_SECONDS = 0.1
_NO_FILE = {errno.ELOOP, errno.ENOTDIR, errno.EPERM}
"""What is said of a link, or of what is no file."""
_QUIET_SECONDS = 0.5
"""So long without output, a line that is not finished is shown, and a container that has ended has no more to come."""


class _Wanted(NamedTuple):
    since_ns: int
    stream: str

    def accepts(self, entry: Entry) -> bool:
        """Say whether to show it; what the log does not say leaves nothing out."""
        return (not self.stream or entry.stream in {"", self.stream}) and (
            not entry.time_ns or entry.time_ns >= self.since_ns
        )


def read_log(
    top: str,
    path: str,
    *,
    since_ns: int = 0,
    tail: int | None = None,
    stream: str = "",
    is_over: Callable[[], bool] | None = None,
) -> Iterator[Entry]:
    """Yield what the log at `path` says, oldest first: all, or from `since_ns` on, the last `tail` lines, one stream.

    With `is_over` it is followed until that says that nothing will be written any more. No symbolic link is followed
    between the directory `top` and the log. Raises NotFoundError if there is no log, StateDirectoryError if it cannot
    be read.
    """
    wanted = _Wanted(since_ns, stream)
    try:
        directory, name = open_parent_beneath(top, path)
        try:
            yield from _read(_Files(directory, name), wanted, tail, is_over)
        finally:
            os.close(directory)
    except OSError as error:
        if is_of_handler(error):
            raise
        raise _translate(path, error) from error


def _read(files: "_Files", wanted: _Wanted, tail: int | None, is_over: Callable[[], bool] | None) -> Iterator[Entry]:
    joiner = Joiner()
    is_formatted = False
    held: deque[Entry] | None = None if tail is None else deque(maxlen=min(tail, sys.maxsize))
    start = files.open_first(wanted) if tail is None else files.open_tail(tail + _MORE_LINES, wanted)
    for line in _walk(files, start, is_over):
        if line is None:
            if held is not None:
                held.extend(joiner.flush())  # a line that is not finished is one of the last
                yield from held
                held = None
            yield from joiner.flush()
            continue
        entry, is_whole = parse(line)
        is_formatted = is_formatted or entry.stream != ""
        if not wanted.accepts(entry) or (is_formatted and not line.endswith(b"\n")):  # it is just being written
            continue
        lines = joiner.add(entry, is_whole=is_whole)
        if held is None:
            yield from lines
        else:
            held.extend(lines)


def _walk(files: "_Files", current: "_File", is_over: Callable[[], bool] | None) -> Iterator[bytes | None]:
    """Yield each line of the files from `current` on; None where all is read, and whenever nothing came for a while."""
    idle = 0.0
    has_caught_up = over = False
    try:
        while True:
            for line in current.read():
                idle = 0.0
                yield line
            later = files.open_later(current)
            if later is not None:
                if current.has_more():
                    later.close()
                else:
                    current.close()
                    current = later
            elif has_caught_up and idle < _QUIET_SECONDS:
                time.sleep(_LOOK_SECONDS)
                idle += _LOOK_SECONDS
            else:
                rest = current.rest
                if rest and (is_over is None or over):
                    yield rest
                yield None
                if is_over is None or over:
                    return
                has_caught_up, over, idle = True, is_over(), 0.0
    finally:
        current.close()


class _File:
    """One of the files, read from a position on."""

    def __init__(self, file: int, position: int = 0) -> None:
        self.file = file
        self.position = position
        self._rest: list[bytes] = []

    @property
    def rest(self) -> bytes:
        """What follows the last newline."""
        return b"".join(self._rest)

    def read(self) -> Iterator[bytes]:
        """Yield the lines that are there, with their newlines."""
        if self.seen().st_size < self.position:  # somebody truncated it
            self.position, self._rest = 0, []
        while block := os.pread(self.file, _BLOCK, self.position):
            self.position += len(block)
            self._rest.append(block)  # joined once the line ends: it may be longer than many blocks
            if b"\n" in block:
                *lines, rest = self.rest.split(b"\n")
                self._rest = [rest]
                for line in lines:
                    yield line + b"\n"

    def has_more(self) -> bool:
        """Say whether something was written since it was read."""
        return self.seen().st_size > self.position

    def seen(self) -> os.stat_result:
        """Return its inode, size and times."""
        return os.fstat(self.file)

    def find_tail(self, count: int, wanted: _Wanted) -> int:
        """Move to where the last `count` wanted lines begin; return how many there are, `count` at most."""
        found = 0
        end, later = self.seen().st_size, [b""]
        self.position = end
        while end:
            start = max(end - _BLOCK, 0)
            block = os.pread(self.file, end - start, start)
            end = start
            first = block.find(b"\n") + 1 if start else 0  # what is before it began before the block
            later.append(block)
            if start and not first:
                continue
            whole = b"".join(reversed(later))
            self.position = place = start + len(whole) - len(whole[first:].rpartition(b"\n")[2])
            for line in reversed(whole[first:].split(b"\n")[:-1]):
                entry, is_whole = parse(line + b"\n")
                if found == count and is_whole:
                    return found
                place -= len(line) + 1
                found += is_whole and wanted.accepts(entry)
                self.position = place
            later = [block[:first]]
        return found

    def close(self) -> None:
        """Close it."""
        os.close(self.file)


class _Files:
    """The log `name` in a directory, and its rotated files."""

    def __init__(self, directory: int, name: str) -> None:
        self._directory = directory
        self._name = name

    def open_first(self, wanted: _Wanted) -> _File:
        """Open the oldest file that can hold something wanted."""
        newest = self._open_newest()
        for name in self._list_rotated(before=newest.seen()):
            try:
                file = self._open(name)
            except FileNotFoundError:  # removed just now
                continue
            if file.seen().st_mtime_ns >= wanted.since_ns:
                newest.close()
                return file
            file.close()
        return newest

    def open_tail(self, count: int, wanted: _Wanted) -> _File:
        """Open the file in which the last `count` wanted lines begin, and go there."""
        file = self._open_newest()
        missing = count - file.find_tail(count, wanted)
        for name in reversed(self._list_rotated(before=file.seen())):
            if not missing:
                break
            try:
                older = self._open(name)
            except FileNotFoundError:  # removed just now, as are those before it
                break
            file.close()
            file = older
            missing -= file.find_tail(missing, wanted)
        return file

    def open_later(self, current: _File) -> _File | None:
        """Open the file that came after `current`; None if that is the log itself."""
        seen = current.seen()
        with suppress(FileNotFoundError):  # it is being rotated
            newest = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
            if (newest.st_dev, newest.st_ino) == (seen.st_dev, seen.st_ino):
                return None
        for name in (*self._list_rotated(after=seen), self._name):
            try:
                return self._open(name)
            except FileNotFoundError:
                continue
        return None

    def _open_newest(self) -> _File:
        """Open the log; or what it was, for while it is rotated no file has its name.

        It is opened before the rotated files are listed: one that is rotated in between is missed by nobody.
        """
        with suppress(FileNotFoundError):
            return self._open(self._name)
        for name in reversed(self._list_rotated()):
            with suppress(FileNotFoundError):
                return self._open(name)
        return self._open(self._name)

    def _list_rotated(self, *, before: os.stat_result | None = None, after: os.stat_result | None = None) -> list[str]:
        """Return the names of rotated files, oldest first; those that came before, or after, one of the files."""
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            with os.scandir(directory) as entries:
                pattern = re.compile(re.escape(self._name) + _ROTATED)
                found = []
                for entry in entries:
                    if pattern.fullmatch(entry.name):
                        with suppress(FileNotFoundError):  # removed just now
                            changed = entry.stat(follow_symlinks=False).st_mtime_ns
                            found.append((entry.name, entry.inode(), changed))
        finally:
            os.close(directory)
        found.sort()
        names = [name for name, _, _ in found]
        inodes = [inode for _, inode, _ in found]
        if before is not None:
            return names[: inodes.index(before.st_ino)] if before.st_ino in inodes else names
        if after is None:
            return names
        if after.st_ino in inodes:
            return names[inodes.index(after.st_ino) + 1 :]
        return [name for name, _, changed in found if changed > after.st_mtime_ns]  # it was removed

    def _open(self, name: str) -> _File:
        # O_NONBLOCK: a FIFO in the log's place would keep us waiting.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        file = os.open(name, flags, dir_fd=self._directory)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError(errno.EPERM, "it is not a file")
        return _File(file)


def _translate(path: str, error: OSError) -> LimpetError:
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"log {quote_path(path)} does not exist: none was written yet, or it was removed")
    if error.errno in _NO_FILE:
        return StateDirectoryError(f"log {quote_path(path)}: {error.strerror}; only a file that is no link is read")
    return to_limpet_error(f"log {quote_path(path)}", error)
