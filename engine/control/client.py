"""Asks the engine that lives on a state directory. Who asks is another process, of the same user or root."""

import os
import select
import socket
import stat
import threading
from contextlib import ExitStack, suppress
from typing import Any

import msgspec

from limpet.engine.control.frames import (
    END,
    END_OF_INPUT,
    INPUT,
    STDERR,
    encode_frame,
    encode_size,
    read_frames,
)
from limpet.engine.control.messages import (
    BLOCK,
    LONGEST_ANSWER,
    SILENCE_SECONDS,
    SOCKET,
    decode_answer,
    encode_request,
    read_peer,
)
from limpet.engine.control.requests import AnyStream, Request
from limpet.engine.starters.abilities import Chunk
from limpet.engine.state.holders import has_open
from limpet.engine.state.names import CONTROL, LOCK
from limpet.recovery.host import has_own_proc
from limpet.schema.decoders import make_decoder
from limpet.schema.errors import (
    EngineGoneError,
    LimpetError,
    StateDirectoryError,
    UnsupportedError,
    WaitTimeoutError,
    quote_path,
)
from limpet.schema.metadata import DEFAULT_NODE

_has_terminal, _exit_code = make_decoder(bool), make_decoder(int | None)
_PATIENCE_SECONDS = 1.0
"""How long nothing may come until it is seen whether it is the engine that listens."""


class NoEngineError(LimpetError):
    """No live engine takes requests here."""


def ask_live(state_dir: str, request: Request, *, node: str = DEFAULT_NODE, silence: float = SILENCE_SECONDS) -> Any:
    """Ask the live engine, and return the result, of the type that the request's `RESULT` names.

    Raises what the engine raised; NoEngineError if there is none, or it takes no requests; EngineGoneError if it ends
    before it answers, or says nothing for `silence` seconds; StateDirectoryError if this user may not ask it.
    """
    line = encode_request(request, node)
    with _connect(state_dir, silence) as link:
        pid, _ = read_peer(link)
        try:
            link.sendall(line, socket.MSG_NOSIGNAL)
            _wait_for_engine(link, state_dir, silence)
            answer = _read_answer(link)
        except TimeoutError as error:
            raise EngineGoneError(
                f"{_name(pid)} has said nothing for {silence:.0f} s, and may hang; whether it did what was asked is not"
                " known: look with limpet ps",
                may_live=True,
            ) from error
        except (ConnectionError, EOFError) as error:
            raise EngineGoneError(
                f"{_name(pid)} ended before it answered; whether it did what was asked is not known: look with limpet"
                " ps"
            ) from error
    result = decode_answer(answer)
    try:
        return make_decoder(request.RESULT).decode(result)
    except msgspec.MsgspecError as error:
        raise UnsupportedError(f"{_name(pid)} answers in a way that this limpet does not know: {error}") from error


def open_live(state_dir: str, request: AnyStream, *, node: str = DEFAULT_NODE) -> "LiveSession":
    """Have the live engine open a session, and return it.

    Raises as `ask_live` does; NoEngineError, too, if the engine ended before it had read what it was asked.
    """
    line = encode_request(request, node)
    with ExitStack() as stack:
        link = stack.enter_context(_connect(state_dir, SILENCE_SECONDS))
        pid, _ = read_peer(link)
        received = bytearray()
        try:
            link.sendall(line, socket.MSG_NOSIGNAL)
            _wait_for_engine(link, state_dir, SILENCE_SECONDS)
            while b"\n" not in received:
                block = link.recv(BLOCK)
                if not block:
                    raise EOFError
                received += block
        except TimeoutError as error:
            raise EngineGoneError(f"{_name(pid)} says nothing, and may hang", may_live=True) from error
        except ConnectionError as error:  # with an end of file instead, all was read
            raise _no_engine(state_dir) from error
        except EOFError as error:
            raise EngineGoneError(
                f"{_name(pid)} has ended before it said that the session began; whether it did is not known"
            ) from error
        answer, _, begun = bytes(received).partition(b"\n")
        has_terminal = _has_terminal.decode(decode_answer(answer))
        link.settimeout(None)
        stack.pop_all()
        return LiveSession(link, pid, begun, has_terminal=has_terminal)


