"""Whether what is mounted later below a path of the host is seen elsewhere, too."""

import fcntl
import os

from limpet.engine.state.descriptors import close_all
from limpet.recovery.mounts import MOUNTINFO, open_lines

_NS_GET_USERNS = 0xB701


def read_propagation(path: str) -> str | None:
    """Return the optional fields of the mount that a path is on (proc_pid_mountinfo(5)).

    None if there is nothing at the path.
    """
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        with open(f"/proc/self/fdinfo/{descriptor}", encoding="utf-8") as file:
            mount_id = next(line.split()[1] for line in file if line.startswith("mnt_id:"))
    finally:
        os.close(descriptor)
    with open_lines(MOUNTINFO) as file:
        lines = (line.split(" ") for line in file)
        return next((" ".join(fields[6 : fields.index("-")]) for fields in lines if fields[0] == mount_id), "")


def owns_mounts() -> bool:
    """Return whether our mount namespace is of our user namespace: of another's, ours only receive (ioctl_nsfs(2))."""
    opened: list[int] = []
    try:
        opened.append(os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
        opened.append(fcntl.ioctl(opened[0], _NS_GET_USERNS))
        return os.path.samestat(os.fstat(opened[1]), os.stat("/proc/self/ns/user"))
    except PermissionError:  # it is of one above
        return False
    except OSError:  # a kernel without them
        return True
    finally:
        close_all(opened)
