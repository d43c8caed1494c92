"""The files and directories in the tree of a life, numbered and identified by their inodes."""

import os
from typing import Final

VOLATILE_SUFFIXES: Final = ("-shm",)
"""Names of files whose content is rebuilt after a crash, never relied on: SQLite's index of its WAL."""


class Nodes:
    """The numbers of all files and directories in the tree, by device and inode."""

    def __init__(self, acknowledgements: int) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self._volatile: set[int] = set()
        self._count = 0
        self.shared_mappings = False
        """Whether a process has mapped a file of the tree shared, not for writing."""
        status = os.fstat(acknowledgements)
        self._acknowledgements = (status.st_dev, status.st_ino)

    def allocate(self) -> int:
        """Return the number of the next node."""
        self._count += 1
        return self._count - 1

    def register(self, status: os.stat_result, number: int | None = None) -> int:
        """Register the node, under `number` if new, else found or numbered; return its number."""
        key = (status.st_dev, status.st_ino)
        if number is None:
            number = self._numbers[key] if key in self._numbers else self.allocate()
        self._numbers[key] = number  # a freed inode may be reused for another file
        return number

    def find(self, status: os.stat_result) -> int | None:
        """Return the node's number, None if it is not in the tree."""
        return self._numbers.get((status.st_dev, status.st_ino))

    def note_name(self, node: int, name: str) -> None:
        """Record by its first name whether the file is volatile."""
        if name.endswith(VOLATILE_SUFFIXES):
            self._volatile.add(node)

    def find_durable(self, status: os.stat_result) -> int | None:
        """Return the number of a file of the tree whose content matters, or None."""
        node = self.find(status)
        return None if node in self._volatile else node

    def takes_acknowledgements(self, status: os.stat_result) -> bool:
        """Return whether this is the pipe through which the life acknowledges."""
        return (status.st_dev, status.st_ino) == self._acknowledgements
