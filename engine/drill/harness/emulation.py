"""What a stopped system call is about to do to the tree, and how the supervisor does it instead."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from limpet.schema.errors import UnsupportedError
from limpet.testing.nodes import Nodes
from limpet.testing.operations import Operation
from limpet.testing.supervisor import Event

AT_FDCWD: Final = -100
_ITS_OWN: Final = {"/proc/self": "", "/proc/thread-self": "", "/dev/fd": "/fd"}
"""Directories that differ between processes, and their path below the process's own under /proc."""


class BlindSpotError(UnsupportedError):
    """The life changed a file of its directory in a way that is not modelled; the message names it."""


class Reply(NamedTuple):
    """What the stopped call returns: a value, one of our descriptors, or the kernel's own result."""

    value: int = 0
    descriptor: int | None = None
    close_on_exec: bool = False
    let_go: bool = False


@dataclass
class Emulation:
    """An operation that is about to happen: `act` does it, and raises OSError if it fails."""

    operation: Operation
    act: Callable[[], Reply]
    descriptors: list[int] = field(default_factory=list)
    """Our descriptors, to close when the call is answered."""
    put: Callable[[bytes, int], int] | None = None
    """For a Write: write these bytes at this offset and return how many were written."""

    def close(self) -> None:
        """Close the descriptors."""
        while self.descriptors:
            os.close(self.descriptors.pop())


def then_reply(act: Callable[[], None]) -> Reply:
    """Do `act` and return 0 from the call."""
    act()
    return Reply()


def path_of(event: Event, directory: int, address: int) -> str:
    """Return the path as seen from here: through /proc, with the process's root and directories."""
    path = event.read_string(address)
    number = directory & 0xFFFFFFFF
    for prefix, inside in _ITS_OWN.items():
        if path == prefix or path.startswith(f"{prefix}/"):
            return f"/proc/{event.pid}{inside}{path.removeprefix(prefix)}"
    if path.startswith("/"):
        return f"/proc/{event.pid}/root{path}"
    if number == AT_FDCWD & 0xFFFFFFFF:
        return f"/proc/{event.pid}/cwd/{path}"
    return f"/proc/{event.pid}/fd/{number}/{path}" if path else f"/proc/{event.pid}/fd/{number}"


def place_of(nodes: Nodes, path: str) -> tuple[int, int, str] | None:
    """Return a path's directory node, a descriptor of that directory, and the name; None outside the tree."""
    directory, name = os.path.split(path.rstrip("/"))
    if name in {"", ".", ".."}:
        return None
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    parent = nodes.find(os.fstat(descriptor))
    if parent is None:
        os.close(descriptor)
        return None
    return parent, descriptor, name


def node_of_descriptor(event: Event, find: Callable[[os.stat_result], int | None], number: int) -> int | None:
    """Return the node of the process's descriptor `number`, according to `find`. Raises OSError."""
    descriptor = event.descriptor(number & 0xFFFFFFFF)
    try:
        return find(os.fstat(descriptor))
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def closed_unless_kept(descriptors: list[int]) -> Iterator[Callable[[Emulation], Emulation]]:
    """Close the descriptors, unless a plan took them over through the yielded function."""
    emulations: list[Emulation] = []

    def keep(made: Emulation) -> Emulation:
        made.descriptors.extend(descriptors)
        emulations.append(made)
        return made

    try:
        yield keep
    finally:
        if not emulations:
            for descriptor in descriptors:
                os.close(descriptor)


def blind_spot(event: Event, how: str, where: int | str) -> BlindSpotError:
    """Return the error for this call; `where` is a path or a descriptor of the process."""
    path = where if isinstance(where, str) else os.readlink(f"/proc/{event.pid}/fd/{where & 0xFFFFFFFF}")
    return BlindSpotError(f"{event.name} {how} is not modelled: {path}; its effect on a crash cannot be tested")
