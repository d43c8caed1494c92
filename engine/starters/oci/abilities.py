"""What is done with an OCI container that runs: execute a command, pause, measure, change limits, reopen its log."""

import json
import os
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from fcntl import ioctl
from typing import Protocol

from limpet.engine.starters.abilities import Executed, Stats
from limpet.engine.starters.oci.cgroups import is_frozen, list_processes, measure
from limpet.engine.starters.oci.cgroups import thaw as thaw_cgroups
from limpet.engine.starters.oci.command import Outcome
from limpet.engine.starters.oci.exits import is_monitor_alive, is_process
from limpet.engine.starters.oci.family import kill_family
from limpet.engine.starters.oci.resources import find_unapplied_limits, list_applied, make_limits
from limpet.engine.starters.oci.run_directory import Processes, RunDirectory
from limpet.engine.starters.oci.sessions import CommandSession, tell_conmon
from limpet.engine.starters.oci.tools import has_unified_cgroups
from limpet.engine.starters.oci.written import read_config
from limpet.recovery.host import open_pidfd
from limpet.schema.cri import LinuxContainerResources
from limpet.schema.errors import InvalidInputError, InvalidStateError, StartError, UnsupportedError, WaitTimeoutError
from limpet.schema.status import Resources

_EXEC_BYTES = 16 << 20
"""How much of a command's output is kept, as containerd does it."""
_REOPEN_SECONDS = 5.0
_PID_SECONDS = 1.0
"""How long a runtime may take to say which process a command is, before it is taken to hang."""


class Call(Protocol):
    """Runs the runtime with these arguments."""

    def __call__(
        self,
        *arguments: str,
        timeout: float = 0,
        most_bytes: int = 64 << 10,
        before_kill: Callable[[], None] | None = None,
    ) -> Outcome:
        """Return how it ended. `before_kill` is called before it is killed at its deadline."""


def execute(
    call: Call, run: RunDirectory, processes: Processes, cgroup: str, args: Sequence[str], timeout: float
) -> Executed:
    """Run a command in the container; see `abilities.Executor`."""
    process_file, pid_file = _write_process(run, args, None)
    try:
        command = ("exec", "--process", process_file, "--pid-file", pid_file, processes.oci_id)
        name = os.path.basename(pid_file)
        outcome = call(
            *command,
            timeout=timeout,
            most_bytes=_EXEC_BYTES,
            before_kill=lambda: _kill(_await_pid(run, name), processes, cgroup),
        )
        pid = run.read_pid(name)
        if outcome.code is None:
            raise WaitTimeoutError(f"{args[0]!r} had not ended after {timeout:g} s, and was killed")
        if not pid:
            raise StartError(outcome.problem)
        code = outcome.code if outcome.code >= 0 else 128 - outcome.code
        return Executed(code, outcome.output, outcome.error, outcome.is_cut)
    finally:
        for path in (process_file, pid_file):
            with suppress(FileNotFoundError):
                os.unlink(path)


def open_command(
    runtime: Sequence[str],
    run: RunDirectory,
    processes: Processes,
    cgroup: str,
    args: Sequence[str],
    *,
    size: tuple[int, int] | None,
) -> CommandSession:
    """Run a command in the container, connected; `runtime` is the command that runs the runtime.

    It has a terminal if that has a size.
    """
    process_file, pid_file = _write_process(run, args, size)
    name = os.path.basename(pid_file)
    return CommandSession(
        [*runtime, "exec", "--process", process_file, "--pid-file", pid_file, processes.oci_id],
        size=size,
        left_over=(process_file, pid_file),
        has_begun=lambda: run.read_pid(name) > 0,
        kill=lambda: _kill(_await_pid(run, name), processes, cgroup),
        resize=lambda packed: _resize(_await_pid(run, name), processes, cgroup, packed),
    )


