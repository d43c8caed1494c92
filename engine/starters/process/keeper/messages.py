"""What engine and keeper say to each other: JSON in SOCK_SEQPACKET messages, descriptors beside it.

An engine begins with `hello`. A keeper outlives its engine, so an engine meets keepers of older versions: a keeper
ignores fields that it does not know, and answers a request that it does not know with an error.

request                            answer
hello version                      version pid anchor pid_namespace view: see `read_view`; with another one an engine
                                   gives what `open_view` returns, and says so by `view`
prepare id log owner report view   pid + [pidfd]: a process that is held at its gate, while the connection lives; with
  + [plan, log, view]              `report` also the end of the pipe that its exec closes: to be waited for, not read
go id                              executed, or why not
list after                         containers (see `Container.describe`), more: ask again after the last
end id                             running, or how it ended: code signal time executed why, empty: nothing is left of
                                   it, copying: its output is on the way to its log; or unknown, with copying
signal id number session pid       left: how many of its processes there are; `session`: in its first one's session;
  start                            unknown, if its first process is another than the one that is named
members id                         members: the pids of its processes, without the one that asks; all: False if they
                                   are more than a message holds
release id                         left: the same, after SIGKILL to all; with none left it is forgotten; and copying
reopen id                          nothing more: its log is opened anew
ack ids                            no answer: these ends are written down elsewhere

`end`, `signal` and `release` may be asked of many containers: `many` has what is different, that is `id` and, for a
signal, `pid` and `start`. The answer is `answers`: in that order, each as of one, or `error`. It may end early: the
rest is to be asked for again. A keeper of version 1 refuses `many`.
"""

import array
import json
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .kernel import close_all

VERSION = 3
"""2: `many`; 3: a gate says by the offset of its plan that it executes the program."""
LONGEST = 1 << 16
"""Bytes of a message."""
MOST_DESCRIPTORS = 8

Message = dict[str, Any]


@contextmanager
def lent(descriptor: int) -> Iterator[socket.socket]:
    """Use a descriptor as a socket while the block runs; it is not closed."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, descriptor)
    try:
        yield link
    finally:
        link.detach()


def read_peer(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of the process at the other end (SO_PEERCRED, unix(7)). Raises OSError."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def send(connection: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send a message. Raises OSError, BlockingIOError if a reader is too slow."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    connection.sendmsg([encode(message)], rights, socket.MSG_NOSIGNAL)


def encode(message: Any) -> bytes:
    """Return a message, or a part of one, as it is sent."""
    return json.dumps(message, separators=(",", ":")).encode()


def receive(connection: socket.socket, most: int = LONGEST) -> tuple[Message | None, list[int]]:
    """Return the next message, of `most` bytes, and its descriptors, which are the caller's to close; None at the end.

    Raises OSError, ValueError if it is no message. A peer that was killed with an answer unread gives ECONNRESET, which
    is an end like any other.
    """
    try:
        # Not socket.recv_fds, which ignores its flags in Python 3.11.
        space = socket.CMSG_LEN(MOST_DESCRIPTORS * array.array("i").itemsize)
        data, ancillary, _, _ = connection.recvmsg(most, space, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return None, []
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    try:
        message = json.loads(data) if data else None
        if message is not None and not isinstance(message, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        close_all(descriptors)
        raise ValueError(f"this is no message: {error}") from error
    return message, list(descriptors)


def divide(request: Message) -> list[Message]:
    """Return the requests about single containers that a request stands for."""
    return [request | each for each in request["many"]] if "many" in request else [request]
