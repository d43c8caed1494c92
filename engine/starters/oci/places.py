"""Paths in a container that its config names: what the image, or the kernel, has there that they cannot be.

The runtimes make what is missing, and follow links beneath the root file system. Where the links of a mount of the
config lead, and what is where each container has something mounted, is not looked into: the runtime tells of that when
it starts.
"""

import errno
import os
import posixpath
import re
import stat
from collections.abc import Sequence

from limpet.engine.starters.oci.mounts import mounts_of, place_of
from limpet.engine.starters.process.keeper.root import open_in_root
from limpet.schema.cri import ContainerConfig, Mount
from limpet.schema.errors import InvalidInputError, quote_path
from limpet.schema.lengths import require_path_fits

_OF_EACH = ("/proc", "/sys", "/dev")
"""Where something else is mounted in each container."""
_FILLED_BY_KERNEL = ("/proc/", "/sys/")
_EMPTY = ("/dev/pts/", "/dev/mqueue/")
"""In which nothing can be made, either; what the host has there no container has."""
_CGROUPS = "/sys/fs/cgroup/"
_OF_RUNC = re.compile(
    r"/proc/(cpuinfo|diskstats|meminfo|stat|swaps|uptime|loadavg|slabinfo|net/dev|sys/kernel/ns_last_pid"
    r"|sys/crypto/fips_enabled)"
)
"""Where runc mounts something in /proc, for lxcfs and the like; the last with runc 1.2 or newer."""
_OF_LINKS = re.compile(r"/(proc/(self|thread-self)|dev/(fd|stdin|stdout|stderr))(/|$)")
"""Links of the kernel's, and those to them that each container has."""
_OF_PROCESS = re.compile(r"/proc/([0-9]+|self|thread-self)(/|$)")
_NOBODY_MAKES = "it is not there, and the kernel lets nobody make it"


def require_places(config: ContainerConfig, root: str, *, is_runc: bool) -> None:
    """Raise InvalidInputError for a mount, or a path that is to be hidden or read-only, which no container can have.

    `root` is the unpacked root file system, with the files in /etc that each container gets.
    """
    above: list[str] = []
    for mount in mounts_of(config):  # outer ones first
        path = place_of(mount.container_path)
        require_path_fits("mounts.container_path", mount.container_path, root)
        if _is_in(path, above):
            why = _find_why_not_on(config, path)
        else:
            why = _find_why_not(mount, path, root, is_runc=is_runc)
        if why:
            raise InvalidInputError(f"mounts.container_path {quote_path(mount.container_path)}: {why}")
        above.append(path)
    context = config.linux.security_context if config.linux else None
    for name in ("masked_paths", "readonly_paths") if context else ():
        for path in getattr(context, name):
            require_path_fits(name, path, root)
            barrier, _ = _look(root, place_of(path), (*_OF_EACH, *above))
            why = _tell(barrier) if barrier else _find_why_not_hidden(name, place_of(path), is_runc=is_runc)
            if why:
                raise InvalidInputError(f"{name} {quote_path(path)}: {why}")


def require_working_directory(field: str, path: str, config: ContainerConfig, root: str) -> None:
    """Raise InvalidInputError for a working directory that can be none: the image has a file there, or on the way."""
    require_path_fits(field, path, root)
    place = place_of(path)
    barrier, kind = _look(root, place, (*_OF_EACH, *(place_of(each.container_path) for each in mounts_of(config))))
    if barrier or kind == "file":
        raise InvalidInputError(f"{field} {quote_path(path)}: {_tell(barrier or place)}")
    mounted = [place_of(each.container_path) for each in mounts_of(config)]
    if not _is_in(place, mounted) and not _OF_PROCESS.match(place) and _is_missing_in_kernel(place):
        raise InvalidInputError(f"{field} {quote_path(path)}: {_NOBODY_MAKES}")


def _tell(path: str) -> str:
    return f"the image has at {quote_path(path)} what is no directory"


