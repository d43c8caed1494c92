"""The -shm file, by which SQLite finds what is in the WAL: each process that uses the database has it mapped.

Whoever touches a mapped page that the file does not have, or that the disk has no room for, is killed by the kernel
(SIGBUS in mmap(2)), and with it the program that limpet is part of. SQLite writes a byte into each page of it, so that
a full disk is told in time. That is not enough where a block of the file system is smaller than a page, nor where
another program cuts the file. So room is looked for before the file is made and taken right after, and the file's
length is looked at before each use. What it holds is made anew from the WAL if it is zeros.
"""

import ctypes
import errno
import fcntl
import os
from contextlib import suppress

from limpet.engine.state.presence import is_there
from limpet.schema.errors import DiskFullError, StoreError
from limpet.schema.telling import get_log

_BYTES = 64 << 10
"""Twice the size by which it grows: room for 8,158 pages in the WAL, of which there are 1,000 at most as a rule."""
_LEAST_BYTES = 32 << 10
"""What SQLite makes of it at once."""
_HEADERS_BYTES = 96
"""Both copies of its header: https://sqlite.org/walformat.html, 2.1."""

_FULL = {errno.ENOSPC, errno.EDQUOT}

_log = get_log("limpet.database")
_sizes: dict[str, int] = {}
"""How long each was at last, by its path: it becomes shorter only while nobody in this process has it open."""
_fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class SharedMemory:
    """That of one database, for whoever uses it in this process."""

    def __init__(self, path: str) -> None:
        """`path` is the database's."""
        self._path = f"{path}-shm"

    def require_room(self) -> None:
        """Raise DiskFullError if a file that SQLite is about to make, or make anew, would find no room."""
        try:
            found = os.statvfs(os.path.dirname(self._path))
            blocks = found.f_bavail if os.geteuid() else found.f_bfree
            taken = os.stat(self._path).st_blocks * 512 if is_there(self._path) else 0
        except (OSError, ValueError):  # as is told when it is opened
            return
        if blocks * found.f_frsize + taken < _LEAST_BYTES:
            raise self._full()

    def take_room(self) -> None:
        """Set room aside for all of it, now that SQLite has it open. Raises DiskFullError."""
        descriptor = self._find_own()
        if descriptor is not None:
            self._allocate(descriptor, _BYTES)

    def require_whole(self) -> None:
        """See to it that it is as long as what is mapped: to be called before SQLite uses it. It takes 3 us.

        Where another program has cut it, SQLite is made to fill it anew. Raises DiskFullError, or StoreError if that
        cannot be.
        """
        try:
            size = os.stat(self._path).st_size  # that its times are asked for matters little: no flush waits for it
        except OSError:  # it has no name any more, or not yet: what is mapped stays, and the next is another file
            _sizes.pop(self._path, None)
            return
        _sizes[self._path] = size if size >= _sizes.get(self._path, 0) else self._mend(size)

    def _mend(self, size: int) -> int:
        """Make it as long again as what is mapped, if that is longer than the file, and return how long it is then."""
        descriptor = self._find_own()
        if descriptor is None:  # nobody had it open just now, and SQLite has begun it anew
            return size
        mapped = _count_mapped(self._path)
        if mapped <= size:
            return size
        _log.warning("%s was cut to %d bytes by another program; its content is made anew", self._path, size)
        try:
            # The headers go first: what is left of it would be believed, and what is in the WAL not be found.
            os.pwrite(descriptor, bytes(_HEADERS_BYTES), 0)
            self._allocate(descriptor, mapped)
            if os.fstat(descriptor).st_size < mapped:
                os.ftruncate(descriptor, mapped)
        except OSError as error:
            if error.errno in _FULL:
                raise self._full() from error
            raise StoreError(f"{self._path} was cut, and cannot be made anew: {error.strerror}") from error
        return mapped

    def _allocate(self, descriptor: int, size: int) -> None:
        """Have blocks for so many bytes, where the file system can do that. Raises DiskFullError."""
        while _fallocate is not None and _fallocate(descriptor, 0, 0, size) != 0:
            code = ctypes.get_errno()
            if code in _FULL:
                raise self._full()
            if code != errno.EINTR:  # as of a file system without this call: SQLite's own writes are to do
                return

    def _find_own(self) -> int | None:
        """Return the descriptor by which SQLite has it open in this process, None if it has not.

        It is not opened here: closing it would drop the locks that SQLite has on it
        (https://sqlite.org/howtocorrupt.html, 2.2).
        """
        name = os.path.basename(self._path)
        try:
            wanted = os.stat(self._path)
            for each in os.listdir("/proc/self/fd"):
                with suppress(OSError):  # closed meanwhile
                    link = f"/proc/self/fd/{each}"
                    is_it = os.path.basename(os.readlink(link)) == name and os.path.samestat(os.stat(link), wanted)
                    if is_it and fcntl.fcntl(int(each), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
                        return int(each)
        except OSError:
            pass
        return None

    def _full(self) -> DiskFullError:
        return DiskFullError(f"{self._path}: the disk has no room for it; free some space, then call again")


def _count_mapped(path: str) -> int:
    """Return how far this process has the file mapped, in bytes; as far as SQLite maps it at once if that is hidden."""
    mapped, name = 0, f"/{os.path.basename(path)}"
    try:
        inode = str(os.stat(path).st_ino)
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            # 7f0c-7f14 rw-s 00000000 fe:00 2146853    /path; as in /proc/locks, the device may not be that of stat(2)
            for line in file:
                addresses, _, offset, _, found, *rest = line.rstrip("\n").split(maxsplit=5)
                if found == inode and rest and rest[0].endswith(name):
                    begin, end = (int(each, 16) for each in addresses.split("-"))
                    mapped = max(mapped, int(offset, 16) + end - begin)
    except (OSError, ValueError):
        return _LEAST_BYTES
    return mapped
