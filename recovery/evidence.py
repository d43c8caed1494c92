"""The basis of a verdict: the checkpoint (what was recorded) and the observation (what was seen)."""

from enum import StrEnum

import msgspec

from limpet.schema.identity import ProcessIdentity
from limpet.schema.status import ContainerState, Status, state_at


class Stage(StrEnum):
    """How far a container had come, according to its record on disk."""

    NEW = "new"
    """It has a row; nothing more was acknowledged."""
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
    """What happened to the process that the checkpoint names."""

    NONE = "none"
    """The checkpoint names no process."""
    ALIVE = "alive"
    """The same process is running now."""
    HELD = "held"
    """It was made, and is held before its program is executed; who would let it go is gone."""
    PAUSED = "paused"
    """The same process is there, and is frozen."""
    MONITOR_GONE = "monitor gone"
    """The same process is running now; what should have recorded how it ends is gone."""
    ENDED = "ended"
    """It ended, and its exit code was observed: from the kernel, or from an exit record."""
    NEVER_RAN = "never ran"
    """Its program was never executed: what was made for it ended before that."""
    GONE = "gone"
    """No process has its pid, or it ended and left no exit code; or its pid namespace is shown to be over."""
    STRANGER = "stranger"
    """Its pid belongs to another process now."""
    UNPROVEN = "unproven"
    """A process has its pid and start time, but this kernel gives no proof that it is the same."""
    HIDDEN = "hidden"
    """We are not allowed to look."""
    ELSEWHERE = "elsewhere"
    """It was identified in another pid namespace, so its pid has no meaning here."""
    ORIGINAL = "of the original"
    """It was started from another state directory, of which this one is a copy."""


class Bundle(StrEnum):
    """What happened to the container's bundle directory."""

    NOT_KEPT = "not kept"
    """Limpet keeps no bundle for this container."""
    WHOLE = "whole"
    PARTIAL = "partial"
    """It is ours, but incomplete."""
    ABSENT = "absent"
    FOREIGN = "foreign"
    """Something is there that limpet did not create for this container."""
    HIDDEN = "hidden"
    """We are not allowed to look."""


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe saw, without changing anything."""

    boot: Boot
    process: Process
    bundle: Bundle = Bundle.NOT_KEPT
    identity: ProcessIdentity | None = None
    """With Process.ALIVE and the like, if the checkpoint does not name the process: its identity."""
    started_at: int = 0
    """With Process.ALIVE and the like, if not in the checkpoint: nanoseconds since the epoch."""
    exit_code: int | None = None
    """With Process.ENDED: the exit code; 128 + signal if a signal ended it."""
    finished_at: int = 0
    """When it ended, if an exit record has that: nanoseconds since the epoch."""
    is_out_of_memory: bool = False
    """With Process.ENDED: the kernel has killed a process of it for want of memory."""
    detail: str = ""
    """What prevented a closer look; with Process.NEVER_RAN, why its program was not executed."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """The facts that the rules match."""

    stage: Stage
    boot: Boot
    process: Process
    bundle: Bundle


def classify(status: Status) -> Stage:
    """Return how far the container had come according to `status`, as read from disk."""
    if status.released:
        return Stage.RELEASED
    return _STAGES[state_at(status.created_at, status.started_at, status.finished_at)]


_STAGES = {
    ContainerState.UNKNOWN: Stage.NEW,
    ContainerState.CREATED: Stage.CREATED,
    ContainerState.RUNNING: Stage.RUNNING,
    ContainerState.EXITED: Stage.EXITED,
}
