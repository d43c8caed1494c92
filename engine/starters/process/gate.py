"""The gate: what a container's process is before it is the container's program.

Run as a script, by path, with nothing but the standard library. It waits until the engine has written its
identity to disk and opens the gate; if the engine dies first, the gate closes and it exits without having run a
line of the user's program. Then it becomes what the plan says, and executes the program in its own place,
so that pid, start time and pidfd inode stay those that were written down.

Descriptors: 3 the gate (one byte opens it, end of file closes it), 4 the report (closed by a successful exec;
what is written to it is why there was none), 5 the plan as JSON.
"""

import errno
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
        execute(plan["args"], dict(entry.split("=", 1) for entry in plan["env"]))
    except BaseException as error:  # noqa: BLE001  # if it is not reported, it passes for a start
        name = getattr(error, "filename", None) or plan["args"][0]
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        os.write(REPORT, f"{name!r}: {reason}".encode(errors="replace")[:4096])
        os._exit(NOT_STARTED)


def execute(args: list[str], environment: dict[str, str]) -> None:
    """Execute the program, looked for in the environment's PATH as execvp(3) does. Raises OSError.

    Not os.execvpe: that imports modules when it is called, which the new root directory does not have.
    """
    name = args[0]
    places = [""] if "/" in name else environment.get("PATH", "/usr/local/bin:/usr/bin:/bin").split(":")
    problem: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    for place in places:
        try:
            os.execve(os.path.join(place, name), args, environment)  # noqa: S606  # a shell is what it must not be
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            problem = error  # somewhere else it may be executable
    problem.filename = name
    raise problem


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
    import ctypes  # noqa: PLC0415  # only a container with a root of its own pays for it

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


if __name__ == "__main__":
    assert sys.argv, "run by the engine"
    main()
