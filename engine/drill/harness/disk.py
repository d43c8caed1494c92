"""The model of a disk: what is certainly durable, what may be, and the trees that a power cut can leave.

There are two models of names. `posix` follows the letter of fsync(2): a name is durable only after an fsync of its
directory, and other names may reach the disk in any combination. `journaled` is what ext4 and XFS do: metadata
reaches the disk in order, and any fsync commits all that came before it. In both, data that was not flushed may
reach the disk in part and in any order, sector by sector.

A failed fsync marks the pages clean (Linux): later flushes skip them until they are written again, and then write
all their bytes. `Fate` says how much had reached the disk.
"""

import enum
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from limpet.testing.nodes import VOLATILE_SUFFIXES
from limpet.testing.operations import (
    ROOT,
    Chmod,
    Create,
    Link,
    MakeDirectory,
    Operation,
    Rename,
    Symlink,
    Sync,
    SyncAll,
    SyncFailed,
    Truncate,
    Unlink,
    Write,
)

SECTOR: Final = 512
PAGE: Final = 4096
MISSING, LANDED, GARBAGE = range(3)
"""What happened to a part of a write."""
_VOLATILE_SIZE: Final = 32_768  # the initial size of SQLite's -shm

Change = Write | Truncate
Naming = Create | MakeDirectory | Symlink | Link | Unlink | Rename | Chmod


class Model(enum.StrEnum):
    """How names become durable."""

    JOURNALED = "journaled"
    POSIX = "posix"


class Fate(enum.StrEnum):
    """How much of the data was on the disk when a flush failed."""

    DROPPED = "dropped"
    LANDED = "landed"
    PARTIAL = "partial"


class File(NamedTuple):
    """A path of an image: a file with its bytes, a symbolic link with its target, or a directory (None)."""

    path: str
    mode: int
    content: bytes | str | None
    same_as: str = ""
    """The earlier path of the image that is another name of this file, if any."""


Image = tuple[File, ...]
"""A tree as a power cut left it, every directory before its entries."""


class Landing(NamedTuple):
    """How much of what was not durable reached the disk: a choice for each pending change and naming.

    A change lands whole (True), not at all (False), or in parts: each unit of it is MISSING, LANDED or GARBAGE, and the
    file has its full size.
    """

    changes: Sequence[bool | bytes]
    namings: Sequence[bool]
    unit: int = 0
    """The size of such a part, which starts at a multiple of it in the file."""


class _Inode:
    """The certain content of a file, link or directory."""

    __slots__ = ("content", "frozen", "lost", "mode", "target")

    def __init__(self, mode: int, content: bytearray | None, target: str | None = None) -> None:
        self.mode, self.content, self.target = mode, content, target
        self.frozen: bytes | None = None
        self.lost: dict[int, bytes] = {}  # page number -> what processes see but no flush will write

    def bytes(self) -> bytes:
        if self.frozen is None:
            self.frozen = bytes(self.content or b"")
        return self.frozen


