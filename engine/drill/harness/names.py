"""Calls that change names and modes, as emulations: open, mkdir, unlink, rename, link, symlink, mknod, chmod."""

import contextlib
import ctypes
import functools
import os
import stat
import struct
from collections.abc import Iterator
from typing import Final

from limpet.testing import syscalls
from limpet.testing.emulation import (
    AT_FDCWD,
    Emulation,
    Reply,
    blind_spot,
    closed_unless_kept,
    path_of,
    place_of,
    then_reply,
)
from limpet.testing.nodes import Nodes
from limpet.testing.operations import (
    Chmod,
    Create,
    Link,
    MakeDirectory,
    Open,
    Rename,
    Symlink,
    Truncate,
    Unlink,
)
from limpet.testing.process import libc
from limpet.testing.supervisor import Event

AT_REMOVEDIR: Final = 0x200
CREAT_FLAGS: Final = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
"""The flags that creat(2) implies."""

_AT_SYMLINK_NOFOLLOW, _AT_SYMLINK_FOLLOW, _AT_EMPTY_PATH = 0x100, 0x400, 0x1000
_O_TMPFILE: Final = 0o20000000 | os.O_DIRECTORY
_RENAME_NOREPLACE: Final = 1
_NOT_MODELLED: Final = {stat.S_IFIFO, stat.S_IFSOCK}
"""Kinds of files that come, go and move unseen: their content never survives."""


def open_file(event: Event, nodes: Nodes, path: str, flags: int, mode: int) -> Emulation | None:
    """Emulate open, openat and creat, if they create, empty, or could have created a file of the tree."""
    if flags & _O_TMPFILE == _O_TMPFILE:
        if nodes.find(os.stat(path)) is not None:
            raise blind_spot(event, "with O_TMPFILE", path)
        return None
    exclusive = flags & os.O_EXCL and flags & os.O_CREAT
    try:
        status = os.stat(path, follow_symlinks=not (exclusive or flags & os.O_NOFOLLOW))
    except FileNotFoundError:
        return _create(event, nodes, path, flags, mode) if flags & os.O_CREAT else None
    node = nodes.find(status)
    if node is None or exclusive or not stat.S_ISREG(status.st_mode):
        return None
    if not flags & os.O_TRUNC:
        return Emulation(Open(node), lambda: Reply(let_go=True))
    descriptors: list[int] = []

    def act() -> Reply:
        descriptors.append(os.open(path, flags & ~os.O_CREAT))
        return Reply(descriptor=descriptors[0], close_on_exec=bool(flags & os.O_CLOEXEC))

    return Emulation(Truncate(node, 0), act, descriptors)


def _create(event: Event, nodes: Nodes, path: str, flags: int, mode: int) -> Emulation | None:
    if os.path.islink(path) and not flags & (os.O_EXCL | os.O_NOFOLLOW):
        path = os.path.realpath(path)  # a dangling link: the file is created at its target
    mask = _umask(event)
    place = place_of(nodes, path)
    if place is None:
        return None
    parent, directory, name = place
    node, descriptors = nodes.allocate(), [directory]

    def act() -> Reply:
        with _with_umask(mask):
            descriptor = os.open(name, flags, mode & 0o7777, dir_fd=directory)
        descriptors.append(descriptor)
        nodes.register(os.fstat(descriptor), node)
        nodes.note_name(node, name)
        return Reply(descriptor=descriptor, close_on_exec=bool(flags & os.O_CLOEXEC))

    return Emulation(Create(node, parent, name, mode & 0o7777 & ~mask), act, descriptors)


def open_how(event: Event, nodes: Nodes, a: list[int]) -> Emulation | None:
    """Emulate openat2."""
    flags, mode, resolve = struct.unpack("=3Q", event.read(a[2], 24))
    if not flags & (os.O_CREAT | os.O_TRUNC | _O_TMPFILE & ~os.O_DIRECTORY):
        return None
    path = path_of(event, a[0], a[1])
    made = open_file(event, nodes, path, flags, mode)
    if made is not None and resolve:
        made.close()
        raise blind_spot(event, f"with resolve {resolve:#x}", path)
    return made


def make_directory(event: Event, nodes: Nodes, directory: int, address: int, mode: int) -> Emulation | None:
    """Emulate mkdir and mkdirat."""
    mask = _umask(event)
    place = place_of(nodes, path_of(event, directory, address))
    if place is None:
        return None
    parent, at, name = place
    node = nodes.allocate()

    def act() -> Reply:
        with _with_umask(mask):
            os.mkdir(name, mode, dir_fd=at)
        nodes.register(os.stat(name, dir_fd=at, follow_symlinks=False), node)
        return Reply()

    return Emulation(MakeDirectory(node, parent, name, mode & 0o7777 & ~mask), act, [at])


def unlink(event: Event, nodes: Nodes, directory: int, address: int, flags: int) -> Emulation | None:
    """Emulate unlink, unlinkat and rmdir."""
    place = place_of(nodes, path_of(event, directory, address))
    if place is None:
        return None
    parent, at, name = place

    def act() -> Reply:
        (os.rmdir if flags & AT_REMOVEDIR else os.unlink)(name, dir_fd=at)
        return Reply()

    return Emulation(Unlink(parent, name), act, [at])


