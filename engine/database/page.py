"""A piece of the log of changes, as it was at one instant."""

from typing import NamedTuple

from limpet.schema.rows import EventRow


class EventPage(NamedTuple):
    """Events that follow a revision, and how far the log goes."""

    epoch: int
    """The epoch of the opening that was the newest."""
    pruned: int
    """Of the events up to this revision, some are gone; all after it are there."""
    newest: int
    """The revision of the newest event, 0 if there was none yet."""
    rows: list[EventRow]
    """In order."""
