"""The socket by which engines reach the keeper of a directory."""

import os
import socket
import stat
from contextlib import suppress

SOCKET = "socket"
_BACKLOG = 512


def listen(directory: int) -> socket.socket:
    """Listen in the directory behind a descriptor, in place of who did before. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        name = f"/proc/self/fd/{directory}/{SOCKET}"  # a socket's path has at most 107 bytes, a state directory's more
        with suppress(FileNotFoundError):
            os.unlink(name)
        listener.bind(name)
        os.chmod(name, 0o600)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def listen_again(listener: socket.socket, directory: int, made: tuple[int, int] | None) -> socket.socket:
    """Take over a listener, or, where its file is not the one that was `made` with it, listen anew. Raises OSError.

    Who listened last is whom SO_PEERCRED names.
    """
    if find_file(directory) == made:
        listener.listen(_BACKLOG)
        return listener
    listener.close()
    return listen(directory)


def find_file(directory: int) -> tuple[int, int] | None:
    """Return which file the socket in a directory is, None if no socket has its name. Raises OSError."""
    try:
        found = os.stat(SOCKET, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) else None
