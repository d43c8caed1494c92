"""From a container's config, its image and its sandbox to what an OCI runtime is to run (its config.json).

Made in two steps: `make_spec` when the container is created, which the bundle keeps; `complete` when it is started,
with what only then is known of the host and the sandbox.
"""

import os
from collections.abc import Mapping
from typing import Any

from limpet.engine.starters.contract import Launch
from limpet.engine.starters.environment import DEFAULT_PATH, add_missing, merge_environment
from limpet.engine.starters.oci.annotations import choose_annotations
from limpet.engine.starters.oci.apparmor import choose_apparmor
from limpet.engine.starters.oci.capabilities import choose, to_spec
from limpet.engine.starters.oci.mounts import (
    add_held,
    choose_root_propagation,
    make_mounts,
    place_of,
    require_directory,
)
from limpet.engine.starters.oci.namespaces import (
    config_in_sandbox,
    is_own,
    make_namespaces,
    mode_of,
    require_options,
)
from limpet.engine.starters.oci.places import require_working_directory
from limpet.engine.starters.oci.resources import (
    choose_oom_score,
    find_unapplied_limits,
    make_devices,
    make_host_devices,
    make_limits,
)
from limpet.engine.starters.oci.rootless import is_rootless
from limpet.engine.starters.oci.sandboxes import HOSTNAME, is_of_runtime, is_pin, kind_of_sysctl, sysctls_of
from limpet.engine.starters.oci.seccomp import make_seccomp
from limpet.engine.starters.process.accounts import RootAccounts
from limpet.engine.starters.process.root_files import require_hostname
from limpet.engine.starters.users import Rights, choose_user
from limpet.engine.state.descriptors import original_descriptor_limit
from limpet.schema.command_line import choose_args
from limpet.schema.cri import Capability, ContainerConfig, LinuxContainerSecurityContext, NamespaceMode
from limpet.schema.errors import InvalidInputError, quote, quote_path
from limpet.schema.layout import ROOTFS

_VERSION = "1.0.2"
_UMASK = 0o022
_MOST_OF_RUNC = 2**31 - 1
_MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
)  # fmt: skip
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
"""What containerd and CRI-O hide, and make read-only, where a config says nothing of it."""


def security_of(config: ContainerConfig) -> LinuxContainerSecurityContext:
    """Return the config's security context, the CRI's defaults where it has none."""
    return (config.linux and config.linux.security_context) or LinuxContainerSecurityContext()


def make_spec(launch: Launch, *, is_unified: bool) -> dict[str, Any]:
    """Return what is to be run. Raises InvalidInputError, UnsupportedError for a profile that is not installed."""
    config, image = config_in_sandbox(launch), launch.metadata.image_manifest
    if image.is_builtin:
        raise InvalidInputError(f"image {str(image.name)!r}: an OCI runtime needs an image with a root file system")
    if ":" in os.path.basename(config.log_path):
        raise InvalidInputError(
            f"log_path {quote(config.log_path)}: conmon cuts the name of a log at a ':'; leave it out"
        )
    require_options(config)
    context = security_of(config)
    root = os.path.join(launch.bundle_path, ROOTFS)
    user, account = choose_user(image.config, config, RootAccounts(root), Rights(0, 0, (), has_own_ids=True))
    env = merge_environment(image.config, config)
    env = tuple(entry for entry in env if entry != "HOME=")  # for which runc takes the user's, as if it was not given
    home, terminal = account.home if account else "/", {"TERM": "xterm"} if config.tty else {}
    env = add_missing(env, {"PATH": DEFAULT_PATH, "HOME": home, **terminal})
    namespaces = make_namespaces(config, launch.namespaces, is_unified=is_unified)
    hostname = _choose_hostname(launch)
    chosen, ambient = choose(context.capabilities or Capability(), privileged=context.privileged)
    spec: dict[str, Any] = {
        "ociVersion": _VERSION,
        "process": {
            "terminal": config.tty,
            "user": {
                "uid": user.uid or 0,
                "gid": user.gid or 0,
                "additionalGids": list(user.additional_gids),
                "umask": _UMASK,
            },
            "args": list(choose_args(image.config, config)),
            "env": list(env),
            "cwd": _choose_directory(launch),
            "capabilities": to_spec(chosen, ambient, is_root=not user.uid),
            "noNewPrivileges": context.no_new_privs,
            **({"apparmorProfile": profile} if (profile := choose_apparmor(context)) else {}),
        },
        "root": {"path": root, "readonly": context.readonly_rootfs},
        "mounts": make_mounts(
            config,
            privileged=context.privileged,
            has_own_network=any(each["type"] == "network" for each in namespaces),
            has_host_ipc=mode_of(config, "ipc") is NamespaceMode.NODE,
        ),
        "linux": _make_linux(launch, context, chosen, is_unified=is_unified),
        "annotations": choose_annotations(config),
    }
    if hostname and is_own(namespaces, "uts"):
        spec["hostname"] = hostname
    return spec


