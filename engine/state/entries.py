"""Checks the entries of a state directory: they must be our files and directories, and lead nowhere else.

Through a link in place of a file, another file would be written; opening a pipe would wait; through a link in place of
`containers`, foreign directories would be judged. Such an entry is not used: it is reported, and left alone.
"""

import os
import stat
from collections.abc import Mapping

from limpet.schema.errors import StateDirectoryError, quote_path


def resolve_directory(state_dir: str | os.PathLike[str]) -> str:
    """Return the real path of a state directory. Raises StateDirectoryError if the path is invalid."""
    try:
        return os.path.realpath(os.fspath(state_dir))
    except (OSError, ValueError) as error:  # it contains a NUL or a lone surrogate
        raise StateDirectoryError(f"state directory {quote_path(state_dir)}: {error}; give another") from error


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
            raise StateDirectoryError(f"{entry} is {what} in place of {place}; move it away and try again")
        if not is_directory and found.st_nlink > 1:
            raise StateDirectoryError(f"{entry} has {found.st_nlink} names (hard links); replace it with a copy")