class LiveSession:
    """A session that a live engine has opened; see `limpet.engine.starters.abilities.Session`."""

    def __init__(self, link: socket.socket, pid: int, begun: bytes, *, has_terminal: bool) -> None:
        self.has_terminal = has_terminal
        self._link, self._pid = link, pid
        self._frames = read_frames(link, begun)
        self._sending = threading.RLock()  # a signal may come amid a write, and tells a size
        self._end: bytes | None = None

    def read(self, timeout: float | None = None) -> Chunk | None:
        """Return what was written next."""
        self._link.settimeout(timeout)
        try:
            frame = next(self._frames, None)
        except TimeoutError as error:
            raise WaitTimeoutError(f"nothing was written for {timeout:g} s") from error
        except OSError:
            frame = None
        if frame is None:
            if self._end is None:
                raise EngineGoneError(f"{_name(self._pid)} has ended, and the session with it")
            return None
        if frame.kind == END:
            self._end = frame.data
            return None
        return Chunk("stderr" if frame.kind == STDERR else "stdout", frame.data)

    def write(self, data: bytes) -> None:
        """Send input."""
        for begin in range(0, len(data), BLOCK):
            self._send(encode_frame(INPUT, data[begin : begin + BLOCK]))

    def end_input(self) -> None:
        """Tell that no more input comes."""
        self._send(encode_frame(END_OF_INPUT))

    def resize(self, rows: int, columns: int) -> None:
        """Tell the size of the terminal."""
        self._send(encode_size(rows, columns))

    def _send(self, frame: bytes) -> None:
        with self._sending, suppress(OSError):
            self._link.sendall(frame, socket.MSG_NOSIGNAL)

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the command's exit code, once all that it wrote was read."""
        while self._end is None:
            self.read(timeout)
        code: int | None = _exit_code.decode(decode_answer(self._end))
        return code

    def hang_up(self) -> None:
        """Leave: the engine kills the command."""
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Leave, and free all."""
        self._link.close()


def find_pid(state_dir: str) -> int | None:
    """Return the engine's pid as it is here, None if it has none in this pid namespace. Raises as `ask_live` does."""
    with _connect(state_dir, SILENCE_SECONDS) as link:
        return read_peer(link)[0] or None


def _name(pid: int) -> str:
    return f"engine {pid}" if pid else "the engine, of another pid namespace,"


def _connect(state_dir: str, silence: float) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        directory = os.open(os.path.join(state_dir, CONTROL), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            owner = os.fstat(directory)
            link.settimeout(silence)
            link.connect(f"/proc/self/fd/{directory}/{SOCKET}")  # a path may be longer than a socket's address
        finally:
            os.close(directory)
        _, uid = read_peer(link)
        if uid != owner.st_uid or stat.S_IMODE(owner.st_mode) & 0o022:
            raise StateDirectoryError(
                f"{quote_path(os.path.join(state_dir, CONTROL))}: it is of user {owner.st_uid}, and user {uid} answers"
                " there; nothing was asked"
            )
        return link
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError) as error:
        link.close()
        raise _no_engine(state_dir) from error
    except TimeoutError as error:
        link.close()
        raise EngineGoneError(
            f"the engine in {quote_path(state_dir)} does not answer; it may hang", may_live=True
        ) from error
    except OSError as error:
        link.close()
        raise StateDirectoryError(
            f"the engine in {quote_path(state_dir)} cannot be reached: {error.strerror or error}"
        ) from error
    except BaseException:
        link.close()
        raise


def _no_engine(state_dir: str) -> NoEngineError:
    return NoEngineError(f"no live engine takes requests in {quote_path(state_dir)}")


def _wait_for_engine(link: socket.socket, state_dir: str, silence: float) -> None:
    """Wait until something comes, which an engine sends at once. Raises TimeoutError, NoEngineError."""
    poll = select.poll()
    poll.register(link, select.POLLIN)
    patience = min(_PATIENCE_SECONDS, silence)
    if not poll.poll(patience * 1000):
        if not _may_be_engine(link, state_dir):
            raise _no_engine(state_dir)
        if not poll.poll((silence - patience) * 1000):
            raise TimeoutError


def _may_be_engine(link: socket.socket, state_dir: str) -> bool:
    """Say whether who listens may be the engine: it has locked the state directory. What is not to be seen may be."""
    pid, _ = read_peer(link)
    try:
        lock = os.lstat(os.path.join(state_dir, LOCK))
        return not pid or not has_own_proc() or has_open(pid, LOCK, lock, with_lock=True)
    except FileNotFoundError:  # it has ended, and a fork of it holds the socket
        return False
    except OSError:
        return True


def _read_answer(link: socket.socket) -> bytes:
    """Return the line that is not empty."""
    blocks: list[bytes] = []
    length = 0
    while True:
        block = link.recv(BLOCK)
        if not block:
            raise EOFError
        if not length:
            block = block.lstrip(b"\n")
        blocks.append(block)
        length += len(block)
        if block.endswith(b"\n"):
            return b"".join(blocks)
        if length > LONGEST_ANSWER:
            raise UnsupportedError(f"the engine's answer is longer than {LONGEST_ANSWER} bytes")
