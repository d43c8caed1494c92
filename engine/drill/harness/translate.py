"""From a stopped system call to the operation it is about to do on the tree, and the means to do it.

The supervisor does the operation itself, on duplicates of the process's own descriptors, and answers the call with
the result. So it knows what really happened, in one order, even with many threads; it can stop half-way through a
write; and a file that it creates for the process is passed over open, O_EXCL or not. Calls that touch nothing in
the tree are let go.

Owners, times, sockets and pipes in the tree are neither modelled nor blind spots. Anything that could change a file
of the tree unseen raises BlindSpotError.
"""

import errno
from collections.abc import Callable
from typing import Final

from limpet.testing import blindspots, contents, names, syscalls
from limpet.testing.emulation import AT_FDCWD, Emulation, path_of
from limpet.testing.nodes import Nodes
from limpet.testing.supervisor import Event

_CURRENT: Final = 0xFFFFFFFFFFFFFFFF  # the offset -1 of pwritev2: the file's own position
_FAILS_ANYWAY: Final = (
    errno.EBADF, errno.EFAULT, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP,
    errno.ENAMETOOLONG, errno.ESRCH,
)  # fmt: skip


def emulate(event: Event, nodes: Nodes) -> Emulation | None:
    """Return what the call is about to do to the tree; None for a call that does not concern it.

    Raises BlindSpotError for a change that is not modelled, UnsupportedError for a process that cannot be inspected.
    """
    try:
        return _TRANSLATIONS[event.name](event, nodes, event.arguments)
    except OSError as error:
        if error.errno not in _FAILS_ANYWAY:
            raise
        return None  # a bad address, descriptor or path: the kernel will tell the process


_Translation = Callable[[Event, Nodes, list[int]], Emulation | None]
_TRANSLATIONS: Final[dict[str, _Translation]] = {
    "write": contents.write_one,
    "pwrite64": lambda e, n, a: contents.write_one(e, n, a, at=a[3]),
    "writev": contents.write_many,
    "pwritev": lambda e, n, a: contents.write_many(e, n, a, at=a[3]),
    "pwritev2": lambda e, n, a: contents.write_many(e, n, a, at=None if a[3] == _CURRENT else a[3], flags=a[5]),
    "truncate": contents.truncate_path,
    "ftruncate": contents.truncate_descriptor,
    "fallocate": contents.allocate,
    "fsync": contents.sync,
    "fdatasync": contents.sync,
    "sync": contents.sync_all,
    "syncfs": contents.sync_all,
    "open": lambda e, n, a: names.open_file(e, n, path_of(e, AT_FDCWD, a[0]), a[1], a[2]),
    "creat": lambda e, n, a: names.open_file(e, n, path_of(e, AT_FDCWD, a[0]), names.CREAT_FLAGS, a[1]),
    "openat": lambda e, n, a: names.open_file(e, n, path_of(e, a[0], a[1]), a[2], a[3]),
    "openat2": names.open_how,
    "open_by_handle_at": blindspots.anywhere,
    "mkdir": lambda e, n, a: names.make_directory(e, n, AT_FDCWD, a[0], a[1]),
    "mkdirat": lambda e, n, a: names.make_directory(e, n, a[0], a[1], a[2]),
    "rmdir": lambda e, n, a: names.unlink(e, n, AT_FDCWD, a[0], names.AT_REMOVEDIR),
    "unlink": lambda e, n, a: names.unlink(e, n, AT_FDCWD, a[0], 0),
    "unlinkat": lambda e, n, a: names.unlink(e, n, a[0], a[1], a[2]),
    "rename": lambda e, n, a: names.rename(e, n, [AT_FDCWD, a[0], AT_FDCWD, a[1]]),
    "renameat": names.rename,
    "renameat2": lambda e, n, a: names.rename(e, n, a, a[4]),
    "link": lambda e, n, a: names.link(e, n, [AT_FDCWD, a[0], AT_FDCWD, a[1]]),
    "linkat": lambda e, n, a: names.link(e, n, a, a[4]),
    "symlink": lambda e, n, a: names.symlink(e, n, a[0], AT_FDCWD, a[1]),
    "symlinkat": lambda e, n, a: names.symlink(e, n, a[0], a[1], a[2]),
    "mknod": lambda e, n, a: names.make_node(e, n, AT_FDCWD, a[0], a[1]),
    "mknodat": lambda e, n, a: names.make_node(e, n, a[0], a[1], a[2]),
    "chmod": lambda e, n, a: names.chmod(n, path_of(e, AT_FDCWD, a[0]), a[1]),
    "fchmod": names.chmod_descriptor,
    "fchmodat": lambda e, n, a: names.chmod(n, path_of(e, a[0], a[1]), a[2]),
    "fchmodat2": lambda e, n, a: names.chmod(n, path_of(e, a[0], a[1]), a[2], a[3]),
    **dict.fromkeys(
        ("setxattr", "lsetxattr", "removexattr", "lremovexattr"),
        lambda e, n, a: blindspots.attribute(e, n, path_of(e, AT_FDCWD, a[0])),
    ),
    **dict.fromkeys(("fsetxattr", "fremovexattr", "ioctl"), lambda e, n, a: blindspots.into_descriptor(e, n, a[0])),
    "mmap": blindspots.map_file,
    "mprotect": blindspots.protect,
    "sendfile": lambda e, n, a: blindspots.into_descriptor(e, n, a[0]),
    "splice": lambda e, n, a: blindspots.into_descriptor(e, n, a[2]),
    "copy_file_range": lambda e, n, a: blindspots.into_descriptor(e, n, a[2]),
    "io_setup": blindspots.anywhere,
    "io_uring_setup": blindspots.anywhere,
    syscalls.FOREIGN: blindspots.anywhere,
}
