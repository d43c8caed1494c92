"""A list that says at which revision of the log of changes it was true."""

from collections.abc import Iterable
from typing import TypeVar

_Item = TypeVar("_Item")


class Listing(list[_Item]):
    """What was found, and the revision of the newest event at that instant: a watch from there on misses nothing."""

    def __init__(self, items: Iterable[_Item], revision: int) -> None:
        super().__init__(items)
        self.revision = revision
        """Give it to `watch` as `since`."""
