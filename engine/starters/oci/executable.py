"""Whether the kernel can execute a container's program: what execve(2) refuses, and why.

Asked only of a process that ended as a failed execve makes it end, for the runtimes do not tell that from a program
which ended so by itself.
"""

import errno
import os
import posixpath
import stat
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from limpet.engine.starters.process.keeper.root import open_in_root

_HEAD_BYTES = 4096
_ELF_BYTES = 64
_PT_INTERP = 3
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG}
MISSING = "its program is not there"
_DEPTH = 5
"""How many scripts may be each other's interpreters (BINPRM_MAX_RECURSION and one)."""
_STRING_PAGES = 32
_ALL_BYTES = 6 << 20
"""How long one argument may be (MAX_ARG_STRLEN), and how much all of them, with the environment (execve(2))."""


def find_flaw(config: Mapping[str, Any]) -> str:
    """Return why the program of a config.json cannot be executed; "" if it can, or if that cannot be told.

    MISSING is no proof by itself: it may be on a mount that only the container has.

    Raises OSError if a file cannot be looked at now. What a mount puts over the root file system is not looked into.
    """
    if not config:
        return ""
    process, root = config["process"], config["root"]["path"]
    program: str = process["args"][0]
    if _are_too_long([*process["args"], *process.get("env", ())]):
        return f"exec {program}: argument list too long"
    mounts = [mount["destination"] for mount in config.get("mounts", ()) if mount.get("type") == "bind"]
    if "/" in program:
        paths = [posixpath.join(process.get("cwd", "/"), program)]
    else:
        search = next((each[5:] for each in process.get("env", ()) if each.startswith("PATH=")), "/usr/bin:/bin")
        paths = [posixpath.join(each or ".", program) for each in search.split(":")]
    for path in map(posixpath.normpath, paths):
        if any(f"{path}/".startswith(f"{mount.rstrip('/')}/") for mount in mounts):
            return ""
        head = _read_head(root, path)
        if head is not None:
            return _find_flaw_in(root, path, head, _DEPTH)
    return MISSING


def _are_too_long(strings: Sequence[str]) -> bool:
    """Return whether the kernel refuses arguments and environment for their size."""
    sizes = [len(os.fsencode(each)) + 1 for each in strings]
    return max(sizes) > _STRING_PAGES * os.sysconf("SC_PAGE_SIZE") or sum(sizes) > _ALL_BYTES


def _find_flaw_in(root: str, path: str, head: bytes, depth: int) -> str:
    if head.startswith(b"#!"):
        words = head[2:].split(b"\n")[0].split()
        interpreter = words[0].partition(b"\0")[0].decode("utf-8", "surrogateescape") if words else ""
        if not depth:
            return f"exec {path}: too many levels of interpreters"
    elif head.startswith(b"\x7fELF"):
        if head[4:6] + head[18:20] != _our_machine() or _is_truncated(head):
            return f"exec {path}: exec format error: it is made for another kind of machine, or damaged"
        interpreter = _elf_interpreter(head)
        if not interpreter:
            return ""
    else:
        return f"exec {path}: exec format error"
    below = _read_head(root, posixpath.normpath(posixpath.join("/", interpreter))) if interpreter else None
    if below is None:
        return f"exec {path}: its interpreter {interpreter!r} is missing"
    return _find_flaw_in(root, path, below, depth - 1) if head.startswith(b"#!") else ""


def _read_head(root: str, path: str) -> bytes | None:
    """Return how a file begins, found as a process in the root would; None if there is none that may be executed."""
    try:
        top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = open_in_root(top, os.fsencode(path.lstrip("/")))
        finally:
            os.close(top)
        try:
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
