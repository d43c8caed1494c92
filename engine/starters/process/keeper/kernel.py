"""What the keeper asks the kernel of processes. Reads, and changes nothing but this process's own attributes.

Kernel interfaces: proc_pid_stat(5), prctl(2), pidfd_open(2), fcntl(2), PIDFD_GET_INFO (linux/pidfd.h; its exit code
Linux 6.15).
"""

import ctypes
import errno
import fcntl
import os
import select
import signal
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple, TypeVar

_T = TypeVar("_T")
PF_FORKNOEXEC = 0x40
"""In field 9 of /proc/PID/stat (include/linux/sched.h): forked, and has executed nothing since. A zombie keeps it."""
_PR_SET_PDEATHSIG, _PR_GET_DUMPABLE, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 3, 4, 15, 36
_PR_SET_TIMERSLACK, _PR_MCE_KILL, _PR_MCE_KILL_CLEAR, _PR_SET_THP_DISABLE = 29, 33, 0, 41
_NEW_TIMER_SLACK_NS, _NEW_COREDUMP_FILTER = 50_000, "0x33"
"""prctl(2) and core(5)."""
_PERSONALITY_IS, _PERSONALITY_DOMAIN = 0xFFFFFFFF, 0xFF
"""personality(2): the question, and the bits that say whose programs are run; the others are flags."""
_CLONE_VM, _CLONE_PARENT = 0x100, 0x8000
_IONBF = 2
"""stdio.h: without a buffer."""
_STACK_BYTES = 1 << 15
_RT_SIGACTION, _KEYCTL = {"x86_64": 13, "aarch64": 134}, {"x86_64": 250, "aarch64": 219}
_SET_MEMPOLICY, _IOPRIO_SET = {"x86_64": 238, "aarch64": 237}, {"x86_64": 251, "aarch64": 30}
"""The system calls' numbers."""
_CLOSE_RANGE = 436
"""The number of that one, which is the same on each architecture."""
_LAST = (1 << 32) - 1
_KEYCTL_JOIN_SESSION_KEYRING = 1
_IOPRIO_WHO_PROCESS = 1
_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO_EXIT = 1 << 3
NO_PROCESS = {errno.ESRCH, errno.EINVAL, errno.ENOENT}
"""What pidfd_open(2) says of a number that is no process's: nobody's, 0, or a thread's."""
UNKNOWN_TICKS = -1
"""The start time of a process that /proc hides."""
_GONE_OR_HIDDEN = (FileNotFoundError, ProcessLookupError, PermissionError)
_CHUNK = 1 << 15
_HAS_CHILDREN_FILES = os.path.exists(f"/proc/self/task/{os.getpid()}/children")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fdopen.restype = ctypes.c_void_p
_stack = ctypes.create_string_buffer(_STACK_BYTES)
"""Of the one process that may hold this one's memory; it is never given back."""


def _read_boot_offset() -> int:
    """Return by how many ticks the boot of our time namespace is later than the machine's (time_namespaces(7))."""
    try:
        with open("/proc/self/timens_offsets", encoding="utf-8") as file:
            offsets = [line.split() for line in file]
    except OSError:  # before Linux 5.6
        return 0
    ahead = next((int(seconds) * 10**9 + int(rest) for name, seconds, rest in offsets if name in {"boottime", "7"}), 0)
    return ahead * os.sysconf("SC_CLK_TCK") // 10**9


_BOOT_OFFSET = _read_boot_offset()


class Stat(NamedTuple):
    """Some fields of /proc/PID/stat."""

    state: str
    parent: int
    session: int
    flags: int
    start_ticks: int
    """Since the boot of the machine."""
    wait_status: int
    """Of a zombie that we may look into; 0 where we may not."""
    threads: int
    """How many it has; a zombie with more than itself runs on without its first one."""

    @property
    def has_executed(self) -> bool:
        """True if the process has executed a program since it was forked."""
        return not self.flags & PF_FORKNOEXEC

    @property
    def is_zombie(self) -> bool:
        """True if it has ended and was not reaped."""
        return self.state in {"Z", "X"} and self.threads <= 1


def close(descriptor: int) -> None:
    """Close a descriptor whose content nobody waits for: it is closed, also where an error is reported (close(2))."""
    with suppress(OSError):
        os.close(descriptor)


def close_all(descriptors: Iterable[int]) -> None:
    """Do the same for many, of which some may be the same."""
    for descriptor in set(descriptors):
        close(descriptor)


def close_from(first: int, last: int = _LAST) -> None:
    """Close all descriptors from this number on, by one call.

    A sandbox around us may refuse that call, which is younger than many a list of what is allowed: then one by one.
    `os.closerange` would try each number that there can be, for minutes.
    """
    if _libc.syscall(ctypes.c_long(_CLOSE_RANGE), ctypes.c_long(first), ctypes.c_long(last), ctypes.c_long(0)):
        close_all(number for number in map(int, os.listdir("/proc/self/fd")) if first <= number <= last)


