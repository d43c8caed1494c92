"""What the kernel says of processes: through /proc and pidfds. It makes no judgements.

Kernel interfaces: pidfd_open(2), proc_pid_stat(5), PIDFD_GET_INFO (linux/pidfd.h, Linux 6.13; its exit code
6.15), pidfs inode numbers (Linux 6.9).
"""

import errno
import fcntl
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from limpet.recovery.evidence import Boot, Process
from limpet.recovery.pid_namespaces import observe_elsewhere
from limpet.schema.identity import ProcessIdentity

_PIDFD_GET_INFO = (3 << 30) | (64 << 16) | (0xFF << 8) | 11  # _IOWR(PIDFS_IOCTL_MAGIC, 11, 64 bytes)
_PIDFD_INFO_EXIT = 1 << 3
_EXIT_CODE_OFFSET = 60

Compare = Callable[[ProcessIdentity, int], tuple[Process, str]]
"""Says whether the process behind a pidfd is the one that is recorded; `compare` is one."""


class NamesAThreadError(ProcessLookupError):
    """No process has this pid, for the number has become that of a thread."""


def read_boot_id() -> str | None:
    """Return the boot id, None if it cannot be read."""
    try:
        return _read("/proc/sys/kernel/random/boot_id").decode("ascii").strip() or None
    except OSError:
        return None


def read_pid_namespace() -> int:
    """Return the inode number of this process's pid namespace, 0 if it cannot be read."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def has_own_proc() -> bool:
    """Say whether the numbers in /proc are those of this process's pid namespace: another's may be mounted there.

    Raises OSError, as where it is one in which this process is not to be seen.
    """
    return os.readlink("/proc/self") == str(os.getpid())


def has_pidfs() -> bool:
    """Return whether pidfds are known to have unique inode numbers here, so that they distinguish processes."""
    try:
        return ask_for_pidfs()
    except OSError:
        return False


@cache
def ask_for_pidfs() -> bool:
    """Return whether pidfds have unique inode numbers here.

    Raises OSError if that cannot be found out now: only an answer of the kernel is remembered.
    """
    # Without pidfs, a pidfd has the one inode that all anonymous files share, such as an eventfd.
    with open_pidfd(os.getpid()) as pidfd:
        other = os.eventfd(0)
        try:
            return not os.path.samestat(os.fstat(pidfd), os.fstat(other))
        finally:
            os.close(other)


@contextmanager
def open_pidfd(pid: int) -> Iterator[int]:
    """Hold a pidfd for `pid`.

    Raises ProcessLookupError if there is no such process, its subclass NamesAThreadError if the number is a thread's of
    another one; OSError.
    """
    try:
        pidfd = _open_pidfd(pid)
    except OSError as error:
        if error.errno in _NAMES_A_THREAD:
            raise NamesAThreadError(errno.ESRCH, os.strerror(errno.ESRCH)) from error
        raise
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _open_pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno not in _NAMES_A_THREAD:
            raise
    return os.pidfd_open(pid)  # an older kernel says the same of a process that is reaped meanwhile


def identify(pid: int, pidfd: int) -> ProcessIdentity:
    """Return the identity of the live process `pid` that `pidfd` refers to.

    Raises OSError if it is gone or /proc cannot be read: nothing may be started without an identity.
    """
    boot_id = read_boot_id()
    if boot_id is None:
        raise OSError(errno.ENOENT, "the boot id cannot be read", "/proc/sys/kernel/random/boot_id")
    return ProcessIdentity(
        pid=pid,
        start_ticks=read_start_ticks(pid),
        boot_id=boot_id,
        pidfd_inode=os.fstat(pidfd).st_ino if ask_for_pidfs() else 0,
        pid_namespace=read_pid_namespace(),
    )


def read_stat(pid: int) -> list[bytes]:
    """Return the fields of /proc/PID/stat from the third (the state) on. Raises OSError.

    The second field, the command's name, is removed up to the last parenthesis: it may contain spaces and
    parentheses, as in `4711 (a) R 1 2 (x) S 1 ...`.
    """
    return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def read_name(pid: int) -> bytes:
    """Return what a process calls itself (comm in proc(5)), 15 bytes at most. Raises OSError."""
    return _read(f"/proc/{pid}/comm").removesuffix(b"\n")


def is_zombie(stat: Sequence[bytes]) -> bool:
    """Say whether a process has ended, by its fields. While its first thread alone is a zombie, others go on."""
    return stat[0] in {b"Z", b"X"} and int(stat[17]) <= 1


def _read(path: str) -> bytes:
    """Return what a small file in /proc says. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # not open(): a buffer and a decoder take longer than this
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def observe_boot(identity: ProcessIdentity | None) -> Boot:
    """Return whether `identity` was recorded in this boot; SAME if there is no identity."""
    if identity is None:
        return Boot.SAME
    boot_id = read_boot_id()
    if boot_id is None:
        return Boot.UNREADABLE
    return Boot.SAME if boot_id == identity.boot_id else Boot.CHANGED


