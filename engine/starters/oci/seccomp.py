"""Seccomp filters: the profile that the host has installed, or a file, as the runtime-spec wants them.

Profiles are written for many machines and sets of capabilities (the format of Docker and containers-common); what
applies to this machine and this container is chosen here.
"""

import os
import platform
from collections.abc import Collection
from typing import Annotated, Any, Literal

import msgspec

from limpet.recovery.files import read_small_file
from limpet.schema.cri import LinuxContainerSecurityContext, ProfileType
from limpet.schema.decoders import make_decoder
from limpet.schema.errors import InvalidInputError, UnsupportedError, quote_path

DEFAULT_PROFILES = ("/etc/containers/seccomp.json", "/usr/share/containers/seccomp.json")
"""Where the host's default profile is looked for, in this order."""
_PACKAGE = "golang-github-containers-common"
_MOST_BYTES = 4 << 20
_MACHINES = {"x86_64": ("amd64", "SCMP_ARCH_X86_64"), "aarch64": ("arm64", "SCMP_ARCH_AARCH64")}
"""By what uname(2) says: Go's name and libseccomp's."""
_ARCHITECTURES = frozenset(
    f"SCMP_ARCH_{name}"
    for name in (
        "X86", "X86_64", "X32", "ARM", "AARCH64", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64", "MIPSEL64N32",
        "PPC", "PPC64", "PPC64LE", "S390", "S390X", "PARISC", "PARISC64", "RISCV64", "LOONGARCH64", "M68K", "SH",
        "SHEB",
    )
)  # fmt: skip
_Action = Literal[
    "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_TRAP", "SCMP_ACT_ERRNO",
    "SCMP_ACT_TRACE", "SCMP_ACT_ALLOW", "SCMP_ACT_LOG",
]  # fmt: skip
"""Not SCMP_ACT_NOTIFY: nobody listens."""
_Operator = Literal[
    "SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"
]
_Flag = Literal[
    "SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
]  # fmt: skip
_Errno = Annotated[int, msgspec.Meta(ge=0, le=4095)]
_Value = Annotated[int, msgspec.Meta(ge=0)]


class _Condition(msgspec.Struct, frozen=True):
    arches: tuple[str, ...] | None = None
    caps: tuple[str, ...] | None = None


class _Argument(msgspec.Struct, frozen=True, rename="camel"):
    index: Annotated[int, msgspec.Meta(ge=0, le=5)]
    op: _Operator
    value: _Value = 0
    value_two: _Value = 0


class _Rule(msgspec.Struct, frozen=True, rename="camel"):
    action: _Action
    names: tuple[str, ...] | None = None
    name: str = ""
    """An older word for one of `names`."""
    args: tuple[_Argument, ...] | None = None
    errno_ret: _Errno | None = None
    includes: _Condition | None = None
    excludes: _Condition | None = None


class _Machine(msgspec.Struct, frozen=True, rename="camel"):
    architecture: str
    sub_architectures: tuple[str, ...] | None = None


class _Profile(msgspec.Struct, frozen=True, rename="camel"):
    default_action: _Action
    default_errno_ret: _Errno | None = None
    syscalls: tuple[_Rule, ...] | None = None
    arch_map: tuple[_Machine, ...] | None = None
    architectures: tuple[str, ...] | None = None
    flags: tuple[_Flag, ...] | None = None


_profile = make_decoder(_Profile)


def make_seccomp(context: LinuxContainerSecurityContext, capabilities: Collection[str]) -> dict[str, Any] | None:
    """Return the runtime-spec's `seccomp`, None for none: where none is asked for, and for privileged containers.

    Raises InvalidInputError for a profile that cannot be read, UnsupportedError if the host has no default one.
    """
    kind, path = _asked(context)
    if kind is ProfileType.UNCONFINED or context.privileged:
        return None
    if kind is ProfileType.RUNTIME_DEFAULT:
        path = next((each for each in DEFAULT_PROFILES if os.path.exists(each)), "")
        if not path:
            raise UnsupportedError(
                f"seccomp RuntimeDefault: this host has no profile in {DEFAULT_PROFILES[-1]}; on Debian: apt-get"
                f" install {_PACKAGE}"
            )
    if not os.path.isabs(path):
        raise InvalidInputError(f"seccomp.localhost_ref {quote_path(path)}: an absolute path is needed")
    try:
        profile = _profile.decode(read_small_file(os.path.realpath(path), _MOST_BYTES))
        return _resolve(profile, capabilities)
    except OSError as error:
        raise InvalidInputError(f"seccomp profile {quote_path(path)}: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"seccomp profile {quote_path(path)} is none: {error}") from error


def _asked(context: LinuxContainerSecurityContext) -> tuple[ProfileType, str]:
    """Return which profile is asked for, also by the deprecated field, and its path."""
    if context.seccomp is not None:
        return context.seccomp.profile_type, context.seccomp.localhost_ref.removeprefix("localhost/")
    old = context.seccomp_profile_path
    if old in {"", "unconfined"}:
        return ProfileType.UNCONFINED, ""
    if old in {"runtime/default", "docker/default"}:
        return ProfileType.RUNTIME_DEFAULT, ""
    return ProfileType.LOCALHOST, old.removeprefix("localhost/")


def _resolve(profile: _Profile, capabilities: Collection[str]) -> dict[str, Any]:
    """Return what of a profile is for this machine and these capabilities. Raises ValueError."""
    machine, _ = _MACHINES.get(platform.machine(), (platform.machine(), ""))
    architectures = _architectures(profile)
    if unknown := sorted(set(architectures) - _ARCHITECTURES):
        raise ValueError(f"there is no architecture {unknown[0]!r}")
    resolved: dict[str, Any] = {"defaultAction": profile.default_action, "architectures": architectures}
    if profile.default_errno_ret is not None:
        resolved["defaultErrnoRet"] = profile.default_errno_ret
    if profile.flags:
        resolved["flags"] = list(profile.flags)
    rules = [rule for rule in profile.syscalls or () if _applies(rule, machine, capabilities)]
    return {**resolved, "syscalls": [_make_rule(rule) for rule in rules]}


def _make_rule(rule: _Rule) -> dict[str, Any]:
    names = list(rule.names or filter(None, [rule.name]))
    if not names:
        raise ValueError("a rule names no system call")
    made: dict[str, Any] = {"names": names, "action": rule.action}
    if rule.args:
        made["args"] = [msgspec.to_builtins(each) for each in rule.args]
    if rule.errno_ret is not None:
        made["errnoRet"] = rule.errno_ret
    return made


def _architectures(profile: _Profile) -> list[str]:
    _, ours = _MACHINES.get(platform.machine(), ("", ""))
    for each in profile.arch_map or ():
        if each.architecture == ours:
            return [ours, *(each.sub_architectures or ())]
    return list(profile.architectures or ([ours] if ours else []))


def _applies(rule: _Rule, machine: str, capabilities: Collection[str]) -> bool:
    includes, excludes = rule.includes or _Condition(), rule.excludes or _Condition()
    held = {f"CAP_{name}" for name in capabilities}
    if includes.arches and machine not in includes.arches:
        return False
    if not held.issuperset(includes.caps or ()):
        return False
    return machine not in (excludes.arches or ()) and held.isdisjoint(excludes.caps or ())
