"""The process starter: a container is a process group on this host, held at a gate until it is on disk."""

import fcntl
import json
import logging
import os
import select
import signal
import sys
from contextlib import suppress

from limpet.engine.lifecycle.command_line import BundleConfig
from limpet.engine.starters import Prepared
from limpet.engine.starters.process import gate
from limpet.engine.starters.process.cgroups.limits import apply_limits, remove_limits
from limpet.engine.state.durable import make_directory
from limpet.recovery.evidence import Process
from limpet.recovery.host import compare, find_bundle_processes, identify, open_pidfd, read_bundle_variable
from limpet.schema.cri import LinuxContainerResources
from limpet.schema.errors import NotFoundError, StartError, UnsupportedError, quote_path
from limpet.schema.identity import ProcessIdentity

_log = logging.getLogger("limpet.starter")
_PROCESS_GROUP = 1 << 2  # PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9: the group, also after its leader was reaped
_FIRST_FREE_DESCRIPTOR = 10  # above all that the gate is given, so that no dup2 overwrites the source of another
_END_TIMEOUT_SECONDS = 5.0


class ProcessStarter:
    """Starts containers as process groups of this host."""

    def prepare(
        self,
        container_id: str,
        bundle_path: str,  # noqa: ARG002  # for runtimes that run a bundle; a process needs its config alone
        config: BundleConfig,
        log_path: str,
        requested: LinuxContainerResources | None,
    ) -> Prepared:
        """Make the process and hold it at the gate, with its output going to the log. Raises StartError."""
        try:
            pid, gate_end, report_end = _spawn(config, log_path)
        except OSError as error:
            name = quote_path(error.filename or "process")
            raise StartError(f"container {container_id}: {name}: {error.strerror}") from error
        pidfd = os.pidfd_open(pid)
        try:
            resources = apply_limits(container_id, pid, requested) if requested is not None else None
            return Prepared(
                identity=identify(pid, pidfd),
                pidfd=pidfd,
                gate=gate_end,
                report=report_end,
                resources=resources,
            )
        except BaseException as error:
            _end_held(pidfd, gate_end, report_end)
            if isinstance(error, OSError):
                raise StartError(f"container {container_id}: its process cannot be identified: {error}") from error
            raise

    def go(self, prepared: Prepared) -> None:
        """Open the gate; returns once the program runs. Raises StartError with the reason if it does not."""
        try:
            with suppress(BrokenPipeError):  # it has ended already: the report says why, or nothing
                os.write(prepared.gate, b"g")
            problem = bytearray()
            while chunk := os.read(prepared.report, 4096):
                problem += chunk
        finally:
            os.close(prepared.gate)
            os.close(prepared.report)
        if problem:
            _reap(prepared.pidfd)
            os.close(prepared.pidfd)
            raise StartError(problem.decode(errors="replace"))

    def abort(self, prepared: Prepared) -> None:
        """Close the gate and wait until the process is gone."""
        _end_held(prepared.pidfd, prepared.gate, prepared.report)

    def adopt(self, identity: ProcessIdentity, bundle_path: str) -> int:
        """Return a pidfd of the process with this identity. Raises NotFoundError if it is not there."""
        try:
            pidfd = os.pidfd_open(identity.pid)
        except OSError as error:
            raise NotFoundError(f"process {identity.pid}: {error.strerror}") from error
        found, detail = compare(identity, pidfd, bundle_path)
        if found is not Process.ALIVE:
            os.close(pidfd)
            raise NotFoundError(f"process {identity.pid} cannot be shown to be the container's: {detail}")
        return pidfd

    def signal(self, pidfd: int, number: int) -> None:
        """Send a signal to the process group that the pidfd's process leads.

        Through the pidfd, so that nobody else can be hit. Raises UnsupportedError for a process that may not be
        signalled.
        """
        try:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number, None, _PROCESS_GROUP)
        except PermissionError as error:
            raise UnsupportedError(f"signal {number}: {error.strerror}; run as the container's user") from error
        except OSError:  # EINVAL: a kernel before 6.9, which only signals the leader through its pidfd
            _signal_group_by_number(pidfd, number)

    def release(self, container_id: str, bundle_path: str) -> None:
        """Kill every process that is left of the container, and remove its cgroup."""
        end_leftovers(bundle_path, find_bundle_processes().get(bundle_path, ()))
        left = remove_limits(container_id)
        if left:
            _log.warning("container %s: a cgroup is left: %s", container_id, "; ".join(left))


