"""What is done with an OCI container that runs: execute a command, pause, measure, change limits, reopen its log."""

import errno
import json
import os
import stat
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fcntl import ioctl

from limpet.engine.starters.abilities import Executed, Stats
from limpet.engine.starters.oci.cgroups import await_frozen, find_frozen, is_frozen, lift_quota, measure
from limpet.engine.starters.oci.cgroups import freeze as freeze_cgroups
from limpet.engine.starters.oci.cgroups import thaw as thaw_cgroups
from limpet.engine.starters.oci.child import UNKNOWN
from limpet.engine.starters.oci.commands import CommandFiles, have_runtime_go_on, is_inside
from limpet.engine.starters.oci.exits import Program, is_monitor_alive, observe_program
from limpet.engine.starters.oci.limit_files import forget_limits, keep_limits, put_back
from limpet.engine.starters.oci.resources import (
    find_unapplied_limits,
    lifts_quota,
    list_applied,
    make_hugepage_limits,
    make_limits,
)
from limpet.engine.starters.oci.run_directory import Processes, RunDirectory
from limpet.engine.starters.oci.runtime import Runtime
from limpet.engine.starters.oci.sessions import CommandSession, clamp, tell_conmon
from limpet.engine.starters.oci.tools import has_unified_cgroups, with_oom_score
from limpet.engine.starters.oci.written import read_config
from limpet.engine.state.durable import open_made
from limpet.schema.cri import LinuxContainerResources
from limpet.schema.errors import (
    InvalidInputError,
    InvalidStateError,
    LimpetError,
    ResourcesError,
    StartError,
    UnsupportedError,
    WaitTimeoutError,
    quote_path,
)
from limpet.schema.layout import TEMPORARY_PREFIX
from limpet.schema.status import Resources

_LEAST_SECONDS = 0.001  # 0 is the deadline of the runtime's other calls
_EXEC_BYTES = 16 << 20
"""How much of a command's output is kept, as containerd does it."""
_REOPEN_SECONDS = 5.0
_NEW_LOG = ".tmp"
"""What conmon adds to the name of a new log until it takes the old one's place. What it finds there it empties."""
_FREEZE_SECONDS = 5.0
_PID_SECONDS = 1.0
"""How long a runtime may take to say which process a command is, before it is taken to hang."""


def execute(runtime: Runtime, run: RunDirectory, processes: Processes, args: Sequence[str], timeout: float) -> Executed:
    """Run a command in the container; see `abilities.Executor`. Raises InvalidStateError if that is frozen."""
    cgroup = runtime.cgroup_of(processes)
    _require_not_frozen(processes, cgroup)
    files = CommandFiles.write(run, args, None)
    has_ended = False

    def see_to(pid: int) -> None:
        nonlocal has_ended
        have_runtime_go_on(pid)
        has_ended = files.has_ended(processes, cgroup)

    try:
        outcome = runtime.call(
            *files.arguments(processes.oci_id),
            timeout=max(timeout, _LEAST_SECONDS),
            most_bytes=_EXEC_BYTES,
            directory=run.path,
            begun_by=_begin(runtime, files),
            see_to=see_to,
        )
        if outcome.code is None and has_ended:
            raise WaitTimeoutError(
                f"{args[0]!r} has ended, but what it has started still had its output open after {timeout:g} s, and was"
                " killed; runc waits for that before it tells the exit code"
            )
        if outcome.code is None:
            raise WaitTimeoutError(f"{args[0]!r} had not ended after {timeout:g} s, and was killed")
        if not files.read_pid():
            raise _explain(processes, cgroup, outcome.problem)
        if outcome.code == UNKNOWN:
            raise ResourcesError(f"{args[0]!r}: {outcome.problem}")
        if outcome.code < 0:
            files.end_orphan(processes, cgroup)
        if flaw := files.find_flaw(outcome.code):
            raise StartError(flaw)
        code = outcome.code if outcome.code >= 0 else 128 - outcome.code
        return Executed(code, outcome.output, outcome.error, outcome.is_cut)
    finally:
        files.remove()


