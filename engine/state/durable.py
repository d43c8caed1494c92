"""Files and directories that survive a power cut: each change with the fsync calls that the kernel requires.

A new name is durable only after an fsync of its directory (fsync(2)), and a file's content only after an fsync of the
file; each function here returns after both. OSError passes through: the caller knows what the file is and says so.
"""

import ctypes
import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from limpet.engine.state.presence import is_directory
from limpet.recovery.mounts import read_mount_id
from limpet.schema.layout import TEMPORARY_PREFIX

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_renameat2 = getattr(_libc, "renameat2", None)
if _renameat2 is not None:
    _renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def make_one_directory(path: str | bytes, mode: int = 0o700, *, dir_fd: int | None = None) -> None:
    """Create a directory with `mode` less the umask, but for what its owner is to have. Raises OSError.

    A program may set a umask such as 0177 for a moment, while it makes a socket, in another thread than ours: a
    directory that is made just then would be of no use to an ordinary user, and stay so.
    """
    os.mkdir(path, mode, dir_fd=dir_fd)
    found = os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_mode
    if mode & 0o700 & ~found:
        os.chmod(path, stat.S_IMODE(found) | mode & 0o700, dir_fd=dir_fd)


def open_made(path: str, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> int:
    """Open a file that is made where it is missing: with `mode`, in the way of `make_one_directory`.

    Raises OSError.
    """
    descriptor = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, mode, dir_fd=dir_fd)
    try:
        found = os.fstat(descriptor).st_mode
        if mode & 0o700 & ~found:
            os.fchmod(descriptor, stat.S_IMODE(found) | mode & 0o700)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def make_directory(path: str, mode: int = 0o700) -> None:
    """Create the directory `path` and its missing parents with `mode` less the umask, durable level by level.

    An existing directory keeps its mode. Raises OSError, such as FileExistsError or NotADirectoryError if a file
    is in the way.
    """
    missing: list[str] = []
    path = os.path.abspath(path)
    while not _is_directory(path):
        missing.append(path)
        path = os.path.dirname(path)
    # Also for an existing one: a crash may have come between its mkdir and this fsync. Its parents are
    # durable then, because each was synced before the next was created.
    _sync_name(path)
    for path in reversed(missing):
        try:
            make_one_directory(path, mode)
        except FileExistsError:  # another thread may have been faster
            if not is_directory(path):
                raise
        _sync_name(path)


def _is_directory(path: str) -> bool:
    """Return whether a directory exists. Raises OSError for an unusable path, such as one that is too long."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def write_file(path: str, data: bytes, mode: int = 0o600) -> None:
    """Write `path` atomically: readers, even after a crash, find the old content or the new.

    A crash before the rename leaves a file next to it whose name starts with TEMPORARY_PREFIX. Raises OSError; then
    nothing has changed, unless the last step failed, the fsync of the directory: the new content is in place, but may
    not survive a power cut.
    """
    _put_file(path, data, mode, os.fsync)
    sync_directory(os.path.dirname(os.path.abspath(path)))


def write_with_tree(path: str, data: bytes) -> None:
    """Write `path` as `write_file` does, once all else on its file system is durable, and its directory's own name.

    One flush for a tree of several files and for this one. Raises OSError.
    """
    _put_file(path, data, 0o600, _sync_file_system_of)
    sync_directory(os.path.dirname(os.path.abspath(path)))


def write_unflushed(path: str, data: bytes) -> None:
    """Write `path` atomically for readers and for a kill; after a power cut it may be missing, empty or full of zeros.

    Raises OSError; then nothing has changed.
    """
    _put_file(path, data, 0o600, lambda _: None)


def _put_file(path: str, data: bytes, mode: int, flush: Callable[[int], None]) -> None:
    directory = os.path.dirname(os.path.abspath(path))
    temporary = temporary_path(directory)
    descriptor = open_made(temporary, os.O_WRONLY | os.O_EXCL, mode)
    try:
        try:
            while data:
                data = data[os.write(descriptor, data) :]
            flush(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def rename_new(source: str, target: str) -> None:
    """Rename a file to a name that nothing has; not durable by itself.

    Raises FileExistsError if it is taken, OSError, ValueError for a path with a NUL, at which C would end it.
    """
    if "\0" in target:
        raise ValueError("embedded null byte")
    if _renameat2 is not None:
        if _renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in {errno.EINVAL, errno.ENOSYS}:  # this file system, or this kernel, has no such call
            raise OSError(code, os.strerror(code), target)
    os.link(source, target)
    os.unlink(source)


def temporary_path(directory: str) -> str:
    """Return a unique path in `directory`, for a file that is renamed once it is complete."""
    return os.path.join(directory, TEMPORARY_PREFIX + os.urandom(8).hex())


def sync_file(path: str) -> None:
    """Make the content of the file `path` durable. Raises OSError. Never for a database that is open here."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: str) -> None:
    """Make all changes to the names in the directory `path` durable: created, renamed and removed entries.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_filesystem(path: str) -> None:
    """Make everything durable that was written to the file system of `path` (syncfs(2)).

    For a tree of many small files: one flush instead of one per file. Raises OSError, since Linux 5.8 also if
    something on that file system could not be written back meanwhile.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _sync_file_system_of(descriptor, path)
    finally:
        os.close(descriptor)


