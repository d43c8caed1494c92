"""The namespaces of a container: its own, its sandbox's, or the host's."""

import errno
import fcntl
import os
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
from limpet.schema.errors import InvalidInputError, StartError, quote, quote_path

_OWNED_BY = {"network": "network", "uts": "network", "ipc": "ipc", "pid": "pid"}
"""Which of the CRI's options decides on each namespace; a UTS namespace goes with the network's."""
JOINED = tuple(_OWNED_BY)
"""The types of namespaces that containers of a sandbox join, if it has them."""
_NS_GET_NSTYPE = 0xB703  # linux/nsfs.h
_CLONE = {"network": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000, "pid": 0x20000000}  # clone(2)
_NO_NAMESPACE = {errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
"""What an ioctl(2) fails with on another file."""


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


def require_options(config: ContainerConfig) -> None:
    """Raise InvalidInputError for another container's namespace of another type than pid, or of no container."""
    for kind in ("network", "ipc"):
        if getattr(options_of(config), kind) is NamespaceMode.TARGET:
            raise InvalidInputError(f"namespace_options.{kind} TARGET: only pid may be another container's")
    options = options_of(config)
    if options.pid is NamespaceMode.TARGET and not options.target_id:
        raise InvalidInputError("namespace_options.target_id is empty: give the id of the container that it is to see")


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


def require_given(config: PodSandboxConfig, given: Mapping[str, str]) -> None:
    """Raise InvalidInputError for a namespace given to a sandbox that none of its containers would join.

    So it does for one that a sandbox cannot have.
    """
    options = options_of_sandbox(config)
    for kind in ("network", "ipc", "pid"):
        if options is not None and getattr(options, kind) is NamespaceMode.TARGET:
            raise InvalidInputError(f"namespace_options.{kind} TARGET: a sandbox can have no other container's")
    for kind in given:
        if kind not in JOINED:
            raise InvalidInputError(
                f"namespaces {quote(kind)}: an OCI container joins none of its sandbox's of that type; it joins"
                f" {', '.join(JOINED[:-1])} or {JOINED[-1]}"
            )
        owner = _OWNED_BY[kind]
        if options is not None and getattr(options, owner) is NamespaceMode.NODE:
            raise InvalidInputError(
                f"namespaces {quote(kind)}: the sandbox's config asks for the host's ({owner} NODE)"
            )


def is_own(namespaces: list[dict[str, Any]], kind: str) -> bool:
    """Return whether a container has a namespace of this type to itself."""
    return {"type": kind} in namespaces


def require_namespace(kind: str, path: str) -> None:
    """Raise StartError if what is to be joined is no namespace of its type. Raises OSError, naming the path."""
    if not path:
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        is_one = fcntl.ioctl(descriptor, _NS_GET_NSTYPE) == _CLONE[kind]
    except OSError as error:
        if error.errno not in _NO_NAMESPACE:
            raise
        is_one = False
    finally:
        os.close(descriptor)
    if not is_one:
        raise StartError(f"namespaces: {quote_path(path)} is no {kind} namespace")
