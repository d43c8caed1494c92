"""The lines of a log in CRI's format: `2016-10-06T00:17:09.669794202Z stdout F text`.

The tag is F for a line, and P for a part of one: the reader joins it with what follows of the same stream. Output that
ends without a newline is a part, too, as containerd writes it: so a reader can give back what was written, byte for
byte.
"""

import time

MAX_TEXT = 16 * 1024
"""Bytes of text in one line of the log, as containerd cuts them; the rest of a longer line comes in further parts."""
_FULL, _PART = b"F", b"P"


def format_lines(stream: bytes, data: bytes, time_ns: int, *, unfinished: bool = False) -> tuple[list[bytes], int]:
    """Return what to append to the log, in pieces, and how many bytes of `data` that is.

    What follows the last newline is left out, unless it is too long, or `unfinished` asks for it.
    """
    stamp = b"%b %b " % (_format_time(time_ns), stream)
    full, part = stamp + _FULL + b" ", stamp + _PART + b" "
    pieces: list[bytes] = []
    start = 0
    while start < len(data):
        end = _find_end_of_short_lines(data, start)
        if end > start:
            pieces += (full, data[start : end - 1].replace(b"\n", b"\n" + full), b"\n")
        start = end
        if len(data) - start > MAX_TEXT:
            pieces += (part, data[start : start + MAX_TEXT], b"\n")
            start += MAX_TEXT
        elif unfinished and start < len(data):
            pieces += (part, data[start:], b"\n")
            start = len(data)
        else:
            break
    return pieces, start


def read_back(written: bytes) -> tuple[bytes, bytes]:
    """Return the stream and the output that became these whole lines; nothing if they are no such lines."""
    streams, output = set(), []
    for line in written.split(b"\n")[:-1]:
        _, stream, tag, text = (*line.split(b" ", 3), b"", b"", b"")[:4]
        if tag not in {_FULL, _PART}:
            return b"", b""
        streams.add(stream)
        output.append(text + b"\n" if tag == _FULL else text)
    return (streams.pop(), b"".join(output)) if len(streams) == 1 else (b"", b"")


def _find_end_of_short_lines(data: bytes, start: int) -> int:
    """Return where the first line begins that is too long for one line of the log, or that has no newline."""
    while (newline := data.rfind(b"\n", start, start + MAX_TEXT + 1)) >= 0:
        start = newline + 1
    return start


def _format_time(time_ns: int) -> bytes:
    seconds, rest = divmod(time_ns, 10**9)
    return b"%b.%09dZ" % (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode(), rest)
