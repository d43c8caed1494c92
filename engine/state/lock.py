"""Who holds a state directory's lock: what its file says, for messages. What the lock means is decided by flock(2)."""

import json
import os

from limpet.engine.state.names import LOCK
from limpet.recovery.files import read_small_file
from limpet.schema.errors import StateDirectoryLockedError

_HOLDER_BYTES = 4096


def write_holder(descriptor: int) -> None:
    """Write who we are into the lock file, which is open as `descriptor`."""
    # Only for the error message: flock alone decides who holds the lock.
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": os.getpid()}).encode(), 0)


def find_holder(path: str) -> int | None:
    """Return the pid of the process that has the state directory open; None if none is visible.

    It reads /proc/locks, which shows only our pid namespace: trying the lock itself, even briefly, could make an engine
    fail that is opening it. So None is no proof.
    """
    pid = _read_holder(path)
    try:
        inode = os.stat(os.path.join(path, LOCK)).st_ino
        with open("/proc/locks", encoding="ascii") as locks:
            # 3: FLOCK  ADVISORY  WRITE 18113 fe:00:2146853 0 EOF; the device there is not always that of stat(2)
            held = any(
                kind == "FLOCK" and holder == str(pid) and file.endswith(f":{inode}")
                for _, kind, _, _, holder, file, *_ in map(str.split, locks)
            )
    except OSError:
        return None
    return pid if held else None


def _read_holder(path: str) -> int | None:
    try:
        pid = json.loads(read_small_file(os.path.join(path, LOCK), _HOLDER_BYTES))["pid"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return pid if isinstance(pid, int) else None


def locked_error(path: str) -> StateDirectoryLockedError:
    """Return the error that names who has the state directory open."""
    pid = _read_holder(path)
    if pid is None:
        holder = "another process"
    elif pid == os.getpid():
        holder = f"this process (pid {pid})"
    elif os.path.exists(f"/proc/{pid}"):
        holder = f"process {pid}"
    else:
        holder, pid = f"a child of process {pid}, which has ended", None
    return StateDirectoryLockedError(
        f"state directory {path} is in use by {holder}; close that engine first, or use another directory",
        pid,
    )
