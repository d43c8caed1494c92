"""A life's operations on the disk: one frozen record per operation, and the trace that holds them in order.

Files and directories are numbered in order of appearance; the root of the life is node 0. A name is an entry in a
directory node, so renames and links need no paths.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

ROOT: Final = 0
"""The node of the life's directory."""


class Write(NamedTuple):
    """Bytes written to a file at an offset; a gap before them reads as zeros."""

    node: int
    offset: int
    data: bytes


class Truncate(NamedTuple):
    """The file's size is set: truncated, or extended with zeros."""

    node: int
    size: int


class Sync(NamedTuple):
    """fsync or fdatasync of a file or directory."""

    node: int


class SyncFailed(NamedTuple):
    """An fsync that returned an error: the pages are now clean, and the disk's content is uncertain."""

    node: int


class SyncAll(NamedTuple):
    """sync or syncfs."""


class Create(NamedTuple):
    """A new regular file."""

    node: int
    parent: int
    name: str
    mode: int


class MakeDirectory(NamedTuple):
    """A new directory."""

    node: int
    parent: int
    name: str
    mode: int


class Symlink(NamedTuple):
    """A new symbolic link."""

    node: int
    parent: int
    name: str
    target: str


class Link(NamedTuple):
    """One more name for a file."""

    node: int
    parent: int
    name: str


class Unlink(NamedTuple):
    """A name is removed: of a file, of an empty directory, or by a move out of the root."""

    parent: int
    name: str


class Rename(NamedTuple):
    """A name moves, and replaces an existing one."""

    node: int
    parent: int
    name: str
    new_parent: int
    new_name: str


class Chmod(NamedTuple):
    """The permission bits of a file or directory."""

    node: int
    mode: int


class Acknowledge(NamedTuple):
    """The life told the outside world: from now on this must survive."""

    data: bytes


class Open(NamedTuple):
    """An existing file is opened by a call that could have created it. Changes nothing; it may fail."""

    node: int


Operation = (
    Write
    | Truncate
    | Sync
    | SyncFailed
    | SyncAll
    | Create
    | MakeDirectory
    | Symlink
    | Link
    | Unlink
    | Rename
    | Chmod
    | Acknowledge
    | Open
)


class Trace(NamedTuple):
    """One recorded life: the tree it started with, already durable, and everything it did, in order."""

    start: tuple[Operation, ...]
    operations: tuple[Operation, ...]

    @property
    def acknowledged(self) -> tuple[bytes, ...]:
        """Everything that was acknowledged, in order."""
        return tuple(operation.data for operation in self.operations if isinstance(operation, Acknowledge))


def describe_tree(root: str, register: Callable[[os.stat_result], int]) -> Iterator[Operation]:
    """Yield the operations that create the present tree under `root`, each node numbered by `register`.

    Sockets, pipes and devices are left out. Raises OSError.
    """
    seen: set[int] = set()
    pending: list[tuple[int, str]] = [(register(os.stat(root)), root)]
    while pending:
        parent, directory = pending.pop()
        with os.scandir(directory) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            node = register(entry.stat(follow_symlinks=False))
            if node in seen:
                yield Link(node, parent, entry.name)
                continue
            seen.add(node)
            yield from _describe(entry, node, parent)
            if entry.is_dir(follow_symlinks=False):
                pending.append((node, entry.path))


def _describe(entry: os.DirEntry[str], node: int, parent: int) -> Iterator[Operation]:
    mode = entry.stat(follow_symlinks=False).st_mode & 0o7777
    if entry.is_symlink():
        yield Symlink(node, parent, entry.name, os.readlink(entry.path))
    elif entry.is_dir():
        yield MakeDirectory(node, parent, entry.name, mode)
    elif entry.is_file():
        yield Create(node, parent, entry.name, mode)
        with open(entry.path, "rb") as file:
            yield Write(node, 0, file.read())


def acknowledged_before(operations: Sequence[Operation], cut: int) -> list[bytes]:
    """Return what the first `cut` operations acknowledged."""
    return [operation.data for operation in operations[:cut] if isinstance(operation, Acknowledge)]