class Disk:
    """The state of the disk after some operations of a trace; step() does the next one."""

    def __init__(self, start: Sequence[Operation], model: Model, *, fate: Fate = Fate.DROPPED, seed: int = 0) -> None:
        self._model, self._fate, self._seed = model, fate, seed
        self._failures = 0
        self._volatile: set[int] = set()
        self._inodes: dict[int, _Inode] = {ROOT: _Inode(0o700, None)}
        self._names: dict[int, dict[str, int]] = {ROOT: {}}
        self.changes: list[Change] = []
        """Writes and truncations that are not certainly durable, in order."""
        self.namings: list[Naming] = []
        """Changes of names and modes that are not certainly durable, in order."""
        for operation in start:
            self.step(operation)
        self._flush_all()

    def step(self, operation: Operation) -> None:
        """Do the next operation of the trace."""
        match operation:
            case Write() | Truncate() if operation.node in self._volatile:
                self._settle(operation)  # nothing depends on how much of it an image has
            case Write() | Truncate():
                self._redirty(operation)
                self.changes.append(operation)
            case Create() | MakeDirectory() | Symlink():
                self._make(operation)
                self.namings.append(operation)
            case Link() | Unlink() | Rename() | Chmod():
                self._trust(operation)
                self.namings.append(operation)
            case Sync():
                self._flush(operation.node)
            case SyncFailed():
                self._lose(operation.node)
            case SyncAll():
                self._flush_all()
            case _:
                pass  # an acknowledgement or an open: no effect on the disk

    def image(self, landing: Landing, rng: random.Random) -> Image:
        """Return the tree on the disk if these parts of the pending operations landed."""
        contents: dict[int, bytearray] = {}
        for change, lands in zip(self.changes, landing.changes, strict=True):
            if lands:
                content = contents.get(change.node)
                if content is None:
                    content = contents[change.node] = bytearray(self._inodes[change.node].bytes())
                if isinstance(lands, bytes) and isinstance(change, Write):
                    _put_parts(content, change, lands, landing.unit, rng)
                else:
                    _put(content, change)
        names = self._names
        modes: dict[int, int] = {}
        if any(landing.namings):
            names = {node: entries.copy() for node, entries in names.items()}
            for naming, lands in zip(self.namings, landing.namings, strict=True):
                if lands:
                    _name(names, modes, naming)
        return tuple(self._walk(names, modes, contents, rng))

    def _walk(
        self,
        names: dict[int, dict[str, int]],
        modes: dict[int, int],
        contents: dict[int, bytearray],
        rng: random.Random,
    ) -> Iterator[File]:
        pending = [(ROOT, "")]
        found = {ROOT: ""}  # the first name of each directory and file
        while pending:
            directory, path = pending.pop()
            for name, node in sorted(names[directory].items()):
                inode = self._inodes[node]
                mode, here = modes.get(node, inode.mode), path + name
                if node in names:
                    if found.setdefault(node, here) == here:  # a directory has one place, never within itself
                        yield File(here, mode, None)
                        pending.append((node, here + "/"))
                elif name.endswith(VOLATILE_SUFFIXES):
                    yield from _volatile(here, mode, rng)
                elif inode.target is not None:
                    yield File(here, mode, inode.target)
                else:
                    first = found.setdefault(node, here)
                    content = bytes(contents[node]) if node in contents else inode.bytes()
                    yield File(here, mode, content, "" if first == here else first)

    def _trust(self, naming: Naming) -> None:
        """Make writes to a volatile file pending, like any other's, once it gets another name."""
        given = _gives(naming)
        if given is None or given[0] not in self._volatile or given[2].endswith(VOLATILE_SUFFIXES):
            return
        node, inode = given[0], self._inodes[given[0]]
        self._volatile.remove(node)
        self.changes.append(Write(node, 0, bytes(inode.content or b"")))
        inode.content, inode.frozen = bytearray(), None

    def _make(self, operation: Create | MakeDirectory | Symlink) -> None:
        match operation:
            case Create():
                self._inodes[operation.node] = _Inode(operation.mode, bytearray())
                if operation.name.endswith(VOLATILE_SUFFIXES):
                    self._volatile.add(operation.node)
            case MakeDirectory():
                self._inodes[operation.node] = _Inode(operation.mode, None)
                self._names[operation.node] = {}
            case Symlink():
                self._inodes[operation.node] = _Inode(0o777, None, operation.target)

    def _flush(self, node: int) -> None:
        rest: list[Change] = []
        for change in self.changes:
            if change.node == node:
                self._settle(change)
            else:
                rest.append(change)
        self.changes = rest
        self._flush_names(lambda naming: self._model is Model.JOURNALED or _directory(naming) == node)

    def _flush_all(self) -> None:
        for change in self.changes:
            self._settle(change)
        self.changes = []
        self._flush_names(lambda _: True)

    def _flush_names(self, is_durable: Callable[[Naming], bool]) -> None:
        rest: list[Naming] = []
        modes: dict[int, int] = {}
        for naming in self.namings:
            if not is_durable(naming):
                rest.append(naming)
                continue
            for earlier in _leading_to(naming, rest):
                _name(self._names, modes, earlier)
                rest = [other for other in rest if other is not earlier]
            _name(self._names, modes, naming)
        for node, mode in modes.items():
            self._inodes[node].mode = mode
        self.namings = rest

    def _settle(self, change: Change) -> None:
        inode = self._inodes[change.node]
        if inode.content is not None:
            _put(inode.content, change)
            inode.frozen = None

    def _lose(self, node: int) -> None:
        """Remove from the pending changes what a failed flush took; remember the pages as processes see them."""
        inode, mine = self._inodes[node], [change for change in self.changes if change.node == node]
        if inode.content is None or not mine:
            return  # a directory: its names stay pending
        seen = bytearray(inode.content)
        pages: set[int] = set()
        for change in mine:
            _put(seen, change)
            if isinstance(change, Write):
                pages.update(_pages(change.offset, len(change.data)))
        inode.lost.update({page: bytes(seen[page * PAGE : (page + 1) * PAGE]) for page in pages})
        self._failures += 1
        rng = random.Random(f"{self._seed}:{self._failures}")  # noqa: S311 - repeatable by its seed
        for change in mine:
            if self._fate is Fate.LANDED or (self._fate is Fate.PARTIAL and rng.random() < 0.5):
                self._settle(change)
        self.changes = [change for change in self.changes if change.node != node]

    def _redirty(self, change: Change) -> None:
        """Restore the lost pages that a new write touches: the next flush writes them whole.

        Truncated parts of them are gone for processes too.
        """
        inode = self._inodes[change.node]
        if inode.lost and isinstance(change, Truncate):
            kept = {page: content[: change.size - page * PAGE] for page, content in inode.lost.items()}
            inode.lost = {page: content for page, content in kept.items() if page * PAGE < change.size}
        elif inode.lost and isinstance(change, Write):
            for page in _pages(change.offset, len(change.data)):
                lost = inode.lost.pop(page, None)
                if lost:
                    self.changes.append(Write(change.node, page * PAGE, lost))