def open_null() -> tuple[int, int]:
    """Return /dev/null twice, as one descriptor: what output goes to that nobody wants. Raises OSError."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    return null, null


def read_stat(pid: int) -> Stat | None:
    """Return what /proc says of a process, None if it is gone. A zombie tells it, too, and mostly anybody may ask.

    Raises OSError if it cannot be looked at now: that is no answer.
    """
    stat = _read_visible(pid)
    return _read_hidden(pid) if stat is None and os.geteuid() != 0 else stat


def _read_hidden(pid: int) -> Stat | None:
    """Return what is known of a process that /proc hides from an ordinary user (hidepid, proc(5)), None if it is gone.

    It has executed a program, set-uid or one that nobody may read: before, it was as visible as we are. Its start time
    is not known. Raises OSError if it cannot be looked at now.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno in NO_PROCESS:
            return None
        raise
    try:
        stat = _read_visible(pid)  # now that the pidfd holds it: the number may be another's
        session = os.getsid(pid)
        with suppress(PermissionError):  # it is there
            signal.pidfd_send_signal(pidfd, 0)
        if stat is None:
            parent = os.getpid() if _is_child(pidfd) else 0
            stat = Stat("Z" if has_ended(pidfd) else "R", parent, session, 0, UNKNOWN_TICKS, 0, 1)
    except ProcessLookupError:
        return None
    finally:
        close(pidfd)
    return stat


def _is_child(pidfd: int) -> bool:
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _read_visible(pid: int) -> Stat | None:
    """Return what /proc says of a process, None if it is gone, or hidden. Raises OSError."""
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except _GONE_OR_HIDDEN:
        if os.readlink("/proc/self") != str(os.getpid()):  # raises, too: where /proc is not mounted, none is to be seen
            raise OSError(errno.ENXIO, "/proc is that of another pid namespace", "/proc") from None
        return None
    try:
        fields = os.read(descriptor, 4096).rpartition(b")")[2].split()  # the name before it may hold anything
    except ProcessLookupError:
        return None
    finally:
        close(descriptor)
    return Stat(
        state=fields[0].decode(),
        parent=int(fields[1]),
        session=int(fields[3]),
        flags=int(fields[6]),
        start_ticks=int(fields[19]) - _BOOT_OFFSET,
        wait_status=int(fields[49]),
        threads=int(fields[17]),
    )


def read_stat_of(pid: int, pidfd: int) -> Stat | None:
    """Return what /proc says of the very process behind a pidfd, whose number is `pid`; None once it was reaped.

    Raises OSError if it cannot be looked at now.
    """
    stat = read_stat(pid)
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:  # its number may have been another's already
        return None
    except PermissionError:  # it is there
        pass
    return stat


def has_ended(pidfd: int, timeout_seconds: float = 0) -> bool:
    """Say whether the process behind a pidfd has ended, or does so in time."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_seconds * 1000))


def kill(pidfd: int, number: int) -> None:
    """Send a signal to a process that may have ended, or may not be signalled."""
    with suppress(OSError):
        signal.pidfd_send_signal(pidfd, number)


def read_inode(pidfd: int, anonymous: os.stat_result) -> int:
    """Return the number that no other process of this boot has; 0 where all pidfds share one (before Linux 6.9).

    That is then the one of all `anonymous` files, such as an epoll set.
    """
    found = os.fstat(pidfd)
    return 0 if os.path.samestat(found, anonymous) else found.st_ino


def let_go_on(pid: int) -> None:
    """Continue a process of the keeper's if a signal has stopped it. Raises OSError."""
    if _is_stopped(read_stat(pid)):
        _signal_ours(pid, signal.SIGCONT, _is_stopped)


def have_go_on(pid: int) -> None:
    """Continue it also if the signal that stops it is still on its way. Raises OSError."""
    _signal_ours(pid, signal.SIGCONT, lambda _: True)


def kill_own(pid: int) -> None:
    """Kill a process of the keeper's that is in its session, which nobody else's is. Raises OSError."""
    session = os.getsid(0)
    _signal_ours(pid, signal.SIGKILL, lambda stat: stat.session == session)


def go_on_at(descriptor: int, pid: int) -> None:
    """Have the kernel continue a process, should it be stopped, whenever something happens at its end of a connection.

    A message comes, or whoever has the other end is gone: nobody is left then who would look after it. That end may be
    this process's own, or one that it has given away (`F_SETSIG` in fcntl(2)).
    """
    with suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, pid)
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGCONT)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, stopped or not (PR_SET_PDEATHSIG in prctl(2))."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def outlive_parent() -> None:
    """Take that back: an exec does not. Raises OSError."""
    if _libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl: {os.strerror(ctypes.get_errno())}")


