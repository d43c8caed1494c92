"""The mounts of a container: those that every one has, and those of its config."""

import os
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from limpet.engine.starters.host_path import require_plain
from limpet.engine.starters.propagation import read_propagation
from limpet.schema.cri import ContainerConfig, Mount, MountPropagation
from limpet.schema.errors import InvalidInputError, quote_path
from limpet.schema.lengths import require_same_bytes

_PROPAGATIONS = {
    MountPropagation.PRIVATE: "rprivate",
    MountPropagation.HOST_TO_CONTAINER: "rslave",
    MountPropagation.BIDIRECTIONAL: "rshared",
}


def make_mounts(
    config: ContainerConfig, *, privileged: bool, has_own_network: bool, has_host_ipc: bool
) -> list[dict[str, Any]]:
    """Return the runtime-spec's `mounts`; those of the config last, outer ones first. Raises InvalidInputError."""
    _require_places(config)
    writing = "rw" if privileged else "ro"
    own = {place_of(mount.container_path) for mount in mounts_of(config)}
    sys = _mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", writing)
    if not has_own_network:  # the kernel mounts a sysfs only for whom the network namespace belongs to
        sys = _mount("/sys", "bind", "/sys", "rbind", "nosuid", "noexec", "nodev", writing)
    shm = _mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k")  # noqa: S108
    if has_host_ipc and os.path.isdir("/dev/shm"):  # noqa: S108  # what is shared there is the IPC namespace's
        shm = _bind_held("/dev/shm", "/dev/shm", "rw")  # noqa: S108
    standard = [
        _mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
        ),
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        shm,
        sys,
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", writing),
    ]
    kept = [mount for mount in standard if mount["destination"] not in own]
    return [*kept, *map(_bind, mounts_of(config))]


def keep_sysfs_writable(spec: Mapping[str, Any]) -> None:
    """Have a sysfs that is mounted read-only be so where it is mounted, not by itself.

    All containers of a network namespace share it, and runc says of the file system what the spec says of the mount:
    beside one container whose /sys is read-only, that of a privileged one would be, too.
    """
    for mount in spec["mounts"]:
        if mount["type"] == "sysfs" and "ro" in mount["options"]:
            mount["options"] = ["rw" if each == "ro" else each for each in mount["options"]]
            spec["linux"]["readonlyPaths"].append(mount["destination"])


def add_held(
    mounts: Sequence[dict[str, Any]], config: ContainerConfig, held: Mapping[str, str], *, is_read_only: bool
) -> list[dict[str, Any]]:
    """Return the mounts with those of what the sandbox holds, before the config's own, which take their place."""
    own = {place_of(mount.container_path) for mount in mounts_of(config)}
    begin = len(mounts) - len(mounts_of(config))
    added = [
        _bind_held(where, path, "ro" if is_read_only and where.startswith("/etc/") else "rw")
        for where, path in held.items()
        if where not in own
    ]
    standard = [mount for mount in mounts[:begin] if mount["destination"] not in held]
    return [*standard, *added, *mounts[begin:]]


def _bind_held(destination: str, source: str, writing: str) -> dict[str, Any]:
    return _mount(destination, "bind", source, "rbind", "rprivate", "nosuid", "noexec", "nodev", writing)


def place_of(path: str) -> str:
    """Return a path in the container as it is compared with others: normpath(3) leaves two slashes at its beginning."""
    return posixpath.normpath(f"/{path.lstrip('/')}")


def mounts_of(config: ContainerConfig) -> Sequence[Mount]:
    """Return the mounts of files and directories, outer ones first, as they must be made."""
    found = [mount for mount in config.mounts if mount.image is None]
    return sorted(found, key=lambda mount: place_of(mount.container_path).count("/"))


def require_directory(path: str, config: ContainerConfig) -> None:
    """Raise InvalidInputError for a working directory that is missing on a mount that is read-only.

    runc cannot make it, and crun makes it on the host all the same. What a link leads to is left to them.
    """
    place = place_of(path)
    for mount in reversed(mounts_of(config)):  # inner ones first
        above = place_of(mount.container_path)
        if not f"{place}/".startswith(f"{above}/"):
            continue
        there = os.path.realpath(mount.host_path)
        for name in place[len(above) :].split("/") if mount.readonly or mount.recursive_read_only else ():
            there = os.path.join(there, name)
            if os.path.islink(there):
                return
            if not os.path.isdir(there):
                raise InvalidInputError(
                    f"working_dir {quote_path(path)}: the mount at {quote_path(above)} is read-only, and has none there"
                )
        return


def choose_root_propagation(config: ContainerConfig) -> str:
    """Return the runtime-spec's `rootfsPropagation`: what the widest of the config's mounts needs."""
    found = {choose_propagation(mount) for mount in mounts_of(config)}
    return next((each for each in ("rshared", "rslave") if each in found), "rprivate")


def choose_propagation(mount: Mount) -> str:
    """Return the propagation of a mount that this host can give it: rprivate where it is on no shared mount."""
    asked = _PROPAGATIONS[mount.propagation]
    return "rprivate" if asked == "rprivate" or find_lost_propagation(mount) else asked


def find_lost_propagation(mount: Mount) -> str:
    """Return why what is mounted later does not get where the mount asks for it; "" if it does."""
    if mount.propagation is MountPropagation.PRIVATE:
        return ""
    found = read_propagation(mount.host_path) or ""
    if "shared:" in found or ("master:" in found and mount.propagation is MountPropagation.HOST_TO_CONTAINER):
        return ""
    return f"{mount.host_path} is on no shared mount of the host"


def has_own(path: str, *, has_terminal: bool) -> bool:
    """Return whether every container has something of its own at a path in it, whatever else is to be there."""
    return path == "/dev/ptmx" or (path == "/dev/console" and has_terminal)


def _require_places(config: ContainerConfig) -> None:
    """Raise InvalidInputError for mounts of which one would hide another, or would not be seen itself."""
    taken = set()
    for mount in mounts_of(config):
        path, why = place_of(mount.container_path), ""
        if path in taken:
            why = "another one is there, and would be hidden"
        elif has_own(path, has_terminal=config.tty):
            why = "the container has its own there"
        elif path == "/dev/null" and os.path.realpath(mount.host_path) != path:
            why = "the runtimes take what is there for their own, and write the container's output into it"
        if why:
            raise InvalidInputError(f"mounts.container_path {quote_path(mount.container_path)}: {why}")
        taken.add(path)


def _bind(mount: Mount) -> dict[str, Any]:
    path = mount.container_path
    if not os.path.isabs(path) or place_of(path) == "/" or "\0" in path:
        raise InvalidInputError(f"mounts.container_path {quote_path(path)}: an absolute path below / is needed")
    require_same_bytes("mounts.host_path", mount.host_path)
    if not os.path.isabs(mount.host_path) or not os.path.exists(mount.host_path):
        raise InvalidInputError(
            f"mounts.host_path {quote_path(mount.host_path)} does not exist, or is not absolute; make it, or leave out"
            f" the mount at {quote_path(path)}"
        )
    writing = ["rro"] if mount.recursive_read_only else ["ro"] if mount.readonly else ["rw"]
    require_plain("mounts.host_path", mount.host_path)
    return _mount(path, "bind", os.path.realpath(mount.host_path), "rbind", choose_propagation(mount), *writing)


def _mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}
