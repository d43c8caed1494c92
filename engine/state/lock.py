"""A state directory's lock: flock(2) on a file that is never removed, and whose content only serves messages.

The lock ends with the file object that holds it, so nothing that interrupts its caller can leave it behind. A fork
closes its copy, so that it does not outlive the process that took it.
"""

import fcntl
import json
import os
from contextlib import suppress
from functools import partial
from io import FileIO
from typing import Self
from weakref import WeakKeyDictionary

from limpet.engine.state.names import LOCK
from limpet.recovery.files import read_small_file
from limpet.recovery.host import is_zombie, read_stat
from limpet.schema.errors import StateDirectoryLockedError

_HOLDER_BYTES = 4096


class Lock:
    """A lock that this process has. Taken by `take`, given up by `release` or when it is collected."""

    def __init__(self, file: FileIO) -> None:
        self._file = file

    @classmethod
    def take(cls, path: str) -> Self | None:
        """Lock the file `path`, which is made if it is missing; None if another has locked it. Raises OSError."""
        while True:
            # Opened and kept by C code alone: no interrupt comes between, and a descriptor has an owner at once.
            file = FileIO(path, "a+", opener=partial(os.open, mode=0o600))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
                    _held[file] = os.fstat(file.fileno())
                    os.fchmod(file.fileno(), 0o600)
                    os.ftruncate(file.fileno(), 0)
                    file.write(json.dumps({"pid": os.getpid()}).encode())
                    return cls(file)
                file.close()  # it was replaced meanwhile
            except BlockingIOError:
                file.close()
                return None
            except FileNotFoundError:
                file.close()  # it was removed meanwhile
            except BaseException:
                file.close()  # a traceback may keep it for long
                raise

    def touch(self) -> None:
        """Read a byte of the file, which inotify(7) tells those who watch it. Once it is given up: nothing."""
        if not self._file.closed:
            with suppress(OSError):  # whoever was to be woken looks by itself, a little later
                os.pread(self._file.fileno(), 1, 0)

    def is_held(self) -> bool:
        """Say whether this process has it: not once it is given up, nor if its descriptor was closed by somebody."""
        return _is_open(self._file)

    def release(self) -> None:
        """Give the lock up, also where a fork still has a copy. Repeating it is fine."""
        if self._file.closed:
            return
        if not self.is_held():
            _lost.add(self._file)
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        finally:
            self._file.close()


_held: WeakKeyDictionary[FileIO, os.stat_result] = WeakKeyDictionary()
"""What is locked, and which file each is."""
_lost: set[FileIO] = set()
"""What somebody else has closed: never to be closed once more, which would be whatever has the number by now."""


def _is_open(file: FileIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), _held[file])
    except (OSError, ValueError):
        return False


def _close_after_fork() -> None:
    for file in list(_held):
        if _is_open(file):
            file.close()
        else:
            _lost.add(file)


os.register_at_fork(after_in_child=_close_after_fork)


def find_holder(path: str) -> int | None:
    """Return the pid of the process that has the state directory open; None if none is visible.

    It reads /proc/locks, which shows only our pid namespace: trying the lock itself, even briefly, could make an engine
    fail that is opening it. So None is no proof.
    """
    pid = _read_holder(path)
    try:
        inode = os.stat(os.path.join(path, LOCK)).st_ino
        with open("/proc/locks", encoding="utf-8") as locks:
            # 3: FLOCK  ADVISORY  WRITE 18113 fe:00:2146853 0 EOF; the device there is not always that of stat(2)
            held = any(
                kind == "FLOCK" and holder == str(pid) and file.endswith(f":{inode}")
                for _, kind, _, _, holder, file, *_ in map(str.split, locks)
            )
    except OSError:
        return None
    return pid if held else None


def is_lock(path: str) -> bool:
    """Say whether the file `path` may be a lock of ours: it names a process, or nobody yet.

    After a power cut, zeros may stand where a process was named: it is never flushed.
    """
    try:
        names_nobody = not read_small_file(path, _HOLDER_BYTES).strip(b"\0")
    except OSError:
        return False
    return names_nobody or _read_holder(os.path.dirname(path)) is not None


def _read_holder(path: str) -> int | None:
    try:
        pid = json.loads(read_small_file(os.path.join(path, LOCK), _HOLDER_BYTES))["pid"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return pid if isinstance(pid, int) else None


def has_holder_ended(path: str) -> bool:
    """Say whether the process that had the state directory open has ended, though the lock is still held.

    Then a child of it holds it that was just about to execute something, as a start is begun: that is over at once.
    """
    pid = _read_holder(path)
    try:
        return pid is not None and is_zombie(read_stat(pid))
    except OSError:
        return True


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
