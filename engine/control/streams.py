"""Serves one session over a connection: what the program writes goes out, what the command sends comes in.

Two threads: the one that was given the connection writes, and starts one that reads. When the command goes away the
session is closed, which kills what it ran; when nothing more is written the end is told.
"""

import socket
import struct
from contextlib import suppress

from limpet.engine.control.frames import (
    END,
    END_OF_INPUT,
    INPUT,
    SIZE,
    STDERR,
    STDOUT,
    decode_size,
    encode_frame,
    read_frames,
)
from limpet.engine.control.messages import SILENCE_SECONDS, encode_error, encode_result
from limpet.engine.control.requests import AnyStream, open_session
from limpet.engine.control.served import Served
from limpet.engine.starters.abilities import Session
from limpet.recovery.thread import Thread
from limpet.schema.errors import LimpetError
from limpet.schema.telling import get_log

_log = get_log("limpet.control")
_KINDS = {"stdout": STDOUT, "stderr": STDERR}


def serve_stream(engine: Served, link: socket.socket, request: AnyStream) -> None:
    """Open the session that is asked for, and serve it until one of both sides ends. Closes the connection."""
    with link:
        # One that does not read its output for long is given up; its input may be silent for ever.
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SILENCE_SECONDS), 0))
        try:
            session = open_session(engine, request)
        except LimpetError as error:
            with suppress(OSError):
                link.sendall(encode_error(error), socket.MSG_NOSIGNAL)
            return
        try:
            _serve(link, session)
        except OSError:
            return  # it is gone
        finally:
            session.close()


def _serve(link: socket.socket, session: Session) -> None:
    link.sendall(encode_result(session.has_terminal), socket.MSG_NOSIGNAL)
    reader = Thread(target=_take_input, args=(link, session), name="limpet-control-input")
    reader.start()
    while (chunk := session.read()) is not None:
        link.sendall(encode_frame(_KINDS[chunk.stream], chunk.data), socket.MSG_NOSIGNAL)
    try:
        end = encode_result(session.wait())
    except LimpetError as error:
        end = encode_error(error)
    link.sendall(encode_frame(END, end), socket.MSG_NOSIGNAL)
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)  # which ends the reader, too
    reader.join()


def _take_input(link: socket.socket, session: Session) -> None:
    try:
        for frame in read_frames(link):
            if frame.kind == INPUT:
                session.write(frame.data)
            elif frame.kind == END_OF_INPUT:
                session.end_input()
            elif frame.kind == SIZE:
                session.resize(*decode_size(frame.data))
    except (OSError, LimpetError) as error:
        _log.info("a session's input ends: %s", error)
    session.hang_up()
