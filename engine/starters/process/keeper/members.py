"""What belongs to containers beside their first processes: found among our children and below them, and signalled."""

import os
import signal
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from .container import Container, Orphans
from .kernel import close, kill, list_processes, read_children

_ROUNDS_OF_SIGKILL = 5
_MORE_LOOKS = 9


class _Children(NamedTuple):
    """Our children whose pids nobody has told us."""

    orphans: Orphans
    helpers: Collection[int]


class Members:
    """The processes of a keeper's containers. Each look sees what is there then, and is shared until `look_anew`."""

    def __init__(self, firsts: Mapping[int, Container], list_ours: Callable[[], set[int]]) -> None:
        """`firsts` are the containers by their first processes; `list_ours` tells which children are none's."""
        self._firsts = firsts
        self._list_ours = list_ours
        self._children_now: _Children | None = None

    def look_anew(self) -> None:
        """Have the next look see all that has ended, and come to us, until now."""
        self._children_now = None

    def orphans(self) -> Orphans:
        """Return our children that are neither a container's first process nor work for us."""
        return self._look_at_children().orphans

    def helpers(self) -> Collection[int]:
        """Return our children that work for us, and whose pids nobody has told us."""
        return self._look_at_children().helpers

    def _look_at_children(self) -> "_Children":
        if self._children_now is None:
            children = set(read_children(os.getpid())).difference(self._firsts, self._list_ours())
            helpers = set(filter(_works_for_us, children))
            self._children_now = _Children(Orphans(children - helpers), helpers)
        return self._children_now

    def reap_orphans(self) -> None:
        """Reap what has ended of all these."""
        children = self._look_at_children()
        for pid in (*children.orphans.pids, *children.helpers):
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)

    def find(self, containers: Sequence[Container]) -> dict[str, list[int]]:
        """Return for each container the pids of all that belongs to it and has not ended.

        A process whose parent ends amid the look is nobody's child in it: no longer the parent's, and not ours yet. So
        where nothing is found another look is taken, in which it is ours; and more, as long as our children change: one
        that forks and ends again and again may have done so before it was looked at.
        """
        members: dict[str, list[int]] = {each.id: [] for each in containers}
        pending = [each for each in containers if not each.is_empty]
        before: frozenset[int] | None = None
        for _ in range(1 + _MORE_LOOKS):
            for container in pending:
                members[container.id] = self._look(container)
            pending = [each for each in pending if not members[each.id]]
            if not pending or before == self.orphans().pids:
                break
            before, self._children_now = self.orphans().pids, None
        for container in pending:
            container.is_empty = container.end is not None
        if any(each.is_empty for each in pending):  # what they left are zombies, all of which were orphans just now
            self.reap_orphans()
        return members

    def find_but(self, container: Container, but_not: int) -> list[int]:
        """Return the pids of all that belongs to a container now, without the one that asks."""
        self._children_now = None
        return [pid for pid in self.find([container])[container.id] if pid != but_not]

    def signal(
        self, containers: Sequence[Container], number: int, but_not: int, only_session: bool = False
    ) -> dict[str, int]:
        """Send a signal to all that belongs to these containers, and return how many processes of each that is.

        `but_not` is the one that asks: an engine that runs in a container does not signal itself. `only_session` spares
        what has left the session of the first process.
        """
        for container in containers:
            if container.report >= 0 and number == signal.SIGKILL and container.is_wanted:
                kill(container.pidfd, number)  # it hangs at its gate
        left: dict[str, int] = {}
        pending = containers
        for _ in range(_ROUNDS_OF_SIGKILL if number == signal.SIGKILL else 1):
            self._children_now = None
            found = self.find(pending)
            for container in pending:
                members = found[container.id]
                if number:
                    container.remember(members)
                if only_session:
                    members = container.find_session(members)
                members = [pid for pid in members if pid != but_not]
                left[container.id] = len(members)
                if number:
                    self._signal_members(container, members, number, but_not)
            pending = [each for each in pending if left[each.id]]
            if not pending or not number:
                break
        self._children_now = None
        return left

    def _signal_members(self, container: Container, members: Sequence[int], number: int, but_not: int) -> None:
        group = _find_group(container, members)
        if group and _read_group(but_not) != container.pid:
            with suppress(OSError):
                os.killpg(container.pid, number)
            members = [pid for pid in members if pid not in group]
        for pid in members:
            self._signal_member(container, pid, number)

    def _signal_member(self, container: Container, pid: int, number: int) -> None:
        if pid == container.pid and container.pidfd >= 0:
            kill(container.pidfd, number)
            return
        with suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                # Looked at again now that the pidfd holds it: the number may be another's by now.
                for _ in range(2):  # as in `_members`
                    self._children_now = None
                    if self._is_member(container, pid):
                        kill(pidfd, number)
                        break
            finally:
                close(pidfd)

    def _is_member(self, container: Container, pid: int) -> bool:
        """Say whether a process belongs to a container now."""
        orphans = self._orphans_of(container).pids & {pid}
        is_left = orphans and container.find_left(Orphans(orphans), has_session=self._has_session(container))
        return bool(is_left) or pid in self._look(container)

    def _look(self, container: Container) -> list[int]:
        return container.find_members(self._orphans_of(container), has_session=self._has_session(container))

    def _has_session(self, container: Container) -> bool:
        """Say whether the number of its session is its own."""
        return self._firsts.get(container.pid, container) is container

    def _orphans_of(self, container: Container) -> Orphans:
        return Orphans(list_processes()) if container.is_stranger else self.orphans()


def _works_for_us(pid: int) -> bool:
    """Say whether a child of ours is none of a container's: it is of our session.

    That is what holds a gate's memory, and the gate that a keeper before us had forked ahead: it ends by itself. What
    descends from a container is of a session that is younger than its gate, which nothing leaves for ours.
    """
    try:
        return os.getsid(pid) == os.getsid(0)
    except ProcessLookupError:  # it is gone
        return True


def _find_group(container: Container, members: Iterable[int]) -> set[int]:
    """Return which are in the process group of the first process, as long as the group's number is surely its own.

    A signal to a group misses nobody in it. Each alone, one that forks and ends just then passes it on to no child.
    """
    if container.is_reaped or container.is_stranger:
        return set()
    return {pid for pid in members if _read_group(pid) == container.pid}


def _read_group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:  # it is gone, or of another pid namespace: 0 is no group of a container's
        return 0
