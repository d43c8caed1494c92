"""Whether the kernel can execute a container's program: what execve(2) refuses, and why.

Asked only of a process that ended as a failed execve makes it end, for the runtimes do not tell that from a program
which ended so by itself.
"""

import errno
import os
import posixpath
import resource
import stat
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from limpet.engine.starters.oci.capabilities import find_not_given
from limpet.engine.starters.process.keeper.root import open_in_root
from limpet.schema.lengths import STRING_BYTES

_HEAD_BYTES = 4096
_ELF_BYTES = 64
_PT_INTERP = 3
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG}
MISSING = "its program is not there"
_USUAL = {
    *("/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys", "/sys/fs/cgroup"),  # noqa: S108
    *("/etc/hosts", "/etc/hostname", "/etc/resolv.conf"),
}
"""What is mounted in each container: no programs."""
_DEPTH = 5
"""How many scripts may be each other's interpreters (BINPRM_MAX_RECURSION and one)."""
_MOST_BYTES, _LEAST_BYTES = 6 << 20, 128 << 10
"""How much all of them may be, with the environment: between these a quarter of the stack's limit (execve(2))."""
_POINTER_BYTES = 8


def find_flaw(config: Mapping[str, Any]) -> str:
    """Return why the program of a config.json cannot be executed; "" if it can, or if that cannot be told.

    MISSING is no proof by itself: it may be on a mount that only the container has.

    Raises OSError if a file cannot be looked at now. What a mount puts over the root file system is not looked into.
    """
    if not config:
        return ""
    process, path_of_root = config["process"], config["root"]["path"]
    program: str = process["args"][0]
    if _are_too_long([*process["args"], *process.get("env", ())]):
        return f"exec {program}: argument list too long"
    mounts = [each for mount in config.get("mounts", ()) if (each := mount["destination"]) not in _USUAL]
    root = _Root(path_of_root, mounts, _User.of(config))
    if "/" in program:
        places = [program]
    else:
        search = next((each[5:] for each in process.get("env", ()) if each.startswith("PATH=")), "/usr/bin:/bin")
        places = [posixpath.join(each or ".", program) for each in search.split(":")]
    directory = process.get("cwd", "/") if "/" in program else ""
    try:
        for place in places:
            path = posixpath.normpath(posixpath.join(directory, place))
            head = root.read_head(path)
            if head is not None:
                is_refused = posixpath.isabs(place) and not root.may_execute(path)
                return f"exec {path}: permission denied" if is_refused else _find_flaw_in(root, path, head, _DEPTH)
    except _MountedError:
        return ""
    return MISSING


