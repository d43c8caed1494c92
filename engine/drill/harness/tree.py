"""Fast creating, copying and emptying of directory trees: a crash test does it tens of thousands of times a minute."""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from typing import Final

from limpet.testing.disk import Image

_SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108 - its files are in a private directory
_ENOUGH_BYTES: Final = 256 * 1024 * 1024
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """Create a private directory, in memory if there is room, and remove it in the end."""
    directory = tempfile.mkdtemp(prefix="limpet-testing-", dir=_roomiest())
    try:
        yield directory
    finally:
        shutil.rmtree(directory, onerror=_make_removable)


def materialise(image: Image, directory: str) -> None:
    """Make `directory`, which is emptied first, the image's tree."""
    empty(directory)
    closed: list[tuple[str, int]] = []
    mask = os.umask(0)
    try:
        for path, mode, content, same_as in image:
            target = f"{directory}/{path}"
            if same_as:
                os.link(f"{directory}/{same_as}", target)
            elif content is None:
                os.mkdir(target, mode | stat.S_IRWXU)
                if mode & stat.S_IRWXU != stat.S_IRWXU:
                    closed.append((target, mode))
            elif isinstance(content, str):
                os.symlink(content, target)
            else:
                _write(target, mode, content)
    finally:
        os.umask(mask)
    for target, mode in reversed(closed):
        os.chmod(target, mode)


def copy(source: str, directory: str) -> None:
    """Make the new `directory` a copy of `source`: files, modes and links. Sockets and pipes are left out."""
    os.mkdir(directory, 0o700)
    mask = os.umask(0)
    try:
        _copy_into(source, directory, {})
    finally:
        os.umask(mask)


def _copy_into(source: str, directory: str, linked: dict[int, str]) -> None:
    """Copy the entries of `source`. `linked` has the copies of files with more than one name, by inode."""
    with os.scandir(source) as entries:
        for entry in entries:
            target = f"{directory}/{entry.name}"
            if entry.is_symlink():
                os.symlink(os.readlink(entry.path), target)
                continue
            status = entry.stat(follow_symlinks=False)
            mode = stat.S_IMODE(status.st_mode)
            if stat.S_ISDIR(status.st_mode):
                os.mkdir(target, stat.S_IRWXU)
                _copy_into(entry.path, target, linked)
                os.chmod(target, mode)
            elif status.st_ino in linked:
                os.link(linked[status.st_ino], target)
            elif stat.S_ISREG(status.st_mode):
                if status.st_nlink > 1:
                    linked[status.st_ino] = target
                _write(target, mode, _read(entry.path, status.st_size))


def _read(path: str, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(descriptor, size)
        while len(data) < size and (more := os.read(descriptor, size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def _write(path: str, mode: int, content: bytes) -> None:
    descriptor = os.open(path, _NEW, mode)
    try:
        written = os.write(descriptor, content) if content else 0
        while written < len(content):
            written += os.write(descriptor, content[written:])
    finally:
        os.close(descriptor)


def empty(directory: str) -> None:
    """Make `directory` exist and be empty."""
    try:
        with os.scandir(directory) as entries:
            found = list(entries)
    except FileNotFoundError:
        os.mkdir(directory, 0o700)
        return
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, onerror=_make_removable)
        else:
            os.unlink(entry.path)


def _make_removable(_function: object, path: str, _: object) -> None:
    """Remove what an ordinary user cannot remove yet, because its directory is read-only."""
    os.chmod(os.path.dirname(path), stat.S_IRWXU)
    if os.path.islink(path) or not os.path.isdir(path):
        os.unlink(path)
        return
    os.chmod(path, stat.S_IRWXU)
    shutil.rmtree(path)


def _roomiest() -> str | None:
    with contextlib.suppress(OSError):
        if os.access(_SHARED_MEMORY, os.W_OK | os.X_OK):
            room = os.statvfs(_SHARED_MEMORY)
            if room.f_bavail * room.f_frsize >= _ENOUGH_BYTES:
                return _SHARED_MEMORY
    return None
