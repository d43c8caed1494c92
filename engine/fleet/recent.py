"""What a node has written since something was sent last, kept in memory: it need not be read from the disk again."""

from dataclasses import replace

from limpet.engine.database import Changes
from limpet.engine.database.sqlite.extract import Extract
from limpet.schema.rows import EventRow, StatusRow

MOST = 1024
"""Of so many statuses or events at most; and for so many events at most, until the disk is looked at again."""


class Recent:
    """All that was written after a revision, if it was nothing but statuses, not too many, and each is noted here.

    Whoever wants to know what else there is, reads the disk.
    """

    __slots__ = ("_after", "_events", "_is_whole", "_newest", "_statuses")

    def __init__(self, after: int = 0, *, is_whole: bool = True) -> None:
        self._after = self._newest = after
        self._is_whole = is_whole
        self._statuses: dict[str, StatusRow] = {}
        self._events: list[EventRow] = []

    def follow(self) -> "Recent":
        """Return what is to take note of what comes next."""
        return Recent(self._newest)

    def add(self, changes: Changes) -> None:
        """Take note of a commit, in the order of commits. May be repeated at once."""
        events = [event for event in changes.events if event.revision > self._newest]
        has_gap = bool(events) and events[0].revision != self._newest + 1
        if events:
            self._newest = events[-1].revision
        if not self._is_whole or has_gap or not changes.is_of_statuses:
            self.spoil()
            return
        self._events += events
        self._statuses.update((key, row) for key, (row, _) in changes.statuses.items())
        if len(self._statuses) > MOST or len(self._events) > MOST:
            self.spoil()

    def spoil(self) -> None:
        """Be of no use: something that was written is not noted here."""
        self._is_whole = False
        self._statuses.clear()
        self._events.clear()

    def extract(self, cursor: int, before: Extract | None) -> Extract | None:
        """Return what reading all that follows `cursor` gives, if that is known; `before` was sent last.

        What was read before may have been ahead of what is noted here: sent after it, this would be too old.
        """
        if before is None or not self._is_whole or not self._after <= cursor <= before.newest <= self._newest:
            return None
        return replace(
            before,
            newest=self._newest,
            reached=self._newest,
            events=[event for event in self._events if event.revision > cursor],
            rows={"container_status": [*self._statuses.values()]},
            absent={},
            damaged=[],
        )
