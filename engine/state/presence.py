"""Whether something is there. A look that fails is no answer.

`os.path.exists` and its kin take it for a no, as on a disk that fails, or without memory: and what is missing is made
anew, or said to be gone.
"""

import os
import stat


def is_there(path: str) -> bool:
    """Say whether something has this name, be it a link that leads nowhere. Raises OSError."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_directory(path: str) -> bool:
    """Say whether this is a directory, or a link to one. Raises OSError."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
