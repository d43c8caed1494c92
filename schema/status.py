"""What changes in a container's life: its Status, the states it passes through, its resources."""

from enum import IntEnum, StrEnum

import msgspec

from limpet.schema.cri import LinuxContainerResources
from limpet.schema.identity import ProcessIdentity

EXIT_CODE_UNKNOWN = 255
"""Written where a container ended and nobody observed its exit code (containerd uses the same)."""
EXIT_CODE_START_ERROR = 128
"""Written where the container's program could not be started."""


class ContainerState(IntEnum):
    """The states of the CRI, with its numbers (runtime/v1 ContainerState)."""

    CREATED = 0
    RUNNING = 1
    EXITED = 2
    UNKNOWN = 3


class Reason(StrEnum):
    """Why a container is in its state, in one word."""

    COMPLETED = "Completed"
    """Exited with code 0."""
    ERROR = "Error"
    """Exited with another code, or by a signal (128 + its number)."""
    START_ERROR = "StartError"
    """Its program could not be started."""
    UNKNOWN = "Unknown"
    """It ended, and its exit code was not observed."""
    REBOOTED = "Rebooted"
    """The machine was rebooted under it; its exit code was not observed."""
    BUNDLE_LOST = "BundleLost"
    """Its bundle is gone, half there, or not ours any more."""
    CREATE_INTERRUPTED = "CreateInterrupted"
    """The engine ended before the bundle was made."""
    UNVERIFIED = "Unverified"
    """Recovery could not find out, or has not looked yet; the message says why."""
    DAMAGED = "Damaged"
    """Its record on disk cannot be read."""


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """The limits a container was asked to have, and which of them the kernel enforces."""

    requested: LinuxContainerResources
    applied: tuple[str, ...] = ()
    """Names of the fields of `requested` that a cgroup (or the kernel) enforces."""
    unapplied: dict[str, str] = {}
    """Name of each other field that was asked for, with the reason why it is not enforced."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The mutable part of a container. Times are nanoseconds since the epoch, 0 for "not yet".

    `unknown` is never written to disk: it says that this process has not verified what the other fields say.
    """

    pid: int = 0
    """Of the container's first process while it runs, else 0."""
    created_at: int = 0
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    """Means something once `finished_at` is set: the exit code, 128 + signal, or EXIT_CODE_UNKNOWN."""
    reason: str = ""
    message: str = ""
    released: bool = False
    """Release was decided: the bundle is removed, or recovery will finish removing it."""
    resources: Resources | None = None
    identity: ProcessIdentity | None = None
    """The process that the container was started as; kept after its end, to recognize what is left of it."""
    unknown: bool = False

    @property
    def state(self) -> ContainerState:
        """Unknown flag first, then finished, started, created; else UNKNOWN."""
        if self.unknown:
            return ContainerState.UNKNOWN
        return state_at(self.created_at, self.started_at, self.finished_at)


def state_at(created_at: int, started_at: int, finished_at: int) -> ContainerState:
    """Return the state that these times tell, each 0 for "not yet"; UNKNOWN if it was never created."""
    if finished_at:
        return ContainerState.EXITED
    if started_at:
        return ContainerState.RUNNING
    return ContainerState.CREATED if created_at else ContainerState.UNKNOWN
