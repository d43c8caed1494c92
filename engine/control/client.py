"""Asks the engine that lives on a state directory. Who asks is another process, of the same user or root."""

import os
import socket
import stat
from typing import Any

import msgspec

from limpet.engine.control.messages import (
    BLOCK,
    LONGEST_ANSWER,
    SILENCE_SECONDS,
    SOCKET,
    decode_answer,
    encode_request,
    read_peer,
)
from limpet.engine.control.requests import Request
from limpet.engine.state.names import CONTROL
from limpet.schema.errors import EngineGoneError, LimpetError, StateDirectoryError, UnsupportedError, quote_path
from limpet.schema.metadata import DEFAULT_NODE


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
            link.sendall(line)
            answer = _read_answer(link)
        except TimeoutError as error:
            raise EngineGoneError(
                f"engine {pid} has said nothing for {silence:.0f} s, and may hang; whether it did what was asked is not"
                " known: look with limpet ps",
                may_live=True,
            ) from error
        except (ConnectionError, EOFError) as error:
            raise EngineGoneError(
                f"engine {pid} ended before it answered; whether it did what was asked is not known: look with limpet"
                " ps"
            ) from error
    result = decode_answer(answer)
    try:
        return msgspec.json.decode(result, type=request.RESULT)
    except msgspec.MsgspecError as error:
        raise UnsupportedError(f"engine {pid} answers in a way that this limpet does not know: {error}") from error


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
        raise NoEngineError(f"no live engine takes requests in {quote_path(state_dir)}") from error
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
