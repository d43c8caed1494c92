"""The state directory: private, locked by one engine at a time, with a record of how its last owner closed it.

lock            locked with flock(2) while an engine or a writing store is open; never removed
owner.json      its last owner: the epoch, and whether the database was closed cleanly
store.db        the database, with its -wal and -shm next to it while it is open
containers/     a bundle for each container        sandboxes/   a directory for each sandbox
images/         the image store                    quarantine/  entries without an owner
backups/        copies made before a migration
"""

import json
import os
import stat
from typing import TYPE_CHECKING, Self

import msgspec
from msgspec.structs import replace

from limpet.engine.state.durable import make_directory, write_file
from limpet.engine.state.entries import require_entries, require_path
from limpet.recovery.files import read_small_file
from limpet.schema.errors import (
    StateDirectoryError,
    StateDirectoryLockedError,
    UnsupportedError,
    quote_path,
)
from limpet.schema.layout import TEMPORARY_PREFIX

if TYPE_CHECKING:
    from filelock import FileLock

DATABASE = "store.db"
CONTAINERS = "containers"
SANDBOXES = "sandboxes"
IMAGES = "images"
QUARANTINE = "quarantine"
BACKUPS = "backups"
_LOCK = "lock"
OWNER = "owner.json"
_FILES = {DATABASE, DATABASE + "-wal", DATABASE + "-shm", DATABASE + "-journal", _LOCK, OWNER}
_DIRECTORIES = {CONTAINERS, SANDBOXES, IMAGES, QUARANTINE, BACKUPS}
_OURS = _FILES | _DIRECTORIES
ENTRIES = dict.fromkeys(_FILES, False) | dict.fromkeys(_DIRECTORIES, True)
"""Whether each entry is a directory."""
_OWNER_BYTES = 4096
_HOLDER_BYTES = 4096

# SQLite's WAL needs memory shared by all users of the database, and flock(2) needs a single machine.
_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre", "afs"}


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """The last engine's record beside the database, which shows whether the database has gone back in time."""

    pid: int
    epoch: int
    """The epoch of its opening: a database that knows only an older one is not the one it wrote to."""
    node: str = ""
    """The node whose epoch it is; empty in the record of an older limpet."""
    closed: bool
    """True once everything is in the database file; while False, acknowledged commits may be only in the WAL."""

    def as_closed(self) -> "Owner":
        """Return the record of an owner that has closed the database: all is in its file, and no WAL is missed."""
        return replace(self, pid=os.getpid(), closed=True)


class StateDirectory:
    """A state directory that this process has locked. Created by `acquire`, given up by `release`."""

    def __init__(self, path: str, lock: "FileLock") -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def acquire(cls, state_dir: str | os.PathLike[str]) -> Self:
        """Make the directory if it is missing, check it, and take its lock without waiting.

        Raises StateDirectoryLockedError if another process (or this one) has it open, StateDirectoryError if it is
        not a private directory of this user, UnsupportedError if it is on a network file system.
        """
        # Imported here: it takes as long to load as everything that reading without the lock needs.
        from filelock import FileLock, Timeout  # noqa: PLC0415

        path = require_path(state_dir)
        try:
            path = os.path.abspath(path)
            make_directory(path)
            _require_private(path, check_directory(path))
            require_entries(path, ENTRIES)
            lock = FileLock(
                os.path.join(path, _LOCK),
                timeout=0,
                mode=0o600,
                thread_local=False,
                fallback_to_soft=False,  # a soft lock survives its holder
                preserve_lock_file=True,
                on_acquired=_write_holder,
            )
            lock.acquire()
        except Timeout as error:
            raise _locked_error(path) from error
        except NotImplementedError as error:
            raise UnsupportedError(f"{path}: this file system cannot lock files (flock); use another") from error
        except (OSError, ValueError) as error:  # the path contains a NUL or a lone surrogate
            reason = getattr(error, "strerror", None) or error
            raise StateDirectoryError(
                f"state directory {quote_path(path)}: {reason}; give a directory that you can write to"
            ) from error
        return cls(path, lock)

    def join(self, name: str) -> str:
        """Return the path of `name` in the directory."""
        return os.path.join(self.path, name)

    def read_owner(self) -> Owner | None:
        """Return the last owner's record, None if there is none or it cannot be read."""
        return read_owner(self.path)

    def write_owner(self, owner: Owner) -> None:
        """Replace the owner's record, durably. Raises StateDirectoryError if writing fails."""
        try:
            write_file(self.join(OWNER), msgspec.json.encode(owner))
        except OSError as error:
            raise StateDirectoryError(f"{self.join(OWNER)}: {error.strerror}; nothing was started") from error

    def remove_temporary_files(self) -> None:
        """Remove files that a kill left half written. Raises StateDirectoryError."""
        try:
            for entry in os.scandir(self.path):
                if entry.name.startswith(TEMPORARY_PREFIX) and not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
        except OSError as error:
            raise StateDirectoryError(f"{error.filename or self.path}: {error.strerror}") from error

    def release(self) -> None:
        """Release the lock; the file stays."""
        self._lock.release()