def _put_parts(content: bytearray, change: Write, fates: bytes, unit: int, rng: random.Random) -> None:
    start, end = change.offset, change.offset + len(change.data)
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    for fate in fates:
        stop = min(end, start - start % unit + unit)
        if fate == LANDED:
            content[start:stop] = change.data[start - change.offset : stop - change.offset]
        elif fate == GARBAGE:
            content[start:stop] = rng.randbytes(stop - start)
        start = stop


def _put(content: bytearray, change: Change) -> None:
    size = len(content)
    if isinstance(change, Truncate):
        if change.size < size:
            del content[change.size :]
        else:
            content.extend(bytes(change.size - size))
        return
    if size < change.offset:
        content.extend(bytes(change.offset - size))
    content[change.offset : change.offset + len(change.data)] = change.data


def _name(names: dict[int, dict[str, int]], modes: dict[int, int], naming: Naming) -> None:
    """Do one change of names. Each says which node the name refers to, so that any subset of them is a tree."""
    match naming:
        case Unlink():
            names[naming.parent].pop(naming.name, None)
        case Rename():
            if names[naming.parent].get(naming.name) == naming.node:
                del names[naming.parent][naming.name]
            names[naming.new_parent][naming.new_name] = naming.node
        case Chmod():
            modes[naming.node] = naming.mode
        case _:
            names[naming.parent][naming.name] = naming.node


def _leading_to(naming: Naming, pending: Sequence[Naming]) -> list[Naming]:
    """Return in order the pending namings that gave the file the name which this one removes.

    A rename is one step: once the new name is durable, the old one is gone and does not come back.
    """
    found: list[Naming] = []
    for earlier in reversed(pending):
        if isinstance(naming, Rename) and _gives(earlier) == (naming.node, naming.parent, naming.name):
            found.append(earlier)
            naming = earlier
    return found[::-1]


def _gives(naming: Naming) -> tuple[int, int, str] | None:
    """Return the node and the place of the name that this gives, if it gives one."""
    match naming:
        case Rename():
            return naming.node, naming.new_parent, naming.new_name
        case Unlink() | Chmod():
            return None
        case _:
            return naming.node, naming.parent, naming.name


def _directory(naming: Naming) -> int:
    """Return the node whose fsync makes this durable according to POSIX."""
    match naming:
        case Rename():
            return naming.new_parent
        case Chmod():
            return naming.node
        case _:
            return naming.parent


def _volatile(path: str, mode: int, rng: random.Random) -> Iterator[File]:
    """Yield the unreliable states of the file: absent, zeroed or garbage."""
    draw = rng.randrange(3)
    if draw:
        sector = bytes(SECTOR) if draw == 1 else rng.randbytes(SECTOR)
        yield File(path, mode, sector * (_VOLATILE_SIZE // SECTOR))


def _pages(offset: int, size: int) -> range:
    return range(offset // PAGE, (offset + size - 1) // PAGE + 1)
