"""The gate: what a container's process is before it is the container's program.

Run as a script, by path, with nothing but the standard library. It waits until the engine has written its
identity to disk and opens the gate; if the engine dies first, the gate closes and it exits without having run a
line of the user's program. Then it becomes what the plan says, and executes the program in its own place,
so that pid, start time and pidfd inode stay those that were written down.

Descriptors: 3 the gate (one byte opens it, end of file closes it), 4 the report (closed by a successful exec;
what is written to it is why there was none), 5 the plan as JSON.
"""

import json
import os
import select
import signal
import sys

GATE, REPORT, PLAN = 3, 4, 5
NOT_STARTED = 128
"""The exit code of a container whose program could not be started, also where nobody is left to be told why."""
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def main() -> None:
    """Wait at the gate, then become the program. Never returns."""
    with os.fdopen(PLAN, "rb") as file:
        plan = json.load(file)
    os.set_inheritable(REPORT, False)
    os.set_inheritable(GATE, False)
    if not wait_for_gate():
        os._exit(NOT_STARTED)
    try:
        enter_root(plan["root"], plan["uid"])
        become_user(plan)
        os.chdir(plan["cwd"])
        # Python ignores these two; a program expects the defaults.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        environment = dict(entry.split("=", 1) for entry in plan["env"])
        os.execvpe(plan["args"][0], plan["args"], environment)  # noqa: S606  # a shell is what it must not be
    except (OSError, ValueError) as error:
        name = getattr(error, "filename", None) or plan["args"][0]
        if isinstance(name, bytes):  # the last place that execvpe has looked for the program
            name = plan["args"][0]
        reason = getattr(error, "strerror", None) or str(error)
        os.write(REPORT, f"{name!r}: {reason}".encode(errors="replace")[:4096])
        os._exit(NOT_STARTED)


def wait_for_gate() -> bool:
    """Return True once the gate is opened, False if the engine is gone.

    A fork of the engine's process may hold the gate's other end, so a new parent means the same as its closing.
    """
    parent = os.getppid()
    poll = select.poll()
    poll.register(GATE, select.POLLIN)
    while not poll.poll(1000):
        if os.getppid() != parent:
            return False
    return os.read(GATE, 1) == b"g"


def enter_root(root: str, uid: int | None) -> None:
    """Make `root` the root directory, with /proc and the usual devices; "" keeps the host's root.

    In a mount namespace of its own, so that nothing is left on the host; an ordinary user needs a user namespace
    for that, where it is `uid` (0 by default) and nobody else.
    """
    if not root:
        return
    import ctypes  # noqa: PLC0415  # only a container with a root of its own pays for it

    libc = ctypes.CDLL(None, use_errno=True)

    def call(what: str, result: int) -> None:
        if result:
            code = ctypes.get_errno()
            raise OSError(code, f"{what}: {os.strerror(code)}", root)

    def mount(source: str, target: str, flags: int) -> None:
        call(
            f"mounting {target}",
            libc.mount(source.encode(), target.encode(), None, ctypes.c_ulong(flags), None),
        )

    def enter_namespaces(flags: int) -> bool:
        return bool(libc.unshare(flags) == 0)

    if os.geteuid() == 0:
        own_mounts = enter_namespaces(_CLONE_NEWNS)
    else:
        outside_uid, outside_gid = os.geteuid(), os.getegid()
        own_mounts = enter_namespaces(_CLONE_NEWUSER | _CLONE_NEWNS)
        if not own_mounts:
            raise OSError(1, "an image with layers needs root or user namespaces, and this kernel allows neither", root)
        write_map("setgroups", "deny")
        write_map("uid_map", f"{uid or 0} {outside_uid} 1")
        write_map("gid_map", f"0 {outside_gid} 1")
    if own_mounts:
        mount("none", "/", _MS_REC | _MS_PRIVATE)
        for name in _DEVICES:
            target = make_mount_point(root, "dev", name)
            if target:
                mount(f"/dev/{name}", target, _MS_BIND)
        target = make_mount_point(root, "proc", "")
        if target:
            mount("/proc", target, _MS_BIND | _MS_REC)
    os.chroot(root)
    os.chdir("/")


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


if __name__ == "__main__":
    assert sys.argv, "run by the engine"
    main()
