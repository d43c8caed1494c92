"""What the log of changes says: one event for each change that a watcher wants to know of."""

from collections.abc import Mapping
from enum import StrEnum

import msgspec

from limpet.schema.sandbox_status import SandboxState, SandboxStatus
from limpet.schema.status import ContainerState, Status


class EventKind(StrEnum):
    """What has changed. The first word is of what; without one it is a container."""

    ADDED = "added"
    """A container was added."""
    STATE = "state"
    """A container's state has changed, or it was released."""
    PAUSED = "paused"
    """A container's processes were frozen, or go on: see its `status`."""
    INTENT = "intent"
    """What is to be done with a container was decided: that it is to stop, or when it expires."""
    EXTRA = "extra"
    """What the runtime keeps of its own with a container has changed."""
    DELETED = "deleted"
    """A container was deleted; the event has its last status."""
    SANDBOX_ADDED = "sandbox-added"
    SANDBOX_CHANGED = "sandbox-changed"
    """A sandbox's status has changed."""
    SANDBOX_DELETED = "sandbox-deleted"
    """A sandbox was deleted; the event has its last status."""
    ITEM_PUT = "item-put"
    """A value of the runtime's own was put; `seq` is its version, `name` its kind, `id` its key."""
    ITEM_DELETED = "item-deleted"


STATE_CHANGES = (EventKind.ADDED, EventKind.STATE)
"""The kinds that a container's history is made of."""
ENDINGS = (EventKind.DELETED, EventKind.SANDBOX_DELETED)
OF_SANDBOXES = (EventKind.SANDBOX_ADDED, EventKind.SANDBOX_CHANGED, EventKind.SANDBOX_DELETED)
OF_ITEMS = (EventKind.ITEM_PUT, EventKind.ITEM_DELETED)


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One change, as it was written together with what changed.

    What is kept as `extra`, and the values of items, are not repeated here, except the `extra` of what was deleted.
    """

    revision: int
    """Numbers the events of a node from 1, without a gap; it is never used twice."""
    commit: int
    """The revision of the last event of the same transaction: all of these became durable together."""
    at: int
    """When it was written: nanoseconds since the epoch, by a clock that may be set back."""
    kind: EventKind
    id: str
    """Of the container or the sandbox; the key of an item."""
    sandbox_id: str
    """The container's sandbox; of a sandbox its own id; empty for an item."""
    name: str
    """Of the container or the sandbox; the kind of an item."""
    labels: Mapping[str, str]
    seq: int = 0
    """The version that it has made of the container's or sandbox's status, or of the item."""
    number: int = 0
    """How many state changes the container has had so far."""
    state: ContainerState | SandboxState | None = None
    """The state on disk from then on; None for an item."""
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    status: Status | None = None
    """The container's status from then on; None where an older limpet wrote the event, or it was damaged."""
    sandbox_status: SandboxStatus | None = None
    """The sandbox's status from then on; None where it was damaged."""

    @property
    def is_last(self) -> bool:
        """True if the transaction that it is of ends with it."""
        return self.revision == self.commit
