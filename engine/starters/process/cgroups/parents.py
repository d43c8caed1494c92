"""Below which cgroups those of containers are: noted, for the process that they were made beside may be gone.

That is the keeper, and the next one may be in other cgroups.
"""

import os
from collections.abc import Collection
from contextlib import suppress
from functools import lru_cache
from typing import Final

from limpet.engine.starters.process.cgroups.hierarchies import read_cgroups
from limpet.engine.state.durable import open_made
from limpet.recovery.mounts import open_lines

_FILE: Final = "cgroups"
_LONGEST: Final = 1 << 16
"""Bytes of the file that are read."""


class Notes:
    """The cgroups that were noted in a directory, one a line. Nothing is flushed: no cgroup outlasts the boot."""

    def __init__(self, directory: str) -> None:
        """`directory` need not be there yet."""
        self._path = os.path.join(directory, _FILE)
        self._noted: dict[str, None] = {}
        with suppress(OSError), open_lines(self._path) as file:
            self._noted = dict.fromkeys(line for line in file.read(_LONGEST).split("\n") if line.startswith("/"))

    @property
    def noted(self) -> Collection[str]:
        """The cgroups below which some were made, in this boot or an earlier one."""
        return tuple(self._noted)

    def note(self, parent: str) -> None:
        """Note a cgroup, before another is made below it."""
        if parent not in self._noted:
            self._noted[parent] = None
            # Without the note its cgroup is found by its keeper, while that lives: no reason to go without limits.
            with suppress(OSError):
                file = open_made(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
                try:
                    os.write(file, f"{parent}\n".encode(errors="surrogateescape"))
                finally:
                    os.close(file)


def find_parents(beside: int, noted: Collection[str]) -> tuple[str, ...]:
    """Return the cgroups below which those of containers are: those noted, and those of the process `beside`.

    0 is this process, which also stands for one that is gone. Raises OSError if none can be found.
    """
    found = dict.fromkeys(noted)
    try:
        found |= dict.fromkeys(_find_parents(beside))
    except OSError:
        if not found:
            found |= dict.fromkeys(_find_parents(0))
    return tuple(found)


def _find_parents(beside: int) -> tuple[str, ...]:
    """Return those of a process. Of a keeper they are remembered: they do not change while it lives."""
    return _remember_parents(beside) if beside else read_cgroups(0).find_parents()


@lru_cache(maxsize=1)
def _remember_parents(keeper: int) -> tuple[str, ...]:
    return read_cgroups(keeper).find_parents()
