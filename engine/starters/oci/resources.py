"""Limits and devices: from the CRI's words to the runtime-spec's `resources`."""

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

from limpet.engine.starters.host_path import require_plain
from limpet.engine.starters.oci.mounts import has_own, mounts_of, place_of
from limpet.engine.starters.oci.ranges import require_limits
from limpet.engine.starters.oci.rootless import is_rootless, name_engine
from limpet.engine.starters.oci.tools import has_controller
from limpet.engine.starters.process.keeper.root import open_in_root
from limpet.engine.starters.users import is_in_user_namespace
from limpet.schema.cri import ContainerConfig, Device, LinuxContainerResources, Mount
from limpet.schema.errors import InvalidInputError, quote_path
from limpet.schema.lengths import require_path_fits, require_same_bytes
from limpet.schema.status import Resources

_CPU = {
    "cpu_shares": "shares", "cpu_quota": "quota", "cpu_period": "period", "cpuset_cpus": "cpus", "cpuset_mems": "mems",
}  # fmt: skip
_MEMORY = {"memory_limit_in_bytes": "limit", "memory_swap_limit_in_bytes": "swap"}
_CONTROLLERS = {
    **dict.fromkeys(("cpu_period", "cpu_quota", "cpu_shares"), "cpu"),
    **dict.fromkeys(("cpuset_cpus", "cpuset_mems"), "cpuset"),
    **dict.fromkeys(_MEMORY, "memory"),
    "hugepage_limits": "hugetlb",
}
"""Whose limit each is."""
_OWN_PLACES = ("/dev/console", "/dev/fd", "/dev/mqueue", "/dev/ptmx", "/dev/pts", "/dev/shm")  # noqa: S108
"""Of each container, in /dev, beside the devices that the runtimes make as the host's are."""
_OF_EACH = tuple(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty"))
"""Devices that the runtimes make in each container."""
_OF_KERNEL = ("/proc/", "/sys/", "/dev/pts/", "/dev/mqueue/")
"""File systems in which the kernel makes all that is there."""
_ALL = "rwm"
"""All that a device may be used for: to be read, to be written, and to be made."""
_PSEUDOTERMINALS = 136
"""Their major number."""
_ALLOWED = frozenset({(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)})
"""Major and minor numbers of /dev/null, zero, full, random, urandom, tty and ptmx: both runtimes allow them to all."""
_ALLOWED_BY = {"runc": (10, 200), "crun": (5, 1)}
"""What each does beside that: /dev/net/tun, not in all versions, and /dev/console."""
_MOUNTED = ("/dev/mqueue", "/dev/pts", "/dev/shm")  # noqa: S108
"""What each container has mounted in /dev: a device made there is hidden, and one in /dev/shm, which the containers of
a sandbox share, can be opened by nobody."""


def make_limits(asked: LinuxContainerResources, left_out: Collection[str]) -> dict[str, Any]:
    """Return the part of `resources` that limits processor time and memory, as `update` takes it, too.

    Without the fields that are `left_out`, and without a quota that is none, which crun cannot write. Raises
    InvalidInputError for values that a runtime would refuse at the start, or take otherwise.
    """
    require_limits(asked)
    wanted = {name: getattr(asked, name) for name in _requested_fields(asked) if name not in left_out}
    if lifts_quota(asked):
        wanted.pop("cpu_quota", None)
    limits: dict[str, Any] = {}
    for name, fields in (("cpu", _CPU), ("memory", _MEMORY)):
        found = {theirs: wanted[ours] for ours, theirs in fields.items() if ours in wanted}
        if found:
            limits[name] = found
    if "hugepage_limits" in wanted:
        limits["hugepageLimits"] = make_hugepage_limits(asked)
    if "unified" in wanted:
        limits["unified"] = dict(asked.unified)
    return limits


def make_hugepage_limits(asked: LinuxContainerResources) -> list[dict[str, Any]]:
    """Return the runtime-spec's `hugepageLimits`."""
    return [{"pageSize": each.page_size, "limit": each.limit} for each in asked.hugepage_limits]


def lifts_quota(asked: LinuxContainerResources) -> bool:
    """Return whether there is to be no limit of processor time."""
    return asked.cpu_quota < 0


def list_applied(asked: LinuxContainerResources, unapplied: Mapping[str, str]) -> Resources:
    """Return which of the limits are in force; the runtime refuses a container whose others are not."""
    wanted = _requested_fields(asked)
    return Resources(
        requested=asked,
        applied=tuple(name for name in wanted if name not in unapplied),
        unapplied={name: unapplied[name] for name in wanted if name in unapplied},
    )


def find_unapplied_limits(asked: LinuxContainerResources, *, is_unified: bool) -> dict[str, str]:
    """Return the limits that are not put into force on this host, and why."""
    wanted = _requested_fields(asked)
    found = {
        name: f"no cgroup controller {_CONTROLLERS[name]!r} is where an OCI runtime looks for it"
        for name in wanted
        if name in _CONTROLLERS and not has_controller(_CONTROLLERS[name])
    }
    if is_rootless():
        names = [name for name in wanted if name != "oom_score_adj"]
        found = dict.fromkeys(names, f"{name_engine()} sets no limits")
    if asked.unified and not is_unified:
        found["unified"] = "this host's cgroups are of version 1"
    elif asked.unified and "unified" not in found:
        controllers = sorted({key.partition(".")[0] for key in asked.unified} - {"cgroup"})
        if missing := [each for each in controllers if not has_controller(each)]:
            found["unified"] = f"this host has no cgroup controller {missing[0]!r}, so none of it is done"
    lowest = lowest_oom_score()
    if asked.oom_score_adj < lowest:
        found["oom_score_adj"] = f"without CAP_SYS_RESOURCE {lowest} is the lowest"
    return found


def choose_oom_score(asked: LinuxContainerResources | None) -> int:
    """Return the `oomScoreAdj` of a container, 0 if none is asked for: never that of conmon."""
    return max(asked.oom_score_adj if asked else 0, lowest_oom_score())


def lowest_oom_score() -> int:
    """Return the lowest oom_score_adj that this process may give to others (proc_pid_oom_score_adj(5))."""
    from limpet.engine.starters.oci.capabilities import available  # noqa: PLC0415

    if os.geteuid() == 0 and not is_in_user_namespace() and "SYS_RESOURCE" in available():
        return -1000
    with open("/proc/self/oom_score_adj", encoding="utf-8") as file:
        return int(file.read())


def make_devices(
    config: ContainerConfig, root: str, *, privileged: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the runtime-spec's `devices` and the rules for their use, for the root file system at `root`.

    Raises InvalidInputError, also for a path that the runtimes would pass over without a word.
    """
    devices: list[dict[str, Any]] = []
    rules: list[dict[str, Any]] = [{"allow": privileged, "access": "rwm"}]
    taken = {place_of(mount.container_path) for mount in mounts_of(config)}
    for device in config.devices:
        require_same_bytes("devices.host_path", device.host_path)
        try:
            found = os.stat(device.host_path)
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"devices.host_path {quote_path(device.host_path)}: it is not there") from error
        access = device.permissions or _ALL
        if not _is_device(found) or set(access) - set(_ALL):
            raise InvalidInputError(
                f"devices.host_path {quote_path(device.host_path)}: a device is needed, with permissions of 'rwm'"
            )
        path = device.container_path or device.host_path
        require_plain("devices.host_path", device.host_path)
        require_path_fits("devices.container_path", path, root)
        made = [place_of(each["path"]) for each in devices]
        why = _find_obstacle(path, root, taken, made, has_terminal=config.tty)
        mount = _find_mount_above(path, config)
        is_there = mount is not None and _is_same(found, _path_on_host(path, mount))
        if not why and mount is not None and not is_there:
            why = f"it is below the mount at {quote_path(mount.container_path)}, and would be made on the host"
        if not why and _shares_devices() and place_of(path) != place_of(device.host_path):
            why = f"{name_engine()} has it at its own path alone, {quote_path(device.host_path)}"
        if why:
            raise InvalidInputError(f"devices.container_path {quote_path(path)}: {why}")
        taken.add(place_of(path))
        about = _describe(found)
        if not is_there:
            devices.append({"path": place_of(path), **about})
        rules.append({"allow": True, **{key: about[key] for key in ("type", "major", "minor")}, "access": access})
    return devices, rules


def find_unrestricted(config: ContainerConfig, *, privileged: bool, kind: str, makes_nodes: bool) -> str:
    """Return why a device may be used in more ways than its permissions say, "" if none may.

    `kind` is the runtime's, and `makes_nodes` says that the container has CAP_MKNOD.
    """
    limited = [each for each in config.devices if set(each.permissions or _ALL) != set(_ALL)]
    if not limited:
        return ""
    if _shares_devices():
        return f"{name_engine()} restricts none: what the device's own mode allows is allowed"
    if privileged:
        return "a privileged container may use all devices"
    free = [
        each.host_path for each in limited if _is_allowed_to_all(each, kind) and not {"r", "w"} <= {*each.permissions}
    ]
    made = [each.host_path for each in limited if "m" not in each.permissions] if makes_nodes else []
    told = (
        (free, f"{kind} lets every container read and write"),
        (made, "with CAP_MKNOD, unless that is dropped, every container may make"),
    )
    return "; ".join(f"{why} {', '.join(map(quote_path, paths))}" for paths, why in told if paths)


def _is_allowed_to_all(device: Device, kind: str) -> bool:
    """Return whether a runtime lets every container read and write a device, whatever the config says of it."""
    with suppress(OSError, ValueError):
        found = os.stat(device.host_path)
        number = os.major(found.st_rdev), os.minor(found.st_rdev)
        is_one = number in _ALLOWED or number == _ALLOWED_BY.get(kind) or number[0] == _PSEUDOTERMINALS
        return stat.S_ISCHR(found.st_mode) and is_one
    return False


def _shares_devices() -> bool:
    """Return whether the runtimes mount devices of the host, as they may neither make nor restrict any."""
    return is_rootless() or is_in_user_namespace()


def _requested_fields(asked: LinuxContainerResources) -> list[str]:
    return [name for name in asked.__struct_fields__ if getattr(asked, name)]


def make_host_devices(config: ContainerConfig, made: Collection[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the runtime-spec's `devices` for those of the host's /dev, as a privileged container has them.

    Not where the config has something else, nor what each container has of its own.
    """
    taken = [place_of(mount.container_path) for mount in mounts_of(config)]
    taken += [place_of(device["path"]) for device in made]
    return [] if "/dev" in taken else [*walk_devices("/dev", {*taken, *_OWN_PLACES})]


def walk_devices(directory: str, taken: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the runtime-spec's `devices` for those below a directory, but for what is at paths that are taken.

    What goes away meanwhile, or may not be read, is left out alone. Raises OSError if the kernel fails otherwise.
    """
    entries: list[os.DirEntry[str]] = []
    with suppress(FileNotFoundError, PermissionError), os.scandir(directory) as found:
        entries = sorted((each for each in found if each.path not in taken), key=lambda each: each.name)
    for entry in entries:
        with suppress(FileNotFoundError):  # unplugged since: the others are there
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                yield from walk_devices(entry.path, taken)
            elif _is_device(status):
                yield {"path": entry.path, **_describe(status)}


def _is_device(found: os.stat_result) -> bool:
    return stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode)


def _describe(found: os.stat_result) -> dict[str, Any]:
    """Return what the runtime-spec says of a device beside its path."""
    number = {"major": os.major(found.st_rdev), "minor": os.minor(found.st_rdev)}
    owner = {"fileMode": found.st_mode & 0o777, "uid": found.st_uid, "gid": found.st_gid}
    return {"type": "b" if stat.S_ISBLK(found.st_mode) else "c", **number, **owner}


def _find_obstacle(path: str, root: str, taken: Collection[str], made: Collection[str], *, has_terminal: bool) -> str:
    """Return why no device can be made at a path in the container, "" if nothing is known to be in its way.

    `made` are the places of the config's other devices, which are among those that are `taken`.
    """
    if not path.startswith("/") or ".." in path.split("/"):
        return "an absolute path without '..' is needed"
    path = place_of(path)
    obstacles = (
        (has_own(path, has_terminal=has_terminal), "the container has its own there"),
        (path in taken, "a mount or another device is there"),
        (any(path.startswith(f"{each}/") for each in (*_OF_EACH, *made)), "a device is on its way"),
        (any(has_own(each, has_terminal=has_terminal) for each in _list_above(path)), "a device is on its way"),
        (path.startswith(_OF_KERNEL), "no device can be made there; choose a path in /dev"),
        (
            any(f"{path}/".startswith(f"{each}/") for each in _MOUNTED),
            "the container has a file system of its own there; choose another path in /dev",
        ),
        (
            not path.startswith("/dev/") and _is_there(path, root),
            "the image has something there; choose a path in /dev",
        ),
    )
    return next((why for is_so, why in obstacles if is_so), "")


def _list_above(path: str) -> list[str]:
    names = path.strip("/").split("/")[:-1]
    return ["/" + "/".join(names[: count + 1]) for count in range(len(names))]


def _find_mount_above(path: str, config: ContainerConfig) -> Mount | None:
    """Return the innermost mount of the config that a path is below, if it is below any."""
    above = [each for each in mounts_of(config) if place_of(path).startswith(f"{place_of(each.container_path)}/")]
    return above[-1] if above else None


def _path_on_host(path: str, mount: Mount) -> str:
    return mount.host_path + place_of(path).removeprefix(place_of(mount.container_path))


def _is_same(device: os.stat_result, path: str) -> bool:
    """Return whether a device is at a path, too."""
    with suppress(OSError):
        other = os.stat(path)
        return (stat.S_IFMT(other.st_mode), other.st_rdev) == (stat.S_IFMT(device.st_mode), device.st_rdev)
    return False


def _is_there(path: str, root: str) -> bool:
    with suppress(OSError):
        top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.close(open_in_root(top, os.fsencode(path)))
        finally:
            os.close(top)
        return True
    return False
