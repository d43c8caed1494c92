"""Containers of an engine that is not root of the host: in a user namespace, with the ids that this user can have.

For an ordinary user that is one, root in the container, and with newuidmap and newgidmap (Debian's `uidmap`) those that
/etc/subuid and /etc/subgid give the user. Root of a user namespace has its containers in this one. Limits are not in
force, and nothing is paused or measured unless the user may make cgroups where it is itself.
"""

import os
import pwd
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from limpet.engine.starters.oci.cgroups import may_make_beside, may_make_cgroups
from limpet.engine.starters.oci.command import clean_environment
from limpet.engine.starters.users import RootRights, has_capability, is_in_user_namespace
from limpet.schema.errors import InvalidInputError, UnsupportedError, quote

_OWN_SYS = ["rbind", "nosuid", "noexec", "nodev", "ro"]
_QUEUES = "/dev/mqueue"
_OWN_QUEUES = ["rbind", "nosuid", "noexec", "nodev"]
_CAP_SYS_ADMIN = 21
_TERMINALS = 5
"""The group that containers' terminals have, where it can be had."""


def is_rootless() -> bool:
    """Return whether this process is not root of the host, so that its containers cannot have all that root's have.

    Root of a user namespace is none, unless it was given cgroups and more users than itself, as a container that is to
    run a whole system is: then it makes containers as root does.
    """
    return os.geteuid() != 0 or _is_root_of_little()


@cache
def _is_root_of_little() -> bool:
    return is_in_user_namespace() and not (_is_mapped(_TERMINALS, _find_mappings("gid")) and may_make_cgroups())


def name_engine() -> str:
    """Return what kind of engine this is, of those whose containers are `is_rootless`: messages begin with it."""
    return "an engine that is root of a user namespace alone" if os.geteuid() == 0 else "an engine that is not root"


def adapt(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json as it can be run without root.

    Raises InvalidInputError for a user or a group that cannot be mapped, and for further groups that cannot be had.
    """
    uids, gids = (_find_mappings(kind) for kind in ("uid", "gid"))
    user = spec["process"]["user"]
    require_mapped("uid", [user["uid"]], uids)
    require_mapped("gid", [user["gid"]], gids)
    groups = _choose_groups(user, gids)
    linux = {name: value for name, value in spec["linux"].items() if name not in {"resources", "cgroupsPath"}}
    if may_make_beside():  # then runc does so in any case, and calls it by the container's id if it is given no name
        linux["cgroupsPath"] = os.path.basename(spec["linux"].get("cgroupsPath", ""))
    namespaces = spec["linux"].get("namespaces", ())
    if os.geteuid() != 0:
        linux |= {"namespaces": [*namespaces, {"type": "user"}], "uidMappings": uids, "gidMappings": gids}
    is_ipc_own = any(each["type"] == "ipc" for each in namespaces)
    mounts = [
        _adapt_mount(each, has_terminals=_is_mapped(_TERMINALS, gids), is_ipc_own=is_ipc_own)
        for each in spec["mounts"]
        if each["type"] != "cgroup" and (each["type"] != "mqueue" or is_ipc_own or os.path.isdir(_QUEUES))
    ]
    process = {**spec["process"], "user": {**user, "additionalGids": groups}}
    return {**spec, "process": process, "linux": linux, "mounts": mounts}


def _choose_groups(user: Mapping[str, Any], gids: Sequence[Mapping[str, int]]) -> list[int]:
    """Return the further groups of a container's program. Raises InvalidInputError for those that cannot be had."""
    more = [each for each in user["additionalGids"] if each != user["gid"]]
    if os.geteuid() == 0 and RootRights.of_this_process().sets_groups:
        require_mapped("supplemental_groups: gid", more, gids)
        return list(user["additionalGids"])
    if more:
        raise InvalidInputError(
            f"supplemental_groups {more}: {name_engine()} gives none here;"
            " leave them out, and set supplemental_groups_policy to Strict if they are the image's"
        )
    return []


def require_admin(program: str) -> None:
    """Raise UnsupportedError if this process may make no namespaces, as root of a user namespace without that right."""
    if os.geteuid() == 0 and not has_capability(_CAP_SYS_ADMIN):
        raise UnsupportedError(f"{program}: {name_engine()} needs CAP_SYS_ADMIN there; begin it with that capability")


def require_own_pids(namespaces: Sequence[Mapping[str, str]]) -> None:
    """Raise InvalidInputError unless a container has a pid namespace to itself, by which all of it can be ended."""
    if {"type": "pid"} not in namespaces:
        raise InvalidInputError(
            f"namespace_options.pid: {name_engine()} may have no cgroups, so its containers need pid namespaces of"
            " their own: CONTAINER"
        )


def require_mapped(kind: str, wanted: Sequence[int], mappings: Sequence[Mapping[str, int]]) -> None:
    """Raise InvalidInputError if one of these ids, of a container, is none that it can have."""
    for number in wanted:
        if not _is_mapped(number, mappings):
            most = sum(each["size"] for each in mappings)
            raise InvalidInputError(
                f"{kind} {number}: {name_engine()} can give its containers {kind.rpartition(' ')[2]}s"
                + (
                    f" of its own alone, which /proc/self/{kind[-3:]}_map has"
                    if os.geteuid() == 0
                    else f" below {most} alone; install uidmap, and give this user a range in /etc/sub{kind[-3:]}"
                )
            )


def _is_mapped(number: int, mappings: Sequence[Mapping[str, int]]) -> bool:
    return any(0 <= number - each["containerID"] < each["size"] for each in mappings)


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
    if os.geteuid() == 0:
        rights = RootRights.of_this_process()
        own_ids = rights.uids if kind == "uid" else rights.gids
        return [{"containerID": each.start, "hostID": each.start, "size": each.stop - each.start} for each in own_ids]
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


def _adapt_mount(mount: Mapping[str, Any], *, has_terminals: bool, is_ipc_own: bool) -> dict[str, Any]:
    if mount["type"] == "sysfs":
        return {**mount, "type": "bind", "source": "/sys", "options": _OWN_SYS}
    if mount["type"] == "mqueue" and not is_ipc_own:  # the kernel mounts it for whom the IPC namespace belongs to
        return {**mount, "type": "bind", "source": _QUEUES, "options": _OWN_QUEUES}
    if mount["type"] == "devpts" and not has_terminals:
        return {**mount, "options": [each for each in mount["options"] if not each.startswith("gid=")]}
    return dict(mount)
