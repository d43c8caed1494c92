"""What is seen of OCI containers after a restart: their bundles tell which processes they had and how those ended.

It needs no runtime, so a reader without one tells the same.
"""

import os
import time

from limpet.engine.starters.oci.cgroups import is_frozen
from limpet.engine.starters.oci.exits import (
    Program,
    await_program,
    explain_never_ran,
    is_monitor_alive,
    is_process,
    let_monitor_go_on,
    may_be_of_held,
    observe_program,
    read_conmon_exit,
    was_out_of_memory,
)
from limpet.engine.starters.oci.run_directory import KnownRuns, Processes, RunDirectory, list_runs
from limpet.engine.state.names import OCI
from limpet.engine.state.presence import is_directory
from limpet.recovery.evidence import Boot, Process
from limpet.recovery.host import has_ended, observe_boot, observe_process, open_pidfd
from limpet.recovery.probe import Witnessed
from limpet.schema.file_name import file_name
from limpet.schema.identity import ProcessIdentity

_EXIT_FILE_SECONDS = 3.0
"""How long to wait for the exit file while conmon lives: some ms after the end, later on a busy machine."""
_START_SECONDS = 2.0
"""How long to wait for a start that is still under way: the engine was killed, and its `runc start` was not."""
_EXECUTE_SECONDS = 0.1
"""How long a process that was let go may take to execute its program."""
_OVER = {Process.ENDED, Process.GONE, Process.STRANGER}
_NEVER_LET_GO = "it was made and held, and its program was never executed"


class BundleWitness:
    """Says of a container's process what its bundle in `containers_dir` tells; nothing if it was no OCI container's.

    With `is_owner`, for an engine's own containers, a conmon that was stopped by a signal is continued where it is
    waited for: nothing else would have it write down how its container has ended.
    """

    def __init__(self, containers_dir: str, *, is_owner: bool = False) -> None:
        self._containers_dir = containers_dir
        self._is_owner = is_owner

    def __call__(self, container_id: str, identity: ProcessIdentity | None) -> Witnessed | None:
        """Return what is known of the very process; of one that the record does not name, whether it runs."""
        bundle = os.path.join(self._containers_dir, file_name(container_id))
        if not is_directory(os.path.join(bundle, OCI)):
            return None
        if identity is None:
            return _see_unnamed(bundle)
        found = KnownRuns().find(bundle, identity)
        if found is None:
            return _see_unwritten(bundle, identity)
        run, processes = found
        is_here = observe_boot(processes.monitor) is Boot.SAME
        if self._is_owner and is_here and observe_program(processes) is Program.ENDED:
            let_monitor_go_on(run, processes.monitor)
        return _see(run, processes)


def _see_unnamed(bundle: str) -> Witnessed | None:
    """Say whether a program runs that the record does not name. One that is held is ended after the look."""
    for run in list_runs(bundle):
        processes = run.read_processes()
        if processes is not None and _is_here(processes) and observe_program(processes) is Program.EXECUTED:
            return Witnessed(Process.ALIVE)
    return None


def _see_unwritten(bundle: str, identity: ProcessIdentity) -> Witnessed | None:
    """Say what the mark of a start tells of which nothing else does: its processes were written down, and are gone."""
    runs = list(list_runs(bundle))
    if len(runs) != 1 or runs[0].read_processes() is not None or observe_boot(identity) is not Boot.SAME:
        return None
    if not runs[0].was_never_let_go():
        return None
    process = observe_process(identity)[0]
    if process is Process.ALIVE:
        return Witnessed(Process.HELD)
    return Witnessed(Process.NEVER_RAN, detail=_NEVER_LET_GO) if process in _OVER else None


def _see(run: RunDirectory, processes: Processes) -> Witnessed | None:
    if run.has("never-ran"):
        return Witnessed(Process.NEVER_RAN, detail=_NEVER_LET_GO)
    here = _is_here(processes)
    if here and (alive := _see_alive(run, processes)) is not None:
        return alive
    if not here and not run.was_let_go():
        return None  # marks survive a kill and no power cut: after a reboot nothing tells whether it was let go
    if run.was_never_let_go():
        return Witnessed(Process.NEVER_RAN, detail="it ended before its program was executed")
    return _see_end(run, processes, is_here=here)


def _is_here(processes: Processes) -> bool:
    return observe_boot(processes.init) is Boot.SAME and observe_process(processes.init)[0] is not Process.ELSEWHERE


def _see_end(run: RunDirectory, processes: Processes, *, is_here: bool) -> Witnessed | None:
    """Say how a process has ended that was let go; None if conmon has not seen it, and will not."""
    deadline = time.monotonic() + _EXIT_FILE_SECONDS
    while (ended := read_conmon_exit(run)) is None and is_here and is_monitor_alive(processes):
        if time.monotonic() > deadline:
            detail = "it has ended, and its conmon has not written down yet how; recover again"
            return Witnessed(Process.UNPROVEN, detail=detail)
        time.sleep(0.005)
    ended = ended or read_conmon_exit(run)  # the last act of a conmon that ended since
    if ended is None:
        return None
    why = explain_never_ran(run, processes, ended.code)
    if why is None:
        return Witnessed(Process.GONE)
    if why:
        return Witnessed(Process.NEVER_RAN, finished_at=ended.finished_at, detail=why)
    if may_be_of_held(run, processes, ended.code):
        return Witnessed(Process.GONE)
    is_out_of_memory = was_out_of_memory(run, processes, os.path.basename(processes.cgroup))
    return Witnessed(Process.ENDED, ended.code, ended.finished_at, is_out_of_memory)


def _see_alive(run: RunDirectory, processes: Processes) -> Witnessed | None:
    """Say whether the program runs or is still held; None if the process has ended.

    Raises OSError if that cannot be seen now, which says nothing: it may be held, or run.
    """
    if not run.has("executed") and run.has("starting") and not _await_start(run):
        detail = "a start that the engine before this one began is still under way; recover again"
        return Witnessed(Process.UNPROVEN, detail=detail)
    found = observe_program(processes)
    if found is Program.HELD and run.has("starting"):
        found = await_program(processes, _EXECUTE_SECONDS)
    if found is Program.HELD:
        return Witnessed(Process.HELD)
    if found is Program.ENDED or not _is_there(processes):
        return None
    if not is_monitor_alive(processes):
        return Witnessed(Process.MONITOR_GONE)
    frozen = is_frozen(processes.cgroups, os.path.basename(processes.cgroup))
    return Witnessed(Process.PAUSED if frozen else Process.ALIVE)


def _is_there(processes: Processes) -> bool:
    try:
        with open_pidfd(processes.init.pid) as pidfd:
            return is_process(processes.init, pidfd, processes.cgroups) and not has_ended(pidfd)
    except (ProcessLookupError, FileNotFoundError):
        return False


def _await_start(run: RunDirectory) -> bool:
    """Wait until no `runc start` of this container is left; say whether that is so. Raises OSError."""
    deadline = time.monotonic() + _START_SECONDS
    while run.is_being_started():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