def check_directory(path: str) -> os.stat_result:
    """Return the stat of a state directory that this user may use.

    Raises StateDirectoryError if `path` is missing, a file, a link or another user's, UnsupportedError if it is on
    a network file system.
    """
    try:
        found = os.lstat(path)
    except OSError as error:
        raise StateDirectoryError(f"state directory {path}: {error.strerror}") from error
    if stat.S_ISLNK(found.st_mode):
        raise StateDirectoryError(f"state directory {path} is a symbolic link; give the directory itself")
    if not stat.S_ISDIR(found.st_mode):
        raise StateDirectoryError(f"state directory {path} is not a directory; give another path")
    if found.st_uid != os.geteuid():
        raise StateDirectoryError(
            f"state directory {path} belongs to user {found.st_uid}, you are user {os.geteuid()}; use your own"
        )
    kind = file_system_type(found.st_dev)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise UnsupportedError(f"state directory {path} is on {kind}, a network file system; use a local disk")
    return found


def read_owner(path: str) -> Owner | None:
    """Return the last owner's record in the state directory `path`, None if there is no readable one."""
    try:
        return msgspec.json.decode(read_small_file(os.path.join(path, OWNER), _OWNER_BYTES), type=Owner)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def find_foreign_entries(path: str) -> list[str]:
    """Return the names in a directory that are not limpet's."""
    return sorted(name for name in os.listdir(path) if name not in _OURS and not name.startswith(TEMPORARY_PREFIX))


def _require_private(path: str, found: os.stat_result) -> None:
    if not os.path.lexists(os.path.join(path, DATABASE)):
        foreign = find_foreign_entries(path)
        if foreign:
            raise StateDirectoryError(
                f"state directory {path} contains no limpet state, but other files ({foreign[0]!r}, ...);"
                " give an empty directory or a new path"
            )
        os.chmod(path, 0o700)
    elif found.st_mode & 0o077:
        raise StateDirectoryError(
            f"state directory {path} is open to other users (mode {stat.S_IMODE(found.st_mode):04o});"
            f" make it private: chmod 700 {path}"
        )


def _write_holder(descriptor: int) -> None:
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
        inode = os.stat(os.path.join(path, _LOCK)).st_ino
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
        pid = json.loads(read_small_file(os.path.join(path, _LOCK), _HOLDER_BYTES))["pid"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return pid if isinstance(pid, int) else None


def _locked_error(path: str) -> StateDirectoryLockedError:
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


def file_system_type(device: int) -> str:
    """Return the type of the file system on a device (st_dev), "" if it is not mounted here.

    Raises UnsupportedError if /proc is missing.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                fields, _, rest = line.partition(" - ")
                if fields.split()[2] == number:
                    return rest.split()[0]
    except OSError as error:
        raise UnsupportedError(f"/proc/self/mountinfo: {error.strerror}; limpet needs /proc: mount it") from error
    return ""
