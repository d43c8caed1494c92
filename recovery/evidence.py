"""What a verdict rests on: the checkpoint (what was recorded) and the observation (what was seen)."""

from enum import StrEnum

import msgspec

from limpet.schema.identity import ProcessIdentity
from limpet.schema.status import ContainerState, Status, state_at


class Checkpoint(StrEnum):
    """How far a container had come, as its record on disk says."""

    NEW = "new"
    """It has a row, and nothing more was acknowledged."""
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"
    RELEASED = "released"
    DAMAGED = "damaged"
    """Its record cannot be read."""


class Boot(StrEnum):
    """Whether the machine is in the same boot as when the checkpoint's process was identified."""

    SAME = "same"
    CHANGED = "changed"
    UNREADABLE = "unreadable"


class Process(StrEnum):
    """What became of the process that the checkpoint names."""

    NONE = "none"
    """The checkpoint names none."""
    ALIVE = "alive"
    """The very one, running now."""
    ENDED = "ended"
    """It ended, and its exit code was observed: from the kernel, or from an exit record."""
    GONE = "gone"
    """No process has its pid, or it ended and left no exit code."""
    STRANGER = "stranger"
    """Its pid belongs to another process now."""
    UNPROVEN = "unproven"
    """A process has its pid and start time, but this kernel gives no proof that it is the same."""
    HIDDEN = "hidden"
    """We may not look."""
    ELSEWHERE = "elsewhere"
    """It was identified in another pid namespace; its pid means nothing here."""


class Bundle(StrEnum):
    """What became of the container's bundle directory."""

    NOT_KEPT = "not kept"
    """This container has no bundle with us."""
    WHOLE = "whole"
    PARTIAL = "partial"
    """Ours, but half-made or half-removed."""
    ABSENT = "absent"
    FOREIGN = "foreign"
    """Something is there that we did not make for this container."""
    HIDDEN = "hidden"
    """We may not look."""


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe saw, without touching anything."""

    boot: Boot
    process: Process
    bundle: Bundle = Bundle.NOT_KEPT
    identity: ProcessIdentity | None = None
    """With Process.ALIVE, where the checkpoint does not name the process: who it is."""
    started_at: int = 0
    """With Process.ALIVE, where the checkpoint does not tell: nanoseconds since the epoch."""
    exit_code: int | None = None
    """With Process.ENDED: the code, 128 + signal where a signal ended it."""
    finished_at: int = 0
    """With Process.ENDED, where an exit record tells it: nanoseconds since the epoch."""
    detail: str = ""
    """What stood in the way of seeing more, in words."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """The facts that the rules look at."""

    checkpoint: Checkpoint
    boot: Boot
    process: Process
    bundle: Bundle


def classify(status: Status) -> Checkpoint:
    """Return how far the container had come according to `status` as it was on disk."""
    if status.released:
        return Checkpoint.RELEASED
    return _CHECKPOINTS[state_at(status.created_at, status.started_at, status.finished_at)]


_CHECKPOINTS = {
    ContainerState.UNKNOWN: Checkpoint.NEW,
    ContainerState.CREATED: Checkpoint.CREATED,
    ContainerState.RUNNING: Checkpoint.RUNNING,
    ContainerState.EXITED: Checkpoint.EXITED,
}
