"""Freezing a container's processes, through cgroup v2 (`cgroup.freeze`) or v1 (the freezer hierarchy).

Where the container's limits have not made a cgroup of it already, its processes are moved to one of its own, below
that of the keeper, the first time it is paused. They stay there; it is removed when the container is released. A
cgroup names processes by number: what was moved and is not of the container, because a number was used again, is moved
back before anything is frozen.
"""

import errno
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

from limpet.engine.starters.process.cgroups.files import read_text, write_line
from limpet.engine.starters.process.cgroups.hierarchies import read_cgroups
from limpet.engine.starters.process.cgroups.parents import Notes
from limpet.schema.errors import UnsupportedError
from limpet.schema.file_name import file_name

_FREEZE_TIMEOUT_SECONDS = 5.0
_LOOK_AGAIN_SECONDS = 0.002
_ROUNDS = 100
"""How often processes that were started meanwhile are moved."""


class _Kind(NamedTuple):
    """How one version of cgroups is told to freeze."""

    file: str
    frozen: str
    thawed: str


_V2 = _Kind("cgroup.freeze", "1", "0")
_V1 = _Kind("freezer.state", "FROZEN", "THAWED")


class _Cgroup(NamedTuple):
    """A cgroup of one container."""

    path: str
    kind: _Kind

    def is_asked(self) -> bool:
        """Say whether it is frozen, or is being frozen, for itself."""
        file = self.kind.file if self.kind is _V2 else "freezer.self_freezing"
        with suppress(OSError):
            return read_text(os.path.join(self.path, file)) == "1"
        return False

    def is_done(self) -> bool:
        """Say whether all processes in it are frozen."""
        if self.kind is _V1:
            return read_text(os.path.join(self.path, self.kind.file)) == self.kind.frozen
        return "frozen 1" in read_text(os.path.join(self.path, "cgroup.events")).splitlines()

    def write(self, state: str) -> None:
        """Ask for a state. Raises OSError."""
        write_line(os.path.join(self.path, self.kind.file), state)


Members = Callable[[], Collection[int]]
"""Returns the pids of all that belongs to the container now."""


class Freezer:
    """What freezes one container: `pid` is its first process, 0 if it has none any more.

    Its own cgroup bears `scope`, the name of the state directory: containers of others may have the same id. It is made
    below that of the process `beside`, 0 for this one, which `notes` keeps.
    """

    def __init__(self, container_id: str, pid: int, scope: str, notes: Notes, beside: int = 0) -> None:
        self._id = container_id
        self._pid = pid
        self._notes = notes
        here = _find_parents(beside)
        before = ((path, _V2 if _is_v2(path) else _V1) for path in notes.noted)
        self._parents = tuple(dict.fromkeys((*here, *before)))
        name = f"limpet-pause-{scope}-{file_name(container_id)}"
        self._own = [_Cgroup(os.path.join(parent, name), kind) for parent, kind in self._parents]
        self._next = self._own[: len(here)]
        """Those that may be made."""

    def freeze(self, members: Members) -> None:
        """Freeze it, and wait until all of its processes are.

        Raises UnsupportedError with the reason if that cannot be done: nothing is frozen then.
        """
        limits = self._find_limits()
        refused = []
        for cgroup in [*limits, *self._next]:
            try:
                if cgroup not in limits:
                    self._notes.note(os.path.dirname(cgroup.path))
                    with suppress(FileExistsError):
                        os.mkdir(cgroup.path, 0o755)
                if not os.path.exists(os.path.join(cgroup.path, cgroup.kind.file)):
                    raise OSError(errno.ENOENT, "this kernel has none", os.path.join(cgroup.path, cgroup.kind.file))
                _gather(cgroup, members)
                _freeze(cgroup, members)
            except OSError as error:
                refused.append(f"{error.filename}: {error.strerror}")
                if cgroup not in limits:
                    with suppress(OSError):
                        os.rmdir(cgroup.path)
            else:
                return
        why = "; ".join(refused) or "no cgroup v2, and no freezer of cgroup v1, is to be seen"
        raise UnsupportedError(f"container {self._id} cannot be frozen: {why}")

    def thaw(self) -> None:
        """Let it go on, wherever it was frozen. May be repeated. Raises UnsupportedError with the reason."""
        try:
            for cgroup in self._find_asked():
                cgroup.write(cgroup.kind.thawed)
        except OSError as error:
            raise UnsupportedError(
                f"container {self._id} cannot be thawed: {error.filename}: {error.strerror}"
            ) from error

    def is_frozen(self) -> bool:
        """Say whether it is frozen, or is being frozen."""
        return bool(self._find_asked())

    def remove(self) -> None:
        """Remove its own cgroups; one that is not empty is left."""
        for cgroup in self._own:
            with suppress(OSError):
                os.rmdir(cgroup.path)

    def _find_asked(self) -> "list[_Cgroup]":
        return [cgroup for cgroup in [*self._own, *self._find_limits()] if cgroup.is_asked()]

    def _find_limits(self) -> "list[_Cgroup]":
        """Return the cgroup v2 that its limits have made, if its first process is in it."""
        name = f"limpet-{file_name(self._id)}"
        paths = [os.path.join(parent, name) for parent, kind in self._parents if kind is _V2]
        if not self._pid or not any(map(os.path.exists, paths)):
            return []
        with suppress(OSError):
            path = read_cgroups(self._pid).v2
            return [_Cgroup(path, _V2)] if path in paths else []
        return []


