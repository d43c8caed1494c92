"""How what a container of an OCI runtime has is ended: its processes, its cgroups, its conmon, the runtime's entry."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from limpet.engine.starters.oci import commands
from limpet.engine.starters.oci.busy import Busy
from limpet.engine.starters.oci.cgroups import make_lines, remove, signal_processes, thaw
from limpet.engine.starters.oci.conmon import end_monitor
from limpet.engine.starters.oci.exits import Program, is_monitor_alive, may_be, observe_program
from limpet.engine.starters.oci.root import remove_entry, to_oci_id
from limpet.engine.starters.oci.run_directory import KnownRuns, Processes, RunDirectory, list_runs
from limpet.engine.starters.oci.runtime import Runtime
from limpet.engine.starters.oci.written import read_config
from limpet.engine.starters.orphans import reap_when_over, takes_orphans
from limpet.recovery.host import open_pidfd, read_stat
from limpet.schema.errors import InvalidStateError, UnsupportedError
from limpet.schema.telling import get_log

_log = get_log("limpet.starter.oci")
_END_SECONDS = 5.0
_CONMON_SECONDS = 0.5
"""How long a conmon that was just started may take to write its pid."""


class Ends:
    """Ends what containers have. Thread-safe; of one container by one thread at a time."""

    def __init__(self, runtime: Runtime, runs: KnownRuns, busy: Busy) -> None:
        self._runtime = runtime
        self._runs = runs
        self._busy = busy

    def end(self, container_id: str) -> None:
        """End all that a container has. Raises InvalidStateError, UnsupportedError."""
        runs = list(list_runs(self._runtime.bundle(container_id)))
        for each in runs:
            if not _may_have_run(each):
                each.mark_never_ran()  # before it is ended, which looks like an end of its program
            _reap_first(each.read_processes())
        self._runs.forget_all(self._runtime.bundle(container_id))
        if len(runs) == 1 and self._forget_ended(container_id, runs[0]):
            return
        if self._runtime.root.entry(container_id):
            outcome = self._runtime.call("delete", "-f", to_oci_id(container_id))
            if outcome.code != 0 and self._runtime.root.entry(container_id):
                raise InvalidStateError(
                    f"container {container_id}: {self._runtime.name} cannot delete it: {outcome.problem}; try again"
                )
        for each in runs:
            processes = each.read_processes()
            if processes is None or self._runtime.is_ours(processes):
                self._end_rest(container_id, each)
            if not end_monitor(each, now=processes is None):
                _log.warning("container %s: its conmon does not end", container_id)

    def discard(self, container_id: str, directory: RunDirectory) -> None:
        """End a start that has failed; what cannot be ended is told, and ended by the next recovery."""
        try:
            if self._runtime.root.entry(container_id):
                self._runtime.call("delete", "-f", to_oci_id(container_id))
            self._end_rest(container_id, directory)
            if not end_monitor(directory, now=True) or self._runtime.root.entry(container_id):
                _log.warning("container %s: something is left of its start", container_id)
        except (OSError, UnsupportedError) as error:
            _log.warning("container %s: something is left of its start: %s", container_id, error)

    def end_leftovers(self, has_ended: Callable[[str], bool]) -> None:
        """End containers that were made and never started, and what is left of those that have ended. Raises OSError.

        A create that was cut short has left a conmon, and perhaps nothing at the runtime yet.
        """
        above = self._runtime.containers_dir
        runs = {name: [*list_runs(os.path.join(above, name))] for name in os.listdir(above)}
        # Asked before what is written: who has made what was found above, and works no more, has written it by now.
        for name, each in runs.items():
            for left in () if self._busy.has_bundle(name) else each:
                if left.read_processes() is None and left.was_never_let_go():
                    left.await_pid("conmon-pidfile", _CONMON_SECONDS)
                    end_monitor(left, now=True)
        left_commands = commands.find_left(run for each in runs.values() for run in each)
        if left_commands:
            commands.end_left(left_commands, self._runtime.cgroup_of, self._runtime.is_ours)
        self.reap_lost()
        for container_id in self._runtime.root.entries():
            self._end_if_left(container_id, has_ended)

    def reap_lost(self) -> None:
        """Reap commands of which nobody can tell which they are; what cannot be looked at now is by a later call."""
        above = self._runtime.containers_dir
        with suppress(OSError):
            names = os.listdir(above) if takes_orphans() else ()
            commands.reap_lost(run for name in names for run in list_runs(os.path.join(above, name)))

    def _end_if_left(self, container_id: str, has_ended: Callable[[str], bool]) -> None:
        if not self._busy.take(container_id, wait=False):
            return  # it is being started now
        try:
            runs = list(list_runs(self._runtime.bundle(container_id)))
            if has_ended(container_id):
                if runs and all(map(_is_over, runs)):
                    return  # its entry and its cgroups hold nothing, and its release removes them
            elif not runs or any(map(_may_have_run, runs)):
                return  # a look tells what became of it, or it runs on though its bundle is lost
            self.end(container_id)
        except OSError as error:
            _log.warning("container %s: what is left of it cannot be looked at: %s", container_id, error)
        except (InvalidStateError, UnsupportedError) as error:
            _log.warning("container %s: something is left of it: %s", container_id, error)
        finally:
            self._busy.give_back(container_id)

    def _forget_ended(self, container_id: str, run: RunDirectory) -> bool:
        """Remove what a container that has ended leaves, without the runtime, whose start takes as long as all else.

        Say whether that was done. Not where anything is to be killed, or more is kept of it than is known here.
        """
        processes = run.read_processes()
        if (
            processes is None
            or not processes.is_plain
            or not processes.has_own_pids
            or processes.entry != self._runtime.root.entry(container_id)
            or observe_program(processes) is not Program.ENDED
            or not end_monitor(run)
            or remove(processes.cgroups, self._runtime.cgroup_of(processes))  # some are left: something is in them
        ):
            return False
        return remove_entry(processes.entry)

    def _end_rest(self, container_id: str, run: RunDirectory) -> None:
        """Kill what is left in the container's cgroups, as where a pid namespace is shared, and remove them.

        Of one that was killed amid making them, with its conmon, the runtime knows nothing.
        """
        processes = run.read_processes()
        path = read_config(run).get("linux", {}).get("cgroupsPath", "") if processes is None else ""
        cgroups = processes.cgroups if processes else make_lines(path)
        name = self._runtime.cgroup_of(processes) if processes else self._runtime.cgroup_name(to_oci_id(container_id))
        deadline = time.monotonic() + _END_SECONDS
        thaw(cgroups, name)  # what is frozen takes no SIGKILL (cgroup v1)
        while signal_processes(cgroups, name, signal.SIGKILL) and time.monotonic() < deadline:
            time.sleep(0.005)
        # The runtime gives up where the kernel is not yet done with them.
        while (left := remove(cgroups, name)) and time.monotonic() < deadline:
            time.sleep(0.005)
        if left:
            _log.warning("container %s: a cgroup is left: %s", container_id, "; ".join(left))


def _reap_first(processes: Processes | None) -> None:
    """Reap a container's first process once it has ended, if it has come to us, as its conmon was killed."""
    if processes is not None and takes_orphans():
        with suppress(OSError), open_pidfd(processes.init.pid) as pidfd:
            if may_be(processes.init, pidfd) and int(read_stat(processes.init.pid)[1]) == os.getpid():
                reap_when_over(pidfd)


def _may_have_run(run: RunDirectory) -> bool:
    """Return whether the program of a start may have been executed, or may yet be by a start under way."""
    if run.was_let_go():
        return True
    processes = run.read_processes()
    program = observe_program(processes) if processes is not None else Program.ENDED
    return program is Program.EXECUTED or (program is Program.ENDED and not run.was_never_let_go())


def _is_over(run: RunDirectory) -> bool:
    """Return whether a start's first process has ended, and with it all others, and its conmon, too."""
    processes = run.read_processes()
    return (
        processes is not None
        and processes.has_own_pids
        and observe_program(processes) is Program.ENDED
        and not is_monitor_alive(processes)
    )