def _sync_file_system_of(descriptor: int, path: str | None = None) -> None:
    if _libc.syncfs(descriptor) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


def remove_tree(path: str) -> None:
    """Remove the directory `path` with its content, durably. A missing directory is not an error.

    Raises what `remove_unflushed` raises.
    """
    path = os.path.abspath(path)
    remove_unflushed(path)
    # Also for a missing one: a crash may have come between its rmdir and this fsync.
    if is_directory(os.path.dirname(path)):
        _sync_name(path)


def remove_unflushed(path: str) -> None:
    """Remove the directory `path` with its content; a power cut may bring back any of it. A missing one is no error.

    Symbolic links are removed, never followed, and no mount is entered: see `empty_directory`, also for the errors
    raised. Raises NotADirectoryError if `path` itself is a link or a file.
    """
    try:
        descriptor = _open_directory(os.fsencode(path), None)
    except FileNotFoundError:
        return
    try:
        empty_directory(descriptor)
    finally:
        os.close(descriptor)
    os.rmdir(path)


class _Level(NamedTuple):
    """A directory on the way down: its name in its parent, its inode, and the subdirectories still to enter."""

    name: bytes
    inode: tuple[int, int]
    children: list[bytes]


def empty_directory(descriptor: int) -> None:
    """Remove everything in the directory open as `descriptor`; not durable by itself.

    The walk goes from descriptor to descriptor, so no symbolic link is followed, and holds one at a time, so no depth
    is too deep. Directories that their owner cannot change are made writable first. Raises OSError: EXDEV at a mount
    point, whose content is left alone; ESTALE if another process moves directories meanwhile; otherwise the kernel's
    error.
    """
    mount = read_mount_id(descriptor)
    current = os.dup(descriptor)
    try:
        levels = [_Level(b".", _inode(current), _remove_files(current))]
        while levels[-1].children or len(levels) > 1:
            if levels[-1].children:
                name = levels[-1].children.pop()
                if _remove_if_empty(name, current):
                    continue
                current = _step(current, _open_directory(name, current))
                if read_mount_id(current) != mount:
                    raise OSError(errno.EXDEV, "something is mounted here", os.fsdecode(name))
                levels.append(_Level(name, _inode(current), _remove_files(current)))
            else:
                done = levels.pop()
                current = _step(current, os.open("..", _DIRECTORY_FLAGS, dir_fd=current))
                if _inode(current) != levels[-1].inode:
                    raise OSError(errno.ESTALE, "moved while it was being removed", os.fsdecode(done.name))
                os.rmdir(done.name, dir_fd=current)
    finally:
        os.close(current)


def _remove_if_empty(name: bytes, parent: int) -> bool:
    """Remove a directory in which nothing is, such as most that a mount was put on; say whether that was so."""
    try:
        os.rmdir(name, dir_fd=parent)
    except OSError:  # something is in it, or on it: that is told when it is entered
        return False
    return True


def _step(current: int, following: int) -> int:
    os.close(current)
    return following


def _remove_files(descriptor: int) -> list[bytes]:
    """Remove everything but directories from this directory, and return the names of its subdirectories."""
    if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o700 != 0o700:
        os.fchmod(descriptor, 0o700)
    directories = []
    with os.scandir(descriptor) as entries:
        found = list(entries)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            directories.append(os.fsencode(entry.name))
        else:
            with suppress(FileNotFoundError):  # whose it is has removed it meanwhile, as a command does that has ended
                os.unlink(entry.name, dir_fd=descriptor)
    return directories


def _open_directory(name: bytes, parent: int | None) -> int:
    """Open a directory, never through a link, even if its owner cannot read it."""
    try:
        return os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
    except PermissionError:
        # chmod by name would follow a link put there meanwhile; through an O_PATH descriptor it does not.
        handle = os.open(name, os.O_PATH | _DIRECTORY_FLAGS, dir_fd=parent)
        try:
            os.chmod(f"/proc/self/fd/{handle}", 0o700)
        finally:
            os.close(handle)
        return os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)


def _inode(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _sync_name(path: str) -> None:
    """Make the presence or absence of `path` in its parent directory durable."""
    parent = os.path.dirname(path)
    try:
        sync_directory(parent)
    except PermissionError:  # a parent that we can enter but not read, such as a home of mode 0711
        sync_filesystem(path if os.path.isdir(path) else parent)
