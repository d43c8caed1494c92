"""The log copier: takes containers' output out of their FIFOs and appends it to their logs.

One process, one thread, one loop. It is sent the FIFOs by the keeper, and holds nothing that would be lost with it: it
looks at the output with tee(2), writes it to the log, and only then takes it out of the FIFO (see `log` for each
instant at which it may be killed). While a log cannot be written its output stays in the FIFO, which blocks the writer
after 64 KiB, and the copier tries again each second. A disk that hangs stops the copier, and nobody else.

Messages are JSON objects, with descriptors beside them. From the keeper:

- `copy`: id, serial, name, max_bytes (0: no rotation), max_files; with the log's directory, the note of how far it was
  copied, and the read ends of the FIFOs of stdout and stderr, each of which has, or had, a writer. Those that the
  container had before are copied on;
- `reopen`: id. The log was moved away: write to a new one;
- `drop`: id. Stop, with what is still in the FIFOs unread.

When the keeper is gone, a copier that it began ends: the next keeper has another. What no writer has any more it copies
to its end first, for that keeper may not know of it.

To the keeper:

- `done`: id, serial. No stream has a writer any more, and all their output is in the log;
- `trouble`: id, why. The log cannot be written, or not be rotated, for this reason; "" once it can.
"""

import array
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

from .kernel import close
from .lines import format_lines, read_back
from .log import Log

_CHUNK: Final = 65536
_MESSAGE: Final = 65536
_PAGE: Final = 4096
_SPLICE_F_NONBLOCK: Final = 2
_AGAIN_SECONDS: Final = 1.0
"""How often a log that cannot be written is tried again; and how long a line may take to be finished."""
_UNFINISHED_SECONDS: Final = 0.01
"""Between two looks at a line without its end: a writer that fills a pipe which was not empty wakes nobody."""
_RIGHTS: Final = 4
"""Descriptors that come with a message."""
_ROOM: Final = 8
"""Free descriptors before a message is taken: those that come with it, its log, and some for rotating logs."""
_IGNORED: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ)