def _are_too_long(strings: Sequence[str]) -> bool:
    """Return whether the kernel refuses arguments and environment for their size."""
    sizes = [len(os.fsencode(each)) + 1 for each in strings]
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)  # which the program has from us
    room = _MOST_BYTES if stack == resource.RLIM_INFINITY else max(min(stack // 4, _MOST_BYTES), _LEAST_BYTES)
    return max(sizes) > STRING_BYTES + 1 or sum(sizes) + _POINTER_BYTES * len(sizes) > room


def _find_flaw_in(root: "_Root", path: str, head: bytes, depth: int, told: str = "") -> str:
    """Return why a file that begins so cannot be executed, as `told`, for which it is an interpreter."""
    told = told or path
    if head.startswith(b"#!"):
        words = head[2:].split(b"\n")[0].split()
        interpreter = words[0].partition(b"\0")[0].decode("utf-8", "surrogateescape") if words else ""
        if not depth:
            return f"exec {told}: too many levels of interpreters"
    elif head.startswith(b"\x7fELF"):
        if flaw := _find_flaw_of_elf(root, path, head):
            return f"exec {told}: {flaw}"
        interpreter = _elf_interpreter(head)
    else:
        return f"exec {told}: exec format error"
    if not interpreter and not head.startswith(b"#!"):
        return ""
    place = posixpath.normpath(posixpath.join("/", interpreter))
    below = root.read_head(place) if interpreter else None
    if below is None and root.mounts:  # a link may lead to it
        raise _MountedError
    if below is None or (posixpath.isabs(interpreter) and not root.may_execute(place)):
        why = "is missing" if below is None else "may not be executed: permission denied"
        return f"exec {told}: its interpreter {interpreter!r} {why}"
    return _find_flaw_in(root, place, below, depth - 1, told) if head.startswith(b"#!") else ""


def _find_flaw_of_elf(root: "_Root", path: str, head: bytes) -> str:
    if head[4:6] + head[18:20] != _our_machine() or _is_truncated(head):
        return "exec format error: it is made for another kind of machine, or damaged"
    lost = root.find_lost_capabilities(path)
    return f"operation not permitted: it counts on {', '.join(lost)}, by its file" if lost else ""


class _MountedError(Exception):
    """What is asked for is on a mount that only the container has, or may be."""


class _User(NamedTuple):
    """Who a program runs as, and so what it may execute (path_resolution(7))."""

    uid: int
    groups: frozenset[int]
    may_pass: bool
    """Whether it may go through any directory: by a capability, or because its ids are not those of the files."""
    overrides: bool
    """Whether it may execute what anybody may."""
    capabilities: Mapping[str, Sequence[str]] | None
    """As the runtime-spec has them; None where those of a file do not count."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "_User":
        process = config["process"]
        user = process.get("user", {})
        has_own_users = "uidMappings" in config.get("linux", {})
        capabilities = None if has_own_users else process.get("capabilities")
        effective = ("CAP_DAC_OVERRIDE",) if capabilities is None else capabilities.get("effective", ())
        overrides = "CAP_DAC_OVERRIDE" in effective
        groups = frozenset([user.get("gid", 0), *user.get("additionalGids", ())])
        may_pass = overrides or "CAP_DAC_READ_SEARCH" in effective
        return cls(user.get("uid", 0), groups, may_pass, overrides, capabilities)

    def may_execute(self, status: os.stat_result) -> bool:
        """Return whether it may execute a file, or go through a directory."""
        if self.may_pass if stat.S_ISDIR(status.st_mode) else self.overrides:
            return True
        if status.st_uid == self.uid:
            return bool(status.st_mode & stat.S_IXUSR)
        return bool(status.st_mode & (stat.S_IXGRP if status.st_gid in self.groups else stat.S_IXOTH))


class _Root(NamedTuple):
    """A container's root file system, as it is without what is mounted in it."""

    path: str
    mounts: Sequence[str]
    """Where something is mounted that may hold programs."""
    user: _User

    def read_head(self, path: str) -> bytes | None:
        """Return how a file begins, found as a process in the root would; None if there is none that may be executed.

        Raises _MountedError, OSError.
        """
        self._require_free(path)
        try:
            top = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                above = os.readlink(f"/proc/self/fd/{top}")
                found = open_in_root(top, os.fsencode(path.lstrip("/")))
            finally:
                os.close(top)
            try:
                self._require_free(os.readlink(f"/proc/self/fd/{found}").removeprefix(above))
                status = os.fstat(found)
                if not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o111:
                    return None
                with open(f"/proc/self/fd/{found}", "rb") as file:
                    return file.read(_HEAD_BYTES)
            finally:
                os.close(found)
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise

    def may_execute(self, path: str) -> bool:
        """Return whether the user may execute a file that is there, and go through the directories that lead to it.

        Those on the way of a link that leads to a link are not looked at. Raises OSError.
        """
        top = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            above = os.readlink(f"/proc/self/fd/{top}")
            for way in (path, _find_place(top, path).removeprefix(above)):
                parts = way.strip("/").split("/")
                for count in range(len(parts) + 1):
                    found = open_in_root(top, os.fsencode("/".join(parts[:count])))
                    try:
                        if not self.user.may_execute(os.fstat(found)):
                            return False
                    finally:
                        os.close(found)
            return True
        finally:
            os.close(top)

    def find_lost_capabilities(self, path: str) -> list[str]:
        """Return which capabilities a program counts on by its file and would not get. Raises OSError."""
        if self.user.capabilities is None:
            return []
        top = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            place = _find_place(top, path)
        finally:
            os.close(top)
        try:
            attribute = os.getxattr(place, "security.capability")
            is_heeded = not os.statvfs(place).f_flag & os.ST_NOSUID
        except OSError as error:
            if error.errno in {errno.ENODATA, errno.EOPNOTSUPP, errno.EOVERFLOW}:  # the last: another user namespace's
                return []
            raise
        return find_not_given(attribute, self.user.capabilities) if is_heeded else []

    def _require_free(self, path: str) -> None:
        if any(f"{path}/".startswith(f"{mount.rstrip('/')}/") for mount in self.mounts):
            raise _MountedError


def _find_place(top: int, path: str) -> str:
    """Return the path, without links, of what a path in a root leads to. Raises OSError."""
    found = open_in_root(top, os.fsencode(path))
    try:
        return os.readlink(f"/proc/self/fd/{found}")
    finally:
        os.close(found)


def _our_machine() -> bytes:
    with open("/proc/self/exe", "rb") as file:
        head = file.read(20)
    return head[4:6] + head[18:20]


def _is_truncated(head: bytes) -> bool:
    """Return whether an ELF file ends before the table of its segments does (elf(5))."""
    if len(head) < _ELF_BYTES:
        return True
    if head[4] != 2 or len(head) == _HEAD_BYTES:
        return False
    offset = struct.unpack_from("=Q", head, 32)[0]
    size, count = struct.unpack_from("=HH", head, 54)
    return bool(offset + size * count > len(head))


def _elf_interpreter(head: bytes) -> str:
    """Return the path in an ELF file's PT_INTERP, "" if it has none or it is beyond what was read (elf(5))."""
    if head[4] != 2:
        return ""
    offset = struct.unpack_from("=Q", head, 32)[0]
    size, count = struct.unpack_from("=HH", head, 54)
    for start in range(offset, offset + size * count, max(size, 1)):
        if start + 40 > len(head):
            return ""
        kind, _, at, _, _, length = struct.unpack_from("=IIQQQQ", head, start)
        if kind == _PT_INTERP:
            return head[at : at + length].rstrip(b"\0").decode("utf-8", "surrogateescape")
    return ""
