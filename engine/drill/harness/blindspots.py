"""Calls that can change a file of the tree unseen: each raises BlindSpotError if it would, otherwise nothing."""

import os
from typing import Final

from limpet.testing.emulation import BlindSpotError, blind_spot, node_of_descriptor
from limpet.testing.nodes import Nodes
from limpet.testing.supervisor import Event

_PROT_WRITE: Final = 2


def map_file(event: Event, nodes: Nodes, a: list[int]) -> None:
    """Refuse to map a file of the tree shared and writable (mmap)."""
    if node_of_descriptor(event, nodes.find_durable, a[4]) is None:
        return
    if a[2] & _PROT_WRITE:
        raise blind_spot(event, "shared and writable", a[4])
    nodes.shared_mappings = True


def protect(event: Event, nodes: Nodes, a: list[int]) -> None:
    """Refuse to make a shared mapping of a file of the tree writable (mprotect)."""
    if not nodes.shared_mappings:
        return
    with open(f"/proc/{event.pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            span, rights, *rest = line.rstrip("\n").split(maxsplit=5)
            start, end = (int(bound, 16) for bound in span.split("-"))
            overlaps = start < a[0] + a[1] and a[0] < end
            path = rest[-1]
            if not (overlaps and rights.endswith("s") and os.path.exists(path)):
                continue
            if nodes.find_durable(os.stat(path)) is not None:
                raise blind_spot(event, "that makes a shared mapping writable", path)


def into_descriptor(event: Event, nodes: Nodes, number: int) -> None:
    """Refuse calls that change a file of the tree without passing the data through the process."""
    if node_of_descriptor(event, nodes.find_durable, number) is not None:
        raise blind_spot(event, "into a file", number)


def attribute(event: Event, nodes: Nodes, path: str) -> None:
    """Refuse to set or remove extended attributes in the tree."""
    if nodes.find(os.stat(path)) is not None:
        raise blind_spot(event, "(extended attributes)", path)


def anywhere(event: Event, _nodes: Nodes, _arguments: list[int]) -> None:
    """Refuse a call whose target cannot be seen."""
    raise BlindSpotError(f"{event.name} by process {event.pid}: its writes cannot be seen")
