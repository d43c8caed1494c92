"""The state directory: private, and locked by one engine at a time."""

import errno
import os
import stat
import time
from typing import Self

import msgspec

from limpet.engine.state.descriptors import fill_standard_numbers, is_of_disk, to_limpet_error
from limpet.engine.state.durable import make_directory, remove_tree, write_file
from limpet.engine.state.entries import require_entries, require_path
from limpet.engine.state.identity import find_original, make_copy, read_identity, settle_identity
from limpet.engine.state.lock import Lock, find_holder, has_holder_ended, is_lock, locked_error
from limpet.engine.state.names import DATABASE, ENTRIES, FILES, IDENTITY, KEEPER, LOCK, OURS, OWNER
from limpet.engine.state.owner import Owner, load_owner
from limpet.engine.state.presence import is_there
from limpet.engine.state.surroundings import require_system_calls
from limpet.engine.state.turn import collect_garbage, patience_with_given_up, pauses
from limpet.recovery.mounts import find_file_system
from limpet.schema.errors import (
    LimpetError,
    StateDirectoryError,
    UnsupportedError,
    quote_path,
)
from limpet.schema.layout import TEMPORARY_PREFIX

# SQLite's WAL needs memory shared by all users of the database, and flock(2) needs a single machine.
_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre", "afs"}
_CANNOT_LOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_CHILD_SECONDS = 0.5
"""How long a child of a killed engine may take to execute its program, which gives the lock up."""
_LONGEST_PATH = 480
"""In bytes. SQLite opens no file whose path has more than 511, and a new database has a name of 22 at first."""


class StateDirectory:
    """A state directory that this process has locked. Created by `acquire`, given up by `release`."""

    def __init__(self, path: str, lock: Lock) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def acquire(cls, state_dir: str | os.PathLike[str], *, wait: float = 0) -> Self:
        """Make the directory if it is missing, check it, and take its lock, for which it waits `wait` seconds at most.

        Raises StateDirectoryLockedError if another process (or this one) has it open, StateDirectoryError if it is
        not a private directory of this user, UnsupportedError if it is on a network file system, DiskFullError.
        """
        path = require_path(state_dir)
        require_system_calls()
        fill_standard_numbers()
        try:
            path = os.path.abspath(path)
            require_short(path)
            make_directory(path)
            _make_private(path, check_directory(path))
            require_entries(path, ENTRIES)
            patience = patience_with_given_up()  # before the first try: one may be over between that and the next
            lock = Lock.take(os.path.join(path, LOCK))
            if lock is None and find_holder(path) == os.getpid() and collect_garbage(wait):
                lock = Lock.take(os.path.join(path, LOCK))  # of a store that an interrupt cut off, and nobody has
            if lock is None:
                wait = max(wait, patience, _CHILD_SECONDS if has_holder_ended(path) else 0)
            for pause in pauses(wait if lock is None else 0):
                time.sleep(pause)
                lock = Lock.take(os.path.join(path, LOCK))
                if lock is not None:
                    break
        except (OSError, ValueError) as error:  # the path contains a NUL or a lone surrogate
            raise _refusal(path, error) from error
        if lock is None:
            raise locked_error(path)
        try:
            return cls(path, lock)
        except BaseException:
            lock.release()
            raise

    def join(self, name: str) -> str:
        """Return the path of `name` in the directory."""
        return os.path.join(self.path, name)

    def read_owner(self) -> Owner | None:
        """Return the last owner's record, None if there is none. Raises StateDirectoryError if it cannot be read."""
        try:
            return load_owner(self.path)
        except OSError as error:
            raise StateDirectoryError(f"{self.join(OWNER)}: {error.strerror}; nothing was started") from error

    def write_owner(self, owner: Owner) -> None:
        """Replace the owner's record, durably. Raises StateDirectoryError if writing fails."""
        try:
            write_file(self.join(OWNER), msgspec.json.encode(owner))
        except OSError as error:
            raise StateDirectoryError(f"{self.join(OWNER)}: {error.strerror}; nothing was started") from error

    def find_original(self, node: str) -> str:
        """Return where the original is if this is a copy of which `node` has not been told; else nothing.

        Raises StateDirectoryError.
        """
        try:
            return find_original(self.path, node)
        except OSError as error:
            raise StateDirectoryError(f"state directory {self.path}: {error.strerror}") from error

    def settle_identity(self, node: str, original: str) -> None:
        """Record, durably, which directory this is, now that what it holds is settled. Raises StateDirectoryError."""
        try:
            settle_identity(self.path, node, original)
        except OSError as error:
            raise StateDirectoryError(f"{self.join(IDENTITY)}: {error.strerror}; nothing was started") from error

    def name_original(self, original: str) -> str:
        """Record, durably, that what will be here is a copy of what is, or was, at `original`; return our identity.

        The first opening then marks what runs there as the original's. Raises StateDirectoryError.
        """
        try:
            return make_copy(self.path, original).id
        except OSError as error:
            raise StateDirectoryError(f"{self.join(IDENTITY)}: {error.strerror}; nothing was made") from error

    def forget_keeper(self) -> None:
        """Remove the copy of a keeper's files: what it noted is of the original's containers. May be repeated."""
        path = self.join(KEEPER)
        try:
            if is_there(path):
                remove_tree(path)
        except OSError as error:
            raise StateDirectoryError(f"{error.filename or path}: {error.strerror}; nothing was started") from error

    @property
    def is_copy(self) -> bool:
        """True if this directory was made as a copy of another one. Raises StateDirectoryError."""
        try:
            record = read_identity(self.path)
        except OSError as error:
            raise StateDirectoryError(f"{self.join(IDENTITY)}: {error.strerror}") from error
        return record is not None and bool(record.original)

    def remove_temporary_files(self) -> None:
        """Remove files that a kill left half written. Raises StateDirectoryError."""
        try:
            for entry in os.scandir(self.path):
                if entry.name.startswith(TEMPORARY_PREFIX) and not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
        except OSError as error:
            raise StateDirectoryError(f"{error.filename or self.path}: {error.strerror}") from error

    def ring(self) -> None:
        """Wake whoever watches the directory's lock for what becomes durable here. Writes nothing."""
        self._lock.touch()

    def require_lock(self) -> None:
        """Raise StateDirectoryError if somebody has closed what this process has open, its lock at least.

        The numbers of what was closed are soon others': what is written to them comes into files that are not ours.
        """
        if not self._lock.is_held():
            raise StateDirectoryError(
                f"{self.path}: the lock is gone, for this program has closed descriptors that are not its own, as"
                " os.closerange() does; nothing is written any more, close this and open the state directory again"
            )

    def release(self) -> None:
        """Release the lock; the file stays. Repeating it is fine."""
        self._lock.release()