def _signal_ours(pid: int, number: int, is_due: Callable[[Stat], bool]) -> None:
    """Signal a process of the keeper's: this one's child, or its parent, or that one's child.

    None of them has executed a program since it was forked; a gate that has is the container's own program.
    """
    pidfd = os.pidfd_open(pid)
    try:
        stat = read_stat_of(pid, pidfd)  # now that the pidfd holds it: the number may be another's
        ours = {os.getpid(), os.getppid()}
        is_ours = stat is not None and not stat.has_executed and (pid in ours or stat.parent in ours)
        if stat is not None and is_ours and is_due(stat):
            signal.pidfd_send_signal(pidfd, number)
    finally:
        close(pidfd)


def _is_stopped(stat: Stat | None) -> bool:
    return stat is not None and stat.state == "T"  # not one that a debugger holds: "t"


def read_children(pid: int) -> list[int]:
    """Return the pids of a process's children, zombies included; none if it is gone.

    From /proc/PID/task/*/children (CONFIG_PROC_CHILDREN), otherwise from the parents of all processes. Raises OSError
    if they cannot be looked at now.
    """
    if not _HAS_CHILDREN_FILES:
        return [each for each in list_processes() if (stat := read_stat(each)) is not None and stat.parent == pid]
    if pid == os.getpid():  # the keeper's own are asked for all the time, and it has one thread
        return [*map(int, _read_whole(f"/proc/self/task/{pid}/children").split())]
    children: list[int] = []
    with suppress(*_GONE_OR_HIDDEN):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(*_GONE_OR_HIDDEN):
                children += map(int, _read_whole(f"/proc/{pid}/task/{thread}/children").split())
    return children


def _read_whole(path: str) -> bytes:
    """Return the content of a file in /proc, in as few calls as it takes. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = b""
        while chunk := os.read(descriptor, _CHUNK):
            content += chunk
        return content
    finally:
        close(descriptor)


def list_processes() -> list[int]:
    """Return the pids of all processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def become_subreaper() -> None:
    """Become the parent of all descendants whose own parent ends (prctl(2)). Raises OSError."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def give_up_other_ids() -> None:
    """Be the effective user and group alone, with no way back to others that the host program has kept.

    Executed with a real user that is another one, this process has files in /proc that are root's (proc(5)).
    """
    uid, gid = os.geteuid(), os.getegid()
    if {*os.getresuid()} != {uid} or {*os.getresgid()} != {gid}:
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def reset_internal_signals() -> None:
    """Have the two signals that glibc keeps for itself at their default; its posix_spawn(3) leaves them ignored.

    It refuses them to sigaction(3), so the kernel is asked. Ignored signals would be inherited by every container.
    """
    number = _RT_SIGACTION.get(os.uname().machine)
    if number is not None:
        default = ctypes.create_string_buffer(32)  # struct sigaction of the kernel: handler, flags, restorer, mask
        for internal in (32, 33):
            _libc.syscall(ctypes.c_long(number), ctypes.c_long(internal), default, None, ctypes.c_long(8))


def reset_inherited() -> None:
    """Have what is handed down from parent to child, and by an exec, as a process of a freshly booted machine has it.

    That is: no flags of personality(2), such as the one that keeps addresses from being random; the usual timer slack,
    core dump filter, memory policy, and behaviour at memory errors; huge pages; no I/O priority. A kernel or sandbox
    that refuses some of it leaves it as it was.
    """
    personality = _libc.personality(ctypes.c_ulong(_PERSONALITY_IS))
    if personality > 0:
        _libc.personality(ctypes.c_ulong(personality & _PERSONALITY_DOMAIN))
    _libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_NEW_TIMER_SLACK_NS), 0, 0, 0)
    _libc.prctl(_PR_MCE_KILL, _PR_MCE_KILL_CLEAR, 0, 0, 0)
    _libc.prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)
    with suppress(OSError), open("/proc/self/coredump_filter", "w", encoding="ascii") as file:
        file.write(_NEW_COREDUMP_FILTER)
    machine = os.uname().machine
    if machine in _SET_MEMPOLICY:
        _libc.syscall(ctypes.c_long(_SET_MEMPOLICY[machine]), ctypes.c_long(0), None, ctypes.c_long(0))
        _libc.syscall(ctypes.c_long(_IOPRIO_SET[machine]), *map(ctypes.c_long, (_IOPRIO_WHO_PROCESS, 0, 0)))


def leave_session_keyring() -> None:
    """Have an empty session keyring (session-keyring(7)): what that of the host program holds are its secrets.

    Where there are no keyrings, or no more of them, this process keeps the one that it has.
    """
    number = _KEYCTL.get(os.uname().machine)
    if number is not None:
        _libc.syscall(ctypes.c_long(number), ctypes.c_long(_KEYCTL_JOIN_SESSION_KEYRING), None)


def name_process(text: str) -> None:
    """Give this process a name for ps and top, of at most 15 bytes (prctl(2))."""
    _libc.prctl(_PR_SET_NAME, text.encode())


def unshare(flags: int) -> None:
    """Enter new namespaces (unshare(2)). Raises OSError."""
    if _libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def hold_memory(until: int) -> None:
    """Have another process share this one's memory up to the end of file of a pipe, if the kernel lets us.

    It spares an exec of this process what takes longer than all the rest of it, to take down the memory of a Python:
    0.1 ms instead of 0.5. That is done by who has it last. The other process is a child of our parent, for an exec does
    not change whose children there are. It runs no Python, and nothing that allocates: a single read, without a buffer.
    """
    file = ctypes.c_void_p(_libc.fdopen(until, b"r"))
    if file.value is not None:
        _libc.setvbuf(file, None, _IONBF, ctypes.c_size_t(0))
        top = ctypes.c_void_p(ctypes.addressof(_stack) + _STACK_BYTES)
        pid = _libc.clone(_libc.fgetc, top, _CLONE_VM | _CLONE_PARENT | signal.SIGCHLD, file)
        if pid > 0:
            go_on_at(until, pid)


def read_uts_namespace(pid: int) -> tuple[int, int] | None:
    """Return device and inode of a process's UTS namespace, None if it is gone or hidden. Raises OSError."""
    try:
        found = _look_as_its_user(pid, lambda: os.stat(f"/proc/{pid}/ns/uts"))
    except _GONE_OR_HIDDEN:
        return None
    return found.st_dev, found.st_ino


