"""Which cgroups a process is in, and below which of them a container's may be made. Reads, and changes nothing."""

import errno
import os
from contextlib import suppress
from typing import NamedTuple

from limpet.recovery.mounts import MOUNTINFO, Mount, open_lines, parse_mounts

_DELEGATION_MARKS = ("trusted.delegate", "user.delegate")
"""The extended attributes that systemd sets to "1" on a cgroup it gave away (CGROUP_DELEGATION.md; user.* from 251)."""
_DELEGATED_UNITS = (".service", ".scope")
_UNITS = (*_DELEGATED_UNITS, ".slice", ".socket", ".mount", ".swap")
"""How the names of systemd's own cgroups end."""


class Cgroups(NamedTuple):
    """The directories of the cgroups that a process is in."""

    v1: dict[str, str]
    """By controller; one that this process sees no cgroup v1 hierarchy of is not there."""
    v2: str
    """Empty where none is to be seen."""
    v2_mount_point: str

    def find_v2_parent(self) -> str:
        """Return the cgroup v2 below which those of containers may be made. Raises OSError where there is none."""
        if not self.v2:
            raise OSError(errno.ENOENT, "no cgroup v2 hierarchy shows the cgroup of this process", "/proc/self/cgroup")
        # Only the root has no type, and only the root may have both processes and children with controllers.
        if not os.path.exists(os.path.join(self.v2, "cgroup.type")):
            return self.v2
        parent = os.path.dirname(self.v2)
        if self.v2 != self.v2_mount_point and (_is_delegated(parent) or self._is_own_of_user_unit(parent)):
            return parent
        raise OSError(
            errno.EBUSY,
            "this process is in it, and a cgroup v2 with processes gives its children no controllers; run the engine "
            "in a subgroup of a delegated cgroup (systemd: Delegate=yes and DelegateSubgroup=, before systemd 254 see "
            "limpet's page on systemd)",
            self.v2,
        )

    def _is_own_of_user_unit(self, parent: str) -> bool:
        """Say whether it is the cgroup of a unit of this user's systemd, and we are in a subgroup that somebody made.

        That systemd marks nothing: it has no right to, and does not try. What it has itself was given to it by the
        machine's, which has marked it.
        """
        if not parent.endswith(_DELEGATED_UNITS) or self.v2.endswith(_UNITS):
            return False
        with suppress(OSError):
            while parent != self.v2_mount_point and os.stat(parent).st_uid == os.geteuid():
                if _is_delegated(parent):
                    return True
                parent = os.path.dirname(parent)
        return False

    def find_parents(self) -> tuple[str, ...]:
        """Return every cgroup below which this process may have made one of a container's."""
        parents = dict.fromkeys(self.v1.values())
        with suppress(OSError):  # where there is no parent, nothing was made
            parents[self.find_v2_parent()] = None
        return tuple(parents)


def read_cgroups(pid: int) -> Cgroups:
    """Return the cgroups of a process, 0 for this one. Raises OSError where there are none or /proc cannot be read."""
    with open_lines(f"/proc/{pid or 'self'}/cgroup") as file:
        cgroup = file.read()
    with open_lines(MOUNTINFO) as file:
        return find_cgroups(cgroup, file.read())


def find_cgroups(cgroup: str, mountinfo: str) -> Cgroups:
    """Return the cgroups from the text of /proc/self/cgroup (cgroups(7)) and /proc/self/mountinfo (proc(5))."""
    mounts = list(parse_mounts(filter(None, mountinfo.split("\n"))))
    v1: dict[str, str] = {}
    v2 = v2_mount_point = ""
    for line in filter(None, cgroup.split("\n")):
        number, names, path = line.split(":", 2)
        controllers = {name for name in names.split(",") if name and not name.startswith("name=")}
        kind = "cgroup2" if number == "0" else "cgroup"
        for mount in mounts:
            directory = _locate(mount, path)
            if mount.kind != kind or not directory or not controllers <= mount.options:
                continue
            if kind == "cgroup2":
                v2, v2_mount_point = directory, mount.point
            else:
                v1.update(dict.fromkeys(controllers, directory))
            break
    return Cgroups(v1, v2, v2_mount_point)


def _locate(mount: Mount, path: str) -> str:
    """Return the directory of the cgroup `path` in a mounted hierarchy; empty if this mount does not show it."""
    root = mount.root.rstrip("/")
    if ".." in path.split("/") or not f"{path}/".startswith(f"{root}/"):
        return ""  # outside of our cgroup namespace, or of the part that is mounted
    return f"{mount.point}{path[len(root) :]}".rstrip("/")


def _is_delegated(path: str) -> bool:
    for name in _DELEGATION_MARKS:
        try:
            if os.getxattr(path, name) == b"1":
                return True
        except OSError:  # not marked, or not ours to read: the other may be
            continue
    return False
