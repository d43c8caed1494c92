"""A container as the keeper knows it: its first process, what became of it, and what else belongs to it."""

import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from .journal import Record
from .kernel import UNKNOWN_TICKS, Stat, read_children, read_stat, read_uts_namespace


class Orphans:
    """Processes that may be left of containers, each looked at once, however many containers are looked for.

    That is the children of the keeper that are no container's first process; or all there are, for a container whose
    orphans may be anybody's children.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self.pids = frozenset(pids)
        self._by_session: dict[int, dict[int, Stat]] | None = None
        self._by_namespace: dict[tuple[int, int] | None, list[int]] | None = None

    def of_session(self, session: int) -> "dict[int, Stat]":
        """Return those that have this session."""
        if self._by_session is None:
            found: dict[int, dict[int, Stat]] = {}
            for pid in self.pids:
                if (stat := read_stat(pid)) is not None:
                    found.setdefault(stat.session, {})[pid] = stat
            self._by_session = found  # not before: one that cannot be looked at now is no answer
        return self._by_session.get(session, {})

    def of_namespace(self, device: int, inode: int) -> "list[int]":
        """Return those that have this UTS namespace."""
        if self._by_namespace is None:
            found: dict[tuple[int, int] | None, list[int]] = {}
            for pid in self.pids:
                found.setdefault(read_uts_namespace(pid), []).append(pid)
            self._by_namespace = found
        return self._by_namespace.get((device, inode), [])


class Container:
    """One container, from the fork of its gate until nothing is left of it and its end is acknowledged."""

    __slots__ = (
        "end",
        "executed",
        "gate",
        "id",
        "inode",
        "is_acknowledged",
        "is_durable",
        "is_empty",
        "is_proven",
        "is_ready",
        "is_reaped",
        "is_report_given",
        "is_stranger",
        "is_wanted",
        "log",
        "owner",
        "pid",
        "pidfd",
        "report",
        "start_ticks",
        "strays",
        "uts",
        "uts_inode",
        "waiting",
        "why",
    )

    def __init__(self, container_id: str, pid: int, start_ticks: int, pidfd: int, log: Record | None) -> None:
        self.id = container_id
        self.pid = pid
        self.start_ticks = start_ticks
        self.pidfd = pidfd
        """-1 once it has ended and was reaped."""
        self.inode = 0
        """The pidfd's: tells it from all other processes of this boot; 0 before Linux 6.9."""
        self.log = log
        self.gate = -1
        """Our end of its gate while it is held, otherwise -1."""
        self.owner: Any = None
        """The connection that prepared it, while it is held: the gate closes with that."""
        self.is_ready = False
        """True once its gate has done all that it can do before it is opened, or has ended."""
        self.is_wanted = False
        """True once the gate is to be opened."""
        self.waiting: Any = None
        """The connection that is to be told whether it has executed its program."""
        self.report = -1
        """The end of a pipe that its exec closes; -1 once that is read."""
        self.is_report_given = False
        """True if its engine has it, too, and sees by itself that the program was executed."""
        self.why = b""
        """What it reported: why its program was not executed."""
        self.executed: bool | None = None
        """None while it is not known."""
        self.uts = -1
        """Its UTS namespace, held open, if it has one of its own."""
        self.uts_inode = 0
        """That namespace's number, if it is known to have one of its own: another's once all of it has ended."""
        self.strays: dict[int, int] = {}
        """Processes that descended from it when it was signalled, and are told by nothing else: start times by pid."""
        self.end: Record | None = None
        """How it ended: `code`, `signal` (True if that is a signal's number), `time`; or `unseen`."""
        self.is_empty = False
        """True if its first process has ended and nothing was left: nothing can come then, either."""
        self.is_durable = False
        """True once its end is flushed."""
        self.is_reaped = False
        self.is_stranger = False
        """True if it is no child of ours: all keepers before us are dead, and what it left is anybody's child."""
        self.is_proven = True
        """False if only pid and start time say which process it is: it is not signalled, and its code not told."""
        self.is_acknowledged = False

    def describe(self) -> Record:
        """Return what an engine, or the next keeper, is told of it."""
        record: Record = {"id": self.id, "pid": self.pid, "start": self.start_ticks, "executed": self.executed}
        if self.inode:
            record["inode"] = self.inode
        if self.uts_inode:
            record["uts"] = self.uts_inode
        if self.log:
            record["log"] = self.log
        if self.why:
            record["why"] = self.why.decode(errors="replace")
        if self.end:
            record["end"] = self.end
        if self.is_acknowledged:
            record["acknowledged"] = True
        if self.is_stranger:
            record["stranger"] = True
        return record

    def find_members(self, orphans: Orphans, *, has_session: bool) -> "list[int]":
        """Return the pids of all its processes that have not ended: see `find_left`."""
        roots = [self.pid] if self.is_proven and self.end is None else []  # one that has ended has no children any more
        roots += self.find_left(orphans, has_session=has_session)
        return [pid for pid in _walk(roots) if (stat := read_stat(pid)) is not None and not stat.is_zombie]

    def find_session(self, members: Collection[int]) -> "list[int]":
        """Return those of its processes that have not left its first process's session."""
        return [pid for pid in members if (stat := read_stat(pid)) is not None and stat.session == self.pid]

    def find_left(self, orphans: Orphans, *, has_session: bool) -> "list[int]":
        """Return those of the orphans that are this container's: by its UTS namespace or session, or as strays.

        Not `has_session` says that the number of that session may be another's by now.
        """
        of_session = orphans.of_session(self.pid) if has_session else {}
        left = set(self._find_strays(orphans.pids))
        namespace = self._read_namespace()
        if namespace is None:
            left |= {pid for pid, stat in of_session.items() if not self.is_stranger or self._is_of_lost(pid, stat)}
        else:
            left |= {*orphans.of_namespace(*namespace), *(() if self.is_stranger else of_session)}
        return list(left)

    def remember(self, members: Iterable[int]) -> None:
        """Take note of those of its processes that nothing would tell once their parents have ended."""
        strays = {pid: self.strays[pid] for pid in self._find_strays(self.strays)}
        for pid in set(members) - {self.pid, *strays}:
            stat = read_stat(pid)
            is_known = stat is not None and stat.start_ticks != UNKNOWN_TICKS
            if stat is not None and is_known and stat.session != self.pid and not self._is_in_namespace(pid):
                strays[pid] = stat.start_ticks
        self.strays = strays

    def _find_strays(self, pids: Collection[int]) -> "list[int]":
        known = [(pid, start_ticks) for pid, start_ticks in self.strays.items() if pid in pids]
        return [pid for pid, start in known if (stat := read_stat(pid)) is not None and stat.start_ticks == start]

    def _is_in_namespace(self, pid: int) -> bool:
        namespace = self._read_namespace()
        return namespace is not None and read_uts_namespace(pid) == namespace

    def _read_namespace(self) -> tuple[int, int] | None:
        """Return device and inode of its own UTS namespace, None if it has none."""
        if self.uts < 0:
            return None
        found = os.fstat(self.uts)
        return found.st_dev, found.st_ino

    def _is_of_lost(self, pid: int, stat: Stat) -> bool:
        """Say whether a process is of the session of a first process whose end nobody saw.

        No number proves that by itself. While a session has a process its number is not given away, but it may have
        been before. So no process has that number now, and the namespace has the container's number, too.
        """
        namespace = read_uts_namespace(pid)
        is_of_namespace = namespace is not None and namespace[1] == self.uts_inode
        return is_of_namespace and stat.start_ticks >= self.start_ticks and read_stat(self.pid) is None


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
