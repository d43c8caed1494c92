"""Runs a command while some of its threads get no processor for a while, as on a machine that has too much to do.

    python -m tests.campaigns.starve pytest tests/engine

Beside it a process burns each processor, and every few hundredths of a second some threads of what it runs are starved:
under SCHED_IDLE (sched(7)) they run when nothing else wants to, for up to half a second. They are not stopped,
so nobody can tell, nor continue them: what comes out is what a delay at any place can do. Only root can take it back.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import suppress

from limpet.engine.starters.process.keeper.kernel import become_subreaper, list_processes, read_stat

_AT_ONCE = 3
"""How many threads are starved in each turn."""
_TURN_SECONDS = 0.03
_SECONDS = (0.05, 0.2, 0.5)
"""How long one is starved."""
_SHARP = -5
"""Our own niceness: turns are to be on time."""


def main(command: list[str]) -> int:
    """Run the command among starved threads; return its exit status, 128 + N if signal N ended it."""
    become_subreaper()  # what is left by its parents stays below us
    burners = [_burn() for _ in os.sched_getaffinity(0)]
    child = subprocess.Popen(command)
    os.nice(_SHARP)
    starved: dict[int, float] = {}
    try:
        while child.poll() is None:
            _reap(child.pid)
            _take_turn(starved, set(_find_threads(burners)))
            time.sleep(_TURN_SECONDS)
    finally:
        for pid in burners:
            os.kill(pid, signal.SIGKILL)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _burn() -> int:
    """Fork a process that is always busy, for as long as we live; return its pid."""
    parent, pid = os.getpid(), os.fork()
    while not pid:
        if os.getppid() != parent:
            os._exit(0)
    return pid


def _reap(but_not: int) -> None:
    """Reap what came to us when its parent ended."""
    while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != but_not:
        os.waitpid(ended.si_pid, 0)


def _take_turn(starved: dict[int, float], threads: set[int]) -> None:
    """Have enough of what has starved for long enough, and starve others. `starved` says until when."""
    now = time.monotonic()
    for thread in [thread for thread, until in starved.items() if until <= now or thread not in threads]:
        del starved[thread]
        _schedule(thread, os.SCHED_OTHER)
    for thread in random.sample(sorted(threads), min(_AT_ONCE, len(threads))):
        starved.setdefault(thread, now + random.choice(_SECONDS))
        _schedule(thread, os.SCHED_IDLE)
    for thread in threads.difference(starved):
        with suppress(OSError):
            if os.sched_getscheduler(thread) == os.SCHED_IDLE:  # one that is starved has made it
                starved[thread] = now + random.choice(_SECONDS)


def _schedule(thread: int, policy: int) -> None:
    with suppress(ProcessLookupError):  # it has ended
        os.sched_setscheduler(thread, policy, os.sched_param(0))


def _find_threads(but_not: Collection[int]) -> Iterator[int]:
    """Yield the numbers of all threads of what descends from us, but for some processes."""
    children: dict[int, list[int]] = {}
    for pid in list_processes():
        with suppress(OSError):
            if (stat := read_stat(pid)) is not None:
                children.setdefault(stat.parent, []).append(pid)
    pending = [os.getpid()]
    while pending:
        found = set(children.get(pending.pop(), ())).difference(but_not)
        pending += found
        for pid in found:
            with suppress(OSError):  # it has ended
                yield from map(int, os.listdir(f"/proc/{pid}/task"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
