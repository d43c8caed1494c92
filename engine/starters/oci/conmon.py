"""conmon, one for each container: it has the runtime make the container, keeps its log, and writes down how it ends.

It is started with two pipes. A byte on the one lets it begin; on the other it answers with one line of JSON: the pid of
the container's first process, which the runtime holds, or why there is none.
"""

import json
import os
import resource
import select
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import FileIO

from limpet.engine.starters.oci.child import Child
from limpet.engine.starters.oci.command import LOOK_SECONDS, clean_environment, reap, shorten
from limpet.engine.starters.oci.exits import is_of_run, list_open, may_be
from limpet.engine.starters.oci.family import find_half_dead, have_go_on, kill_family
from limpet.engine.starters.oci.run_directory import RunDirectory
from limpet.engine.starters.orphans import reap_when_over, takes_orphans
from limpet.engine.starters.signals import let_go_on
from limpet.engine.state.durable import open_made
from limpet.engine.state.forks import undisturbed
from limpet.recovery.files import read_small_file
from limpet.recovery.host import has_ended, open_pidfd, read_stat, wait_for_end, wait_readable
from limpet.schema.errors import StartError, quote

_ANSWER_BYTES = 256 << 10
_GO_ALONE_SECONDS = 1.0
"""How long a conmon whose container is gone has to write the rest of the log and end by itself."""
_END_SECONDS = 5.0
_PF_EXITING = 0x4  # linux/sched.h: it has begun to end; in proc_pid_stat(5), field 9
_LOOK_SECONDS = 0.5
"""Between two looks at what a runtime that says nothing has come to."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What conmon is to have made."""

    conmon: str
    runtime: Sequence[str]
    """The runtime's command and its global options."""
    oci_id: str
    run: RunDirectory
    log_directory: int = -1
    """A descriptor of the directory that the log is in, -1 if there is none."""
    log_name: str = ""
    stdin: bool = False
    stdin_once: bool = False
    terminal: bool = False


def make_container(order: Order, timeout: float, meanwhile: Callable[[], None] = lambda: None) -> int:
    """Have conmon make the container, held by the runtime, and return the pid of its first process.

    `meanwhile` is called once conmon has written its pid, while the runtime is at work, unless that is over already.
    Raises StartError with what conmon or the runtime says, or if neither has answered after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    with ExitStack() as stack:
        said = stack.enter_context(open(open_made(order.run.join("conmon.log"), os.O_WRONLY | os.O_TRUNC), "wb"))
        with undisturbed():
            answer, answered = _pipe(stack)
            begun, begin = _pipe(stack)
            try:
                process = Child(
                    _command(order),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    pass_fds=[answered.fileno(), begun.fileno(), *([order.log_directory] if order.log_name else [])],
                    begins_users=True,
                    directory=order.run.join("exits"),
                    environment={
                        **clean_environment(),
                        "LC_ALL": "C.UTF-8",  # in others it takes no options that are not ASCII
                        "_OCI_SYNCPIPE": str(answered.fileno()),
                        "_OCI_STARTPIPE": str(begun.fileno()),
                    },
                )
            except OSError as error:
                raise StartError(f"{order.conmon} cannot be executed: {error.strerror}") from error
            answered.close()
            begun.close()
        try:
            with suppress(BrokenPipeError):
                begin.write(b"\0")
            if _await_own_pid(process, answer.fileno(), deadline):
                meanwhile()
            line = _read_line(answer.fileno(), deadline, order.run)
            _await_first(process, deadline)
        finally:
            if process.poll() is None:  # it forks once, and this one has nothing left to do
                process.kill()
                reap(process)
            process.close()
    return _read_pid(order.run, line, is_late=time.monotonic() >= deadline)


def _await_first(process: Child, deadline: float) -> None:
    """Wait until conmon's first process has ended, which writes the pid of the second, or it is too late."""
    while not process.wait(min(max(deadline - time.monotonic(), 0.1), LOOK_SECONDS)):
        if time.monotonic() >= deadline:
            break
        have_go_on(process.pid)


def _await_own_pid(process: Child, answer: int, deadline: float) -> bool:
    """Wait until conmon's first process has ended, which writes the pid of the second; False if it answers before."""
    if process.poll() is not None:
        return not wait_readable(answer, 0)
    poll = select.poll()
    poll.register(process.pidfd, select.POLLIN)
    poll.register(answer, select.POLLIN)
    while not (ready := {descriptor for descriptor, _ in poll.poll(LOOK_SECONDS * 1000)}):
        if time.monotonic() >= deadline:
            break
        have_go_on(process.pid)
    return ready == {process.pidfd}


