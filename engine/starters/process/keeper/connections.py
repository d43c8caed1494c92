"""Connections: processes of the keeper's own user come and go; their requests are answered, or refused."""

import errno
import os
import resource
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from .kernel import close, close_all
from .listener import find_file, listen
from .loop import Loop
from .messages import Message, read_peer, receive, send

_LISTEN_AGAIN_SECONDS = 1.0
"""Between two looks whether the socket's file is there."""
_WITHOUT_ANSWER = {"ack"}
Answer = tuple[Message | None, Sequence[int]]
"""What is answered, None for nothing yet or at all, and the descriptors that go with it."""


class Connections:
    """All that are open, and the socket at which others come."""

    def __init__(
        self,
        directory: int,
        listener: socket.socket,
        loop: Loop,
        answer: Callable[[socket.socket, Message, list[int]], Answer],
        leave: Callable[[socket.socket], None],
    ) -> None:
        """`answer` is called with each request and its descriptors; `leave` when a connection was closed."""
        self._directory = directory
        self._listener = listener
        self._loop = loop
        self._answer = answer
        self._leave = leave
        self._open: dict[int, socket.socket] = {}
        self._peers: dict[int, int] = {}  # a pidfd of who has connected, by the connection's descriptor
        self._look_again_at = 0.0
        loop.watch(listener.fileno(), self._accept)

    def __bool__(self) -> bool:
        """Say whether any is open."""
        return bool(self._open)

    def listen_again(self) -> None:
        """Listen anew where our socket's file was removed, or replaced by what is none: no engine finds us.

        Raises OSError where that cannot be done now.
        """
        now = time.monotonic()
        if now < self._look_again_at:
            return
        self._look_again_at = now + _LISTEN_AGAIN_SECONDS
        if os.fstat(self._directory).st_nlink and find_file(self._directory) is None:
            listener = listen(self._directory)
            self._loop.watch(listener.fileno(), self._accept)
            before, self._listener = self._listener, listener
            self._loop.unwatch(before.fileno())
            before.close()

    def serve(self, connection: socket.socket) -> None:
        """Take a request, and answer it. One that makes no sense is refused, and ends nothing."""
        try:
            request, descriptors = receive(connection)
        except BlockingIOError:
            return
        except ValueError as error:
            self._refuse(connection, error)
            return
        try:
            if request is None:
                self.close(connection)
                return
            answer, given = self._answer(connection, request, descriptors)
        except Exception as error:  # noqa: BLE001  # whatever it is, who asked is told
            if request is None or request.get("op") not in _WITHOUT_ANSWER:
                self._refuse(connection, error)
            return
        finally:
            close_all(descriptors)
        if answer is not None:
            self.send(connection, answer, given)

    def send(self, connection: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send an answer. Where it cannot be sent the connection is closed: who waits for it asks again."""
        try:
            send(connection, message, descriptors)
        except OSError:
            if connection.fileno() in self._open:
                self.close(connection)

    def close(self, connection: socket.socket) -> None:
        """Close a connection, whose other end is gone or has given up a call."""
        self._loop.unwatch(connection.fileno())
        del self._open[connection.fileno()]
        peer = self._peers.pop(connection.fileno(), -1)
        if peer >= 0:
            self._loop.unwatch(peer)
            close(peer)
        connection.close()
        self._leave(connection)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        with suppress(OSError):
            pid, uid = read_peer(connection)
            if uid == os.geteuid():
                connection.setblocking(False)
                self._loop.watch(connection.fileno(), lambda: self.serve(connection))
                self._open[connection.fileno()] = connection
                self._watch_peer(connection, pid)
                return
        connection.close()

    def _watch_peer(self, connection: socket.socket, pid: int) -> None:
        """Close it with the process that connected: a fork of that may hold the other end for longer."""
        with suppress(OSError, ValueError):  # one of another pid namespace has no number here
            pidfd = os.pidfd_open(pid)
            try:
                self._loop.watch(pidfd, lambda: self.close(connection))
            except BaseException:
                close(pidfd)
                raise
            self._peers[connection.fileno()] = pidfd

    def _refuse(self, connection: socket.socket, error: Exception) -> None:
        self.send(connection, {"error": _explain(error)})


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"the keeper, process {os.getpid()}, has no file descriptor left: its limit is {most}, that of who began"
            " it; raise it (prlimit --nofile), or try again once containers have ended"
        )
    if isinstance(error, OSError) and error.errno == errno.EAGAIN:
        return (
            f"no process can be forked where the keeper, process {os.getpid()}, is; raise the limit of its cgroup"
            " (pids.max) or of its user (RLIMIT_NPROC), or try again once containers have ended"
        )
    return f"{type(error).__name__}: {error}"
