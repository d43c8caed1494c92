"""A container as the keeper knows it: its first process, what became of it, and what else belongs to it."""

import os
from collections.abc import Collection, Iterator
from typing import Any

from .journal import Record
from .kernel import read_children, read_stat, read_uts_namespace


class Container:
    """One container, from the fork of its gate until nothing is left of it and its end is acknowledged."""

    __slots__ = (
        "end",
        "executed",
        "gate",
        "id",
        "is_acknowledged",
        "is_durable",
        "is_reaped",
        "log",
        "owner",
        "pid",
        "pidfd",
        "report",
        "start_ticks",
        "uts",
        "waiting",
        "why",
    )

    def __init__(self, container_id: str, pid: int, start_ticks: int, pidfd: int, log: Record | None) -> None:
        self.id = container_id
        self.pid = pid
        self.start_ticks = start_ticks
        self.pidfd = pidfd
        """-1 once it has ended and was reaped."""
        self.log = log
        self.gate = -1
        """Our end of its gate while it is held, otherwise -1."""
        self.owner: Any = None
        """The connection that prepared it, while it is held: the gate closes with that."""
        self.waiting: Any = None
        """The connection that is to be told whether it has executed its program."""
        self.report = -1
        self.why = b""
        """What it reported: why its program was not executed."""
        self.executed: bool | None = None
        """None while it is not known."""
        self.uts = -1
        """Its UTS namespace, held open, if it has one of its own."""
        self.end: Record | None = None
        """How it ended: `code`, `signal` (True if that is a signal's number), `time`; or `unseen`."""
        self.is_durable = False
        """True once its end is flushed."""
        self.is_reaped = False
        self.is_acknowledged = False

    def describe(self) -> Record:
        """Return what an engine, or the next keeper, is told of it."""
        record: Record = {"id": self.id, "pid": self.pid, "start": self.start_ticks, "executed": self.executed}
        if self.log:
            record["log"] = self.log
        if self.why:
            record["why"] = self.why.decode(errors="replace")
        if self.end:
            record["end"] = self.end
        if self.is_acknowledged:
            record["acknowledged"] = True
        return record

    def find_members(self, orphans: Collection[int], *, has_session: bool) -> "list[int]":
        """Return the pids of all its processes that have not ended.

        `orphans` are those children of the keeper that are no container's first process: what daemonized is among
        them. It is this container's if it has its UTS namespace or its session; not `has_session` says that the
        number of that session may be another's by now.
        """
        roots = [] if self.is_reaped else [self.pid]
        namespace = os.fstat(self.uts) if self.uts >= 0 else None
        for pid in orphans:
            stat = read_stat(pid)
            if stat is None:
                continue
            if (has_session and stat.session == self.pid) or (
                namespace is not None and read_uts_namespace(pid) == (namespace.st_dev, namespace.st_ino)
            ):
                roots.append(pid)
        return [pid for pid in _walk(roots) if (stat := read_stat(pid)) is not None and not stat.is_zombie]


def _walk(roots: Collection[int]) -> Iterator[int]:
    """Yield these processes and all that descend from them."""
    seen: set[int] = set()
    pending = list(roots)
    while pending:
        pid = pending.pop()
        if pid not in seen:
            seen.add(pid)
            yield pid
            pending += read_children(pid)
