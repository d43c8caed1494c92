"""The namespaces of a container: its own, its sandbox's, or the host's."""

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from limpet.engine.starters.contract import Launch
from limpet.schema.cri import (
    ContainerConfig,
    LinuxContainerConfig,
    LinuxContainerSecurityContext,
    NamespaceMode,
    NamespaceOption,
    PodSandboxConfig,
)

_OWNED_BY = {"network": "network", "uts": "network", "ipc": "ipc", "pid": "pid"}
"""Which of the CRI's options decides on each namespace; a UTS namespace goes with the network's."""


def options_of(config: ContainerConfig) -> NamespaceOption:
    """Return the config's namespace options, the CRI's defaults where it has none."""
    context = config.linux.security_context if config.linux else None
    return (context and context.namespace_options) or NamespaceOption()


def options_of_sandbox(config: PodSandboxConfig) -> NamespaceOption | None:
    """Return the sandbox's own namespace options, None if it has none."""
    context = config.linux.security_context if config.linux else None
    return context.namespace_options if context else None


def config_in_sandbox(launch: Launch) -> ContainerConfig:
    """Return the config with the host's namespace where it asks for the sandbox's and the sandbox uses the host's."""
    config = launch.metadata.config
    shared = options_of_sandbox(launch.sandbox.config) if launch.sandbox else None
    if shared is None:
        return config
    own, pod, node = options_of(config), NamespaceMode.POD, NamespaceMode.NODE
    kinds = ("network", "ipc", "pid")
    changed = {kind: node for kind in kinds if getattr(own, kind) is pod and getattr(shared, kind) is node}
    if not changed:
        return config
    linux = config.linux or LinuxContainerConfig()
    context = linux.security_context or LinuxContainerSecurityContext()
    context = replace(context, namespace_options=replace(own, **changed))
    return replace(config, linux=replace(linux, security_context=context))


def make_namespaces(
    config: ContainerConfig, paths: Mapping[str, str], *, is_unified: bool, target: str = ""
) -> list[dict[str, Any]]:
    """Return the runtime-spec's `namespaces`. `paths` are those that the sandbox holds; for `target` see `complete`.

    A namespace that is to be the sandbox's, and that the sandbox does not hold, is one of the container's own.
    """
    found: list[dict[str, Any]] = [{"type": "mount"}]
    for kind in _OWNED_BY:
        mode = mode_of(config, kind)
        if mode is NamespaceMode.NODE:
            continue
        path = paths.get(kind, "") if mode is NamespaceMode.POD else target if mode is NamespaceMode.TARGET else ""
        found.append({"type": kind, "path": path} if path else {"type": kind})
    if is_unified:
        found.append({"type": "cgroup"})
    return found


def mode_of(config: ContainerConfig, kind: str) -> NamespaceMode:
    """Return whose namespace of a type the config asks for."""
    mode: NamespaceMode = getattr(options_of(config), _OWNED_BY[kind])
    return mode


def is_own(namespaces: list[dict[str, Any]], kind: str) -> bool:
    """Return whether a container has a namespace of this type to itself."""
    return {"type": kind} in namespaces