def run(link: socket.socket, directory: int) -> NoReturn:
    """Copy until nobody is left at the other end of `link`. `directory` is the keeper's, with the folder `fifo`."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    try:
        _Copier(link, directory).loop()
    except BaseException:  # noqa: BLE001  # a fork must not go on in the caller's code
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def require_peek() -> None:
    """Raise OSError where a sandbox around us refuses what output is copied by: a log would stay empty."""
    pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    peek = _Peek()
    try:
        peek(pipe[0])
    except OSError as error:
        raise OSError(error.errno, f"its log cannot be written: tee(2): {error.strerror}") from error
    finally:
        for descriptor in pipe:
            close(descriptor)
        peek.close()


class _Container:
    def __init__(self, id: str, log: Log) -> None:
        self.id = id
        self.serial = ""
        self.log = log
        self.streams: list[_Stream] = []
        self.trouble = ""
        self.try_at = 0.0


class _Stream:
    def __init__(self, container: _Container, name: bytes, fifo: int) -> None:
        self.container = container
        self.name = name
        self.fifo = fifo
        self.capacity = fcntl.fcntl(fifo, fcntl.F_GETPIPE_SZ)
        self.is_watched = False
        self.hung_up = False
        self.unfinished_since = 0.0
        """When a beginning of a line was first seen, without its end; 0 if there is none."""


class _Copier:
    def __init__(self, link: socket.socket, directory: int) -> None:
        self._link = link
        self._directory = directory
        self._containers: dict[str, _Container] = {}
        self._streams: dict[int, _Stream] = {}
        self._ready: dict[int, _Stream] = {}
        self._later: dict[int, _Stream] = {}
        self._later_at = 0.0
        self._letters: dict[tuple[str, str], dict[str, str]] = {}
        self._peek = _Peek()
        self._poll = select.epoll()
        self._poll.register(link, select.EPOLLIN | select.EPOLLET)
        self._has_mail = True
        self._take: Mapping[str, Callable[[dict[str, Any], list[int]], None]] = {
            "copy": self._add,
            "reopen": self._reopen,
            "drop": self._drop,
        }

    def loop(self) -> None:
        """Return once the link's other end is closed, and what has no writer any more is copied."""
        while True:
            for descriptor, events in self._poll.poll(self._timeout()):
                if descriptor == self._link.fileno():
                    self._has_mail = True
                elif descriptor in self._streams:
                    self._streams[descriptor].hung_up |= bool(events & select.EPOLLHUP)
                    self._ready[descriptor] = self._streams[descriptor]
            if self._later and time.monotonic() >= self._later_at:
                self._ready.update(self._later)
                self._later.clear()
            if self._has_mail and not self._receive():
                self._finish_alone()
                return
            for stream in list(self._ready.values()):  # a chunk of each, so that none waits for another
                if stream.fifo in self._streams and not self._step(stream):
                    self._ready.pop(stream.fifo, None)
            self._send()

    def _timeout(self) -> float:
        if self._ready:
            return 0
        if self._later:
            return max(self._later_at - time.monotonic(), 0)
        return _AGAIN_SECONDS if self._has_mail or self._letters else -1

    # ---------------------------------------------------------------- the link

    def _receive(self) -> bool:
        """Take what the keeper has sent, as long as there is room for its descriptors: those without would be lost.

        Returns False if nobody is left who could send something.
        """
        while self._has_room():
            try:
                data, descriptors = _receive_message(self._link)
            except BlockingIOError:
                self._has_mail = False
                break
            except ConnectionResetError:  # the other end was closed with something unread; what it sent is still there
                continue
            except OSError:
                return False
            if not data:
                return False
            message = json.loads(data)
            self._take[message["op"]](message, descriptors)
        return True

    def _has_room(self) -> bool:
        taken: list[int] = []
        try:
            while len(taken) < _ROOM:
                taken.append(os.dup(self._directory))
        except OSError:
            return False
        finally:
            for descriptor in taken:
                close(descriptor)
        return True

    def _tell(self, op: str, id: str, **fields: str) -> None:
        self._letters[op, id] = {"op": op, "id": id, **fields}  # the latest of a kind: so they stay few

    def _send(self) -> None:
        try:
            for key, letter in list(self._letters.items()):
                self._link.send(json.dumps(letter).encode(), socket.MSG_DONTWAIT)
                del self._letters[key]
        except OSError:  # it does not read: again in a second; or it is gone: that is an event of its own
            pass

    def _add(self, message: dict[str, Any], descriptors: list[int]) -> None:
        key = message["id"]
        if len(descriptors) < _RIGHTS:
            for descriptor in descriptors:
                close(descriptor)
            return
        directory, note, *fifos = descriptors
        container = self._containers.get(key)
        if container is None:
            log = Log(directory, note, message["name"], message["max_bytes"], message["max_files"])
            container = self._containers[key] = _Container(key, log)
        else:
            close(directory)
            close(note)
        container.serial = message.get("serial", "")
        for name, fifo in zip((b"stdout", b"stderr"), fifos, strict=True):
            if any(os.path.samestat(os.fstat(fifo), os.fstat(each.fifo)) for each in container.streams):
                close(fifo)  # the next keeper does not know that we have it
                continue
            os.set_blocking(fifo, False)
            self._streams[fifo] = stream = _Stream(container, name, fifo)
            container.streams.append(stream)
            self._ready[fifo] = stream
        for stream in container.streams[:1]:
            self._step(stream)  # there is room for its log now

    def _reopen(self, message: dict[str, Any], _: list[int]) -> None:
        if (container := self._containers.get(message["id"])) is not None:
            container.log.close()
            container.try_at = 0.0
            self._ready.update((stream.fifo, stream) for stream in container.streams)

    def _drop(self, message: dict[str, Any], _: list[int]) -> None:
        if (container := self._containers.get(message["id"])) is not None:
            for stream in list(container.streams):
                self._close(stream)
            self._forget(container)

    def _finish_alone(self) -> None:
        """Copy what has no writer any more to its end, if its log can be written: the next keeper may not know it.

        A log that another copier has by now is left to that one.
        """
        for container in list(self._containers.values()):
            if all(_has_no_writer(stream.fifo) for stream in container.streams):
                container.try_at = 0.0
                for stream in list(container.streams):
                    stream.hung_up = True
                    while stream.fifo in self._streams and self._step(stream):
                        pass

    # ---------------------------------------------------------------- output

    def _step(self, stream: _Stream) -> bool:
        """Copy a chunk of the stream; return whether there may be more."""
        container = stream.container
        if time.monotonic() < container.try_at:
            self._look_later(stream)
            return False
        try:
            if not container.log.is_open:
                self._open(container)
            data = self._peek(stream.fifo)
            if data:
                return self._copy(stream, data)
        except (OSError, MemoryError) as error:
            self._hold(container, error)
            return False
        if data is None:
            self._end_trouble(container)
            self._watch(stream)
            return False
        self._close(stream)
        if not container.streams:
            self._forget(container)
            self._tell("done", container.id, serial=container.serial)
        return False

    def _copy(self, stream: _Stream, data: bytes) -> bool:
        pieces, used = format_lines(stream.name, data, time.time_ns())
        if not used:
            if not self._must_break(stream, len(data)):
                self._watch(stream)
                self._look_later(stream, _UNFINISHED_SECONDS)
                return False
            pieces, used = format_lines(stream.name, data, time.time_ns(), unfinished=True)
        container = stream.container
        container.log.append(pieces)
        os.read(stream.fifo, used)
        container.log.note()
        stream.unfinished_since = 0.0
        if container.log.is_full():
            self._rotate(container)
        else:
            self._end_trouble(container)
        return True

    def _rotate(self, container: _Container) -> None:
        try:
            container.log.rotate()
        except OSError as error:
            if not container.log.is_open:
                raise
            self._tell_trouble(container, f"it cannot be rotated: {error}")

    def _watch(self, stream: _Stream) -> None:
        """See to it that we are woken by the stream's next output; or look ourselves, if the kernel has no room."""
        if not stream.is_watched:
            try:
                self._poll.register(stream.fifo, select.EPOLLIN | select.EPOLLET)
                stream.is_watched = True
            except OSError:
                self._look_later(stream)

    def _must_break(self, stream: _Stream, length: int) -> bool:
        """Return whether a line is written before its end: that does not come, or not soon, or has no room."""
        now = time.monotonic()
        stream.unfinished_since = stream.unfinished_since or now
        is_late = now - stream.unfinished_since >= _AGAIN_SECONDS
        return stream.hung_up or is_late or length > stream.capacity - _PAGE

    def _open(self, container: _Container) -> None:
        """Open the log, and take out of the FIFO what a copier has written to it, but did not take out any more."""
        name, output = read_back(container.log.open())
        for stream in container.streams:
            if stream.name == name:
                self._skip(stream.fifo, output)
        container.log.note()

    def _skip(self, fifo: int, output: bytes) -> None:
        data = self._peek(fifo)
        # A peek can be shorter than the output where pipes are small; the FIFO as a whole cannot.
        if data and _count_readable(fifo) >= len(output) and (data.startswith(output) or output.startswith(data)):
            os.read(fifo, len(output))

    def _hold(self, container: _Container, error: Exception) -> None:
        """Leave the output where it is, and try again later."""
        container.log.close()
        container.try_at = time.monotonic() + _AGAIN_SECONDS
        for stream in container.streams:
            self._look_later(stream)
        self._tell_trouble(container, str(error))

    def _tell_trouble(self, container: _Container, why: str) -> None:
        if container.trouble != why:
            container.trouble = why
            self._tell("trouble", container.id, why=why)

    def _end_trouble(self, container: _Container) -> None:
        self._tell_trouble(container, "")

    def _look_later(self, stream: _Stream, seconds: float = _AGAIN_SECONDS) -> None:
        due = time.monotonic() + seconds
        self._later_at = min(self._later_at, due) if self._later else due
        self._later[stream.fifo] = stream

    def _close(self, stream: _Stream) -> None:
        if stream.is_watched:
            self._poll.unregister(stream.fifo)
        close(stream.fifo)
        for known in (self._streams, self._ready, self._later):
            known.pop(stream.fifo, None)
        stream.container.streams.remove(stream)

    def _forget(self, container: _Container) -> None:
        container.log.end()
        del self._containers[container.id]


