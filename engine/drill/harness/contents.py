"""Calls that change or flush a file's content, as emulations: write, truncate, fallocate, fsync."""

import fcntl
import functools
import os
import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from limpet.testing.emulation import (
    AT_FDCWD,
    Emulation,
    Reply,
    blind_spot,
    closed_unless_kept,
    node_of_descriptor,
    path_of,
    then_reply,
)
from limpet.testing.nodes import Nodes
from limpet.testing.operations import Acknowledge, Sync, SyncAll, Truncate, Write
from limpet.testing.supervisor import Event

_KEEP_SIZE: Final = 1  # FALLOC_FL_KEEP_SIZE
_LARGEST: Final = (1 << 63) - 1  # the kernel takes a larger offset for negative: EINVAL


class _Data(NamedTuple):
    size: int
    read: Callable[[], bytes]


def _write(event: Event, nodes: Nodes, number: int, at: int | None, data: _Data) -> Emulation | None:
    descriptor = event.descriptor(number & 0xFFFFFFFF)
    with closed_unless_kept([descriptor]) as keep:
        status = os.fstat(descriptor)
        if nodes.takes_acknowledgements(status):
            acknowledgement = Acknowledge(data.read())
            return keep(Emulation(acknowledgement, lambda: Reply(len(acknowledgement.data))))
        node = nodes.find(status)
        if node is None or not data.size or (at is not None and at > _LARGEST):
            return None
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if flags & os.O_DSYNC:
            raise blind_spot(event, "to a file opened with O_SYNC or O_DSYNC", number)
        if flags & os.O_DIRECT:
            raise blind_spot(event, "to a file opened with O_DIRECT", number)
        appends = bool(flags & os.O_APPEND)
        if at is not None and not appends:
            put = functools.partial(os.pwrite, descriptor)
            return keep(Emulation(Write(node, at, data.read()), Reply, put=put))
        offset = status.st_size if appends else os.lseek(descriptor, 0, os.SEEK_CUR)
        return keep(Emulation(Write(node, offset, data.read()), Reply, put=lambda part, _: os.write(descriptor, part)))


def write_one(event: Event, nodes: Nodes, a: list[int], *, at: int | None = None) -> Emulation | None:
    """Emulate write and, with `at`, pwrite64."""
    return _write(event, nodes, a[0], at, _Data(a[2], lambda: event.read(a[1], a[2])))


def write_many(event: Event, nodes: Nodes, a: list[int], *, at: int | None = None, flags: int = 0) -> Emulation | None:
    """Emulate writev and, with `at`, pwritev and pwritev2."""
    vectors = struct.unpack(f"={2 * a[2]}Q", event.read(a[1], 16 * a[2]))
    pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
    data = _Data(sum(vectors[1::2]), lambda: b"".join(event.read(*pair) for pair in pairs))
    made = _write(event, nodes, a[0], at, data)
    if flags and made is not None:
        made.close()
        raise blind_spot(event, f"with the flags {flags:#x}", a[0])
    return made


def truncate_path(event: Event, nodes: Nodes, a: list[int]) -> Emulation | None:
    """Emulate truncate."""
    descriptor = os.open(path_of(event, AT_FDCWD, a[0]), os.O_PATH | os.O_CLOEXEC)
    path = f"/proc/self/fd/{descriptor}"
    return _truncate(nodes, descriptor, a[1], lambda: os.truncate(path, a[1]))


def truncate_descriptor(event: Event, nodes: Nodes, a: list[int]) -> Emulation | None:
    """Emulate ftruncate."""
    descriptor = event.descriptor(a[0] & 0xFFFFFFFF)
    return _truncate(nodes, descriptor, a[1], lambda: os.ftruncate(descriptor, a[1]))


def _truncate(nodes: Nodes, descriptor: int, size: int, cut: Callable[[], None]) -> Emulation | None:
    with closed_unless_kept([descriptor]) as keep:
        node = nodes.find(os.fstat(descriptor))
        if node is None or size > _LARGEST:
            return None
        return keep(Emulation(Truncate(node, size), lambda: then_reply(cut)))


def allocate(event: Event, nodes: Nodes, a: list[int]) -> Emulation | None:
    """Emulate fallocate, modelled as an extending truncation; other modes are a blind spot."""
    descriptor = event.descriptor(a[0] & 0xFFFFFFFF)
    with closed_unless_kept([descriptor]) as keep:
        status = os.fstat(descriptor)
        node = nodes.find_durable(status)
        if node is None or a[1] == _KEEP_SIZE:
            return None
        if a[1]:
            raise blind_spot(event, f"with mode {a[1]:#x}", a[0])
        end = a[2] + a[3]

        act = functools.partial(os.posix_fallocate, descriptor, a[2], a[3])
        return keep(Emulation(Truncate(node, end), lambda: then_reply(act))) if end > status.st_size else None


def sync(event: Event, nodes: Nodes, a: list[int]) -> Emulation | None:
    """Emulate fsync and fdatasync, of files and directories; nothing is really flushed."""
    node = node_of_descriptor(event, nodes.find, a[0])
    return None if node is None else Emulation(Sync(node), Reply)  # durability is the model's, not the disk's


def sync_all(_event: Event, _nodes: Nodes, _arguments: list[int]) -> Emulation | None:
    """Emulate sync and syncfs."""
    return Emulation(SyncAll(), Reply)