def _find_why_not(mount: Mount, path: str, root: str, *, is_runc: bool) -> str:
    """Return why nothing can be mounted at a path that is below no other mount of the config, "" if it can be."""
    if path == "/dev" and not os.path.exists(os.path.join(mount.host_path, "null")):
        return "the runtimes need a null there, and the host's directory has none"
    if path == "/proc" and is_runc and not os.path.islink(os.path.join(mount.host_path, "self")):
        return "runc takes nothing there but a /proc"
    if path.startswith("/proc/") and is_runc and not _OF_RUNC.fullmatch(path):
        return "runc mounts nothing there"
    if _is_missing_in_kernel(path):
        return _NOBODY_MAKES
    barrier, kind = _look(root, path, _OF_EACH)
    own = "directory" if os.path.isdir(mount.host_path) else "file"
    other = (
        f"a {kind} is there, and the host's {quote_path(mount.host_path)} is a {own}" if kind not in {"", own} else ""
    )
    return _tell(barrier) if barrier else other


def _is_missing_in_kernel(path: str) -> bool:
    """Return whether a path is where the kernel makes all that is there, and this is not."""
    is_made_by_kernel = path.startswith(_FILLED_BY_KERNEL) and not path.startswith(_CGROUPS)
    return path.startswith(_EMPTY) or (is_made_by_kernel and not os.path.exists(path))


def _find_why_not_on(config: ContainerConfig, path: str) -> str:
    """Return why nothing can be mounted at a path on another mount, "" if it can be, or if a link is on its way.

    What is missing there is made on the host; crun does that for a mount that is read-only, too.
    """
    outer = [each for each in mounts_of(config) if _is_in(path, [place_of(each.container_path)])]
    mount = outer[-2] if len(outer) > 1 else outer[0]  # the last is the one at the path itself
    above, there = place_of(mount.container_path), os.path.realpath(mount.host_path)
    for name in path[len(above) :].strip("/").split("/"):
        if not os.path.isdir(there):
            return f"the mount at {quote_path(above)} has on its way what is no directory"
        there = os.path.join(there, name)
        if os.path.islink(there):
            return ""
        if not os.path.lexists(there):
            is_read_only = mount.readonly or mount.recursive_read_only
            return f"the mount at {quote_path(above)} is read-only, and has nothing there" if is_read_only else ""
    return ""


def _find_why_not_hidden(field: str, path: str, *, is_runc: bool) -> str:
    """Return why a path cannot be hidden, or be read-only, with which no start would come to its program."""
    if _OF_LINKS.match(path):
        return "it is another file for each process"
    needed = {"/dev", "/proc"} if is_runc else {"/dev"}
    return "the runtime itself needs what is there" if field == "masked_paths" and path in needed else ""


def _is_in(path: str, places: Sequence[str]) -> bool:
    return any(f"{path}/".startswith(f"{each}/") for each in places)


def _look(root: str, path: str, hidden: Sequence[str]) -> tuple[str, str]:
    """Return which part of a path is no directory, though more is to come, and what is at its end.

    Both are "" where nothing is there, or what is there is hidden by something that is mounted: see `_OF_EACH`.
    """
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        beginning = os.readlink(f"/proc/self/fd/{top}")
        parts, found = path.strip("/").split("/"), ""
        for count in range(1, len(parts) + 1):
            each = posixpath.join("/", *parts[:count])
            if _is_in(each, hidden):
                return "", ""
            try:
                entry = open_in_root(top, os.fsencode(each))
            except OSError as error:
                if error.errno in {errno.ENOENT, errno.ELOOP, errno.EACCES}:
                    return "", ""
                if error.errno == errno.ENOTDIR:  # a link leads there
                    return each, ""
                raise
            try:
                if _is_in(os.readlink(f"/proc/self/fd/{entry}").removeprefix(beginning), hidden):
                    return "", ""
                found = "directory" if stat.S_ISDIR(os.fstat(entry).st_mode) else "file"
            finally:
                os.close(entry)
            if found == "file" and count < len(parts):
                return each, ""
        return "", found
    finally:
        os.close(top)
