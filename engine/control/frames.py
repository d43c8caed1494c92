"""What goes over a connection once a session is open: frames, both ways.

A frame is a byte that says what it is, the length of the rest as four bytes (big endian), and the rest:
The first line that the engine answers, before any frame, is an error, or whether the program has a terminal.

kind          from         content
INPUT         the command  bytes for the program's input
END_OF_INPUT  the command  nothing
SIZE          the command  rows and columns of the terminal, two bytes each
STDOUT        the engine   bytes that the program has written; STDERR likewise
END           the engine   the answer's last line, as `messages` has it: {"result": code or null}, or an error
"""

import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from limpet.schema.errors import UnsupportedError

INPUT, END_OF_INPUT, SIZE, STDOUT, STDERR, END = range(6)
LONGEST = 1 << 20
_HEAD = struct.Struct(">BI")
_SIZE = struct.Struct(">HH")


class Frame(NamedTuple):
    """One frame."""

    kind: int
    data: bytes


def encode_frame(kind: int, data: bytes = b"") -> bytes:
    """Return a frame as bytes."""
    return _HEAD.pack(kind, len(data)) + data


def encode_size(rows: int, columns: int) -> bytes:
    """Return the frame that tells a terminal's size."""
    most = 0xFFFF
    return encode_frame(SIZE, _SIZE.pack(min(max(rows, 0), most), min(max(columns, 0), most)))


def decode_size(data: bytes) -> tuple[int, int]:
    """Return rows and columns. Raises UnsupportedError."""
    if len(data) != _SIZE.size:
        raise UnsupportedError(f"a terminal's size has {_SIZE.size} bytes, not {len(data)}")
    rows, columns = _SIZE.unpack(data)
    return rows, columns


def read_frames(link: socket.socket, begun: bytes = b"") -> Iterator[Frame]:
    """Yield the frames that come, until the other side is gone; `begun` was read already.

    Raises OSError, and UnsupportedError for a frame that is too long.
    """
    received = bytearray(begun)
    while True:
        while len(received) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(received)
            if length > LONGEST:
                raise UnsupportedError(f"a frame has {length} bytes, the most is {LONGEST}")
            end = _HEAD.size + length
            if len(received) < end:
                break
            yield Frame(kind, bytes(received[_HEAD.size : end]))
            del received[:end]
        block = link.recv(1 << 16)
        if not block:
            return
        received += block
