"""Capabilities (capabilities(7)): those that a container has by default, and what its config adds and drops."""

import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from limpet.schema.cri import Capability
from limpet.schema.errors import InvalidInputError, quote

DEFAULT = (
    "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
    "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
)  # fmt: skip
"""Docker's, containerd's and CRI-O's default."""
_NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip
"""By their numbers, from 0."""
_ATTRIBUTE = struct.Struct("<5I")
_VERSION_2, _EFFECTIVE = 0x02000000, 1


@cache
def available() -> tuple[str, ...]:
    """Return the capabilities that this process may hand on: a runtime refuses any other."""
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        bits = next(int(line.split()[1], 16) for line in file if line.startswith("CapBnd:"))
    return tuple(name for number, name in enumerate(_NAMES) if bits >> number & 1)


def choose(asked: Capability, *, privileged: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the capabilities of a container, and those that its program has as another user, too (ambient ones).

    Raises InvalidInputError for a name that is none. What this process does not have is left out; see `find_missing`.
    """
    add, drop, ambient = _normalize(asked)
    if privileged:
        return available(), tuple(name for name in ambient if name in available())
    chosen = set() if "ALL" in drop else set(DEFAULT)
    if "ALL" in add:
        chosen = set(_NAMES)
    chosen = (chosen - set(drop)) | (set(add) - {"ALL"}) | set(ambient)
    have = set(available())
    return tuple(name for name in _NAMES if name in chosen & have), tuple(name for name in ambient if name in have)


def find_missing(asked: Capability) -> tuple[str, ...]:
    """Return the capabilities that are asked for by name and that this process does not have itself."""
    add, _, ambient = _normalize(asked)
    return tuple(name for name in dict.fromkeys((*add, *ambient)) if name not in {"ALL", *available()})


def find_undropped(asked: Capability) -> tuple[str, ...]:
    """Return the capabilities that are to be dropped and are added as well, or ambient: those are had."""
    add, drop, ambient = _normalize(asked)
    return tuple(name for name in dict.fromkeys(drop) if name in {*add, *ambient})


def to_spec(chosen: Sequence[str], ambient: Sequence[str], *, is_root: bool) -> dict[str, Any]:
    """Return the runtime-spec's `capabilities`. A program of another user than root has only the ambient ones."""
    bounding, kept = _prefix(chosen), _prefix(ambient)
    effective = bounding if is_root else kept
    spec = {"bounding": bounding, "effective": effective, "permitted": effective}
    return {**spec, "inheritable": kept, "ambient": kept} if kept else spec


def find_not_given(attribute: bytes, spec: Mapping[str, Sequence[str]]) -> list[str]:
    """Return which capabilities of a program's file execve(2) refuses it for, with the runtime-spec's `capabilities`.

    A file's "effective" flag says that its program counts on all that the file permits: it is not begun with fewer.
    `attribute` is the file's security.capability (capabilities(7)); one of another user namespace's says nothing.
    """
    if len(attribute) != _ATTRIBUTE.size:
        return []
    kind, permitted, inheritable, more_permitted, more_inheritable = _ATTRIBUTE.unpack(attribute)
    if kind != _VERSION_2 | _EFFECTIVE:
        return []
    bounding, inherited = (set(spec.get(name, ())) for name in ("bounding", "inheritable"))
    lost = []
    for number, name in enumerate(_prefix(_NAMES)):
        is_permitted = (permitted | more_permitted << 32) >> number & 1
        is_inherited = name in inherited and (inheritable | more_inheritable << 32) >> number & 1
        if is_permitted and not is_inherited and name not in bounding:
            lost.append(name)
    return lost


def _normalize(asked: Capability) -> tuple[list[str], list[str], list[str]]:
    found = []
    for field in ("add_capabilities", "drop_capabilities", "add_ambient_capabilities"):
        names = [name.upper().removeprefix("CAP_") for name in getattr(asked, field)]
        for name in names:
            if name not in _NAMES and (name != "ALL" or field == "add_ambient_capabilities"):
                raise InvalidInputError(f"capabilities.{field} {quote(name)}: no such capability; see capabilities(7)")
        found.append(names)
    return found[0], found[1], found[2]


def _prefix(names: Iterable[str]) -> list[str]:
    return [f"CAP_{name}" for name in names]