def require_short(path: str) -> None:
    """Refuse a path that is too long for what is opened in it, before anything is made. Raises StateDirectoryError."""
    found = len(os.fsencode(os.path.realpath(path)))
    if found > _LONGEST_PATH:
        raise StateDirectoryError(
            f"state directory {quote_path(path)}: its path has {found:,} bytes, links followed; SQLite opens no"
            f" database where it has more than {_LONGEST_PATH}; give a shorter one"
        )


def check_directory(path: str, *, is_read: bool = False) -> os.stat_result:
    """Return the stat of a state directory that this user may use; if it is only read, root may read any user's.

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
        raise _no_directory(path)
    if found.st_uid != os.geteuid() and not (is_read and os.geteuid() == 0):
        raise StateDirectoryError(
            f"state directory {path} belongs to user {found.st_uid}, you are user {os.geteuid()}; use your own, or run"
            f" this as that user: sudo -u '#{found.st_uid}' ..."
        )
    kind = _file_system(found.st_dev)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise UnsupportedError(f"state directory {path} is on {kind}, a network file system; use a local disk")
    return found


def _refusal(path: str, error: OSError | ValueError) -> LimpetError:
    """Return what to raise where a state directory can be neither made nor locked."""
    number = getattr(error, "errno", None)
    if number in _CANNOT_LOCK:
        return UnsupportedError(f"{path}: this file system cannot lock files (flock); use another")
    if isinstance(error, FileExistsError | NotADirectoryError):
        return _no_directory(path)
    if isinstance(error, OSError) and is_of_disk(error):
        return to_limpet_error(f"state directory {quote_path(path)}", error)
    reason = getattr(error, "strerror", None) or error
    advice = "give a directory that you can write to"
    if number == errno.EFBIG:
        advice = "raise the limit (RLIMIT_FSIZE, ulimit -f)"
    return StateDirectoryError(f"state directory {quote_path(path)}: {reason}; {advice}")


def _no_directory(path: str) -> StateDirectoryError:
    return StateDirectoryError(f"state directory {quote_path(path)} is not a directory; give another path")


def require_ours(path: str) -> None:
    """Raise StateDirectoryError if the directory has entries, and nothing of limpet's among them. Raises OSError.

    The names of its directories are anybody's: only its files tell.
    """
    found = {name for name in os.listdir(path) if not name.startswith(TEMPORARY_PREFIX)}
    foreign = found - OURS
    has_file = not found.isdisjoint(FILES - {LOCK}) or (LOCK in found and is_lock(os.path.join(path, LOCK)))
    if not found or DATABASE in found or (has_file and not foreign):
        return
    raise StateDirectoryError(
        f"state directory {quote_path(path)} contains no limpet state, but other files"
        f" ({min(foreign or found)!r}, ...); give an empty directory or a new path"
    )


def _make_private(path: str, found: os.stat_result) -> None:
    """Close a state directory to others. A service manager may open it again before each start."""
    require_ours(path)
    if found.st_mode & 0o077 or not os.path.lexists(os.path.join(path, DATABASE)):
        os.chmod(path, 0o700)


def find_foreign_entries(path: str) -> list[str]:
    """Return the names in a directory that are not limpet's."""
    return sorted(name for name in os.listdir(path) if name not in OURS and not name.startswith(TEMPORARY_PREFIX))


def _file_system(device: int) -> str:
    try:
        return find_file_system(device)
    except OSError as error:
        raise UnsupportedError(f"{error.filename}: {error.strerror}; limpet needs /proc: mount it") from error
