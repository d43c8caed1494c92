"""What a config asks for and this starter does not do: a table of fields, each with the reason."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from limpet.engine.starters.contract import Launch
from limpet.engine.starters.process.accounts import RootAccounts
from limpet.engine.starters.propagation import owns_mounts, read_propagation
from limpet.engine.starters.users import Rights, choose_user, has_capability, may_set_groups
from limpet.schema.cri import (
    ContainerConfig,
    LinuxContainerSecurityContext,
    MountPropagation,
    NamespaceMode,
    NamespaceOption,
    ProfileType,
    SecurityProfile,
    SupplementalGroupsPolicy,
)
from limpet.schema.layout import ROOTFS

_CAP_SYS_ADMIN = 21


@dataclass(frozen=True)
class Abilities:
    """What the containers of this process can have."""

    own_mounts: bool
    """A mount namespace, in a container with a root of its own."""
    own_hostname: bool
    """A UTS namespace."""
    shared_mounts: bool
    """Mounts that reach the host, which a user namespace keeps apart."""


def find_abilities() -> Abilities:
    """Return what this process's user and capabilities allow."""
    if os.geteuid():
        return Abilities(own_mounts=True, own_hostname=False, shared_mounts=False)
    is_admin = has_capability(_CAP_SYS_ADMIN)
    return Abilities(own_mounts=is_admin, own_hostname=is_admin, shared_mounts=is_admin and owns_mounts())


def find_unapplied(launch: Launch, abilities: Abilities) -> dict[str, str]:
    """Return the name of each field that asks for what is not done, and why; a sandbox's with "sandbox." before it."""
    config, image = launch.metadata.config, launch.metadata.image_manifest
    places: dict[str, Any] = {
        "": config,
        "security": config.linux and config.linux.security_context,
        "sandbox": launch.sandbox and launch.sandbox.config,
        "sandbox.linux": launch.sandbox and launch.sandbox.config.linux,
    }
    found = {}
    for place, prefix, name, why, asks in _FIELDS:
        message = places[place]
        if message is not None and asks(getattr(message, name)):
            found[prefix + _written_name(message, name)] = why
    has_mounts = not image.is_builtin and abilities.own_mounts
    if config.mounts and not has_mounts:
        found["mounts"] = (
            "no mount namespace: it needs an image with layers, and root's CAP_SYS_ADMIN or a user namespace"
        )
    for name, why in _MOUNT_FIELDS.items() if has_mounts else ():
        if any(getattr(mount, name) for mount in config.mounts):
            found[f"mounts.{name}"] = why
    lost = _find_lost_propagation(config, abilities) if has_mounts else ""
    if lost:
        found["mounts.propagation"] = lost
    found |= _find_of_sandbox(launch, abilities)
    if _has_groups(launch) and not may_set_groups():
        found["supplemental_groups_policy"] = "the groups that /etc/group gives need root that may set them"
    return found


def _find_of_sandbox(launch: Launch, abilities: Abilities) -> dict[str, str]:
    found = {}
    if launch.namespaces:
        found["sandbox.namespaces"] = _HOST_NAMESPACES
    if launch.sandbox and launch.sandbox.config.hostname and not abilities.own_hostname:
        found["sandbox.hostname"] = "it takes CAP_SYS_ADMIN"
    if (
        launch.sandbox
        and launch.metadata.image_manifest.is_builtin
        and _holds_anything(launch.sandbox.config.dns_config)
    ):
        found["sandbox.dns_config"] = "the host image uses the host's /etc/resolv.conf"
    return found


def _has_groups(launch: Launch) -> bool:
    """Say whether /etc/group of an image that is unpacked already gives the program's user groups."""
    root = os.path.join(launch.bundle_path, ROOTFS)
    config, image = launch.metadata.config, launch.metadata.image_manifest
    if image.is_builtin or not os.path.isdir(root):
        return False
    accounts = RootAccounts(root)
    _, account = choose_user(image.config, config, accounts, Rights.of_this_process(has_own_root=True))
    context = (config.linux and config.linux.security_context) or LinuxContainerSecurityContext()
    is_merge = context.supplemental_groups_policy is SupplementalGroupsPolicy.MERGE
    return is_merge and account is not None and bool(accounts.groups_of(account))


