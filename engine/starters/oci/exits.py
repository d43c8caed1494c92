"""How a container's first process is, or how it ended: what conmon, the runtime and the kernel tell.

The order to look: is the process alive, by its identity? has it executed its program? conmon's exit file; conmon
itself, which writes the file a moment after the end; then the kernel. What none of them knows, nobody saw.
"""

import errno
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum
from typing import NamedTuple

from limpet.engine.starters.oci.cgroups import count_memory_kills
from limpet.engine.starters.oci.executable import MISSING, find_flaw
from limpet.engine.starters.oci.run_directory import Processes, RunDirectory
from limpet.engine.starters.oci.written import read_config
from limpet.engine.starters.signals import let_go_on
from limpet.engine.state.presence import is_there
from limpet.recovery.evidence import Boot, Process
from limpet.recovery.files import read_small_file
from limpet.recovery.host import compare, has_ended, is_reaped, observe_boot, open_pidfd, read_stat
from limpet.recovery.mounts import open_lines
from limpet.schema.identity import ProcessIdentity

_CODE = re.compile(rb"[0-9]{1,3}")
FAILED_TO_EXECUTE = 1
"""What runc's and crun's own init exit with if the program cannot be executed."""
_OF_INIT = {FAILED_TO_EXECUTE, 2}
"""What that ends with before it comes to the program: 2 is a crash of Go's."""
_NOT_CONMONS = {errno.EFBIG, errno.ELOOP, errno.EINVAL, errno.ENXIO}
"""What reading a file tells that conmon has not written: one too large, a link, a directory or a pipe, a socket."""
_WRITABLE_BY_OTHERS = 0o022
_STOPPED = {b"T", b"t", b"Z", b"X"}
_SCAN_MOST = 1000
_PF_FORKNOEXEC = 0x40  # linux/sched.h: forked, and has executed nothing since; in proc_pid_stat(5), field 9


class Program(Enum):
    """Whether the container's program was executed."""

    HELD = "held"
    """The process waits for the runtime's start, and has executed nothing of the user's."""
    EXECUTED = "executed"
    ENDED = "ended"
    """The process has ended, or another has its pid."""


class ConmonExit(NamedTuple):
    """What conmon has written down of an end."""

    code: int
    finished_at: int
    """Nanoseconds since the epoch."""


def read_conmon_exit(run: RunDirectory) -> ConmonExit | None:
    """Return the end that conmon has seen; None if its file is missing, not conmon's or, after a power cut, damaged.

    Of the two that conmon writes it is the one beside the config, not the one in `exits`: who was given that directory,
    as for a look at all ends, may write anything there. Raises OSError if that cannot be found out now, as without free
    descriptors.
    """
    path = run.join("exit")
    try:
        data = read_small_file(path, 16)
        found, owner = os.lstat(path), os.stat(run.path).st_uid
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno in _NOT_CONMONS:
            return None
        raise
    is_ours = found.st_uid == owner and found.st_nlink == 1 and not found.st_mode & _WRITABLE_BY_OTHERS
    if not is_ours or _CODE.fullmatch(data) is None or int(data) > 255:
        return None
    return ConmonExit(int(data), max(found.st_mtime_ns, 1))


def was_out_of_memory(run: RunDirectory, processes: Processes, cgroup: str) -> bool:
    """Return whether the kernel has killed a process of a container for want of memory, as its cgroups tell.

    Where they are gone, or on an old kernel, conmon's file does. With cgroups of version 1 it is written as well where
    the limit of a cgroup above was reached, and a process of another container was killed. Raises OSError.
    """
    count = count_memory_kills(processes.cgroups, cgroup) if observe_boot(processes.init) is Boot.SAME else None
    return run.has("oom") if count is None else count > 0


def observe_program(processes: Processes) -> Program:
    """Return how far the container's first process is, in this boot. Raises OSError if that cannot be seen."""
    try:
        with open_pidfd(processes.init.pid) as pidfd:
            if has_ended(pidfd) or not is_process(processes.init, pidfd, processes.cgroups):
                return Program.ENDED
            is_held = _is_held(processes)
            if is_held is None or has_ended(pidfd):
                return Program.ENDED
            return Program.HELD if is_held else Program.EXECUTED
    except ProcessLookupError:
        return Program.ENDED


def keep_seen(run: RunDirectory, processes: Processes) -> bool:
    """Say whether the program is seen to be executed, now, and see to the mark that says so."""
    with suppress(OSError):
        if observe_program(processes) is not Program.EXECUTED:
            return False
        if not run.has("executed"):
            with suppress(OSError):  # a full disk
                run.mark("executed")
        return True
    return False


def await_program(processes: Processes, seconds: float, *, has_it_go_on: bool = False) -> Program:
    """Wait until the program is executed or the process has ended, for so long; return what it is then.

    `has_it_go_on` is for who has let it go: a signal may have stopped it before it executes the program.
    """
    deadline, patience = time.monotonic() + seconds, 0.0001
    while (found := observe_program(processes)) is Program.HELD and time.monotonic() < deadline:
        time.sleep(patience)
        patience = min(patience * 2, 0.02)
        if has_it_go_on:
            let_held_go_on(processes)
    return found


def let_held_go_on(processes: Processes) -> None:
    """Continue a process that was stopped by a signal before it has executed its program."""
    with suppress(OSError), open_pidfd(processes.init.pid) as pidfd:
        if is_process(processes.init, pidfd, processes.cgroups) and _is_held(processes):
            let_go_on(processes.init.pid, pidfd)