def _write_process(run: RunDirectory, args: Sequence[str], size: tuple[int, int] | None) -> tuple[str, str]:
    """Write down for the runtime what to run, as the container's user; return that file, and where its pid is to go.

    Raises InvalidStateError.
    """
    token = os.urandom(6).hex()
    process_file = run.join(f"exec-{token}.json")
    config = read_config(run)
    if not config:
        raise InvalidStateError(f"{run.path}: its config.json cannot be read")
    process = {**config["process"], "args": list(args), "terminal": size is not None}
    if size and all(size):
        process["consoleSize"] = {"height": size[0], "width": size[1]}
    if size is not None and not any(each.startswith("TERM=") for each in process["env"]):
        process["env"] = [*process["env"], "TERM=xterm"]
    descriptor = os.open(process_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(json.dumps(process).encode())
    return process_file, run.join(f"exec-{token}.pid")


def _kill(pid: int, processes: Processes, cgroup: str) -> None:
    """Kill a command in the container, with what it has started: the runtime is only its parent.

    To be called while the runtime still runs: one that is killed before it has said the pid may have started it.
    """
    if pid:
        with suppress(OSError), open_pidfd(pid) as pidfd:
            if _is_inside(pid, processes, cgroup):
                kill_family(pid, pidfd)


def _is_inside(pid: int, processes: Processes, cgroup: str) -> bool:
    """Return whether a process is one of the container's, by its cgroup, or by a pid namespace of the container's own.

    Raises OSError.
    """
    if pid in list_processes(processes.cgroups, cgroup):
        return True
    if not processes.has_own_pids:
        return False
    with open_pidfd(processes.init.pid) as pidfd:
        namespaces = [os.stat(f"/proc/{each}/ns/pid") for each in (pid, processes.init.pid)]
        return is_process(processes.init, pidfd) and os.path.samestat(*namespaces)


def _await_pid(run: RunDirectory, name: str) -> int:
    """Return the pid in a file that the runtime is about to write, 0 if it does not come soon."""
    deadline = time.monotonic() + _PID_SECONDS
    while not (pid := run.read_pid(name)) and time.monotonic() < deadline:
        time.sleep(0.005)
    return pid


def _resize(pid: int, processes: Processes, cgroup: str, size: bytes) -> None:
    """Give the terminal of a command in the container a size. Raises OSError."""
    if pid:
        terminal = os.open(f"/proc/{pid}/fd/0", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if _is_inside(pid, processes, cgroup):  # asked after it was opened: it is the very process's
                ioctl(terminal, termios.TIOCSWINSZ, size)
        finally:
            os.close(terminal)


def freeze(call: Call, processes: Processes, cgroup: str) -> None:
    """Freeze the container. Raises UnsupportedError: then nothing of it is frozen."""
    if not is_frozen(processes.cgroups, cgroup):
        outcome = call("pause", processes.oci_id)
        if outcome.code != 0:
            thaw(processes, cgroup)
            raise UnsupportedError(f"the runtime cannot freeze it: {outcome.problem}")


def thaw(processes: Processes, cgroup: str) -> None:
    """Let the container go on. Raises UnsupportedError."""
    try:
        thaw_cgroups(processes.cgroups, cgroup)
    except OSError as error:
        raise UnsupportedError(f"it cannot be thawed: {error.strerror} ({error.filename})") from error


def measure_container(processes: Processes, cgroup: str) -> Stats:
    """Return what the container uses."""
    cpu, memory, working_set, count = measure(processes.cgroups, cgroup)
    return Stats(time.time_ns(), cpu, memory, working_set, count)


def change_limits(call: Call, run: RunDirectory, processes: Processes, limits: LinuxContainerResources) -> Resources:
    """Put limits into force. Raises InvalidInputError if the runtime or the kernel refuses them."""
    is_unified = has_unified_cgroups()
    path = run.join("limits.json")
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(json.dumps(make_limits(limits, is_unified=is_unified)).encode())
    outcome = call("update", "-r", path, processes.oci_id)
    if outcome.code != 0:
        raise InvalidInputError(f"the limits cannot be changed: {outcome.problem}")
    unapplied = find_unapplied_limits(limits, is_unified=is_unified)
    if limits.oom_score_adj:
        unapplied["oom_score_adj"] = "it is given at the start alone"
    return list_applied(limits, unapplied)


def reopen_log(run: RunDirectory, processes: Processes, log_path: str) -> None:
    """Have conmon begin a new log where the old one was renamed. Raises InvalidStateError if there is no conmon."""
    if not is_monitor_alive(processes):
        raise InvalidStateError("its conmon has ended, so nothing more comes to its log")
    before = _inode(log_path)
    try:
        tell_conmon(run, "2 0 0\n")
    except OSError as error:
        raise InvalidStateError(f"its conmon cannot be asked: {error.strerror}") from error
    deadline = time.monotonic() + _REOPEN_SECONDS
    while _inode(log_path) in {0, before}:
        if time.monotonic() > deadline:
            raise InvalidStateError(f"its conmon has not begun a new log after {_REOPEN_SECONDS:g} s")
        time.sleep(0.002)


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return 0
