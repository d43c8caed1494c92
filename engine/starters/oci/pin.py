"""Makes a sandbox's namespaces and pins them: run by a Python of its own, with the standard library alone.

It reads JSON: {"directory", "kinds", "hostname", "sysctls", "shm_bytes", "follows_first", "mark", "is_trial"}. It
enters new namespaces, sets up loopback, hostname and sysctls, and binds each namespace to a file of its kind's name in
the directory, where it stays without any process. The file `mounts` there names the mount namespace in which that is
so. A pid namespace needs a process: its first, which has what ends there reaped, and does nothing else. A trial is an
ordinary user's, in a user namespace, and pins nothing.

Containers see that first process, and those with CAP_SYS_PTRACE get at all that it has. So it has nothing: for its root
directory an empty file system, which has `mark` for its source, no capabilities, no descriptors, no environment, and
for its program some bytes of machine code, instead of this Python and its memory, that allow it one system call alone.

Kernel interfaces: unshare(2), setns(2), user_namespaces(7), mount_namespaces(7), mount(2), netdevice(7), prctl(2),
pid_namespaces(7), pivot_root(2), capabilities(7), seccomp(2), wait(2) on SIGCHLD that is ignored, elf(5).
"""

import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

_CLONE = {"net": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000, "pid": 0x20000000}
_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWCGROUP = 0x00020000, 0x10000000, 0x02000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 8, 32, 4096
_MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x4000, 0x40000, 2
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_PR_SET_DUMPABLE, _PR_SET_NAME, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 15, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAP_SYS_PTRACE = 19
_CAPABILITY_VERSION = 0x20080522
_FIRST = "limpet-pause"
_libc = ctypes.CDLL(None, use_errno=True)


class _Machine(NamedTuple):
    """What differs between machines in the program of a first process."""

    elf: int
    """Its number in ELF."""
    audited: int
    """Its number in filters of system calls."""
    call: int
    """The one that waits for ever."""
    begin: str
    """Code that asks for a filter, prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter), up to the filter's address."""
    load: Callable[[int], bytes]
    """Return code that loads an address."""
    end: str
    """Code that makes that call, and then waits for ever, and again if it is woken."""


_MACHINES = {
    "x86_64": _Machine(
        elf=62,  # EM_X86_64
        audited=0xC000003E,  # AUDIT_ARCH_X86_64
        call=34,  # pause()
        begin="bf 16000000  be 02000000",
        load=lambda address: struct.pack("<BI", 0xBA, address),
        end="b8 9d000000  0f05  b8 22000000  0f05  ebf7",
    ),
    "aarch64": _Machine(
        elf=183,  # EM_AARCH64
        audited=0xC00000B7,  # AUDIT_ARCH_AARCH64
        call=73,  # ppoll(NULL, 0, NULL, NULL)
        begin="c00280d2  410080d2",
        load=lambda address: struct.pack(
            "<II", 0xD2800002 | (address & 0xFFFF) << 5, 0xF2A00002 | (address >> 16) << 5
        ),
        end="e81480d2 010000d4  000080d2 010080d2 020080d2 030080d2 280980d2 010000d4  faffff17",
    ),
}
"""By what uname(2) calls them; on others the first process is Python."""


def main() -> None:
    """Do what is asked for on its input, or exit with what the system has refused."""
    try:
        _make(json.load(sys.stdin))
    except OSError as problem:
        sys.exit(f"{problem.filename or ''}: {problem.strerror}".removeprefix(": "))


def _make(asked: dict[str, Any]) -> None:
    directory, kinds = asked["directory"], asked["kinds"]
    is_trial = asked.get("is_trial", False)
    if is_trial:
        _enter_users()
    _check(_libc.unshare(sum(_CLONE[kind] for kind in kinds)), "unshare")
    if "net" in kinds:
        _raise_loopback()
    if asked["hostname"] and "uts" in kinds:
        socket.sethostname(asked["hostname"])
    _set_sysctls(asked["sysctls"])
    if is_trial:
        return
    if asked["follows_first"]:
        _enter_first(directory)
    with open(os.path.join(directory, "mounts"), "x", encoding="ascii") as file:
        file.write(os.readlink("/proc/self/ns/mnt"))
    if "ipc" in kinds:
        path = os.path.join(directory, "shm")
        os.mkdir(path)
        _mount("shm", path, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, f"mode=1777,size={asked['shm_bytes']}")
    for kind in kinds:
        if kind != "pid":
            _pin(f"/proc/self/ns/{kind}", os.path.join(directory, kind))
    if "pid" in kinds:
        _begin_pids(directory, asked["mark"])


def _set_sysctls(sysctls: dict[str, str]) -> None:
    for name, value in sysctls.items():
        path = f"/proc/sys/{name.replace('.', '/')}"
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(value)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"sysctls {name!r}") from error


def _enter_first(directory: str) -> None:
    """Enter the mount namespace of process 1, if the directory is there, too: else, or where we may not, stay here."""
    here = os.stat(directory)
    own, first = (os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC) for pid in ("self", "1"))
    if _libc.setns(first, _CLONE_NEWNS) == 0:
        try:
            is_same = os.path.samestat(os.stat(directory), here)
        except OSError:
            is_same = False
        if not is_same:
            _check(_libc.setns(own, _CLONE_NEWNS), "setns")