def settle_program(processes: Processes, seconds: float) -> Program:
    """Return whether the process of a start that is given up has executed its program.

    It is stopped for that, or it might between the look and its end; what has executed goes on, and what is held stays
    stopped. One that does not stop in time is believed to be as it looks. Raises OSError.
    """
    deadline = time.monotonic() + seconds
    try:
        with open_pidfd(processes.init.pid) as pidfd:
            if not is_process(processes.init, pidfd, processes.cgroups):
                return Program.ENDED
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            while read_stat(processes.init.pid)[0] not in _STOPPED and time.monotonic() < deadline:
                time.sleep(0.001)
            found = observe_program(processes)
            if found is Program.EXECUTED:
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            return found
    except (ProcessLookupError, FileNotFoundError):
        return Program.ENDED


def read_program(pid: int) -> tuple[int, int]:
    """Return device and inode of what a process has executed, zeros if we may not see it.

    Raises OSError, also if it has ended.
    """
    try:
        found = os.stat(f"/proc/{pid}/exe")
    except PermissionError:
        return 0, 0
    return found.st_dev, found.st_ino


def _is_held(processes: Processes) -> bool | None:
    """Return whether the process has not executed the program yet, None if it has ended."""
    pid = processes.init.pid
    try:
        program = read_program(pid)
        if program == (0, 0):  # another user's, of a user namespace of ours; runc forks it, and executes nothing before
            return bool(int(read_stat(pid)[6]) & _PF_FORKNOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return program == processes.held_program


def is_process(identity: ProcessIdentity, pidfd: int, cgroups: tuple[str, ...] = ()) -> bool:
    """Return whether the process behind a pidfd is the recorded one, and was not reaped where that is asked of /proc.

    Where the kernel gives no proof (before Linux 6.9), being in the container's own cgroup does. Raises OSError if that
    cannot be seen.
    """
    found = _compare(identity, pidfd)
    if found is Process.UNPROVEN:
        return bool(cgroups) and _is_in(cgroups, identity.pid, pidfd)
    return found is Process.ALIVE


def _is_in(cgroups: tuple[str, ...], pid: int, pidfd: int) -> bool:
    try:
        found = read_cgroups(pid)
    except (FileNotFoundError, ProcessLookupError):
        if is_reaped(pidfd):
            return False
        raise
    return found == cgroups and not is_reaped(pidfd)  # by then its number may have been another's


def may_be(identity: ProcessIdentity, pidfd: int) -> bool:
    """Return whether nothing tells the process behind a pidfd from the recorded one. Raises OSError, too."""
    return _compare(identity, pidfd) in {Process.ALIVE, Process.UNPROVEN}


def _compare(identity: ProcessIdentity, pidfd: int) -> Process:
    found, why = compare(identity, pidfd)
    if found is Process.HIDDEN:  # that it is another, or has ended, is not said of what cannot be seen
        raise OSError(errno.EIO, why)
    return found


def read_cgroups(pid: int) -> tuple[str, ...]:
    """Return the cgroups of a process, as the lines of /proc/PID/cgroup (cgroups(7)). Raises OSError."""
    with open_lines(f"/proc/{pid}/cgroup") as file:
        return tuple(sorted(line.rstrip("\n") for line in file))


def is_monitor_alive(processes: Processes) -> bool:
    """Return whether the container's conmon lives: an exit file may still come. Raises OSError."""
    monitor = processes.monitor
    if observe_boot(monitor) is not Boot.SAME:
        return False
    try:
        with open_pidfd(monitor.pid) as pidfd:
            # Where there is no proof, waiting a moment is all it costs.
            return not has_ended(pidfd) and may_be(monitor, pidfd) and read_stat(monitor.pid)[0] not in {b"Z", b"X"}
    except (ProcessLookupError, FileNotFoundError):
        return False


def let_monitor_go_on(run: RunDirectory, monitor: ProcessIdentity) -> None:
    """Continue a conmon that was stopped by a signal: nobody else writes down how its container ends."""
    with suppress(OSError), open_pidfd(monitor.pid) as pidfd:
        if is_process(monitor, pidfd) or (may_be(monitor, pidfd) and is_of_run(run, monitor.pid)):
            let_go_on(monitor.pid, pidfd)


def is_of_run(run: RunDirectory, pid: int) -> bool:
    """Return whether a process has a file of this start open, as its conmon has and nobody else of that pid would."""
    prefix = f"{os.path.realpath(run.path)}/"
    return any(target.startswith(prefix) for target in list_open(pid))


def list_open(pid: int) -> Iterator[str]:
    """Yield what a process has open, as the links in /proc/PID/fd tell; nothing if they cannot be read."""
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd")[:_SCAN_MOST]:
            with suppress(OSError):
                yield os.readlink(f"/proc/{pid}/fd/{name}")


def explain_never_ran(run: RunDirectory, processes: Processes, code: int) -> str | None:
    """Return why the program of a process that has ended was never executed; "" if it was, None if nothing tells.

    The runtime's init ends with 1 if it cannot execute the program, which a program that was executed may do as well.
    So it is asked whether the kernel could have executed that file, before it was let go and now: a program may remove
    or mend its own file, and so may others.
    """
    if run.has("executed") or code != FAILED_TO_EXECUTE:
        return ""
    flaw = find_flaw(read_config(run))
    if processes.flaw is not None and bool(flaw) != bool(processes.flaw):
        return None
    return "" if flaw == MISSING else flaw


def may_be_of_held(run: RunDirectory, processes: Processes, code: int) -> bool:
    """Return whether the runtime's own init may have ended so while it was held, and nothing tells. Raises OSError.

    It has failed, or was killed. The runtime still keeps the pipe at which it held it, as its `start` was killed, or
    somebody has removed the marks.
    """
    if run.has("executed") or not (code in _OF_INIT or code > 128):
        return False
    return not run.has("starting") or is_there(os.path.join(processes.entry, "exec.fifo"))
