"""The mutable part of a container: its Status, its states, its resources."""

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import Any

import msgspec
from msgspec.structs import replace

from limpet.schema.cri import LinuxContainerResources
from limpet.schema.errors import InvalidInputError, quote
from limpet.schema.identity import ProcessIdentity

EXIT_CODE_UNKNOWN = 255
"""Recorded if a container ended and its exit code was not observed (containerd uses the same)."""
EXIT_CODE_START_ERROR = 128
"""Recorded if the container's program could not be started."""


class ContainerState(IntEnum):
    """The CRI's container states, with its numbers (runtime/v1 ContainerState)."""

    CREATED = 0
    RUNNING = 1
    EXITED = 2
    UNKNOWN = 3

    def __str__(self) -> str:
        """Return the name, which is what people put into messages."""
        return self.name

    def __format__(self, spec: str) -> str:
        """Format the name; a spec for integers is taken for the number."""
        return format(self.value if spec[-1:] in {*"bcdoxXn"} else self.name, spec)


def read_state(state: "ContainerState | str | int") -> ContainerState:
    """Return a state that is given as one, as its name in any case (the CRI's too), or as its number.

    Raises InvalidInputError for anything else.
    """
    if isinstance(state, str):
        found = ContainerState.__members__.get(state.upper().removeprefix("CONTAINER_"))
        if found is not None:
            return found
    elif state in list(ContainerState):
        return ContainerState(state)
    names = ", ".join(one.name.lower() for one in ContainerState)
    raise InvalidInputError(f"state {quote(state)}: use one of {names}")


class Reason(StrEnum):
    """Why a container is in its state, as one word."""

    STOPPING = "Stopping"
    """It runs, and was asked to stop: it has time until `Status.stop_deadline`."""
    COMPLETED = "Completed"
    """Exited with code 0."""
    ERROR = "Error"
    """Exited with another code, or by a signal (128 + its number)."""
    START_ERROR = "StartError"
    """Its program could not be started."""
    UNKNOWN = "Unknown"
    """It ended, and its exit code was not observed."""
    REBOOTED = "Rebooted"
    """The machine was rebooted while it ran; its exit code was not observed."""
    BUNDLE_LOST = "BundleLost"
    """Its bundle is missing, incomplete, or no longer ours."""
    CREATE_INTERRUPTED = "CreateInterrupted"
    """The engine ended before the bundle was made."""
    UNVERIFIED = "Unverified"
    """Recovery could not determine the state, or has not examined it yet; the message says why."""
    MONITOR_GONE = "MonitorGone"
    """It runs, and who would have seen how it ends has ended."""
    OOM_KILLED = "OOMKilled"
    """The kernel killed a process of it for want of memory, it has not ended well, and nobody had asked it to stop."""
    DAMAGED = "Damaged"
    """Its record on disk cannot be read."""
    COPIED = "Copied"
    """The state directory is a copy: the container was made, and perhaps started, by the original's engine."""
    NOT_HEARD_OF = "NotHeardOf"
    """Seen from the fleet: its node gives no sign of life, so that nobody vouches for what it wrote last."""
    EXPIRED = "Expired"
    """Its time was over: it is being stopped, or was released."""
    DECLARED_GONE = "DeclaredGone"
    """A person said that no process of it is left; its exit code was not observed."""


