"""A container's root directory, user and groups, as its process takes them."""

import ctypes
import errno
import os

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def enter_root(plan):
    root, uid = plan["root"], plan["uid"]
    """Make `root` the root directory, with /proc and the usual devices; "" keeps the host's root.

    In a mount namespace of its own, so that nothing is left on the host. Root that may not have one (in a
    container of somebody else's) goes without /proc and devices.
    """
    if not root:
        return
    if enter_namespaces(uid):
        mount("none", "/", _MS_REC | _MS_PRIVATE)
        for directory, name, flags in (
            *(("dev", name, _MS_BIND) for name in _DEVICES),
            ("proc", "", _MS_BIND | _MS_REC),
        ):
            target = make_mount_point(root, directory, name)
            if target:
                mount(os.path.join("/", directory, name), target, flags)
    os.chroot(root)
    os.chdir("/")


def enter_namespaces(uid: int | None) -> bool:
    """Enter a mount namespace of our own; say whether there is one.

    An ordinary user needs a user namespace for that, where it is `uid` (0 by default) and nobody else. Raises
    OSError where the kernel does not allow it.
    """
    if os.geteuid() == 0:
        return call_libc("unshare", _CLONE_NEWNS) == 0
    outside_uid, outside_gid = os.geteuid(), os.getegid()
    if call_libc("unshare", _CLONE_NEWUSER | _CLONE_NEWNS):
        raise OSError(errno.EPERM, "an image with layers needs root or user namespaces, and there is neither here")
    write_map("setgroups", "deny")
    write_map("uid_map", f"{uid or 0} {outside_uid} 1")
    write_map("gid_map", f"0 {outside_gid} 1")
    return True


def mount(source: str, target: str, flags: int) -> None:
    """Mount without a type or options (mount(2)). Raises OSError."""
    code = call_libc("mount", source.encode(), target.encode(), None, flags, None)
    if code:
        raise OSError(code, f"mounting it: {os.strerror(code)}", target)


def call_libc(name: str, *arguments: object) -> int:
    """Call a function of the C library that returns 0 or sets errno; return 0 or the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_ulong(each) if isinstance(each, int) else each for each in arguments]
    return ctypes.get_errno() if getattr(libc, name)(*words) else 0


def make_mount_point(root: str, directory: str, name: str) -> str:
    """Return a path under `root` to mount on, made if it is missing; "" if the image put a link in its place."""
    parent = os.path.join(root, directory)
    if not os.path.lexists(parent):
        os.mkdir(parent, 0o755)
    if os.path.islink(parent) or not os.path.isdir(parent):
        return ""
    if not name:
        return parent
    path = os.path.join(parent, name)
    if not os.path.lexists(path):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return "" if os.path.islink(path) else path


def write_map(name: str, text: str) -> None:
    """Write one of this process's user namespace files (user_namespaces(7))."""
    with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
        file.write(text)


def become_user(plan: dict[str, object]) -> None:
    """Take the plan's groups and user, which needs the right to; nothing is done where it names none."""
    groups, gid, uid = plan["groups"], plan["gid"], plan["uid"]
    if os.geteuid() == uid and not groups and gid in {None, os.getegid()}:
        return
    if isinstance(groups, list) and (groups or uid is not None) and plan["setgroups"]:
        os.setgroups(groups)
    if isinstance(gid, int):
        os.setgid(gid)
    if isinstance(uid, int):
        os.setuid(uid)