def open_command(
    runtime: Runtime,
    run: RunDirectory,
    processes: Processes,
    args: Sequence[str],
    *,
    size: tuple[int, int] | None,
    reap_lost: Callable[[], None],
) -> CommandSession:
    """Run a command in the container, connected.

    It has a terminal if that has a size. crun hands that over: the last that crun 1.8 copies it shows as an error of
    its own. runc copies what is written, for it hands over only to leave. `reap_lost` is called once its runtime was
    killed. Raises InvalidStateError if the container is frozen.
    """

    def end_orphan() -> None:
        files.end_orphan(processes, cgroup)
        reap_lost()

    command, cgroup = runtime.command_with_root(), runtime.cgroup_of(processes)
    _require_not_frozen(processes, cgroup)
    size = size and (clamp(size[0]), clamp(size[1]))
    files = CommandFiles.write(run, args, size)
    try:
        door = files.listen() if size is not None and runtime.kind == "crun" else None
    except BaseException:
        files.remove()
        raise
    return CommandSession(
        [*_begin(runtime, files), *command, *files.arguments(processes.oci_id, has_door=door is not None)],
        size=size,
        directory=run.path,
        door=door,
        files=files,
        end_orphan=end_orphan,
        explain=lambda said: _explain(processes, cgroup, said),
        resize=lambda packed: None if door else _resize(_await_pid(files), processes, cgroup, packed),
    )


def _begin(runtime: Runtime, files: CommandFiles) -> Sequence[str]:
    """Return what begins the runtime: crun 1.8 passes over the oom score of a command, which then has crun's own."""
    return with_oom_score(files.oom_score) if runtime.kind == "crun" else ()


def _require_not_frozen(processes: Processes, cgroup: str) -> None:
    """Raise InvalidStateError where a command would not begin, and the runtime would wait for that."""
    if frozen := find_frozen(processes.cgroups, cgroup):
        raise InvalidStateError(
            f"no command can begin in the container: its processes are frozen, by the cgroup {quote_path(frozen)};"
            f" {'resume it' if os.path.basename(frozen) == cgroup else 'thaw that'} first"
        )


def _explain(processes: Processes, cgroup: str, said: str) -> LimpetError:
    """Return why a command has not begun: its container was frozen or has ended meanwhile, or what the runtime said."""
    try:
        _require_not_frozen(processes, cgroup)
    except InvalidStateError as error:
        return error
    except OSError:  # that cannot be seen now
        pass
    if _has_ended(processes):
        return InvalidStateError("no command can begin in the container: it has ended")
    return StartError(said)


def _has_ended(processes: Processes) -> bool:
    """Return whether the container has ended, which nobody may have written down yet; False if that cannot be seen."""
    try:
        return observe_program(processes) is Program.ENDED
    except OSError:
        return False


