"""Opens what lies beneath a directory, component by component, through no symbolic link."""

import errno
import os
from contextlib import suppress

from limpet.engine.state.durable import make_directory, make_one_directory

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_parent_beneath(top: str, path: str, *, make: bool = False) -> tuple[int, str]:
    """Return a descriptor (O_PATH) of the directory that holds `path`, and the name of `path` in it.

    `top` is somebody's choice and may be a link; between it and `path` no link is followed, so whoever may write there
    leads nobody elsewhere. `make` makes missing directories, with mode 0700. Raises OSError, also for a path that is
    not beneath `top`.
    """
    top = os.path.realpath(top)
    below = os.path.relpath(path, top).split(os.sep)
    if below[0] in {os.curdir, os.pardir}:
        raise OSError(errno.EXDEV, f"it is not beneath {top}", path)
    if make and not os.path.isdir(top):
        make_directory(top)
    directory = os.open(top, _DIRECTORY)
    try:
        for name in below[:-1]:
            inner = _open_directory(directory, name, make=make)
            os.close(directory)
            directory = inner
    except BaseException:
        os.close(directory)
        raise
    return directory, below[-1]


def _open_directory(directory: int, name: str, *, make: bool) -> int:
    while True:
        try:
            return os.open(name, _DIRECTORY, dir_fd=directory)
        except FileNotFoundError:
            if not make:
                raise
        with suppress(FileExistsError):  # another start was faster; what it is, is seen when it is opened
            make_one_directory(name, dir_fd=directory)
