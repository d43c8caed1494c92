"""Containers of an engine that is not root: in a user namespace, with the ids that this user can have mapped.

That is one, root in the container, and with newuidmap and newgidmap (Debian's `uidmap`) those that /etc/subuid and
/etc/subgid give the user. There are no cgroups: limits are not in force, and nothing is paused or measured.
"""

import os
import pwd
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from limpet.engine.starters.oci.command import clean_environment
from limpet.schema.errors import InvalidInputError, quote

_OWN_SYS = ["rbind", "nosuid", "noexec", "nodev", "ro"]
_QUEUES = "/dev/mqueue"
_OWN_QUEUES = ["rbind", "nosuid", "noexec", "nodev"]


def is_rootless() -> bool:
    """Return whether this process is not root, so that its containers need a user namespace."""
    return os.geteuid() != 0


def adapt(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json as it can be run without root.

    Raises InvalidInputError for a user or a group that cannot be mapped, and for further groups.
    """
    uids, gids = (_find_mappings(kind) for kind in ("uid", "gid"))
    user = spec["process"]["user"]
    require_mapped("uid", [user["uid"]], uids)
    require_mapped("gid", [user["gid"]], gids)
    if more := [each for each in user["additionalGids"] if each != user["gid"]]:
        raise InvalidInputError(
            f"supplemental_groups {more}: runc gives none where the engine is not root;"
            " leave them out, and set supplemental_groups_policy to Strict if they are the image's"
        )
    linux = {name: value for name, value in spec["linux"].items() if name not in {"resources", "cgroupsPath"}}
    linux |= {
        "namespaces": [*spec["linux"].get("namespaces", ()), {"type": "user"}],
        "uidMappings": uids,
        "gidMappings": gids,
    }
    is_ipc_own = any(each["type"] == "ipc" for each in linux["namespaces"])
    mounts = [
        _adapt_mount(each, has_many=len(gids) > 1, is_ipc_own=is_ipc_own)
        for each in spec["mounts"]
        if each["type"] != "cgroup" and (each["type"] != "mqueue" or is_ipc_own or os.path.isdir(_QUEUES))
    ]
    process = {**spec["process"], "user": {**user, "additionalGids": []}}
    return {**spec, "process": process, "linux": linux, "mounts": mounts}


def require_own_pids(namespaces: Sequence[Mapping[str, str]]) -> None:
    """Raise InvalidInputError unless a container has a pid namespace to itself, by which all of it can be ended."""
    if {"type": "pid"} not in namespaces:
        raise InvalidInputError(
            "namespace_options.pid: an engine that is not root has no cgroups, so its containers need pid namespaces"
            " of their own: CONTAINER"
        )


def require_mapped(kind: str, wanted: Sequence[int], mappings: Sequence[Mapping[str, int]]) -> None:
    """Raise InvalidInputError if one of these ids, of a container, is none that it can have."""
    most = sum(each["size"] for each in mappings)
    for number in wanted:
        if number >= most:
            raise InvalidInputError(
                f"{kind} {number}: an engine that is not root can give its containers {kind}s below {most} alone;"
                f" install uidmap, and give this user a range in /etc/sub{kind}"
            )


def require_mapped_groups(field: str, text: str) -> None:
    """Raise InvalidInputError unless a text is two numbers of groups that a container can have, as the kernel wants."""
    numbers = text.split()
    if len(numbers) != 2 or not all(re.fullmatch("[0-9]{1,10}", each) for each in numbers):
        raise InvalidInputError(f"{field}: two numbers of groups are needed, not {quote(text)}")
    try:
        require_mapped("gid", [int(each) for each in numbers], _find_mappings("gid"))
    except InvalidInputError as error:
        raise InvalidInputError(f"{field}: {error}") from error


def _find_mappings(kind: str) -> list[dict[str, int]]:
    """Return the runtime-spec's mappings of users ("uid") or groups ("gid")."""
    own = os.geteuid() if kind == "uid" else os.getegid()
    found = [{"containerID": 0, "hostID": own, "size": 1}]
    if shutil.which(f"new{kind}map", path=clean_environment()["PATH"]) is None:
        return found
    names = {str(os.geteuid())}
    with suppress(KeyError):
        names.add(pwd.getpwuid(os.geteuid()).pw_name)
    with suppress(OSError, ValueError), open(f"/etc/sub{kind}", encoding="utf-8") as file:
        for line in file:
            name, _, rest = line.strip().partition(":")
            if name in names:
                begin, _, count = rest.partition(":")
                return [*found, {"containerID": 1, "hostID": int(begin), "size": int(count)}]
    return found


def _adapt_mount(mount: Mapping[str, Any], *, has_many: bool, is_ipc_own: bool) -> dict[str, Any]:
    if mount["type"] == "sysfs":
        return {**mount, "type": "bind", "source": "/sys", "options": _OWN_SYS}
    if mount["type"] == "mqueue" and not is_ipc_own:  # the kernel mounts it for whom the IPC namespace belongs to
        return {**mount, "type": "bind", "source": _QUEUES, "options": _OWN_QUEUES}
    if mount["type"] == "devpts" and not has_many:
        return {**mount, "options": [each for each in mount["options"] if not each.startswith("gid=")]}
    return dict(mount)
