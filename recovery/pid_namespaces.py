"""What became of a process that was identified in another pid namespace. Nothing is concluded from a number alone.

No process outlives its pid namespace: when the first process of one ends, the kernel kills all others. That a namespace
is over can be shown in two ways. Numbers of namespaces are unique among all kinds while they exist, so one that names
another kind now was given back. And who sees every process of the machine sees that none is in it.
"""

import os
from contextlib import suppress

from limpet.recovery.evidence import Process
from limpet.schema.identity import ProcessIdentity

_FIRST_PID_NAMESPACE = 0xEFFFFFFC
FIRST_USER_NAMESPACE = 0xEFFFFFFD
"""Numbers that the kernel gives to the namespaces of its boot (linux/proc_ns.h)."""
_CAP_SYS_PTRACE = 1 << 19


def observe_elsewhere(identity: ProcessIdentity) -> tuple[Process, str]:
    """Return what became of a process of this boot in another pid namespace, GONE or ELSEWHERE, and why.

    Only what cannot hang is asked of other processes, and nothing that they can make large: links, and pidfds.
    """
    namespace, pidfd_inode = identity.pid_namespace, identity.pidfd_inode
    kind = _find_other_kind(namespace)
    if kind:
        return Process.GONE, f"that namespace is over: its number is that of this process's {kind} namespace"
    if not _sees_all_processes():
        return Process.ELSEWHERE, "whether that one is over cannot be seen from here"
    members = _find_members(namespace)
    if members is None:
        return Process.ELSEWHERE, "not every process may be looked at"
    if not members:
        return Process.GONE, "that namespace is over: no process of this machine is in it"
    if pidfd_inode and not any(_has_inode(pid, pidfd_inode) for pid in members):
        return Process.GONE, "it is not among the processes of that namespace"
    return Process.ELSEWHERE, f"process {members[0]} here is in that one"


def _find_other_kind(number: int) -> str:
    """Return the kind of this process's namespace that has this number and is no pid namespace; empty if none has."""
    for kind in ("cgroup", "ipc", "mnt", "net", "time", "user", "uts"):
        with suppress(OSError):  # a kernel without this kind
            if os.stat(f"/proc/self/ns/{kind}").st_ino == number:
                return kind
    return ""


def _sees_all_processes() -> bool:
    """Return whether this process is in the machine's own namespaces and /proc hides nothing from it."""
    try:
        with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
            capabilities = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
        return (
            os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE
            and os.stat("/proc/self/ns/user").st_ino == FIRST_USER_NAMESPACE
            and bool(capabilities & _CAP_SYS_PTRACE)
        )
    except (OSError, StopIteration):
        return False


def _find_members(namespace: int) -> list[int] | None:
    """Return the processes in a pid namespace that is not ours, None if one could not be looked at."""
    members = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        if name == "1":  # the first process of our own, which may have more rights than we
            continue
        try:
            if os.readlink(f"/proc/{name}/ns/pid") == f"pid:[{namespace}]":
                members.append(int(name))
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        except OSError:
            return None
    return members


def _has_inode(pid: int, pidfd_inode: int) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it may be
    try:
        return os.fstat(pidfd).st_ino == pidfd_inode
    finally:
        os.close(pidfd)
