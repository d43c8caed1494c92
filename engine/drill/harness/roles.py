"""Who is at a system call: the role of its process, by its name (proc_pid_comm(5)), for names that stay the same.

LIFE is the process that runs the workload. A process with the name of the one that forked it, other than that, has that
one's role and CHILD: it has no name of its own yet.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

LIFE: Final = "life"
CHILD: Final = ".child"
_LONGEST: Final = 64


class Roles:
    """The roles in one life. Close it."""

    def __init__(self, life: int, names: Mapping[str, str] | None) -> None:
        """`life` is the process that runs the workload.

        `names` gives the roles by the names of processes, and no others have one; None: each name is a role.
        """
        self._names = names
        self._processes: dict[int, int] = {}  # by thread
        self._parents: dict[int, int] = {}  # by process: who forked it
        self._comms: dict[int, int] = {}  # by process, a descriptor: that of a dead one tells nothing of a later one
        self._life = life

    def of(self, thread: int) -> str | None:
        """Return the role of a stopped thread's process; None if it has none. Raises OSError if it is gone."""
        process = self.process(thread)
        if process == self._life:
            return LIFE
        name = self._read_name(process)
        role = name if self._names is None else self._names.get(name)
        if role is None:
            return None
        parent = self._parents[process]
        with suppress(OSError):
            if parent != self._life and self._read_name(parent) == name:
                return role + CHILD
        return role

    def process(self, thread: int) -> int:
        """Return the process of a stopped thread. Raises OSError."""
        if thread not in self._processes:
            with open(f"/proc/{thread}/status", encoding="utf-8", errors="replace") as file:
                fields = dict(line.split(":", 1) for line in file)
            process = self._processes[thread] = int(fields["Tgid"])
            self._parents.setdefault(process, int(fields["PPid"]))
        return self._processes[thread]

    def close(self) -> None:
        """Close what it has open."""
        for descriptor in self._comms.values():
            os.close(descriptor)
        self._comms.clear()

    def _read_name(self, process: int) -> str:
        """Return a process's name, "" once it has ended. Raises OSError if it has ended before it was first asked."""
        if process not in self._comms:
            self._comms[process] = os.open(f"/proc/{process}/comm", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.fsdecode(os.pread(self._comms[process], _LONGEST, 0).rstrip(b"\n"))
        except ProcessLookupError:
            return ""