def _await_pid(files: CommandFiles) -> int:
    """Return the pid of a command that the runtime is about to start, 0 if it does not come soon."""
    deadline = time.monotonic() + _PID_SECONDS
    while not (pid := files.read_pid()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return pid


def _resize(pid: int, processes: Processes, cgroup: str, size: bytes) -> None:
    """Give the terminal of a command in the container a size. Raises OSError."""
    if pid:
        terminal = os.open(f"/proc/{pid}/fd/0", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if is_inside(pid, processes, cgroup):  # asked after it was opened: it is the very process's
                ioctl(terminal, termios.TIOCSWINSZ, size)
        finally:
            os.close(terminal)


def freeze(runtime: Runtime, processes: Processes) -> None:
    """Freeze the container. Raises UnsupportedError, InvalidStateError if it has ended: then nothing is frozen."""
    cgroup = runtime.cgroup_of(processes)
    is_held = bool(find_frozen(processes.cgroups, cgroup))
    if not is_held:
        outcome = runtime.call("pause", processes.oci_id)
        if outcome.code != 0:
            thaw(processes, cgroup)
            if _has_ended(processes):
                raise InvalidStateError("it cannot be frozen: it has ended")
            raise UnsupportedError(f"the runtime cannot freeze it: {outcome.problem}")
    try:
        if is_held and not is_frozen(processes.cgroups, cgroup):  # and somebody else may thaw what is above it
            freeze_cgroups(processes.cgroups, cgroup)
        if await_frozen(processes.cgroups, cgroup, _FREEZE_SECONDS):
            return
        why = "a process of it hangs in the kernel"
    except OSError as error:
        why = str(error.strerror)
    thaw(processes, cgroup)
    raise UnsupportedError(f"it cannot be frozen: {why}")


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


def change_limits(
    runtime: Runtime, run: RunDirectory, processes: Processes, limits: LinuxContainerResources
) -> Resources:
    """Put limits into force. Raises InvalidInputError for what is refused, InvalidStateError if it has ended.

    Then those from before are in force, as they are if it is interrupted; where the kernel refuses that, too, what is
    in force instead is named.
    """
    cgroup = runtime.cgroup_of(processes)
    unapplied = find_unchangeable(run, limits, is_runc=runtime.kind == "runc")
    unapplied |= find_unapplied_limits(limits, is_unified=has_unified_cgroups())
    wanted = json.dumps(make_limits(limits, unapplied)).encode()
    path = run.join("limits.json")
    with open(open_made(path, os.O_WRONLY | os.O_TRUNC), "wb") as file:
        file.write(wanted)
    before = keep_limits(run, processes.cgroups, cgroup, tuple(limits.unified))
    is_done, left = False, dict[str, str]()
    try:
        outcome = runtime.call("update", "-r", path, processes.oci_id)
        is_done, why = outcome.code == 0, outcome.problem
        if is_done and lifts_quota(limits):
            is_done = False
            lift_quota(processes.cgroups, cgroup)
            is_done = True
    finally:
        left = {} if is_done else put_back(before)
        forget_limits(run)
    if is_done:
        return list_applied(limits, unapplied)
    if _has_ended(processes):
        raise InvalidStateError("the limits cannot be changed: the container has ended")
    told = "; ".join(f"{path} is {text.strip()!r}" for path, text in left.items())
    raise InvalidInputError(
        f"the limits cannot be changed: {why}; "
        + (f"those from before cannot be put back, either: {told}" if told else "those from before are in force")
    )


def find_unchangeable(run: RunDirectory, limits: LinuxContainerResources, *, is_runc: bool) -> dict[str, str]:
    """Return the limits that are not what the container was started with, and cannot become it while it runs."""
    started = read_config(run)
    found = {}
    if limits.oom_score_adj and limits.oom_score_adj != started.get("process", {}).get("oomScoreAdj"):
        found["oom_score_adj"] = "it is given at the start alone"
    hugepages = started.get("linux", {}).get("resources", {}).get("hugepageLimits", [])
    if is_runc and limits.hugepage_limits and make_hugepage_limits(limits) != hugepages:
        found["hugepage_limits"] = "runc's update passes over it: it is given at the start alone"
    return found


def reopen_log(run: RunDirectory, processes: Processes, log_path: str) -> None:
    """Have conmon begin a new log where the old one was renamed. Raises InvalidStateError if there is no conmon.

    Where it was not renamed conmon goes on with it: a new one would take its place, and all that is in it be lost.
    """
    _require_monitor(processes)
    if _require_place(processes.monitor.pid, log_path):
        return
    before = _inode(log_path)
    try:
        tell_conmon(run, "2 0 0\n")
    except OSError as error:
        raise InvalidStateError(f"its conmon cannot be asked: {error.strerror}") from error
    deadline = time.monotonic() + _REOPEN_SECONDS
    while _inode(log_path) in {0, before}:
        _require_monitor(processes)  # it ends with its container
        if time.monotonic() > deadline:
            raise InvalidStateError(
                f"its conmon has not begun a new log after {_REOPEN_SECONDS:g} s, and does so when it can go on:"
                " somebody who is attached and does not read holds it up"
            )
        time.sleep(0.002)


def _require_monitor(processes: Processes) -> None:
    """Raise InvalidStateError if the container's conmon has ended."""
    if not is_monitor_alive(processes):
        raise InvalidStateError("its conmon has ended, so nothing more comes to its log")


def _require_place(monitor: int, log_path: str) -> bool:
    """Return whether the log that conmon writes is still there, under its name.

    Raise InvalidStateError where conmon could not open a new one: it ends then, and nobody sees the container's end. It
    has the directory open that the log was in when the container was started.
    """
    directory = os.path.dirname(log_path)
    try:
        found, opened = os.stat(directory), [*_stat_open(monitor)]
        if not any(os.path.samestat(each, found) for each in opened):
            raise FileNotFoundError(errno.ENOENT, "it was removed, or replaced, since the container was started")
        with suppress(FileNotFoundError):
            there = os.lstat(log_path)
            if stat.S_ISDIR(there.st_mode):
                raise IsADirectoryError(errno.EISDIR, "a directory has the log's name")
            if any(os.path.samestat(each, there) for each in opened):
                return True
        with suppress(FileNotFoundError):
            first = os.lstat(f"{log_path}{_NEW_LOG}")
            if not stat.S_ISREG(first.st_mode) or first.st_size:  # another's log, say; what a conmon leaves is empty
                name = quote_path(f"{os.path.basename(log_path)}{_NEW_LOG}")
                raise FileExistsError(errno.EEXIST, f"conmon makes it as {name} first; move what is there away")
        probe = os.path.join(directory, f"{TEMPORARY_PREFIX}{os.urandom(8).hex()}")
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        os.unlink(probe)
    except OSError as error:
        raise InvalidStateError(f"no new log can be made in {quote_path(directory)}: {error.strerror}") from error
    return False


def _stat_open(pid: int) -> Iterator[os.stat_result]:
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            yield os.stat(f"/proc/{pid}/fd/{name}")


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return 0
