"""The mutable part of a sandbox: its Status, READY or NOTREADY."""

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import Any

import msgspec
from msgspec.structs import replace

from limpet.schema.errors import InvalidInputError, quote, quote_path

NAMESPACE_TYPES = ("network", "ipc", "uts", "pid", "mount", "user", "cgroup", "time")
"""As the OCI runtime spec calls them."""


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
    """The path of each namespace that it holds, by its type: see NAMESPACE_TYPES."""
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


def require_namespaces(namespaces: Mapping[str, object], known: Mapping[str, str] | None = None) -> None:
    """Raise InvalidInputError for a namespace of no type there is, or at no path; those that are `known` may stay."""
    if not isinstance(namespaces, Mapping):
        raise InvalidInputError(f"namespaces {quote(namespaces)}: give a mapping from types to paths")
    for kind, path in namespaces.items():
        if known is not None and kind in known and known[kind] == path:
            continue
        if kind not in NAMESPACE_TYPES:
            raise InvalidInputError(f"namespaces {quote(kind)}: there is no such type; it is {_list_types()}")
        if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
            raise InvalidInputError(f"namespaces {quote(kind)}: {quote_path(path)} is no absolute path")


def _list_types() -> str:
    return f"{', '.join(NAMESPACE_TYPES[:-1])} or {NAMESPACE_TYPES[-1]}"