def _find_lost_propagation(config: ContainerConfig, abilities: Abilities) -> str:
    """Return why what is mounted later does not get where a config asks for it, "" if it does."""
    asked = [(mount.host_path, mount.propagation) for mount in config.mounts if mount.image is None]
    if any(propagation is MountPropagation.BIDIRECTIONAL for _, propagation in asked) and not abilities.shared_mounts:
        return "what is mounted in a user namespace does not reach the host"
    for path, propagation in asked:
        found = "" if propagation is MountPropagation.PRIVATE else read_propagation(path)
        if found is None:
            continue  # what is not there is refused by its own name
        if propagation is MountPropagation.BIDIRECTIONAL and "shared:" not in found:
            return f"{path} is on no shared mount of the host"
        if propagation is MountPropagation.HOST_TO_CONTAINER and "shared:" not in found and "master:" not in found:
            return f"{path} is on no shared mount of the host, nor on one that follows one"
    return ""


def _any(value: object) -> bool:
    return bool(value)


def _holds_anything(message: msgspec.Struct | None) -> bool:
    return message is not None and message != type(message)()


def _wants_namespaces(options: NamespaceOption | None) -> bool:
    modes = () if options is None else (options.network, options.pid, options.ipc)
    return any(mode is not NamespaceMode.NODE for mode in modes) or bool(options and options.userns_options)


def _wants_profile(profile: SecurityProfile | None) -> bool:
    return profile is not None and profile.profile_type is not ProfileType.UNCONFINED


def _is_confined(profile: str) -> bool:
    return profile not in {"", "unconfined"}


def _is_given(message: object) -> bool:
    return message is not None


_HOST_NAMESPACES = "the host's network, pid and IPC namespaces are used"
_FIELDS: tuple[tuple[str, str, str, str, Callable[[Any], bool]], ...] = (
    ("", "", "devices", "devices of the host are not handed on", _any),
    ("", "", "cdi_devices", "devices of the host are not handed on", _any),
    ("", "", "stdin", "standard input is /dev/null", _any),
    ("", "", "stdin_once", "standard input is /dev/null", _any),
    ("", "", "tty", "there is no terminal", _any),
    ("", "", "windows", "this is Linux", _is_given),
    ("security", "", "capabilities", "a program has the capabilities of its user", _holds_anything),
    ("security", "", "privileged", "a program has the capabilities of its user, and the usual devices", _any),
    ("security", "", "namespace_options", _HOST_NAMESPACES, _wants_namespaces),
    ("security", "", "selinux_options", "no label is set", _holds_anything),
    ("security", "", "readonly_rootfs", "the root can be written", _any),
    ("security", "", "masked_paths", "nothing in /proc is hidden", _any),
    ("security", "", "readonly_paths", "nothing in /proc is made read-only", _any),
    ("security", "", "seccomp", "no seccomp filter is set", _wants_profile),
    ("security", "", "seccomp_profile_path", "no seccomp filter is set", _is_confined),
    ("security", "", "apparmor", "no AppArmor profile is set", _wants_profile),
    ("security", "", "apparmor_profile", "no AppArmor profile is set", _is_confined),
    ("sandbox", "sandbox.", "port_mappings", "programs listen on the host's own ports", _any),
    ("sandbox", "sandbox.", "windows", "this is Linux", _is_given),
    ("sandbox.linux", "sandbox.", "cgroup_parent", "a container's cgroup is below the engine's own", _any),
    ("sandbox.linux", "sandbox.", "security_context", "a sandbox has no process of its own", _holds_anything),
    ("sandbox.linux", "sandbox.", "sysctls", _HOST_NAMESPACES, _any),
    ("sandbox.linux", "sandbox.", "overhead", "limits are those of each container", _holds_anything),
    ("sandbox.linux", "sandbox.", "resources", "limits are those of each container", _holds_anything),
)
"""Where the field is, what its name begins with, the field, why it is not done, and which values ask for something."""

_MOUNT_FIELDS: Mapping[str, str] = {
    "selinux_relabel": "no label is set",
    "uid_mappings": "owners are those of the host",
    "gid_mappings": "owners are those of the host",
    "recursive_read_only": "what is mounted below it can be written",
    "image": "an image cannot be mounted in a container",
    "image_sub_path": "an image cannot be mounted in a container",
}


def _written_name(message: msgspec.Struct, name: str) -> str:
    """Return the field's name as JSON has it."""
    return next(field.encode_name for field in msgspec.structs.fields(message) if field.name == name)
