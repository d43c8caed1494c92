"""What the lines of a log say: `2016-10-06T00:17:09.669794202Z stdout F text`, and P for a part of a longer line."""

import re
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

_LINE = re.compile(
    rb"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?(Z|[+-][0-9]{2}:[0-9]{2})"
    rb" (stdout|stderr) ([FP])(?::\S*)? (.*)",
    re.DOTALL,
)
_LONGEST = 1 << 20
"""Bytes of one line that are kept together; the rest of a longer one comes as further entries."""


class Entry(NamedTuple):
    """A line of output, or a part of one that is too long or not finished."""

    text: bytes
    """With its newline, if the container wrote one."""
    stream: str = ""
    """"stdout" or "stderr"; "" in a log that does not say, which is shown as it is."""
    time_ns: int = 0
    """When it was written, in nanoseconds since 1970; 0 in a log that does not say."""
    goes_on: bool = False
    """Whether it goes on the line of the stream's last entry."""


def parse(line: bytes) -> tuple[Entry, bool]:
    """Return what a line of the file says, and whether that is a whole line."""
    found = _LINE.fullmatch(line.removesuffix(b"\n"))
    if found is None:
        return Entry(line), True
    when, fraction, zone, stream, tag, text = found.groups()
    is_whole = tag == b"F"
    seconds = _parse_seconds(when + zone)
    time_ns = seconds * 10**9 + int((fraction or b"").ljust(9, b"0")) if seconds else 0
    return Entry(text + b"\n" if is_whole else text, stream.decode(), time_ns), is_whole


class _Parts:
    """The parts of a line that is not whole yet. There may be very many: a program may write a byte at a time."""

    def __init__(self, first: Entry) -> None:
        self._first = first
        self._texts = [first.text]
        self.length = len(first.text)

    def add(self, text: bytes) -> None:
        self._texts.append(text)
        self.length += len(text)

    def join(self) -> Entry:
        return self._first._replace(text=b"".join(self._texts))


class Joiner:
    """Puts the parts of each stream's lines together again."""

    def __init__(self) -> None:
        self._parts: dict[str, _Parts] = {}
        self._begun: set[str] = set()

    def add(self, entry: Entry, *, is_whole: bool) -> Iterator[Entry]:
        """Yield the line that is whole with this, if one is."""
        parts = self._parts.get(entry.stream)
        if parts is None:
            if is_whole:
                yield self._mark(entry, is_whole=True)
                return
            parts = self._parts[entry.stream] = _Parts(entry)
        else:
            parts.add(entry.text)
        if is_whole or parts.length >= _LONGEST:
            del self._parts[entry.stream]
            yield self._mark(parts.join(), is_whole=is_whole)

    def flush(self) -> Iterator[Entry]:
        """Yield the lines that are not whole as far as they are there."""
        for parts in self._parts.values():
            yield self._mark(parts.join(), is_whole=False)
        self._parts.clear()

    def _mark(self, entry: Entry, *, is_whole: bool) -> Entry:
        marked = entry._replace(goes_on=entry.stream in self._begun)
        (self._begun.discard if is_whole else self._begun.add)(entry.stream)
        return marked


@lru_cache(maxsize=64)
def _parse_seconds(text: bytes) -> int:
    try:
        return int(datetime.fromisoformat(text.decode()).timestamp())
    except ValueError:  # a month of 13
        return 0