def _enter_users() -> None:
    """Become root in a user namespace."""
    user, group = os.geteuid(), os.getegid()
    _check(_libc.unshare(_CLONE_NEWUSER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _begin_pids(directory: str, mark: str) -> None:
    """Start the first process of the new pid namespace; it goes on only once the namespace is pinned.

    Returns once it has nothing any more that a container could get at.
    """
    wait, begin = os.pipe()
    answer, answered = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(begin)
        if os.read(wait, 1):
            try:
                _be_first(directory, mark, answered)
            except OSError as problem:
                os.write(answered, str(problem.strerror).encode())
        os._exit(0)
    os.close(wait)
    os.close(answered)
    _pin(f"/proc/{pid}/ns/pid", os.path.join(directory, "pid"))
    os.write(begin, b"\0")
    if why := os.read(answer, 4096):
        raise OSError(0, why.decode(errors="replace"))


def _be_first(directory: str, mark: str, answered: int) -> None:
    """Do nothing for ever. What is reparented to it is reaped by the kernel, as SIGCHLD is ignored.

    `answered` is closed once all else is. Raises OSError.
    """
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    _libc.unshare(_CLONE_NEWCGROUP)
    code, has_ptrace = _make_code(os.uname().machine), _has_ptrace()
    texts = _find_texts()
    os.dup2(answered, 0, inheritable=False)
    os.closerange(1, max(map(int, os.listdir("/proc/self/fd"))) + 1)  # a lock has the number that it has in the engine
    _enter_nothing(directory, mark, code, 0o111 if has_ptrace else 0o555)
    _drop_capabilities()
    try:
        os.execve(f"/{_FIRST}", [_FIRST], {})  # noqa: S606  # there is no shell where it is
    except OSError:  # another machine, or a system that executes no such file
        _libc.prctl(_PR_SET_NAME, _FIRST.encode(), 0, 0, 0)
        for begin, end in texts:
            ctypes.memset(begin, 0, end - begin)
        if has_ptrace:
            _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        os.close(0)
    while True:
        signal.sigwait(())


def _enter_nothing(directory: str, mark: str, code: bytes, mode: int) -> None:
    """Have a mount namespace of its own, in which there is its program and nothing else, and nothing can be made.

    Nobody can trace one whose program it may not read, but who has CAP_SYS_PTRACE; nor would an engine without that
    see what namespaces it has.
    """
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE, "")
    _mount(mark, directory, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=555,size=4k,nr_inodes=2")
    os.chdir(directory)
    if code:
        with open(_FIRST, "wb") as file:
            file.write(code)
            os.fchmod(file.fileno(), mode)
    _mount(mark, ".", "", _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV, "")
    _check(_libc.pivot_root(b".", b"."), "pivot_root")  # the old root is mounted over the new one then
    _check(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/")


def _drop_capabilities() -> None:
    """Give up all capabilities, and the ways to get some by executing a file."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    number = 0
    while _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
        number += 1
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _check(_libc.capset(struct.pack("Ii", _CAPABILITY_VERSION, 0), bytes(24)), "capset")


def _has_ptrace() -> bool:
    with open("/proc/self/status", encoding="ascii") as file:
        return any(line.startswith("CapEff:") and int(line[7:], 16) >> _CAP_SYS_PTRACE & 1 for line in file)


def _find_texts() -> list[tuple[int, int]]:
    """Return where the arguments and the environment of this process are in memory (proc_pid_stat(5), 48 to 51)."""
    with open("/proc/self/stat", "rb") as file:
        found = [int(each) for each in file.read().rpartition(b")")[2].split()[45:49]]
    return [(found[0], found[1]), (found[2], found[3])]


def _make_code(machine: str) -> bytes:
    """Return a program that allows itself one system call and waits in it for ever, b"" for an unknown machine."""
    if machine not in _MACHINES:
        return b""
    one = _MACHINES[machine]
    base, headers = 0x400000, 64 + 2 * 56
    most = 64  # bytes of code
    filter_at = base + headers + most
    text = (bytes.fromhex(one.begin) + one.load(filter_at) + bytes.fromhex(one.end)).ljust(most, b"\0")
    instructions = (
        (0x20, 0, 0, 4),  # load the machine
        (0x15, 0, 2, one.audited),
        (0x20, 0, 0, 0),  # load the number of the call
        (0x15, 1, 0, one.call),
        (0x06, 0, 0, 0x00050001),  # SECCOMP_RET_ERRNO, EPERM
        (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
    )
    text += struct.pack("<HxxxxxxQ", len(instructions), filter_at + 16)
    text += b"".join(struct.pack("<HBBI", *each) for each in instructions)
    size = headers + len(text)
    header = struct.pack(
        "<4sBBBxxxxxxxxxHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 2, one.elf, 1, base + headers, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    loaded = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x10000)
    stack = struct.pack("<IIQQQQQQ", 0x6474E551, 6, 0, 0, 0, 0, 0, 16)  # which no code is executed in
    return header + loaded + stack + text


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        found = fcntl.ioctl(link, _SIOCGIFFLAGS, struct.pack("16sh22x", b"lo", 0))
        flags = struct.unpack_from("16sh", found)[1] | _IFF_UP
        fcntl.ioctl(link, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags))


def _pin(namespace: str, path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    _mount(namespace, path, "", _MS_BIND, "")


def _mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    texts = (os.fsencode(source), os.fsencode(target), kind.encode() or None)
    _check(_libc.mount(*texts, ctypes.c_ulong(flags), options.encode() or None), f"mount {target}")


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
