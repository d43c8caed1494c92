"""The system calls that a system may refuse, also those that change no file, with the errors that are tried for each.

Numbers are those of the kernel's asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64). Left out is what never
fails or must not (exit, futex, the return from a signal handler), and what asks for the time or for this process's ids.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from limpet.testing import syscalls

KILLED: Final = "KILL"
"""Instead of an error: the process is killed at the call, as for want of memory."""
STOPPED: Final = "STOP"
"""Instead of an error: the process is stopped at the call, by a signal, and goes on once another has it continue.

It does the call before, unless it would have to wait in it.
"""

_FILE = ("EIO", "ENOSPC")
_OPEN = ("EMFILE", "ENOMEM", "EIO")
_LOOK = ("EIO", "ENOMEM")
_DESCRIPTOR = ("EMFILE", "ENOMEM")
_MEMORY = ("ENOMEM",)
_SEND = ("ENOBUFS", "EPIPE")
_AGAIN = ("EINTR",)
_RIGHT = ("EPERM",)


class Call(NamedTuple):
    """A system call: its numbers, None where there is none, and the errors that are tried."""

    x86_64: int | None
    aarch64: int | None
    errors: tuple[str, ...]


_MORE: Final[Mapping[str, Call]] = {
    "read":              Call(0, 63, ("EIO", "ENOMEM")),
    "pread64":           Call(17, 67, ("EIO",)),
    "readv":             Call(19, 65, ("EIO",)),
    "preadv":            Call(295, 69, ("EIO",)),
    "stat":              Call(4, None, _LOOK),
    "lstat":             Call(6, None, _LOOK),
    "fstat":             Call(5, 80, _LOOK),
    "newfstatat":        Call(262, 79, _LOOK),
    "statx":             Call(332, 291, _LOOK),
    "access":            Call(21, None, _LOOK),
    "faccessat":         Call(269, 48, _LOOK),
    "faccessat2":        Call(439, 439, _LOOK),
    "statfs":            Call(137, 43, _LOOK),
    "fstatfs":           Call(138, 44, _LOOK),
    "readlink":          Call(89, None, _LOOK),
    "readlinkat":        Call(267, 78, _LOOK),
    "getdents64":        Call(217, 61, _LOOK),
    "getcwd":            Call(79, 17, _MEMORY),
    "chdir":             Call(80, 49, _LOOK),
    "fchdir":            Call(81, 50, _LOOK),
    "utimensat":         Call(280, 88, ("EIO",)),
    "fchown":            Call(93, 55, ("EIO", "EPERM")),
    "fchownat":          Call(260, 54, ("EIO", "EPERM")),
    "close":             Call(3, 57, ("EIO", "EINTR")),
    "dup":               Call(32, 23, ("EMFILE",)),
    "dup2":              Call(33, None, ("EINTR",)),
    "dup3":              Call(292, 24, ("EINTR",)),
    "fcntl":             Call(72, 25, ("EMFILE", "ENOLCK")),
    "flock":             Call(73, 32, ("ENOLCK",)),
    "pipe":              Call(22, None, ("EMFILE", "ENFILE")),
    "pipe2":             Call(293, 59, ("EMFILE", "ENFILE")),
    "eventfd2":          Call(290, 19, _DESCRIPTOR),
    "memfd_create":      Call(319, 279, _DESCRIPTOR),
    "epoll_create1":     Call(291, 20, _DESCRIPTOR),
    "epoll_ctl":         Call(233, 21, ("ENOSPC", "ENOMEM")),
    "epoll_wait":        Call(232, None, _AGAIN),
    "epoll_pwait":       Call(281, 22, _AGAIN),
    "poll":              Call(7, None, ("ENOMEM", "EINTR")),
    "ppoll":             Call(271, 73, ("ENOMEM", "EINTR")),
    "select":            Call(23, None, ("ENOMEM", "EINTR")),
    "pselect6":          Call(270, 72, ("ENOMEM", "EINTR")),
    "socket":            Call(41, 198, ("EMFILE", "ENOBUFS")),
    "socketpair":        Call(53, 199, ("EMFILE", "ENOMEM")),
    "bind":              Call(49, 200, ("ENOMEM", "EADDRINUSE")),
    "listen":            Call(50, 201, ("ENOBUFS",)),
    "connect":           Call(42, 203, ("ECONNREFUSED", "EAGAIN", "ENOMEM")),
    "accept":            Call(43, 202, ("EMFILE", "ECONNABORTED")),
    "accept4":           Call(288, 242, ("EMFILE", "ECONNABORTED")),
    "sendto":            Call(44, 206, _SEND),
    "recvfrom":          Call(45, 207, ("ENOMEM", "ECONNRESET")),
    "sendmsg":           Call(46, 211, (*_SEND, "ETOOMANYREFS")),
    "recvmsg":           Call(47, 212, ("ENOMEM", "ECONNRESET")),
    "getsockopt":        Call(55, 209, ("ENOMEM",)),
    "setsockopt":        Call(54, 208, ("ENOMEM",)),
    "clone":             Call(56, 220, ("EAGAIN", "ENOMEM")),
    "clone3":            Call(435, 435, ("EAGAIN", "ENOMEM")),
    "fork":              Call(57, None, ("EAGAIN", "ENOMEM")),
    "vfork":             Call(58, None, ("EAGAIN", "ENOMEM")),
    "execve":            Call(59, 221, ("ENOMEM", "EAGAIN", "EIO")),
    "execveat":          Call(322, 281, ("ENOMEM", "EAGAIN", "EIO")),
    "wait4":             Call(61, 260, _AGAIN),
    "waitid":            Call(247, 95, _AGAIN),
    "kill":              Call(62, 129, _RIGHT),
    "pidfd_open":        Call(434, 434, _DESCRIPTOR),
    "pidfd_send_signal": Call(424, 424, ("EPERM", "ENOMEM")),
    "pidfd_getfd":       Call(438, 438, ("EMFILE",)),
    "mmap":              Call(9, 222, _MEMORY),
    "mremap":            Call(25, 216, _MEMORY),
    "mprotect":          Call(10, 226, _MEMORY),
    "brk":               Call(12, 214, _MEMORY),
    "ioctl":             Call(16, 29, ("ENOMEM",)),
    "tee":               Call(276, 77, _MEMORY),
    "splice":            Call(275, 76, _MEMORY),
    "prctl":             Call(157, 167, ("EINVAL",)),
    "setsid":            Call(112, 157, _RIGHT),
    "unshare":           Call(272, 97, ("EPERM", "ENOSPC")),
    "sethostname":       Call(170, 161, _RIGHT),
    "mount":             Call(165, 40, ("ENOMEM", "EPERM")),
    "umount2":           Call(166, 39, ("EBUSY", "EPERM")),
    "open_tree":         Call(428, 428, _DESCRIPTOR),
    "move_mount":        Call(429, 429, ("ENOMEM", "EPERM")),
    "chroot":            Call(161, 51, ("ENOMEM", "EPERM")),
    "setgroups":         Call(116, 159, ("ENOMEM", "EPERM")),
    "setresuid":         Call(117, 147, ("EAGAIN", "EPERM")),
    "setresgid":         Call(119, 149, _RIGHT),
    "prlimit64":         Call(302, 261, _RIGHT),
    "setrlimit":         Call(160, 164, _RIGHT),
}  # fmt: skip

_OF_FILES: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(("write", "pwrite64", "writev", "pwritev", "pwritev2", "fallocate"), _FILE),
    **dict.fromkeys(("truncate", "ftruncate", "fsync", "fdatasync", "sync", "syncfs"), ("EIO",)),
    **dict.fromkeys(("open", "creat", "openat", "openat2", "open_by_handle_at"), _OPEN),
    **dict.fromkeys(("mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat", "mknod", "mknodat"), _FILE),
    **dict.fromkeys(("rmdir", "unlink", "unlinkat", "rename", "renameat", "renameat2"), ("EIO",)),
    **dict.fromkeys(("chmod", "fchmod", "fchmodat", "fchmodat2"), ("EIO",)),
    **dict.fromkeys(("setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr"), ("ENOSPC",)),
    **dict.fromkeys(("sendfile", "copy_file_range"), ("EIO",)),
}
"""The errors of calls whose numbers are in `syscalls.CALLS`."""

CALLS: Final[Mapping[str, Call]] = {
    **{name: Call(*syscalls.CALLS[name], errors) for name, errors in _OF_FILES.items()},
    **_MORE,
}

CALL_FAILURES: Final[Mapping[str, tuple[str, ...]]] = {name: call.errors for name, call in CALLS.items()}
"""The errors tried for each call: those that Linux returns for want of something, not for a mistake in the program."""

ANY_CALL: Final = syscalls.Stops({name: (call.x86_64, call.aarch64) for name, call in CALLS.items()}, {})
"""A process is stopped at each of them."""
