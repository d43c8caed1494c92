"""What happens in a drill, in order: one entry for each kill, each restart and each new statement of the engine."""

import time
from collections.abc import Callable
from enum import StrEnum, auto

import msgspec

from limpet.schema.status import Status


class Happened(StrEnum):
    """The kinds of entry."""

    SEEN = auto()
    """A call returned, or the engine was asked: `status` is what a reader sees of `container` now."""
    SAID = auto()
    """The same, as the first statement of an engine that has just recovered."""
    GONE = auto()
    """The record of `container` is deleted."""
    ENGINE_KILLED = auto()
    RECOVERY_KILLED = auto()
    """An engine is killed while it recovers."""
    KEEPERS_KILLED = auto()
    """`words` says which."""
    DISTURBED = auto()
    """The drill has changed something of `container`; `words` says what."""
    RECOVERED = auto()
    """An engine is open again, and no kill of this round is to come."""
    FAULT = auto()
    """A statement about `container` is false, or something of it was lost or harmed; `words` says what."""
    CLOSED = auto()
    """The last engine was closed."""


class Happening(msgspec.Struct, frozen=True):
    """One entry."""

    kind: Happened
    at: int
    """Nanoseconds since the epoch, by the clock that the engine's own times come from."""
    container: str = ""
    status: Status | None = None
    words: str = ""


class Diary:
    """Tells each entry to a listener, with its time; a statement only if it is new."""

    def __init__(self, listener: Callable[[Happening], object]) -> None:
        self._listener = listener
        self._last: dict[str, Status] = {}

    def note(self, kind: Happened, container: str = "", words: str = "") -> None:
        """Note what happens now."""
        self._listener(Happening(kind, time.time_ns(), container, None, words))

    def see(self, container: str, status: Status) -> None:
        """Note what a reader sees of a container, unless that is known."""
        if self._last.get(container) != status:
            self._last[container] = status
            self._listener(Happening(Happened.SEEN, time.time_ns(), container, status))

    def hear(self, container: str, status: Status) -> None:
        """Note what an engine says of a container after its recovery, also if that is known."""
        self._last[container] = status
        self._listener(Happening(Happened.SAID, time.time_ns(), container, status))

    def lose(self, container: str) -> None:
        """Note that a record is there no more, unless that is known."""
        if self._last.pop(container, None) is not None:
            self.note(Happened.GONE, container)