def hold_uts_namespace(pid: int) -> int:
    """Return a descriptor of a process's UTS namespace if it has one of its own, otherwise -1.

    While it is open, no other namespace gets the same inode number. Raises OSError if that cannot be found out now.
    """
    try:
        descriptor = _look_as_its_user(pid, lambda: os.open(f"/proc/{pid}/ns/uts", os.O_RDONLY | os.O_CLOEXEC))
    except _GONE_OR_HIDDEN:
        return -1
    try:
        found, ours = os.fstat(descriptor), os.stat("/proc/self/ns/uts")
    except BaseException:
        close(descriptor)
        raise
    if (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino):
        close(descriptor)
        return -1
    return descriptor


def _look_as_its_user(pid: int, look: Callable[[], _T]) -> _T:
    """Look into a process of /proc; as its user, where root may look into its own processes alone (CAP_SYS_PTRACE).

    That is no help with one that has itself become another user, and executed nothing since. Raises OSError.
    """
    try:
        return look()
    except PermissionError:
        if os.geteuid() != 0:
            raise
        owner = os.stat(f"/proc/{pid}")
    is_dumpable = _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0)
    group = _libc.setfsgid(ctypes.c_uint(owner.st_gid))
    user = _libc.setfsuid(ctypes.c_uint(owner.st_uid))
    try:
        return look()
    finally:
        _libc.setfsuid(ctypes.c_uint(user))
        _libc.setfsgid(ctypes.c_uint(group))
        _libc.prctl(_PR_SET_DUMPABLE, is_dumpable, 0, 0, 0)  # which each of these takes, and our forks need


def read_exit_of_stranger(pid: int, pidfd: int) -> int | None:
    """Return the wait status of an ended process that is not our child, None if the kernel does not tell it.

    A zombie's stat has it, if we may look into the process; once it is reaped its pidfd has it.
    """
    status = _read_reaped_status(pidfd)
    if status is None:
        may_see = _may_see(pid)
        stat = read_stat_of(pid, pidfd)
        if stat is None:
            return _read_reaped_status(pidfd)
        if stat.is_zombie and may_see:
            return stat.wait_status
    return status


def _read_reaped_status(pidfd: int) -> int | None:
    info = bytearray(64)
    struct.pack_into("Q", info, 0, _PIDFD_INFO_EXIT)
    with suppress(OSError):
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
        if struct.unpack_from("Q", info)[0] & _PIDFD_INFO_EXIT:
            status: int = struct.unpack_from("i", info, 60)[0]
            return status
    return None


def _may_see(pid: int) -> bool:
    """Say whether stat shows us the real exit code, not 0 in its place (proc_pid_stat(5), PTRACE_MODE_READ_FSCREDS)."""
    try:
        os.readlink(f"/proc/{pid}/cwd")  # needs the same permission; a zombie has none
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