def _receive_message(link: socket.socket) -> tuple[bytes, list[int]]:
    """Return a message and what came beside it. Raises BlockingIOError; socket.recv_fds() would ignore the flags."""
    flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    data, beside, _, _ = link.recvmsg(_MESSAGE, socket.CMSG_SPACE(_RIGHTS * 4), flags)
    descriptors = array.array("i")
    for _, _, rights in beside:
        descriptors.frombytes(rights)
    return data, list(descriptors)


class _Peek:
    """Reads a FIFO without taking anything out, as far as a pipe of our own has room for it."""

    def __init__(self) -> None:
        self._tee = ctypes.CDLL(None, use_errno=True).tee
        self._tee.restype = ctypes.c_ssize_t
        self._tee.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
        self._room = memoryview(bytearray(_CHUNK))  # there, also with no memory left
        self._pipe: tuple[int, ...] = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def __call__(self, fifo: int) -> bytes | None:
        """Return what is in it; None if there is nothing to read yet, b"" if there is no writer any more.

        Raises OSError.
        """
        if not self._pipe:
            self._pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        read_end, write_end = self._pipe
        size = self._tee(fifo, write_end, _CHUNK, _SPLICE_F_NONBLOCK)
        if size == 0:
            return b""
        if size < 0:
            number = ctypes.get_errno()
            if number == errno.EAGAIN:
                return None
            raise OSError(number, os.strerror(number))
        try:
            return bytes(self._room[: os.readv(read_end, [self._room])])
        except OSError:
            self.close()  # what stays in it would be read twice
            raise

    def close(self) -> None:
        """Close its pipe; it makes another when it is used again."""
        pipe, self._pipe = self._pipe, ()
        for descriptor in pipe:
            close(descriptor)


def _has_no_writer(fifo: int) -> bool:
    poll = select.poll()
    poll.register(fifo, select.POLLIN)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _count_readable(fifo: int) -> int:
    (count,) = struct.unpack("i", fcntl.ioctl(fifo, termios.FIONREAD, bytes(4)))
    return int(count)
