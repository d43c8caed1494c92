"""Which processes we are: whoever signals a group or what is left of a container spares them.

An engine, or a command, may itself run in a container of its state directory: a job that restarts the service it was
started by.
"""

import os

from limpet.recovery.host import read_stat


def find_own_lineage() -> frozenset[int]:
    """Return the pids of this process and of all that it descends from, as this pid namespace numbers them.

    Where /proc cannot be read, those that are known.
    """
    lineage = {os.getpid()}
    pid = os.getppid()
    while pid > 0 and pid not in lineage:
        lineage.add(pid)
        try:
            pid = int(read_stat(pid)[1])
        except OSError:  # it has ended, or /proc hides it
            break
    return frozenset(lineage)


def is_in_own_group(group: int) -> bool:
    """Return whether a signal to this process group would reach this process."""
    return group == os.getpgrp()
