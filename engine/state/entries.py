"""What the entries of a state directory are: files and directories of ours, and nothing that leads elsewhere.

A link in the place of a file would have another one written, a pipe would keep us waiting, and a link in the place of
`containers` would have us judge somebody else's directories. None is used: it is named, and left alone.
"""

import os
import stat
from collections.abc import Mapping

from limpet.schema.errors import StateDirectoryError, quote_path


def resolve_directory(state_dir: str | os.PathLike[str]) -> str:
    """Return the real path of a state directory. Raises StateDirectoryError for what can be no path."""
    try:
        return os.path.realpath(os.fspath(state_dir))
    except (OSError, ValueError) as error:  # a NUL in it, or a lone surrogate
        raise StateDirectoryError(f"state directory {quote_path(state_dir)}: {error}; name another") from error


def require_entries(path: str, wanted: Mapping[str, bool]) -> None:
    """Raise StateDirectoryError where an entry of the directory is not what it must be; a missing one is fine.

    `wanted` says for each name whether it is a directory, or else a file, which may have one name only: what is written
    to it must not show elsewhere.
    """
    for name, is_directory in wanted.items():
        entry = os.path.join(path, name)
        try:
            found = os.lstat(entry)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise StateDirectoryError(f"{entry}: {error.strerror}; use a directory that you may read") from error
        if is_directory != stat.S_ISDIR(found.st_mode) or (not is_directory and not stat.S_ISREG(found.st_mode)):
            what = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "something else"
            place = "a directory" if is_directory else "a file"
            raise StateDirectoryError(f"{entry} is {what} in the place of {place}; move it away and try again")
        if not is_directory and found.st_nlink > 1:
            raise StateDirectoryError(f"{entry} has {found.st_nlink} names (hard links); put a copy in its place")