def end_leftovers(bundle_path: str, pids: "tuple[int, ...] | list[int]") -> None:
    """Kill those of `pids` that bear the bundle's path in their environment, and wait until they are gone."""
    for pid in pids:
        with suppress(ProcessLookupError, FileNotFoundError), open_pidfd(pid) as pidfd:
            # Looked at again now that the pidfd holds the process: the pid may be another's by now.
            if read_bundle_variable(pid) == bundle_path:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                _wait(pidfd, _END_TIMEOUT_SECONDS)


def _spawn(config: BundleConfig, log_path: str) -> tuple[int, int, int]:
    """Start the gate in a session of its own; return its pid and our ends of the gate and of the report."""
    process = config.process
    plan = {
        "args": process.args,
        "env": process.env,
        "cwd": process.cwd,
        "root": config.root.path,
        "uid": process.user.uid,
        "gid": process.user.gid,
        "groups": process.user.additional_gids,
        "setgroups": os.geteuid() == 0,
    }
    opened: list[int] = []
    kept: list[int] = []
    try:
        gate_read, gate_write = _high_pipe(opened)
        report_read, report_write = _high_pipe(opened)
        opened.append(plan_file := _high(os.memfd_create("limpet-plan", os.MFD_CLOEXEC)))
        os.write(plan_file, json.dumps(plan).encode(errors="surrogateescape"))
        os.lseek(plan_file, 0, os.SEEK_SET)
        opened.append(log := _open_log(log_path))
        opened.append(null := _high(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)))
        targets = [(null, 0), (log, 1), (log, 2)]
        targets += [(gate_read, gate.GATE), (report_write, gate.REPORT), (plan_file, gate.PLAN)]
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", gate.__file__],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, source, target) for source, target in targets],
            setsid=True,
            setsigmask=(),
            setsigdef=[number for number in signal.valid_signals() if number not in _UNBLOCKABLE],
        )
        kept = [gate_write, report_read]
        return pid, gate_write, report_read
    finally:
        for descriptor in opened:
            if descriptor not in kept:
                os.close(descriptor)


_UNBLOCKABLE = {signal.SIGKILL, signal.SIGSTOP}


def _open_log(path: str) -> int:
    if not path:
        return _high(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC))
    make_directory(os.path.dirname(path))
    # O_NONBLOCK: a named pipe that nobody reads would keep us waiting; as it is, it is refused.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    log = _high(os.open(path, flags, 0o600))
    os.set_blocking(log, True)
    return log


def _high_pipe(opened: list[int]) -> tuple[int, int]:
    ends = os.pipe2(os.O_CLOEXEC)
    read, write = _high(ends[0]), _high(ends[1])
    opened += (read, write)
    return read, write


def _high(descriptor: int) -> int:
    """Move a descriptor out of the way of those that the gate is given."""
    if descriptor >= _FIRST_FREE_DESCRIPTOR:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_DESCRIPTOR)
    finally:
        os.close(descriptor)


def _end_held(pidfd: int, gate_end: int, report_end: int) -> None:
    os.close(gate_end)
    os.close(report_end)
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    _reap(pidfd)
    os.close(pidfd)


def _reap(pidfd: int) -> None:
    with suppress(ChildProcessError):  # the host program reaps all children itself
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)


def _wait(pidfd: int, timeout_seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_seconds * 1000))


def _signal_group_by_number(pidfd: int, number: int) -> None:
    """Signal the group by its number while its leader, seen alive through the pidfd, keeps that number taken."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    pid = int(fields["Pid"])
    if pid > 0 and not _wait(pidfd, 0):
        with suppress(ProcessLookupError):
            os.killpg(pid, number)
