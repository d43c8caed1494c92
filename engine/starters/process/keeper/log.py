"""One container's log file: appended to, rotated, and never followed to another file.

A note (`ID.at` beside the FIFOs) says which file the log is and up to which size the output in it was also taken out
of its FIFO. What follows in the file was written by a copier that was killed before it could say so:

| killed after | the log ends with | the FIFO begins with |
| --- | --- | --- |
| a part of the write | some of the output, torn | all of it |
| the write | the output | the output |
| taking it out of the FIFO | the output | what came next |
| the note | nothing that is not noted | what came next |

So `open` cuts off the torn end and returns the whole lines after the note; the copier takes them out of the FIFO if
that begins with them. Only lines that are all alike could be confused with those that came next.
"""

import errno
import fcntl
import os
import re
import stat
import struct
import time
from collections.abc import Sequence
from contextlib import suppress

_NOTE = struct.Struct("=QQQ")  # device, inode, size
_LONGEST_WRITE = 1 << 22
"""More than any write: 64 KiB of newlines, each with its time and stream."""
_ROTATED = r"(\.[0-9]{8}-[0-9]{6})(?:\.([0-9]{6}))?"


class Log:
    """The log `name` in the directory. Not open until `open` is called; takes over both descriptors."""

    def __init__(self, directory: int, note: int, name: str, max_bytes: int, max_files: int) -> None:
        self._directory = directory
        self._name = name
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._note = note
        self._is_ours = False
        self._file = -1
        self._known = (0, 0, 0)
        self._rotate_at = max_bytes

    @property
    def is_open(self) -> bool:
        """Whether it can be written to."""
        return self._file >= 0

    def open(self) -> bytes:
        """Open the log, or make it; return the whole lines in it that are not noted. `note` must follow.

        Raises OSError, also for a symbolic link, FIFO, device or file with several names in its place, which is neither
        followed nor waited for; and while another copier, which was not killed yet, still has this log.
        """
        self.close()
        if not self._is_ours:
            fcntl.flock(self._note, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._is_ours = True
        known = os.pread(self._note, _NOTE.size, 0)
        device, inode, size = self._known = _NOTE.unpack(known) if len(known) == _NOTE.size else (0, 0, 0)
        file = _open_regular(self._directory, self._name, os.O_CREAT)
        try:
            found = os.fstat(file)
            if (found.st_dev, found.st_ino) == (device, inode):
                lines = _cut_torn_end(file, size)
            else:
                _end_last_line(file)
                lines = self._read_moved(inode) if inode else b""
        except BaseException:
            os.close(file)
            raise
        self._file = file
        self._rotate_at = self._max_bytes
        return lines

    def append(self, pieces: Sequence[bytes]) -> None:
        """Write lines. Raises OSError; then the log has to be opened again, which cuts off what was torn."""
        found = os.fstat(self._file)
        if found.st_size != self._known[2]:  # somebody else truncated it, or wrote to it
            self.note()
        length = sum(map(len, pieces))
        if os.writev(self._file, pieces) != length:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def note(self) -> None:
        """Note that all of the log is out of the FIFOs. Raises OSError."""
        found = os.fstat(self._file)
        known = (found.st_dev, found.st_ino, found.st_size)
        os.pwrite(self._note, _NOTE.pack(*known), 0)
        self._known = known

    def is_full(self) -> bool:
        """Return whether it has grown to where it is rotated."""
        return self._max_bytes > 0 and self._rotate_at <= self._known[2]

    def rotate(self) -> None:
        """Give the file a name with the time, as the kubelet does, begin a new one, and remove the oldest.

        Raises OSError; if the file could not be renamed, it goes on, and is rotated after another `max_bytes`.
        """
        self._rotate_at = self._known[2] + self._max_bytes
        older = self._list_rotated()
        if self._has_its_name():
            name = _choose_name(self._name, time.time(), older[-1] if older else "")
            os.rename(self._name, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            older.append(name)
        self.open()
        self.note()
        for name in older[: max(len(older) - self._max_files + 1, 0)]:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._directory)

    def close(self) -> None:
        """Close the file; `open` opens what has the log's name by then."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def end(self) -> None:
        """Close all. The note is the keeper's to remove: a copier that it does not wait for can leave none."""
        self.close()
        os.close(self._note)
        os.close(self._directory)

    def _has_its_name(self) -> bool:
        try:
            found = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == self._known[:2]

    def _list_rotated(self) -> list[str]:
        pattern = re.compile(re.escape(self._name) + _ROTATED)
        return sorted(name for name, _ in self._list() if pattern.fullmatch(name))

    def _read_moved(self, inode: int) -> bytes:
        """Return what is not noted in the file that was the log, if it was given another name here."""
        for name, number in self._list():
            if number == inode:
                try:
                    file = _open_regular(self._directory, name)
                except OSError:
                    return b""
                try:
                    found = os.fstat(file)
                    if (found.st_dev, found.st_ino) == self._known[:2]:
                        return _cut_torn_end(file, self._known[2])
                finally:
                    os.close(file)
        return b""

    def _list(self) -> list[tuple[str, int]]:
        """Return the names in the directory, and their inodes.

        The directory is opened anew: whoever holds our descriptor's copies shares its position, and a copier that is
        killed amid a list leaves that in the middle.
        """
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            with os.scandir(directory) as entries:
                return [(entry.name, entry.inode()) for entry in entries]
        finally:
            os.close(directory)


def _open_regular(directory: int, name: str, flags: int = 0) -> int:
    """Open a regular file with only one name. Raises OSError."""
    flags |= os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    file = os.open(name, flags, 0o600, dir_fd=directory)
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(file)
        raise OSError(errno.EPERM, "it is not a file with one name")
    return file


def _cut_torn_end(file: int, noted: int) -> bytes:
    """Return the whole lines after the noted size, and cut off the rest."""
    size = os.fstat(file).st_size
    if not noted < size <= noted + _LONGEST_WRITE:
        return b""
    lines = os.pread(file, size - noted, noted)
    lines = lines[: lines.rfind(b"\n") + 1]
    if noted + len(lines) < size:
        os.ftruncate(file, noted + len(lines))
    return lines


def _end_last_line(file: int) -> None:
    """Write a newline if the file, of which nothing is known, ends within a line."""
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")


def _choose_name(name: str, now: float, newest: str) -> str:
    """Return a name for the rotated log that sorts after `newest`, also within a second, or with the clock set back."""
    chosen = f"{name}.{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}"
    if chosen > newest:
        return chosen
    found = re.fullmatch(re.escape(name) + _ROTATED, newest)
    assert found is not None
    return f"{name}{found[1]}.{int(found[2] or 0) + 1:06d}"
