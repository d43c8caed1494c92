"""Seccomp filters: the profile that the host has installed, or a file, as the runtime-spec wants them.

Profiles are written for many machines and sets of capabilities (the format of Docker and containers-common); what
applies to this machine and this container is chosen here.
"""

import json
import os
import platform
from collections.abc import Collection, Mapping
from typing import Any

from limpet.recovery.files import read_small_file
from limpet.schema.cri import LinuxContainerSecurityContext, ProfileType
from limpet.schema.errors import InvalidInputError, UnsupportedError, quote_path

DEFAULT_PROFILES = ("/etc/containers/seccomp.json", "/usr/share/containers/seccomp.json")
"""Where the host's default profile is looked for, in this order."""
_PACKAGE = "golang-github-containers-common"
_MOST_BYTES = 4 << 20
_MACHINES = {"x86_64": ("amd64", "SCMP_ARCH_X86_64"), "aarch64": ("arm64", "SCMP_ARCH_AARCH64")}
"""By what uname(2) says: Go's name and libseccomp's."""
_COPIED = ("action", "args", "errnoRet")


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
        profile = json.loads(read_small_file(os.path.realpath(path), _MOST_BYTES))
        return _resolve(profile, capabilities)
    except OSError as error:
        raise InvalidInputError(f"seccomp profile {quote_path(path)}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInputError(f"seccomp profile {quote_path(path)} is none: {error!r}") from error


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


def _resolve(profile: Mapping[str, Any], capabilities: Collection[str]) -> dict[str, Any]:
    machine, _ = _MACHINES.get(platform.machine(), (platform.machine(), ""))
    resolved = {"defaultAction": profile["defaultAction"], "architectures": _architectures(profile)}
    if profile.get("defaultErrnoRet") is not None:
        resolved["defaultErrnoRet"] = profile["defaultErrnoRet"]
    rules = [rule for rule in profile.get("syscalls") or () if _applies(rule, machine, capabilities)]
    resolved["syscalls"] = [
        {
            "names": rule.get("names") or [rule["name"]],
            **{key: rule[key] for key in _COPIED if rule.get(key) is not None},
        }
        for rule in rules
    ]
    return resolved


def _architectures(profile: Mapping[str, Any]) -> list[str]:
    _, ours = _MACHINES.get(platform.machine(), ("", ""))
    for each in profile.get("archMap") or ():
        if each["architecture"] == ours:
            return [ours, *(each.get("subArchitectures") or ())]
    return list(profile.get("architectures") or ([ours] if ours else []))


def _applies(rule: Mapping[str, Any], machine: str, capabilities: Collection[str]) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    held = {f"CAP_{name}" for name in capabilities}
    if includes.get("arches") and machine not in includes["arches"]:
        return False
    if not held.issuperset(includes.get("caps") or ()):
        return False
    return machine not in (excludes.get("arches") or ()) and held.isdisjoint(excludes.get("caps") or ())