def read_start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since the boot of the machine. Raises OSError.

    /proc counts from the boot time of the reader's time namespace, which may be another's (time_namespaces(7)).
    """
    return int(read_stat(pid)[19]) - _read_boot_offset() * os.sysconf("SC_CLK_TCK") // 10**9


def read_boot_clock() -> int:
    """Return the nanoseconds since the boot, as our time namespace counts them: those of suspension included.

    Nobody can set that clock.
    """
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def read_machine_clock() -> int:
    """Return the nanoseconds since the boot of the machine, which are the same in each time namespace."""
    return read_boot_clock() - _read_boot_offset()


def _read_boot_offset() -> int:
    """Return by how many nanoseconds the boot time of our time namespace is ahead of the machine's."""
    try:
        offsets = [line.split() for line in _read("/proc/self/timens_offsets").decode("ascii").splitlines()]
    except FileNotFoundError:  # before Linux 5.6
        return 0
    return next((int(seconds) * 10**9 + int(rest) for clock, seconds, rest in offsets if clock in {"boottime", "7"}), 0)


def compare(identity: ProcessIdentity, pidfd: int) -> tuple[Process, str]:
    """Return whether the process behind `pidfd` is the recorded one: ALIVE (or just ended), STRANGER, or neither.

    An inode number decides if there is one. Without, another start time shows a stranger, and the same one proves
    nothing: whoever is the process's parent knows more. GONE if it was reaped before that was seen, HIDDEN if it cannot
    be seen.
    """
    try:
        if identity.pidfd_inode and ask_for_pidfs():
            same = os.fstat(pidfd).st_ino == identity.pidfd_inode
            return (Process.ALIVE, "") if same else (Process.STRANGER, f"pid {identity.pid} was reused")
        if abs(read_start_ticks(identity.pid) - identity.start_ticks) <= 1:  # rounded twice, between time namespaces
            return Process.UNPROVEN, f"pid {identity.pid} and its start time match, which is not proof"
    except OSError as error:
        if is_reaped(pidfd):  # what /proc does not have, or has of another by now, is nothing hidden
            return Process.GONE, ""
        return Process.HIDDEN, f"pid {identity.pid}: {error.strerror}"
    return Process.STRANGER, f"pid {identity.pid} was reused"


def observe_process(identity: ProcessIdentity, compare: Compare = compare) -> tuple[Process, int | None, str]:
    """Return what became of a process of this boot, its exit code if it was observed, and what hid more."""
    here = read_pid_namespace()
    if here != identity.pid_namespace:
        place = f"pid {identity.pid} is of pid namespace {identity.pid_namespace}, this is {here or 'not readable'}"
        found, detail = observe_elsewhere(identity) if here else (Process.HIDDEN, "/proc hides which one it is")
        return found, None, f"{place}; {detail}"
    try:
        with open_pidfd(identity.pid) as pidfd:
            found, detail = compare(identity, pidfd)
            if found not in {Process.ALIVE, Process.UNPROVEN} or not has_ended(pidfd):
                return found, None, detail
            # Unproven, it may be another that has ended: the number was given back before, and its code tells nothing.
            exit_code = read_exit_code(identity.pid, pidfd) if found is Process.ALIVE else None
            return (Process.GONE if exit_code is None else Process.ENDED), exit_code, ""
    except NamesAThreadError:
        return Process.STRANGER, None, f"pid {identity.pid} is a thread of another process"
    except ProcessLookupError:
        return Process.GONE, None, ""
    except OSError as error:
        return Process.HIDDEN, None, f"pid {identity.pid}: {error.strerror}"


