"""A container's past, as the log of changes tells it: its state changes."""

import msgspec

from limpet.schema.status import ContainerState

KEPT_TRANSITIONS = 64
"""How many state changes of each container are kept; older ones are dropped as newer ones come."""


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """One change of a container's state."""

    number: int
    """Counts the container's transitions from 1, without a gap."""
    seq: int
    """The checkpoint that made it."""
    at: int
    """Nanoseconds since the epoch."""
    state: ContainerState
    exit_code: int
    reason: str
    message: str
