"""Ends: each is peeked at, written down, and made durable by the engine or by a flush; only then is it reaped."""

import os
import time
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress

from .container import Container
from .journal import Journal, Record
from .kernel import close, read_exit_of_stranger, read_stat
from .loop import Loop
from .members import Members

_ENGINE_TAKES_SECONDS = 0.2
"""How long an end waits for a connected engine before it is flushed."""
_FLUSH_AGAIN_SECONDS = 0.5
"""Between two flushes: a disk that is slow, or refuses, is not asked without end."""
_UNSEEN_SECONDS = 10.0
"""How long a process that is not our child may take to be reaped by its parent."""


class Ends:
    """The ends of a keeper's containers, from when a first process has ended until it is reaped."""

    def __init__(
        self,
        loop: Loop,
        journal: Journal,
        containers: Mapping[str, Container],
        firsts: MutableMapping[int, Container],
        members: Members,
    ) -> None:
        """`firsts` are the containers by their first processes; what is reaped is none's any more."""
        self._loop = loop
        self._journal = journal
        self._containers = containers
        self._firsts = firsts
        self._members = members
        self._flush_at: dict[str, float] = {}  # of what is not reaped, in seconds of the monotonic clock
        self._unreadable: dict[str, float] = {}  # their codes are not to be had yet: until when to ask
        self._just_ended: list[Container] = []  # of these it is not known yet whether anything is left
        self._flushing: tuple[int, list[Container]] | None = None
        self._flush_again_at = 0.0

    @property
    def flusher(self) -> int:
        """The process that flushes the journal just now, 0 if there is none."""
        return self._flushing[0] if self._flushing else 0

    @property
    def are_pending(self) -> bool:
        """Say whether an end is to be read, or to be made durable, yet."""
        return bool(self._flush_at or self._unreadable)

    @property
    def unreadable(self) -> "list[Container]":
        """Those that have ended, and whose codes were not to be had."""
        return [self._containers[key] for key in self._unreadable]

    def seconds_to_flush(self) -> float | None:
        """Return in how many seconds there is something to flush, None if nothing is, or it cannot be done now."""
        now = time.monotonic()
        if not self._flush_at or self._flushing is not None or not self._journal.is_written:
            return None
        return max(0.0, min(self._flush_at.values()) - now) if now >= self._flush_again_at else None

    def note(self, container: Container, *, engine_is_there: bool) -> bool:
        """Peek at how it ended, without reaping it, and write that down; False if that cannot be had yet."""
        end = self._peek(container)
        self._loop.unwatch(container.pidfd)
        if end is None:
            self._unreadable.setdefault(container.id, time.monotonic() + _UNSEEN_SECONDS)
            return False
        self._unreadable.pop(container.id, None)
        container.end = end | {"time": time.time_ns()}
        self._journal.append({"id": container.id, "end": container.end})
        self._flush_at[container.id] = time.monotonic() + (_ENGINE_TAKES_SECONDS if engine_is_there else 0)
        self._just_ended.append(container)
        return True

    def note_known(self, container: Container) -> None:
        """Take over one whose end another keeper has written down; whether it was flushed is not known."""
        self._flush_at[container.id] = time.monotonic()

    def look_for_left(self) -> None:
        """Find out of which of those that have just ended nothing is left, mostly of all: it is known from here on.

        Raises OSError if that cannot be looked at now.
        """
        ended, self._just_ended = self._just_ended, []
        if ended:
            self._members.look_anew()  # what they have left is ours by now
            self._members.find([each for each in ended if self._containers.get(each.id) is each])

    def flush(self) -> None:
        """Make ends durable that no engine has taken in time, and reap what they are of. Raises OSError."""
        if self._flushing is not None:
            self._finish_flush()
        now = time.monotonic()
        is_due = any(when <= now for when in self._flush_at.values())
        if not is_due or self._flushing is not None or not self._journal.is_written or now < self._flush_again_at:
            return
        self._flush_again_at = now + _FLUSH_AGAIN_SECONDS
        pid = self._journal.begin_flush()
        self._flushing = pid, [self._containers[key] for key in self._flush_at]

    def acknowledge(self, keys: Iterable[str]) -> "Sequence[Container]":
        """Reap containers whose ends their engine has written down; return those of which nothing is left.

        What is left of the others has to be told as theirs still.
        """
        containers = [each for key in keys if (each := self._containers.get(key)) is not None and each.end is not None]
        with suppress(OSError):
            self.look_for_left()  # before their sessions' numbers may be others'
        for container in containers:
            self.reap(container)
            container.is_acknowledged = True
        members = self._members.find(containers)
        told = {each.id: "acknowledged" if members[each.id] else "forgotten" for each in containers}
        self._journal.append(*({"id": key, what: True} for key, what in told.items()))
        return [each for each in containers if told[each.id] == "forgotten"]

    def rewrite_journal(self) -> None:
        """Write down anew what is known, if it may be worth it and no end has to survive a power cut there."""
        if self._flushing is not None or not self._journal.has_grown():
            return
        if not any(each.is_durable and not each.is_acknowledged for each in self._containers.values()):
            with suppress(OSError):
                self._journal.rewrite(each.describe() for each in self._containers.values())

    def reap(self, container: Container) -> None:
        """Reap its first process, which has ended, and whose end is written down."""
        self._flush_at.pop(container.id, None)
        if not container.is_reaped:
            with suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, container.pidfd, os.WEXITED | os.WNOHANG)
            close(container.pidfd)
            container.pidfd = -1
            container.is_reaped = True
            self._firsts.pop(container.pid, None)

    def drop(self, container: Container) -> None:
        """Do nothing more about it."""
        self._flush_at.pop(container.id, None)
        self._unreadable.pop(container.id, None)

    def _peek(self, container: Container) -> Record | None:
        """Return code and signal of one that has ended; None if they cannot be had yet."""
        try:
            found = os.waitid(os.P_PIDFD, container.pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:  # known from the journal alone: all keepers before us are dead
            return self._peek_at_stranger(container)
        if found is not None:
            return {"code": found.si_status, "signal": found.si_code != os.CLD_EXITED}
        # A tracer keeps it from its parent (ptrace(2)); its zombie tells all the same.
        stat = read_stat(container.pid)
        return _read_wait_status(stat.wait_status) if stat is not None and stat.is_zombie and stat.wait_status else None

    def _peek_at_stranger(self, container: Container) -> Record | None:
        if not container.is_proven:  # an end, but whose? The container's came no later
            return {"unseen": True}
        status = read_exit_of_stranger(container.pid, container.pidfd)
        if status is not None:
            return _read_wait_status(status)
        is_over = time.monotonic() > self._unreadable.get(container.id, time.monotonic() + 1)
        return {"unseen": True} if is_over else None

    def _finish_flush(self) -> None:
        assert self._flushing is not None
        pid, containers = self._flushing
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            return  # a slow disk; zombies wait
        self._flushing = None
        if status:
            return  # tried again later
        self._flush_again_at = 0.0
        for container in containers:
            container.is_durable = True
            self.reap(container)


def _read_wait_status(status: int) -> Record:
    return {"code": status & 0x7F or status >> 8, "signal": bool(status & 0x7F)}
