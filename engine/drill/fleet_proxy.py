"""A proxy before PostgreSQL that cuts, tears and holds connections at any byte, and tells whoever wants to kill then.

It knows nothing of the protocol: it counts what arrives in one piece. Whoever sends waits for each answer, so a piece
is one step of it. One thread, no lock: nothing passes while nobody calls `pump`.
"""

import os
import select
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Literal, NamedTuple

Way = Literal["up", "down"]
"""To the server, or from it."""

_PIECE: Final = 1 << 16
_RESET: Final = struct.pack("ii", 1, 0)


class Target(NamedTuple):
    """Where a server listens: a directory with its socket, or a host; and its port."""

    host: str
    port: int

    @property
    def is_local(self) -> bool:
        """True for a socket in a directory."""
        return self.host.startswith("/")

    def name(self) -> str:
        """Return the path of the socket, as PostgreSQL's clients look for it."""
        return f"{self.host}/.s.PGSQL.{self.port}"


class Piece(NamedTuple):
    """What has just arrived, not passed on yet."""

    way: Way
    number: int
    """Counted from 0 since the last `reset`, for each way."""
    data: bytes


class _Pipe:
    """One connection through the proxy: two sockets."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.waiting: list[tuple[socket.socket, bytes]] = []
        self.is_held = False

    def close(self) -> None:
        for each in (self.client, self.server):
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            each.close()


class Proxy:
    """Passes bytes on between clients and one server, in both directions."""

    def __init__(self, target: Target, directory: str) -> None:
        """Listen in `directory` if the server does so in one, else on this machine alone. Raises OSError."""
        self._target = target
        if target.is_local:
            self.place = Target(directory, target.port)
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(self.place.name())
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.place = Target("127.0.0.1", self._listener.getsockname()[1])
        self._listener.listen()
        self._pipes: list[_Pipe] = []
        self._counts: dict[Way, int] = {"up": 0, "down": 0}
        self.on_piece: Callable[[Piece], int | None] = lambda _: None
        """Called with each piece; returns how many of its bytes are passed on before the connection ends, None for all.

        It may call `hold`, or kill somebody: nothing else passes meanwhile.
        """
        self._now: _Pipe | None = None

    def reset(self) -> None:
        """Close all connections, and begin to count anew."""
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()
        self._counts = {"up": 0, "down": 0}

    def close(self) -> None:
        """Close everything. May be repeated."""
        self.reset()
        self._listener.close()
        if self.place.is_local:
            with suppress(FileNotFoundError):
                os.unlink(self.place.name())

    def close_in_child(self) -> None:
        """In a fork: close what the parent has, or a connection would outlive its cut."""
        self._listener.close()
        for pipe in self._pipes:
            pipe.client.close()
            pipe.server.close()

    def hold(self) -> None:
        """Let nothing more through the connection whose piece it is, until `release`; within `on_piece` only."""
        assert self._now is not None
        self._now.is_held = True

    def release(self) -> None:
        """Let all through that was held."""
        for pipe in self._pipes:
            pipe.is_held = False

    def pump(self, seconds: float, *others: int) -> bool:
        """Pass on what there is, for so long at most; return whether there is something to read from one of `others`.

        It returns at once when there is.
        """
        readable = {self._listener.fileno(): None, **dict.fromkeys(others)}
        poll = select.poll()
        for number in readable:
            poll.register(number, select.POLLIN)
        ends: dict[int, tuple[_Pipe, socket.socket]] = {}
        for pipe in [*self._pipes]:
            if not pipe.is_held:
                self._flush(pipe)
            if not pipe.is_held and pipe in self._pipes:
                for end in (pipe.client, pipe.server):
                    ends[end.fileno()] = (pipe, end)
                    poll.register(end.fileno(), select.POLLIN)
        found = [number for number, _ in poll.poll(1000 * seconds)]
        for number in found:
            if number in ends and ends[number][0] in self._pipes:
                self._pass_on(*ends[number])
            elif number == self._listener.fileno():
                self._accept()
        return any(number in others for number in found)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            if self._target.is_local:
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target.name())
            else:
                server = socket.create_connection(self._target, 5)
        except OSError:  # the server is down: so is the proxy, for this client
            client.close()
            return
        self._pipes.append(_Pipe(client, server))

    def _pass_on(self, pipe: _Pipe, source: socket.socket) -> None:
        try:
            data = source.recv(_PIECE)
        except OSError:
            data = b""
        if not data:
            self._end(pipe)
            return
        way: Way = "up" if source is pipe.client else "down"
        piece = Piece(way, self._counts[way], data)
        self._counts[way] += 1
        self._now = pipe
        length = self.on_piece(piece)
        self._now = None
        if pipe not in self._pipes:
            return
        to = pipe.server if way == "up" else pipe.client
        if pipe.is_held:
            pipe.waiting.append((to, data))
            return
        self._send(pipe, to, data[:length])
        if length is not None:
            self._end(pipe)

    def _flush(self, pipe: _Pipe) -> None:
        waiting, pipe.waiting = pipe.waiting, []
        for to, data in waiting:
            self._send(pipe, to, data)

    def _send(self, pipe: _Pipe, to: socket.socket, data: bytes) -> None:
        try:
            to.sendall(data)
        except OSError:
            self._end(pipe)

    def _end(self, pipe: _Pipe) -> None:
        if pipe in self._pipes:
            self._pipes.remove(pipe)
            pipe.close()
