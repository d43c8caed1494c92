"""Kills a process with all that it has started, or has it go on: a conmon, a runtime, a command in a container.

To be killed all of them are stopped first, so that none starts another while they are looked for. What has left both
its parent and its session, as a daemon does, is not found.
"""

import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, suppress

from limpet.engine.starters.orphans import reap_when_over
from limpet.engine.starters.signals import let_go_on
from limpet.engine.state.holders import find_stopped
from limpet.recovery.host import has_ended, is_zombie, open_pidfd, read_stat

_STOPPED = {b"T", b"t", b"Z", b"X"}
_START = 19
"""Of what `read_stat` returns: when it began."""
_STOP_SECONDS = 0.2
"""How long a process may take to stop; one that is frozen does not."""


def kill_family(pid: int, pidfd: int, *, sessions: bool = False, is_waited_for: bool = False) -> None:
    """Kill the process behind a pidfd, and all that descend from it. It is not this process.

    What becomes this process's child thereby is reaped, so it is, too, unless the caller waits for it.

    `sessions` says that its session is nobody else's, as are those of its descendants: then all in them are killed,
    also those that another process has become the parent of. This process's own session is never among them, nor 0, in
    which all are that have come from another pid namespace, and the kernel's threads.
    """
    deadline = time.monotonic() + _STOP_SECONDS
    others = {0, os.getsid(0)}
    with ExitStack() as stack:
        held, own = {pid: pidfd}, set[int]()
        with suppress(OSError):
            own = {int(read_stat(pid)[3])} - others if sessions else own
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            while (found := _find_more(held, own)) or (time.monotonic() < deadline and not all(map(_is_stopped, held))):
                for each in found:
                    with suppress(ProcessLookupError, FileNotFoundError):
                        opened = stack.enter_context(open_pidfd(each))
                        _, parent, _, session, *_ = read_stat(each)
                        if _belongs(int(parent), int(session), held, own):  # asked after it was opened: it is the one
                            signal.pidfd_send_signal(opened, signal.SIGSTOP)
                            held[each] = opened
                            own |= {int(session)} - others if sessions else set()
                if not found:
                    time.sleep(0.001)
        for each in held.values():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(each, signal.SIGKILL)
                if each != pidfd or not is_waited_for:
                    reap_when_over(each)


def _find_more(held: Mapping[int, int], sessions: Collection[int]) -> list[int]:
    """Return which other processes descend from those held, or are in these sessions."""
    return [
        pid
        for pid, parent, session in list_processes()
        if pid not in held and pid != os.getpid() and _belongs(parent, session, held, sessions)
    ]


def _belongs(parent: int, session: int, held: Mapping[int, int], sessions: Collection[int]) -> bool:
    return session in sessions or (parent in held and not has_ended(held[parent]))


def list_processes() -> Iterator[tuple[int, int, int]]:
    """Yield pid, parent and session of each process that has not ended. Raises OSError."""
    for pid, stat in _read_stats():
        if not is_zombie(stat):
            yield pid, int(stat[1]), int(stat[3])


def list_children() -> list[int]:
    """Return this process's children, also those that have ended. Raises OSError."""
    return [pid for pid, stat in _read_stats() if int(stat[1]) == os.getpid()]


def is_child(pid: int, parent: int) -> bool:
    """Say whether a process is a child of another's first thread, also if /proc hides it (hidepid). Raises OSError."""
    with open(f"/proc/{parent}/task/{parent}/children", "rb") as file:  # CONFIG_PROC_CHILDREN
        return b"%d" % pid in file.read().split()


def find_half_dead(pid: int) -> set[tuple[int, bytes]]:
    """Return which processes that descend from another have lost their first thread, and are not over. Raises OSError.

    One that just ends may be seen so, too: only what is found twice has lost it for good. Each has its start time.
    """
    family = _read_family(pid).items()
    return {(each, stat[_START]) for each, stat in family if stat[0] == b"Z" and not is_zombie(stat)}


def have_go_on(pid: int, is_own: Callable[[int], bool] = lambda _: True) -> None:
    """Continue what a signal has stopped of a process that works for us, and of those that descend from it.

    A container of root's can stop any, and a person. `is_own` says of each whether it is no program of the user's.
    """
    with suppress(OSError):
        for each, stat in _read_family(pid).items():
            if stat[0] == b"T":
                with suppress(OSError), open_pidfd(each) as pidfd:
                    if read_stat(each)[_START] == stat[_START] and is_own(each):
                        let_go_on(each, pidfd)


def have_holders_go_on(lock: int) -> None:
    """Continue what a signal has stopped of those that hold the lock of an open file, its own too (flock(2))."""
    with suppress(OSError):
        for pid, pidfd in find_stopped(lock, with_lock=True):
            with suppress(OSError):  # it has ended
                let_go_on(pid, pidfd)


def _read_family(pid: int) -> dict[int, list[bytes]]:
    """Return what /proc says of a process and of all that descend from it. Raises OSError."""
    stats = dict(_read_stats())
    family, found = {pid}, {pid}
    while found:
        found = {each for each, stat in stats.items() if int(stat[1]) in found} - family
        family |= found
    return {each: stats[each] for each in family & stats.keys()}


def _read_stats() -> Iterator[tuple[int, list[bytes]]]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(ProcessLookupError, FileNotFoundError, PermissionError):
                yield int(name), read_stat(int(name))


def _is_stopped(pid: int) -> bool:
    try:
        return read_stat(pid)[0] in _STOPPED
    except OSError:
        return True