def _command(order: Order) -> list[str]:
    run = order.run
    program, *options = order.runtime
    # Through our own descriptor: whoever may write in the log's directory leads conmon nowhere else with a link.
    log = f"k8s-file:/proc/self/fd/{order.log_directory}/{order.log_name}" if order.log_name else "none"
    # What it writes later has paths from where it works, for the state directory may be moved; which is not the
    # directory of the start itself, by which the runtimes of commands are told.
    return [
        order.conmon, "--api-version", "1", "-c", order.oci_id, "-u", order.oci_id, "-n", order.oci_id,
        "-r", program, *(each for option in options for each in ("--runtime-arg", option)),
        "-b", run.path, "-p", run.join("pidfile"), "-P", run.join("conmon-pidfile"),
        "--exit-dir", ".", "--persist-dir", "..", "-l", log, "--log-level", "error",
        "--full-attach",
        *(["-i"] if order.stdin else []),
        *(["--leave-stdin-open"] if order.stdin and not order.stdin_once else []),
        *(["-t"] if order.terminal else []),
    ]  # fmt: skip


def _pipe(stack: ExitStack) -> tuple[FileIO, FileIO]:
    """Make a pipe, and return its ends; what is open of it is closed with the stack."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    return stack.enter_context(FileIO(reader, "rb")), stack.enter_context(FileIO(writer, "wb"))


def _read_line(descriptor: int, deadline: float, run: RunDirectory) -> bytes:
    """Return the line that conmon writes, b"" if none came in time. Raises StartError if none can come."""
    line = bytearray()
    half_dead: set[tuple[int, bytes]] = set()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while not line.endswith(b"\n") and len(line) < _ANSWER_BYTES:
        if not poll.poll(min(max(deadline - time.monotonic(), 0), _LOOK_SECONDS) * 1000):
            if time.monotonic() >= deadline:
                return b""
            monitor = run.read_pid("conmon-pidfile")
            if monitor > 0 and (is_of_run(run, monitor) or _has_pipe(monitor, descriptor)):
                seen_before, half_dead = half_dead, find_half_dead(monitor)
                if seen_before & half_dead:
                    raise StartError("a thread of its first process was killed")
                have_go_on(monitor)
            continue
        chunk = os.read(descriptor, 65536)
        if not chunk:
            break
        line += chunk
    return bytes(line)


def _read_pid(run: RunDirectory, line: bytes, *, is_late: bool) -> int:
    """Return the pid that conmon answered. Raises StartError."""
    try:
        answer = json.loads(line)
        pid = answer["data"]
        said = str(answer.get("message") or "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pid, said = -1, ""
    if isinstance(pid, int) and not isinstance(pid, bool) and 0 < pid < 1 << 31:
        return pid
    if is_late:
        raise StartError("the runtime did not make the container in time")
    answered = f"conmon answered {quote(line.decode(errors='replace'))}" if line else "conmon ended without an answer"
    raise StartError(shorten(said) or shorten(_read_log(run)) or answered)


def _read_log(run: RunDirectory) -> str:
    try:
        return read_small_file(run.join("conmon.log"), 64 << 10).decode(errors="replace")
    except OSError:
        return ""


def free_of_limits(pid: int) -> None:
    """Give a conmon whose container is made, and held, all the time and room that it may have. Raises OSError.

    A limit of its engine's (ulimit) would end it amid its work: as its log gets to RLIMIT_FSIZE, or some day at
    RLIMIT_CPU. The container has those of the engine nevertheless, for it is there by now.
    """
    for number in (resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
        soft, hard = resource.prlimit(pid, number)
        if soft != hard:
            resource.prlimit(pid, number, (hard, hard))


def end_monitor(run: RunDirectory, *, now: bool = False) -> bool:
    """See to it that a container's conmon ends, with what it has started; say whether it has.

    It is given a moment to go by itself, unless `now`. It is known by having a file of this start open.
    """
    pid = run.read_pid("conmon-pidfile")
    if pid <= 0:
        return True
    try:
        with open_pidfd(pid) as pidfd:
            if takes_orphans() and _is_monitor(run, pid, pidfd):
                reap_when_over(pidfd)
            if not is_of_run(run, pid):
                # One amid its end has nothing open any more. That a stranger's is waited for does no harm.
                return not int(read_stat(pid)[6]) & _PF_EXITING or wait_for_end(pidfd, _END_SECONDS)
            if has_ended(pidfd):
                return True
            if not now:
                let_go_on(pid, pidfd)
            if not now and wait_for_end(pidfd, _GO_ALONE_SECONDS):
                return True
            kill_family(pid, pidfd)
            return wait_for_end(pidfd, _END_SECONDS)
    except (ProcessLookupError, FileNotFoundError):
        return True


def _is_monitor(run: RunDirectory, pid: int, pidfd: int) -> bool:
    """Return whether a process is the conmon of this start, also if it has ended and nobody has reaped it."""
    processes = run.read_processes()
    is_known = processes is not None and processes.monitor.pid == pid and may_be(processes.monitor, pidfd)
    return is_known or is_of_run(run, pid)


def _has_pipe(pid: int, descriptor: int) -> bool:
    """Return whether a process has our pipe open: a conmon has it before it has a file of its start."""
    return os.readlink(f"/proc/self/fd/{descriptor}") in list_open(pid)