def complete(
    spec: Mapping[str, Any], launch: Launch, *, cgroup: str, is_unified: bool, held: Mapping[str, str], target: str = ""
) -> dict[str, Any]:
    """Return a spec as the runtime gets it: with this host's limits, what its sandbox holds, and its own cgroup.

    `held` is what is mounted of the sandbox: where, and the path here. `target` is the path of the pid namespace of the
    container that it is to see, if it is to see another's.
    """
    config = config_in_sandbox(launch)
    limits = config.linux.resources if config.linux else None
    soft, hard = original_descriptor_limit()
    process = {
        **spec["process"],
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": soft, "hard": hard}],
        "oomScoreAdj": choose_oom_score(limits),
    }
    namespaces = make_namespaces(config, launch.namespaces, is_unified=is_unified, target=target)
    linux = {**spec["linux"], "namespaces": namespaces, "cgroupsPath": cgroup, "sysctl": find_sysctls(launch)}
    root = {**spec["root"], "path": os.path.realpath(os.path.join(launch.bundle_path, ROOTFS))}
    # A namespace of the sandbox's has the sandbox's name already.
    kept = {name: value for name, value in spec.items() if name != "hostname" or is_own(namespaces, "uts")}
    mounts = add_held(spec["mounts"], config, held, is_read_only=bool(spec["root"].get("readonly")))
    return {**kept, "process": process, "linux": linux, "root": root, "mounts": mounts}


def _make_linux(
    launch: Launch, context: LinuxContainerSecurityContext, capabilities: tuple[str, ...], *, is_unified: bool
) -> dict[str, Any]:
    config = launch.metadata.config
    devices, rules = make_devices(config, os.path.join(launch.bundle_path, ROOTFS), privileged=context.privileged)
    if context.privileged and not is_rootless():
        devices += make_host_devices(config, devices)
    for name in ("masked_paths", "readonly_paths"):
        for path in getattr(context, name):
            if place_of(path) == "/":  # which the runtimes pass over
                raise InvalidInputError(f"{name} {quote_path(path)}: a path below / is needed")
    asked = config.linux.resources if config.linux else None
    limits = make_limits(asked, find_unapplied_limits(asked, is_unified=is_unified)) if asked else {}
    hidden = () if context.privileged else context.masked_paths or _MASKED
    read_only = () if context.privileged else context.readonly_paths or _READ_ONLY
    linux = {
        "resources": {"devices": rules, **limits},
        "rootfsPropagation": choose_root_propagation(config),
        "devices": devices,
        "maskedPaths": list(hidden),
        "readonlyPaths": list(read_only),
    }
    seccomp = make_seccomp(context, capabilities)
    return linux if seccomp is None else {**linux, "seccomp": seccomp}


def require_ids_of_runc(user: Mapping[str, Any]) -> None:
    """Raise InvalidInputError for a user or group with a number that crun can give to a container, and runc cannot."""
    numbers = [("user", user["uid"]), ("group", user["gid"])]
    for what, number in [*numbers, *(("supplemental group", each) for each in user["additionalGids"])]:
        if number > _MOST_OF_RUNC:
            raise InvalidInputError(f"{what} {number}: runc takes no number above {_MOST_OF_RUNC}; use crun for it")


def find_sysctls(launch: Launch) -> dict[str, str]:
    """Return the sandbox's sysctls that are set in the container: those of namespaces that are its own."""
    own = make_namespaces(config_in_sandbox(launch), launch.namespaces, is_unified=False)
    asked = sysctls_of(launch.sandbox.config) if launch.sandbox else {}
    return {name: value for name, value in asked.items() if is_own(own, kind_of_sysctl(name)) and is_of_runtime(name)}


def explain_sysctls(launch: Launch) -> str:
    """Return why some of the sandbox's sysctls are not as it asks for where the container is, "" if all are."""
    own = make_namespaces(config_in_sandbox(launch), launch.namespaces, is_unified=False)
    names = set(sysctls_of(launch.sandbox.config) if launch.sandbox else ()) - set(find_sysctls(launch)) - {HOSTNAME}
    refused = sorted(name for name in names if is_own(own, kind_of_sysctl(name)))
    if refused:
        return f"the runtimes set none of {', '.join(refused)} in a namespace of the container's own"
    if all(is_pin(launch.namespaces.get(kind_of_sysctl(name), "")) for name in names):
        return ""
    return "the namespaces that they belong to are not the container's own"


def _choose_hostname(launch: Launch) -> str:
    """Return the name of the host, which the sandbox may have given as a sysctl, too: the runtimes refuse that one."""
    if launch.sandbox is None:
        return ""
    hostname = launch.sandbox.config.hostname
    return require_hostname(hostname) if hostname else sysctls_of(launch.sandbox.config).get(HOSTNAME, "")


def _choose_directory(launch: Launch) -> str:
    config, image = launch.metadata.config, launch.metadata.image_manifest
    chosen = config.working_dir or image.config.working_dir or "/"
    if not os.path.isabs(chosen):
        raise InvalidInputError(f"working_dir {quote_path(chosen)}: an absolute path is needed")
    require_working_directory("working_dir", chosen, config, os.path.join(launch.bundle_path, ROOTFS))
    require_directory(chosen, config)
    return chosen