def is_runtime_init(pid: int) -> bool:
    """Return whether a process calls itself what runc's or crun's init does, which executes the program once let go.

    By its name (comm in proc(5)), which any program may give itself: it proves nothing, and raises a doubt. runc gives
    it one (libcontainer/nsenter/nsexec.c). With crun it is called as crun itself, which stays in our mount namespace.
    """
    try:
        name = read_name(pid)
    except OSError:
        return False
    return name == b"runc:[2:INIT]" or (name == b"crun" and not _shares_mounts(pid))


def _shares_mounts(pid: int) -> bool:
    """Say whether a process is in our mount namespace, as far as that can be seen; of a zombie it cannot."""
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/ns/mnt"), os.stat("/proc/self/ns/mnt"))
    except OSError:
        return False


_NAMES_A_THREAD = {errno.EINVAL, errno.ENOENT}
"""What pidfd_open(2) says of a number that is a thread's and no process's: the first before Linux 6.15."""


def has_ended(pidfd: int) -> bool:
    """Return whether the process has ended (a zombie has)."""
    return wait_for_end(pidfd, 0)


def is_reaped(pidfd: int) -> bool:
    """Return whether the process has ended, and whoever was to wait for it has."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is there, and another user's
        pass
    return False


def wait_for_end(pidfd: int, seconds: float) -> bool:
    """Wait until the process has ended, for so long; return whether it has."""
    return wait_readable(pidfd, seconds)  # as it is from then on: pidfd_open(2)


def wait_readable(descriptor: int, seconds: float) -> bool:
    """Wait until there is something to read, or its end, for so long; return whether there is."""
    poll = select.poll()  # select(2) takes no descriptor from 1,024 on
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def read_exit_code(pid: int, pidfd: int) -> int | None:
    """Return the exit code of an ended process, even if it is not our child; 128 + signal; None if it is lost.

    The kernel has it if the process was reaped (Linux 6.15), /proc/PID/stat until it is reaped.
    """
    wait_status = read_wait_status(pid, pidfd)
    return None if wait_status is None else to_exit_code(wait_status)


def to_exit_code(wait_status: int) -> int:
    """Return the exit code that stands for what wait(2) tells: 128 + signal where one ended it."""
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


def read_wait_status(pid: int, pidfd: int) -> int | None:
    """Return the same as wait(2) has it."""
    wait_status = _read_reaped_status(pidfd)
    return _read_zombie_status(pid, pidfd) if wait_status is None else wait_status


def _read_reaped_status(pidfd: int) -> int | None:
    info = bytearray(64)
    struct.pack_into("Q", info, 0, _PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:  # not reaped yet, or not supported by the kernel
        return None
    if not struct.unpack_from("Q", info)[0] & _PIDFD_INFO_EXIT:
        return None
    status: int = struct.unpack_from("i", info, _EXIT_CODE_OFFSET)[0]
    return status


def _read_zombie_status(pid: int, pidfd: int) -> int | None:
    try:
        fields, may_see = read_stat(pid), _may_see(pid)
        signal.pidfd_send_signal(pidfd, 0)  # if it was reaped meanwhile, both may be of another, or of none
    except PermissionError:
        return None  # nor does its stat say how it ended
    except OSError:
        return _read_reaped_status(pidfd)
    if not is_zombie(fields) or not may_see:
        return _read_reaped_status(pidfd)
    return int(fields[49])  # exit_code, the 52nd field


def _may_see(pid: int) -> bool:
    """Return whether /proc/PID/stat shows us the real exit code, not 0 in its place (proc_pid_stat(5)).

    True of one that was reaped, too: whoever asks makes sure that it was not.
    """
    try:
        os.readlink(f"/proc/{pid}/cwd")  # needs the same permission; a zombie has no cwd
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