def rename(event: Event, nodes: Nodes, a: list[int], flags: int = 0) -> Emulation | None:
    """Emulate rename, renameat and renameat2; a rename out of the tree is an unlink, one into it a blind spot."""
    old, new = path_of(event, a[0], a[1]), path_of(event, a[2], a[3])
    status = os.stat(old, follow_symlinks=False)
    node, descriptors = nodes.find(status), list[int]()
    with closed_unless_kept(descriptors) as keep:
        source, target = (_keep_open(place_of(nodes, path), descriptors) for path in (old, new))
        if source is not None and stat.S_IFMT(status.st_mode) in _NOT_MODELLED:
            return None
        if source is None and target is None and node is None:
            return None
        if source is None or node is None:
            raise blind_spot(event, "of a file outside the life's directory, or of that directory itself", old)
        if flags & ~_RENAME_NOREPLACE:
            raise blind_spot(event, f"with the flags {flags:#x}", old)
        if os.path.lexists(new) and os.path.samestat(os.stat(new, follow_symlinks=False), status):
            return None  # two names of one file: nothing happens
        act = functools.partial(_do_rename, old, new, flags)
        if target is None:
            return keep(Emulation(Unlink(source[0], source[2]), act))
        return keep(Emulation(Rename(node, source[0], source[2], target[0], target[2]), act))


def _keep_open(place: tuple[int, int, str] | None, descriptors: list[int]) -> tuple[int, int, str] | None:
    if place is not None:
        descriptors.append(place[1])
    return place


def _do_rename(old: str, new: str, flags: int) -> Reply:
    number = syscalls.RENAMEAT2_NUMBERS[syscalls.machine()]
    arguments = (AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)
    if libc.syscall(number, *arguments):
        raise _last_error()
    return Reply()


def link(event: Event, nodes: Nodes, a: list[int], flags: int = 0) -> Emulation | None:
    """Emulate link and linkat."""
    place = place_of(nodes, path_of(event, a[2], a[3]))
    if place is None:
        return None
    parent, at, name = place
    with closed_unless_kept([at]) as keep:
        old, follow = path_of(event, a[0], a[1]), bool(flags & _AT_SYMLINK_FOLLOW)
        node = None if flags & _AT_EMPTY_PATH else nodes.find(os.stat(old, follow_symlinks=follow))
        if node is None:
            raise blind_spot(event, "of a file outside the life's directory", old)

        def act() -> Reply:
            os.link(old, name, dst_dir_fd=at, follow_symlinks=follow)
            return Reply()

        return keep(Emulation(Link(node, parent, name), act))


def symlink(event: Event, nodes: Nodes, address: int, directory: int, path: int) -> Emulation | None:
    """Emulate symlink and symlinkat."""
    target = event.read_string(address)
    place = place_of(nodes, path_of(event, directory, path))
    if place is None:
        return None
    parent, at, name = place
    node = nodes.allocate()

    def act() -> Reply:
        os.symlink(target, name, dir_fd=at)
        nodes.register(os.stat(name, dir_fd=at, follow_symlinks=False), node)
        return Reply()

    return Emulation(Symlink(node, parent, name, target), act, [at])


def make_node(event: Event, nodes: Nodes, directory: int, address: int, mode: int) -> Emulation | None:
    """Check mknod and mknodat: pipes and sockets are allowed, others are a blind spot."""
    path = path_of(event, directory, address)
    place = place_of(nodes, path)
    if place is not None:
        os.close(place[1])
        if stat.S_IFMT(mode) not in _NOT_MODELLED:
            raise blind_spot(event, f"with the mode {mode:#o}", path)
    return None


def chmod(nodes: Nodes, path: str, mode: int, flags: int = 0) -> Emulation | None:
    """Emulate chmod, fchmodat and fchmodat2."""
    if flags & _AT_SYMLINK_NOFOLLOW and os.path.islink(path):
        return None
    return _chmod_of(nodes, os.open(path, os.O_PATH | os.O_CLOEXEC), mode)


def chmod_descriptor(event: Event, nodes: Nodes, a: list[int]) -> Emulation | None:
    """Emulate fchmod."""
    return _chmod_of(nodes, event.descriptor(a[0] & 0xFFFFFFFF), a[1])


def _chmod_of(nodes: Nodes, descriptor: int, mode: int) -> Emulation | None:
    with closed_unless_kept([descriptor]) as keep:
        node = nodes.find(os.fstat(descriptor))
        act = functools.partial(os.chmod, f"/proc/self/fd/{descriptor}", mode & 0o7777)
        return None if node is None else keep(Emulation(Chmod(node, mode & 0o7777), lambda: then_reply(act)))


def _umask(event: Event) -> int:
    with open(f"/proc/{event.pid}/status", "rb") as file:
        return int(next(line for line in file if line.startswith(b"Umask:")).split()[1], 8)


@contextlib.contextmanager
def _with_umask(mask: int) -> Iterator[None]:
    previous = os.umask(mask)
    try:
        yield
    finally:
        os.umask(previous)


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