def _find_parents(beside: int) -> Sequence[tuple[str, _Kind]]:
    """Return those below which one can be made; those of this process, where the other is gone."""
    with suppress(OSError):
        if beside:
            return _remember_parents(beside)
    with suppress(OSError):
        return _read_parents(0)
    return ()


def _is_v2(path: str) -> bool:
    return os.path.exists(os.path.join(path, "cgroup.controllers"))


@lru_cache(maxsize=1)
def _remember_parents(keeper: int) -> Sequence[tuple[str, _Kind]]:
    return _read_parents(keeper)


def _read_parents(pid: int) -> Sequence[tuple[str, _Kind]]:
    own = read_cgroups(pid)
    v2 = dict.fromkeys(filter(None, (own.v2,)))
    with suppress(OSError):  # where limits have made one, it is below this
        v2[own.find_v2_parent()] = None
    found = [(path, _V2) for path in v2]
    return (*found, (own.v1["freezer"], _V1)) if "freezer" in own.v1 else tuple(found)


def _gather(cgroup: _Cgroup, members: Members, *, is_frozen: bool = False) -> None:
    """Move all that belongs to the container into the cgroup, and nothing else. Raises OSError.

    What ends before it can be moved is moved by nobody, and may have started others: only a cgroup that `is_frozen`,
    in which nothing ends, tells that none is missing.
    """
    procs = os.path.join(cgroup.path, "cgroup.procs")
    for _ in range(_ROUNDS):
        wanted = set(members())
        if not wanted:
            raise OSError(errno.ESRCH, "no process of the container is known", procs)
        inside = _read_pids(procs)
        missing = wanted - inside
        moved = [pid for pid in missing if _move(pid, procs)]
        if not (missing if is_frozen else moved):
            _move_strangers_back(cgroup, inside - wanted - set(members()))
            return
    raise OSError(errno.EAGAIN, "the container starts processes faster than they can be moved", procs)


def _move(pid: int, procs: str) -> bool:
    """Move a process into a cgroup; say whether it has not ended meanwhile. Raises OSError."""
    try:
        write_line(procs, str(pid))
    except ProcessLookupError:
        return False
    return True


def _move_strangers_back(cgroup: _Cgroup, strangers: Collection[int]) -> None:
    outside = os.path.join(os.path.dirname(cgroup.path), "cgroup.procs")
    for pid in strangers:
        _move(pid, outside)


def _freeze(cgroup: _Cgroup, members: Members) -> None:
    """Freeze what is in it, and what was missing. Raises OSError: it goes on then."""
    try:
        _wait_until_frozen(cgroup)
        _gather(cgroup, members, is_frozen=True)
        _wait_until_frozen(cgroup)
    except OSError:
        with suppress(OSError):
            cgroup.write(cgroup.kind.thawed)
        raise


def _wait_until_frozen(cgroup: _Cgroup) -> None:
    deadline = time.monotonic() + _FREEZE_TIMEOUT_SECONDS
    cgroup.write(cgroup.kind.frozen)
    while not cgroup.is_done():
        if time.monotonic() > deadline:
            raise OSError(errno.ETIMEDOUT, "a process of it hangs in the kernel, and cannot be frozen", cgroup.path)
        time.sleep(_LOOK_AGAIN_SECONDS)
        # v1 stays amid it until it is asked once more where a process waits for a child by vfork(2) that is frozen
        # already; v2 takes no note of that.
        cgroup.write(cgroup.kind.frozen)


def _read_pids(path: str) -> set[int]:
    return {int(line) for line in read_text(path).split()}
