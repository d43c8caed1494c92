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
from typing import NamedTuple, Self
from weakref import WeakKeyDictionary

from limpet.engine.state.holders import has_open
from limpet.engine.state.names import LOCK
from limpet.engine.state.owner import read_owner
from limpet.recovery.files import read_small_file
from limpet.recovery.host import has_own_proc, is_zombie, open_pidfd, read_boot_id, read_pid_namespace, read_stat
from limpet.schema.errors import StateDirectoryLockedError

_HOLDER_BYTES = 4096
_NOTE_BEGINS = b'{"pid":'
_PIDS = 1 << 22  # PID_MAX_LIMIT of the kernel, and more than any pid


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
                    file.write(_make_note())
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

    It is the number that the process has here, be its own pid namespace one below ours. It reads /proc/locks, which
    shows only our pid namespace: trying the lock itself, even briefly, could make an engine fail that is opening it.
    So None is no proof.
    """
    note = _read_note(path)
    try:
        found = os.stat(os.path.join(path, LOCK))
        if note is None or not has_own_proc():
            return None
        with open("/proc/locks", encoding="utf-8") as locks:
            # 3: FLOCK  ADVISORY  WRITE 18113 fe:00:2146853 0 EOF; the device there is not always that of stat(2)
            holders = [
                int(holder)
                for _, kind, _, _, holder, file, *_ in map(str.split, locks)
                if kind == "FLOCK" and file.endswith(f":{found.st_ino}")
            ]
    except OSError:
        return None
    if note.is_from_here is False:
        return next((pid for pid in holders if _has_locked(pid, found)), None)
    return note.pid if note.pid in holders else None


def may_be_held_elsewhere(path: str) -> bool:
    """Say whether whoever had the state directory open last, and may still have, is of another namespace or host."""
    note = _read_note(path)
    if note is None or note.is_from_here is not False:
        return False
    owner = read_owner(path)
    return owner is None or not owner.closed


def _has_locked(pid: int, found: os.stat_result) -> bool:
    """Say whether it is seen that a process has locked this file, and not one of that number on another disk."""
    try:
        return has_open(pid, LOCK, found, with_lock=True)
    except OSError:  # it has ended, or may not be looked at
        return False


def is_lock(path: str) -> bool:
    """Say whether the file `path` may be a lock of ours: it names a process, begins to, or names nobody yet.

    It is never flushed: after a power cut, zeros may stand where a process was named; and a disk may take a part of it.
    """
    try:
        content = read_small_file(path, _HOLDER_BYTES).strip(b"\0")
    except OSError:
        return False
    return content[: len(_NOTE_BEGINS)] == _NOTE_BEGINS[: len(content)]


class _Note(NamedTuple):
    """What the lock's file says of the process that has taken it."""

    pid: int
    is_from_here: bool | None
    """False if the pid is of another pid namespace or host, and means nothing here; None if that was not noted."""


def _make_note() -> bytes:
    return json.dumps({"pid": os.getpid(), "pid_namespace": read_pid_namespace(), "boot_id": read_boot_id()}).encode()


def _read_note(path: str) -> _Note | None:
    try:
        note = json.loads(read_small_file(os.path.join(path, LOCK), _HOLDER_BYTES))
        pid, place = note["pid"], (note.get("pid_namespace"), note.get("boot_id"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(pid, int) or not 0 < pid < _PIDS:
        return None
    return _Note(pid, None if place == (None, None) else place == (read_pid_namespace(), read_boot_id()))


def has_holder_ended(path: str) -> bool:
    """Say whether the process that had the state directory open has ended, though the lock is still held.

    Then a child of it holds it that was just about to execute something, as a start is begun: that is over at once.
    """
    note = _read_note(path)
    try:
        return note is not None and note.is_from_here is not False and is_zombie(read_stat(note.pid))
    except OSError:
        return True


def locked_error(path: str) -> StateDirectoryLockedError:
    """Return the error that names who has the state directory open: by pid only where that means this very process."""
    note, pid, advice = _read_note(path), find_holder(path), "close that engine first"
    if note is None or (note.is_from_here is None and pid is None):
        holder = "another process"
    elif pid == os.getpid():
        holder = f"this process (pid {pid})"
    elif pid is not None:
        holder = f"process {pid}"
    elif note.is_from_here is False:
        holder = "a process of another pid namespace (as a container has) or host"
        advice = "close that engine there first"
    elif _is_process(note.pid):  # on this file system the lock has another number than the file
        holder, pid = f"process {note.pid}", note.pid
    else:
        holder = f"a child of process {note.pid}, which has ended"
    message = f"state directory {path} is in use by {holder}; {advice}, or use another directory"
    return StateDirectoryLockedError(message, pid)


def _is_process(pid: int) -> bool:
    """Say whether a process has this pid; in /proc it may be another's, if that is of another pid namespace."""
    try:
        with open_pidfd(pid):
            return True
    except ProcessLookupError:
        return False
    except OSError:
        return True
