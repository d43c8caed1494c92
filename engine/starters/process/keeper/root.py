"""A container's root directory, its mounts, its working directory and its user, as its process takes them.

Works in the process that becomes the program, with the standard library alone. What the plan says of it:

| field | meaning |
| --- | --- |
| root | the root directory; "" for the host's own |
| mounts | for a root: [{"source", "target", "readonly", "propagation"}], propagation private, slave or shared |
| cwd | the working directory, in the root; in a root it is made if it is missing |
| uid, gid | numbers, or null for those that this process has |
| groups | supplementary groups, set where setgroups is true and any of uid and groups is given |
| setgroups | whether this process may set groups, and so become anybody |
| no_new_privs | whether no program may get more rights than its parent had (prctl(2)) |

Strings are UTF-8; bytes that are not are surrogates in them (PEP 383), whatever the locale.

Kernel interfaces: unshare(2), setns(2), mount(2), open_tree(2) and move_mount(2) (Linux 5.2), prctl(2),
user_namespaces(7).
"""

import ctypes
import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWUSER = 0x00020000, 0x04000000, 0x10000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC = 32, 4096, 16384
_PROPAGATIONS = {"private": 1 << 18, "slave": 1 << 19, "shared": 1 << 20}
_KEPT_FLAGS = 0x0F | 0x400 | 0x800 | 0x1000
"""Of statvfs(3): read-only, nosuid, nodev, noexec, noatime, nodiratime, relatime."""
_RELATIME_SEEN, _MS_RELATIME = 0x1000, 1 << 21
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT = 428, 429
"""The same on every architecture."""
_AT_FDCWD, _AT_RECURSIVE, _OPEN_TREE_CLONE = -100, 0x8000, 1
_MOVE_FROM_AND_TO_DESCRIPTORS = 0x04 | 0x40
_PR_SET_NO_NEW_PRIVS = 38
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ANYTHING = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LINKS = 40
"""As many as the kernel follows in one path."""
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
_DEVICE_MOUNTS = (
    ("dev/pts", "devpts", _MS_NOSUID | _MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"),
    ("dev/shm", "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "mode=1777,size=64m"),
)
_libc = ctypes.CDLL(None, use_errno=True)


def enter_root(plan: dict[str, Any]) -> None:
    """Make the plan's root the root directory, with its mounts, /proc and /dev; "" keeps the host's root.

    In a mount namespace of its own, so that nothing is left on the host. Root that may not have one (in a
    container of somebody else's) goes without /proc and /dev. Raises OSError, also for mounts where there is none.
    """
    if not plan["root"]:
        return
    has_own_mounts = enter_namespaces(plan["uid"], plan["gid"])
    root = os.open(_to_bytes(plan["root"]), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # as the new namespace has it
    if has_own_mounts:
        fill_root(root, plan["mounts"])
    elif plan["mounts"]:
        raise OSError(errno.EPERM, "there is no mount namespace here", plan["mounts"][0]["target"])
    os.close(open_in_root(root, _to_bytes(plan["cwd"]), make="directory"))
    os.fchdir(root)
    try:
        os.chroot(b".")
    except OSError as error:
        error.filename, error.strerror = plan["root"], f"chroot(2): {error.strerror}"
        raise
    os.close(root)


def read_view() -> list[int]:
    """Return what this thread's mount namespace and root directory are told by: two that see other files differ."""
    root = os.stat("/")
    return [os.stat("/proc/thread-self/ns/mnt").st_ino, root.st_dev, root.st_ino]


def open_view() -> list[int]:
    """Return descriptors of this thread's mount namespace and root directory."""
    namespace = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [namespace, os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
    except BaseException:
        os.close(namespace)
        raise


def enter_view(namespace: int, root: int) -> None:
    """See the files that another process sees (setns(2), which takes root). Raises OSError."""
    if _libc.setns(namespace, _CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.fchdir(root)
    os.chroot(b".")


def enter_namespaces(uid: int | None, gid: int | None) -> bool:
    """Enter a mount namespace of our own; say whether there is one.

    An ordinary user needs a user namespace for that, where it is `uid` and `gid` (0 by default) and nobody else; there
    it has a UTS namespace, too, by which its descendants are told. Raises OSError where the kernel does not allow it.
    """
    if os.geteuid() == 0:
        return int(_libc.unshare(_CLONE_NEWNS)) == 0
    outside_uid, outside_gid = os.geteuid(), os.getegid()
    if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS):
        raise OSError(errno.EPERM, "an image with layers needs root or user namespaces, and there is neither here")
    _libc.unshare(_CLONE_NEWUTS)  # where that is refused, they are told by their session
    write_map("setgroups", "deny")
    write_map("uid_map", f"{uid or 0} {outside_uid} 1")
    write_map("gid_map", f"{gid or 0} {outside_gid} 1")
    return True


def fill_root(root: int, mounts: list[dict[str, Any]]) -> None:
    """Mount /proc, /dev and `mounts` below the directory `root`, in a mount namespace of our own. Raises OSError.

    Copies of the sources are made first: they are peers of the host's mounts, as "slave" and "shared" need it. Then
    nothing that is mounted here reaches the host by itself.
    """
    devices = {name: _copy_mounts(f"/dev/{name}") for name in _DEVICES if os.path.exists(f"/dev/{name}")}
    proc = _copy_mounts("/proc")
    copies = [_copy_mounts(each["source"]) for each in mounts]
    _mount(None, "/", None, _MS_REC | _PROPAGATIONS["private"], None)
    _place(proc, root, "proc")
    dev = open_in_root(root, b"dev", make="directory")
    _mount("tmpfs", _name(dev), "tmpfs", _MS_NOSUID | _MS_NOEXEC, "mode=755,size=64k")
    os.close(dev)
    for name, copy in devices.items():
        _place(copy, root, f"dev/{name}")
    for target, kind, flags, options in _DEVICE_MOUNTS:
        found = open_in_root(root, target.encode(), make="directory")
        _mount(kind, _name(found), kind, flags, options)
        os.close(found)
    dev = open_in_root(root, b"dev")
    for name, link in _DEVICE_LINKS.items():
        os.symlink(link, name, dir_fd=dev)
    os.close(dev)
    for each, copy in zip(mounts, copies, strict=True):
        _place(copy, root, each["target"], readonly=each["readonly"], propagation=each["propagation"])


def _copy_mounts(source: str) -> int:
    """Return a descriptor of a detached copy of what is seen at `source`, mounts below it included."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE
    copy: int = _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, _to_bytes(source), flags)
    if copy < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), source)
    return copy


def _place(copy: int, root: int, target: str, *, readonly: bool = False, propagation: str = "private") -> None:
    """Attach a detached copy at `target` in `root`, which is made if it is missing."""
    kind = "directory" if stat.S_ISDIR(os.fstat(copy).st_mode) else "file"
    found = open_in_root(root, _to_bytes(target), make=kind)
    if _libc.syscall(_SYS_MOVE_MOUNT, copy, b"", found, b"", _MOVE_FROM_AND_TO_DESCRIPTORS):
        raise OSError(ctypes.get_errno(), f"mounting it: {os.strerror(ctypes.get_errno())}", target)
    os.close(found)
    if propagation != "shared":  # it is the host's peer already, if the host shares it
        _mount(None, _name(copy), None, _MS_REC | _PROPAGATIONS[propagation], None)
    if readonly:
        _mount(None, _name(copy), None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _read_flags(copy), None)
    os.close(copy)


def _read_flags(copy: int) -> int:
    """Return the flags that a mount has: in a user namespace, none of those that came with it may be taken away."""
    seen = os.fstatvfs(copy).f_flag & _KEPT_FLAGS
    return seen & ~_RELATIME_SEEN | (_MS_RELATIME if seen & _RELATIME_SEEN else 0)


def open_in_root(root: int, path: bytes, *, make: str = "") -> int:
    """Return an O_PATH descriptor of `path` as a process with this root directory would find it.

    Neither ".." nor a link leads out of it. Where the path ends, `make` ("directory" or "file") makes what is missing,
    directories on the way included. Raises OSError, naming the path.
    """
    trail = [os.dup(root)]
    names = _split(path)
    links = 0
    try:
        while names:
            name = names.pop()
            if name == b"..":
                _go_back(trail, max(len(trail) - 1, 1))
                continue
            found = _open_name(trail[-1], name, make if not names else "directory" if make else "")
            trail.append(found)
            mode = os.fstat(found).st_mode
            if stat.S_ISLNK(mode):
                link = os.readlink(b"", dir_fd=found)
                _go_back(trail, 1 if link.startswith(b"/") else len(trail) - 1)
                names += _split(link)
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            elif not stat.S_ISDIR(mode) and (names or make == "directory"):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return os.dup(trail[-1])
    except OSError as error:
        error.filename = os.fsdecode(path)
        raise
    finally:
        _go_back(trail, 0)


def _split(path: bytes) -> list[bytes]:
    """Return the names in a path, the first one last."""
    return [name for name in reversed(path.split(b"/")) if name not in {b"", b"."}]


def _go_back(trail: list[int], length: int) -> None:
    """Close the directories that were walked through, the last ones first, until so many are left."""
    while len(trail) > length:
        os.close(trail.pop())


def _open_name(directory: int, name: bytes, make: str) -> int:
    """Open what has this name, a link itself; make it first if it is missing and `make` says what.

    What is made is for everybody to read, whatever the umask of an engine that makes it.
    """
    for _ in range(2):
        try:
            return os.open(name, _ANYTHING, dir_fd=directory)
        except FileNotFoundError:
            if not make:
                raise
        with suppress(FileExistsError):
            if make == "directory":
                os.mkdir(name, 0o755, dir_fd=directory)
                os.chmod(name, 0o755, dir_fd=directory)  # noqa: S103  # as any root file system has it
            else:
                file = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=directory)
                os.fchmod(file, 0o644)
                os.close(file)
    return os.open(name, _ANYTHING, dir_fd=directory)


def become_user(plan: dict[str, Any]) -> None:
    """Take the plan's groups, group and user, which needs the right to, and its working directory. Raises OSError.

    The directory is entered before, as by other runtimes: an image's may be one that its user may not enter (/root).
    """
    cwd = _to_bytes(plan["cwd"])
    try:
        os.chdir(cwd)
        is_there = True
    except PermissionError:  # perhaps it is the user alone who may
        is_there = False
    groups, gid, uid = plan["groups"], plan["gid"], plan["uid"]
    if plan["setgroups"] and (groups or uid is not None):
        _call(os.setgroups, groups)
    if gid is not None and (gid,) * 3 != os.getresgid():
        _call(os.setresgid, gid, gid, gid)
    if uid is not None and (uid,) * 3 != os.getresuid():
        _call(os.setresuid, uid, uid, uid)
    if not is_there:
        os.chdir(cwd)
    if plan["no_new_privs"] and _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs cannot be set")


def _call(call: Callable[..., None], *args: object) -> None:
    """Make a call that names no file. Raises OSError that says which it was."""
    try:
        call(*args)
    except OSError as error:
        error.strerror = f"{call.__name__}(2): {error.strerror}"
        raise


def write_map(name: str, text: str) -> None:
    """Write one of this process's user namespace files (user_namespaces(7))."""
    with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
        file.write(text)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None) -> None:
    """Call mount(2). Raises OSError."""
    texts = [None if each is None else each.encode() for each in (source, target, kind, options)]
    if _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]):
        raise OSError(ctypes.get_errno(), f"mounting it: {os.strerror(ctypes.get_errno())}", kind or target)


def _name(descriptor: int) -> str:
    """Return a path that leads to what is open, and nowhere else."""
    return f"/proc/self/fd/{descriptor}"


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
