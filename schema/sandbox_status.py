"""The mutable part of a sandbox: its Status, READY or NOTREADY."""

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import Any

import msgspec
from msgspec.structs import replace


class SandboxState(IntEnum):
    """The CRI's sandbox states, with its numbers (runtime/v1 PodSandboxState)."""

    READY = 0
    NOTREADY = 1

    def __str__(self) -> str:
        return self.name


class SandboxReason(StrEnum):
    """Why a sandbox is NOTREADY, as one word."""

    STOPPED = "Stopped"
    """It was stopped."""
    EXPIRED = "Expired"
    """Its time was over."""
    REBOOTED = "Rebooted"
    """The machine was rebooted: nothing that a sandbox holds outlives that."""
    LOST = "Lost"
    """What it held was taken away, such as its namespaces."""
    COPIED = "Copied"
    """The state directory is a copy: what the sandbox holds is the original's."""


class SandboxStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The mutable part of a sandbox. Times are nanoseconds since the epoch, 0 for "not yet" or "never"."""

    stopped_at: int = 0
    """Since when it is NOTREADY. It takes no new containers from then on, and never becomes READY again."""
    reason: str = ""
    message: str = ""
    boot_id: str = ""
    """The boot in which it was made ready (/proc/sys/kernel/random/boot_id); empty if that is not known."""
    namespaces: Mapping[str, str] = {}
    """The path of each namespace that it holds, by type as in the OCI runtime spec: network, ipc, uts, pid."""
    addresses: tuple[str, ...] = ()
    """Its IP addresses, the CRI's primary one first."""
    extra: Mapping[str, Any] = {}
    """What the runtime keeps of its own: a JSON object of at most 64 KiB."""
    expires_at: int = 0
    """When it is to be stopped and removed; 0 for never."""

    @property
    def state(self) -> SandboxState:
        """NOTREADY once it was stopped."""
        return SandboxState.NOTREADY if self.stopped_at else SandboxState.READY


def stop_sandbox(status: SandboxStatus, reason: SandboxReason, *, at: int, message: str = "") -> SandboxStatus:
    """Return `status` as NOTREADY; one that was so already stays as it is."""
    if status.stopped_at:
        return status
    return replace(status, stopped_at=max(at, 1), reason=reason, message=message)
