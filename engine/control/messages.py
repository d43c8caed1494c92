"""What a command and a live engine say to each other: JSON, one line each way for each connection.

The command sends one line, its request. The engine answers with one line; while it is at work it sends an empty line
each second, so that the command can tell slow from dead. Neither believes that the other is well meaning: a line has a
longest length, and each step has a deadline.

line                                        from
{"version":1,"node":"local",
 "request":{"type":"stop",...}}             the command, all in one line
(empty)                                     the engine, while it works or waits
{"version":1,"result":{...}}                the engine
{"version":1,"error":"NotFoundError",
 "message":"..."}                           the engine, all in one line
"""

import socket
import struct
from typing import Any

import msgspec

from limpet.schema import errors
from limpet.schema.any_text import encode_any
from limpet.schema.decoders import Decoder, make_decoder
from limpet.schema.errors import InvalidInputError, LimpetError, UnsupportedError, quote

VERSION = 1
LONGEST_REQUEST = 1 << 20
"""Bytes of a request: twice what the kernel takes as a command line of one program, with room for a config."""
LONGEST_ANSWER = 1 << 26
BLOCK = 1 << 16
DIRECTORY_MODE, SOCKET_MODE = 0o700, 0o600
SOCKET = "engine.sock"
BEAT_SECONDS = 1.0
"""Between two empty lines."""
SILENCE_SECONDS = 15.0
"""Without a line for so long, the other one is given up."""


class _Asked(msgspec.Struct, frozen=True):
    version: int
    node: str
    request: msgspec.Raw


class _Answered(msgspec.Struct, frozen=True, omit_defaults=True):
    version: int
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    message: str = ""


_asked, _answered = make_decoder(_Asked), make_decoder(_Answered)


def read_peer(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of the process at the other end (SO_PEERCRED, unix(7)). Raises OSError."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def encode_request(request: msgspec.Struct, node: str) -> bytes:
    """Return a request as a line. Raises InvalidInputError for one that is too long, or that no JSON can hold."""
    try:
        line = msgspec.json.encode({"version": VERSION, "node": node, "request": request}) + b"\n"
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{quote(error.object)} is not UTF-8; write it in UTF-8") from error
    if len(line) > LONGEST_REQUEST:
        raise InvalidInputError(
            f"what is asked for has {len(line)} bytes, a live engine takes {LONGEST_REQUEST}; use a shorter command"
        )
    return line


def decode_request(line: bytes, request: Decoder[Any], node: str) -> Any:
    """Return the request in a line, as `request` decodes it, that is for the engine of `node`.

    Raises UnsupportedError, InvalidInputError.
    """
    try:
        asked = _asked.decode(line)
        if asked.version != VERSION:
            raise UnsupportedError(
                f"the command speaks version {asked.version} of the control protocol, this engine {VERSION};"
                " use the limpet that the engine has"
            )
        if asked.node != node:
            raise InvalidInputError(f"the live engine has node {quote(node)}, not {quote(asked.node)}; give --node")
        return request.decode(asked.request)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInputError(f"this engine cannot read the request: {error}") from error


def encode_result(result: object) -> bytes:
    """Return the line of an answer."""
    return encode_any({"version": VERSION, "result": result}) + b"\n"


def encode_error(error: LimpetError) -> bytes:
    """Return the line that tells an error."""
    return encode_any({"version": VERSION, "error": type(error).__name__, "message": str(error)}) + b"\n"


def decode_answer(line: bytes) -> bytes:
    """Return the result in an answer, or raise the error that it tells. Raises UnsupportedError for no answer."""
    try:
        answer = _answered.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UnsupportedError(f"the live engine's answer cannot be read ({error}): {quote(line[:80])}") from error
    if answer.error:
        raise _find_error(answer.error)(answer.message)
    return bytes(answer.result)


def _find_error(name: str) -> type[LimpetError]:
    """Return the error of this name; a newer engine may have others."""
    found = getattr(errors, name, LimpetError)
    return found if isinstance(found, type) and issubclass(found, LimpetError) else LimpetError
