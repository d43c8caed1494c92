"""Checks the entries of a state directory: they must be our files and directories, and lead nowhere else.

Through a link in place of a file, another file would be written; opening a pipe would wait; through a link in place of
`containers`, foreign directories would be judged. Such an entry is not used: it is reported, and left alone.
"""

import errno
import os
import re
import stat
from collections.abc import Mapping

from limpet.schema.errors import InvalidInputError, StateDirectoryError, quote_path

_MOST_LINKS = 40  # as the kernel, path_resolution(7)
_STICKY_FOR_ALL = stat.S_ISVTX | stat.S_IWOTH
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):(/|memory:$)|:memory:$")


def require_path(state_dir: str | os.PathLike[str]) -> str:
    """Return a state directory's path. Raises InvalidInputError for a URL, or any other value that is no path."""
    try:
        path = os.fspath(state_dir)
    except TypeError:
        path = ""
    if not path or not isinstance(path, str):
        raise InvalidInputError(f"state directory {quote_path(state_dir)}: give a path, as text")
    if path.split("/", 1)[0] == "~":
        raise InvalidInputError(
            f"state directory {quote_path(path)}: only a shell knows whose home ~ is; give os.path.expanduser of it, or"
            " ./~ for a directory of that name"
        )
    if (found := _URL.match(path)) is not None:
        what = f"a URL ({found['scheme']}:...)" if found["scheme"] else "a name that SQLite knows"
        raise InvalidInputError(  # not all of it: it may hold a password
            f"state directory: got {what}, not a path; name a directory on a local disk for limpet to use"
        )
    return path


def resolve_directory(state_dir: str | os.PathLike[str]) -> str:
    """Return the real path of a state directory, which may be missing.

    Raises StateDirectoryError, also for another user's link in a directory such as /tmp: any user could choose which
    directory is made private and used. Most kernels do not follow those either (fs.protected_symlinks,
    proc_sys_fs(5)). Raises InvalidInputError for what is no path.
    """
    path = require_path(state_dir)
    try:
        return _follow(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in it, or a lone surrogate
        reason = getattr(error, "strerror", None) or error
        raise StateDirectoryError(f"state directory {quote_path(state_dir)}: {reason}; name another") from error


def require_utf8(path: str) -> None:
    """Raise StateDirectoryError if JSON cannot hold the path: records, configs and requests of containers name it."""
    try:
        os.fsencode(path).decode()  # the path's bytes, whatever the locale
    except UnicodeError as error:
        raise StateDirectoryError(
            f"state directory {quote_path(path)}: its path, links followed, is not UTF-8, and no record of a container"
            " could name it; rename what is not, or give another directory"
        ) from error


def _follow(path: str) -> str:
    real = "/" if path.startswith("/") else os.getcwd()
    names = path.split("/")[::-1]
    links = 0
    while names:
        name = names.pop()
        if name in {"", "."}:
            continue
        if name == "..":
            real = os.path.dirname(real)
            continue
        entry = os.path.join(real, name)
        try:
            found = os.lstat(entry)
        except FileNotFoundError:
            return os.path.normpath(os.path.join(entry, *names[::-1]))
        if not stat.S_ISLNK(found.st_mode):
            real = entry
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        _require_trusted_link(entry, found, os.stat(real))
        target = os.readlink(entry)
        real = "/" if target.startswith("/") else real
        names += target.split("/")[::-1]
    return real


def _require_trusted_link(entry: str, link: os.stat_result, parent: os.stat_result) -> None:
    is_open_to_all = parent.st_mode & _STICKY_FOR_ALL == _STICKY_FOR_ALL
    if is_open_to_all and link.st_uid not in {os.geteuid(), parent.st_uid}:
        raise OSError(
            errno.EACCES, f"{entry} is a link of user {link.st_uid} in a directory that is open to all", entry
        )


def require_entries(path: str, wanted: Mapping[str, bool]) -> None:
    """Raise StateDirectoryError if an entry of the directory has the wrong type; a missing one is fine.

    `wanted` says for each name whether it is a directory; otherwise it is a file, which must have only one name: writes
    to it must not change another file.
    """
    for name, is_directory in wanted.items():
        entry = os.path.join(path, name)
        try:
            found = os.lstat(entry)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise StateDirectoryError(f"{entry}: {error.strerror}; use a directory that you can read") from error
        if is_directory != stat.S_ISDIR(found.st_mode) or (not is_directory and not stat.S_ISREG(found.st_mode)):
            what = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "something else"
            place = "a directory" if is_directory else "a file"
            raise StateDirectoryError(f"{entry} is {what} in place of {place}; put that there itself and try again")
        if not is_directory and found.st_nlink > 1:
            raise StateDirectoryError(f"{entry} has {found.st_nlink} names (hard links); replace it with a copy")
