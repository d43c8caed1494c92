"""What a config asks for and an OCI runtime under limpet does not do: each field by name, with the reason."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from limpet.engine.starters.contract import Launch
from limpet.engine.starters.oci.annotations import find_orders
from limpet.engine.starters.oci.apparmor import choose_apparmor
from limpet.engine.starters.oci.capabilities import choose, find_missing, find_undropped
from limpet.engine.starters.oci.mounts import find_lost_propagation, mounts_of, place_of
from limpet.engine.starters.oci.namespaces import (
    JOINED,
    config_in_sandbox,
    mode_of,
    options_of,
    options_of_sandbox,
)
from limpet.engine.starters.oci.resources import find_unapplied_limits, find_unrestricted
from limpet.engine.starters.oci.rootless import is_rootless, name_engine
from limpet.engine.starters.oci.sandboxes import choose_kinds
from limpet.engine.starters.oci.spec import explain_sysctls, security_of
from limpet.engine.starters.propagation import owns_mounts
from limpet.schema.cri import (
    Capability,
    ContainerConfig,
    LinuxContainerSecurityContext,
    LinuxSandboxSecurityContext,
    MountPropagation,
    NamespaceMode,
    NamespaceOption,
    ProfileType,
)

_MOUNT_FIELDS: Mapping[str, str] = {
    "selinux_relabel": "no label is set",
    "uid_mappings": "owners are those of the host",
    "gid_mappings": "owners are those of the host",
    "image": "an image cannot be mounted in a container",
    "image_sub_path": "an image cannot be mounted in a container",
}
_NO_PROCESS = "a sandbox has no process of its own"
_HOST_USERS = "its users are those of the host"
_EACH = "limits are those of each container"


def find_unapplied(launch: Launch, *, is_unified: bool, is_apart: bool, kind: str) -> dict[str, str]:
    """Return the name of each field that asks for what is not done, and why; a sandbox's with "sandbox." before it.

    `is_apart` says that the runtime works in a mount namespace of its own, so that nothing mounted reaches the host.
    `kind` is the runtime's.
    """
    config, context = launch.metadata.config, security_of(launch.metadata.config)
    found = {name: why for name, why, asks in _FIELDS if asks(config)}
    found |= _find_of_security(context)
    for name, why in _MOUNT_FIELDS.items():
        if any(getattr(mount, name) for mount in config.mounts):
            found[f"mounts.{name}"] = why
    if lost := _find_lost(config, is_apart=is_apart):
        found["mounts.propagation"] = lost
    if context.readonly_rootfs and _has_volumes(launch):
        found["image.volumes"] = "they are read-only, as the root is: nothing is mounted there"
    orders = find_orders(config)
    if orders:
        found["annotations"] = orders
    chosen, _ = choose(context.capabilities or Capability(), privileged=context.privileged)
    if why := find_unrestricted(config, privileged=context.privileged, kind=kind, makes_nodes="MKNOD" in chosen):
        found["devices.permissions"] = why
    found |= _find_namespaces(launch)
    others = [kind for kind in launch.namespaces if kind not in JOINED]
    if others:
        found["sandbox.namespaces"] = f"it joins none of type {' or '.join(others)}"
    limits = config.linux.resources if config.linux else None
    if limits:
        found |= find_unapplied_limits(limits, is_unified=is_unified)
    return found | _find_of_sandbox(launch)


def _find_lost(config: ContainerConfig, *, is_apart: bool) -> str:
    """Return why what is mounted later does not get where the config asks for it, "" if it does."""
    if any(mount.propagation is MountPropagation.BIDIRECTIONAL for mount in mounts_of(config)):
        if is_apart:
            return "crun works in a mount namespace of its own here, so nothing that is mounted reaches the host"
        if os.geteuid() != 0 or not owns_mounts():
            return "what is mounted in a user namespace does not reach the host"
    return next(filter(None, map(find_lost_propagation, mounts_of(config))), "")


def _has_volumes(launch: Launch) -> bool:
    """Return whether the image has volumes at which the config mounts nothing."""
    mounted = [place_of(mount.container_path) for mount in mounts_of(launch.metadata.config)]
    return any(place_of(each) not in mounted for each in launch.metadata.image_manifest.config.volumes)


def _find_of_security(context: LinuxContainerSecurityContext) -> dict[str, str]:
    found = {name: why for name, why, asks in _SECURITY if asks(context)}
    if not choose_apparmor(context):
        found |= {name: _NO_APPARMOR for name, asks in _APPARMOR if asks(context)}
    if why := _find_other_capabilities(context.capabilities or Capability()):
        found["capabilities"] = why
    if context.privileged:
        found |= {name: _PRIVILEGED for name, asks in _NOT_PRIVILEGED if asks(context)}
    return found


def _find_other_capabilities(asked: Capability) -> str:
    reasons = (
        (find_missing(asked), "the engine itself does not have"),
        (find_undropped(asked), "added as well, or ambient, and so not dropped:"),
    )
    return "; ".join(f"{why} {', '.join(names)}" for names, why in reasons if names)


def _find_namespaces(launch: Launch) -> dict[str, str]:
    config = config_in_sandbox(launch)
    options = options_of(config)
    found = {}
    if _has_own_users(options):
        found["namespace_options.userns_options"] = _HOST_USERS
    is_given = bool(config.linux and config.linux.security_context and config.linux.security_context.namespace_options)
    # Only a sandbox that says so has a pid namespace for all, so only there a container misses it.
    shared = {*(("network", "ipc") if is_given else ()), *(_find_shared(launch) & {"pid"})}
    alone = [kind for kind in ("network", "ipc", "pid") if kind in shared and kind not in launch.namespaces]
    alone = [kind for kind in alone if mode_of(config, kind) is NamespaceMode.POD]
    if options.target_id and options.pid is not NamespaceMode.TARGET:
        found["namespace_options.target_id"] = "pid is not TARGET, so it sees no other container's processes"
    if alone:
        found["namespace_options"] = (
            f"the sandbox holds no namespace of type {' and '.join(alone)}: it has one of its own"
        )
    return found


def _find_shared(launch: Launch) -> set[str]:
    return set(choose_kinds(launch.sandbox.config)) if launch.sandbox else set()


def _find_of_sandbox(launch: Launch) -> dict[str, str]:
    if launch.sandbox is None:
        return {}
    config = launch.sandbox.config
    found = {}
    if config.port_mappings:
        found["sandbox.port_mappings"] = "no port of the host is handed on"
    if config.windows is not None:
        found["sandbox.windows"] = "this is Linux"
    if config.hostname and mode_of(config_in_sandbox(launch), "uts") is NamespaceMode.NODE:
        found["sandbox.hostname"] = "it uses the host's UTS namespace"
    if config.linux is None:
        return found
    told = (
        ("security_context", _NO_PROCESS, _holds_anything(_without_namespaces(config.linux.security_context))),
        ("namespace_options.userns_options", _HOST_USERS, _has_own_users(options_of_sandbox(config))),
        ("overhead", _EACH, _holds_anything(config.linux.overhead)),
        ("resources", _EACH, _holds_anything(config.linux.resources)),
    )
    found |= {f"sandbox.{name}": why for name, why, asks in told if asks}
    if why := explain_sysctls(launch):
        found["sandbox.sysctls"] = why
    if config.linux.cgroup_parent and is_rootless():
        found["sandbox.cgroup_parent"] = f"{name_engine()} chooses no cgroup"
    return found


def _without_namespaces(context: LinuxSandboxSecurityContext | None) -> LinuxSandboxSecurityContext | None:
    """Return what is left of a sandbox's security context: its namespaces are made, or are the host's."""
    return context and replace(context, namespace_options=None)


def _has_own_users(options: NamespaceOption | None) -> bool:
    users = options.userns_options if options else None
    return users is not None and users.mode is not NamespaceMode.NODE


def _holds_anything(message: Any) -> bool:
    return message is not None and message != type(message)()


def _is_confined(profile: Any) -> bool:
    return profile is not None and profile.profile_type is not ProfileType.UNCONFINED


_FIELDS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("CDI_devices", "there is no registry of CDI devices here; give them in `devices`", lambda c: bool(c.cdi_devices)),
    ("windows", "this is Linux", lambda c: c.windows is not None),
)
_SECURITY: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("selinux_options", "no label is set", lambda s: _holds_anything(s.selinux_options)),
)
_APPARMOR: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("apparmor", lambda s: _is_confined(s.apparmor)),
    ("apparmor_profile", lambda s: s.apparmor_profile not in {"", "unconfined"}),
)
_NOT_PRIVILEGED: tuple[tuple[str, Callable[[LinuxContainerSecurityContext], bool]], ...] = (
    ("capabilities", lambda s: bool(s.capabilities and s.capabilities.drop_capabilities)),
    ("masked_paths", lambda s: bool(s.masked_paths)),
    ("readonly_paths", lambda s: bool(s.readonly_paths)),
    ("seccomp", lambda s: _is_confined(s.seccomp)),
    ("seccomp_profile_path", lambda s: s.seccomp_profile_path not in {"", "unconfined"}),
)
"""What takes something from a container, and which of them a config asks for."""
_PRIVILEGED = "a privileged container has all capabilities, no seccomp filter, and nothing hidden or read-only"
_NO_APPARMOR = "this kernel has no AppArmor, or the profile is the runtime's own, and there is none"