_UNOBSERVED = {Reason.UNKNOWN, Reason.REBOOTED, Reason.DECLARED_GONE, Reason.START_ERROR}
"""The reasons of an end with an exit code that no program gave."""
_OUT_OF_MEMORY = (
    "the kernel killed a process of it for want of memory: a memory limit was reached, or the host had none left"
)
_CLOCK_STEP = 10_000_000
"""By so many nanoseconds a file's time, by which an end may be told, can be before the clock's."""


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """The limits requested for a container, and which of them the kernel enforces."""

    requested: LinuxContainerResources
    applied: tuple[str, ...] = ()
    """Names of the fields of `requested` that a cgroup or the kernel enforces."""
    unapplied: dict[str, str] = {}
    """Name of each other requested field, with the reason why it is not enforced."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The mutable part of a container. Times are nanoseconds since the epoch, 0 for "not yet".

    `unknown` is never written to disk: it means that this process has not verified the other fields.
    """

    pid: int = 0
    """The pid of the container's first process while it runs, else 0."""
    created_at: int = 0
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    """Meaningful once `finished_at` is set: the exit code, 128 + signal, or EXIT_CODE_UNKNOWN."""
    reason: str = ""
    message: str = ""
    released: bool = False
    """The release is recorded: the bundle is removed, or recovery will finish removing it."""
    resources: Resources | None = None
    identity: ProcessIdentity | None = None
    """The container's first process; kept after its end, to recognize what remains of it."""
    unapplied: dict[str, str] = {}
    """Name of each field of the config that the container's starter does not carry out, with the reason."""
    stop_requested_at: int = 0
    """When a stop was asked for; kept after the end, which it may explain."""
    stop_deadline: int = 0
    """When what is left of the container is due for SIGKILL, once a stop was asked for."""
    expires_at: int = 0
    """When it is to be stopped and released; 0 for never."""
    paused: bool = False
    """It runs, and its processes are frozen."""
    extra: Mapping[str, Any] = {}
    """What the runtime keeps of its own: a JSON object of at most 64 KiB."""
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


def find_exit_code(status: Status) -> int | None:
    """Return the exit code that was observed; None if it has not ended, nobody saw how, or its program never ran."""
    if status.unknown or not status.finished_at:
        return None
    return None if status.reason in _UNOBSERVED else status.exit_code


def end(
    status: Status, exit_code: int | None, *, finished_at: int, message: str = "", is_out_of_memory: bool = False
) -> Status:
    """Return `status` as ended: with `exit_code`, or with 255 and reason Unknown if it was not observed.

    Of one that is out of memory the kernel has killed a process, at any time of its life. One that ends with 0 all the
    same has lost another than its first, and could do without; so could one that ran until it was asked to stop.
    """
    if exit_code is None:
        reason, code = Reason.UNKNOWN, EXIT_CODE_UNKNOWN
        message = message or "it ended, and its exit code was not observed"
    else:
        reason, code = (Reason.ERROR if exit_code else Reason.COMPLETED), exit_code
    if is_out_of_memory and exit_code:
        was_stopped = bool(status.stop_requested_at) and finished_at + _CLOCK_STEP >= status.stop_requested_at
        reason = Reason.ERROR if was_stopped else Reason.OOM_KILLED
        message = message or f"{'it was asked to stop, and ' if was_stopped else ''}{_OUT_OF_MEMORY}"
    return replace(
        status,
        pid=0,
        paused=False,
        finished_at=max(finished_at, 1),
        exit_code=code,
        reason=reason,
        message=message,
        unknown=False,
    )


def declare_gone(checkpoint: Status, why: str, *, finished_at: int) -> Status:
    """Return `checkpoint` as ended on a person's word: 255, reason DeclaredGone, and `why` as the message.

    How one ended that has ended already is kept: then the word is only that nothing is left of it.
    """
    if checkpoint.finished_at:
        return replace(checkpoint, message=why, unknown=False)
    return replace(end(checkpoint, None, finished_at=finished_at, message=why), reason=Reason.DECLARED_GONE)


def end_never_run(status: Status, why: str, *, finished_at: int) -> Status:
    """Return `status` as ended without its program ever having been executed: code 128, reason StartError."""
    ended = end(status, EXIT_CODE_START_ERROR, finished_at=finished_at, message=f"never ran: {why}")
    return replace(ended, reason=Reason.START_ERROR)


def mark_copied(status: Status, original: str, copy: str) -> Status:
    """Return the RUNNING `status` in a copy of a state directory, marked as a process of the original's."""
    return replace(status, reason=Reason.COPIED, message=f"{copy} is a copy of {original}, which looks after it")
