"""Makes a sandbox's namespaces and pins them: run by a Python of its own, with the standard library alone.

It reads JSON: {"directory", "kinds", "hostname", "sysctls", "shm_bytes", "follows_first", "is_trial"}. It enters new
namespaces, sets up loopback, hostname and sysctls, and binds each namespace to a file of its kind's name in the
directory, where it stays without any process. The file `mounts` there names the mount namespace in which that is so. A
pid namespace needs a process: its first, which reaps and does nothing else, and works in the directory. A trial is an
ordinary user's, in a user namespace, and pins nothing.

Kernel interfaces: unshare(2), setns(2), user_namespaces(7), mount_namespaces(7), mount(2), netdevice(7), prctl(2),
pid_namespaces(7).
"""

import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import sys
from typing import Any

_CLONE = {"net": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000, "pid": 0x20000000}
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND = 2, 4, 8, 4096
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_PR_SET_NAME = 15
_libc = ctypes.CDLL(None, use_errno=True)


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
        _begin_pids(os.path.join(directory, "pid"))


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


def _begin_pids(path: str) -> None:
    """Start the first process of the new pid namespace; it goes on only once the namespace is pinned."""
    wait, begin = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(begin)
        if os.read(wait, 1):
            _reap_for_ever(os.path.dirname(path))
        os._exit(0)
    os.close(wait)
    _pin(f"/proc/{pid}/ns/pid", path)
    os.write(begin, b"\0")


def _reap_for_ever(directory: str) -> None:
    os.setsid()
    os.chdir(directory)  # by which it is found once somebody has unmounted the pin
    os.closerange(0, max(map(int, os.listdir("/proc/self/fd"))) + 1)  # a lock has the number that it has in the engine
    _libc.prctl(_PR_SET_NAME, b"limpet-pause", 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    while True:
        signal.sigwait({signal.SIGCHLD})
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            continue


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
