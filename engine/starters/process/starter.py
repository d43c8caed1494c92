"""The process starter: a container is a process group on this host, held at a gate until it is on disk."""

import fcntl
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from limpet.engine.starters.contract import Launch, Prepared
from limpet.engine.starters.process import gate
from limpet.engine.starters.process.cgroups.limits import apply_limits, remove_limits
from limpet.engine.starters.process.spec import make_spec, read_spec
from limpet.engine.state.durable import make_directory
from limpet.recovery.evidence import Process
from limpet.recovery.host import (
    Compare,
    compare,
    find_bundle_processes,
    identify,
    open_pidfd,
    read_bundle_variable,
    read_exit_code,
)
from limpet.recovery.probe import HostProbe
from limpet.schema.errors import NotFoundError, StartError, UnsupportedError, quote_path
from limpet.schema.identity import ProcessIdentity
from limpet.schema.runtime_spec import Spec

_log = logging.getLogger("limpet.starter")
_PROCESS_GROUP = 1 << 2  # PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9: the group, also after its leader was reaped
_FIRST_FREE_DESCRIPTOR = 10  # above all that the gate is given, so that no dup2 overwrites the source of another
_END_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class _Held:
    """Our ends of the pipes to a process at the gate."""

    gate: int
    report: int


class ProcessStarter:
    """Starts containers as process groups of this host. `environment` is the host's part of each container's.

    `compare` tells processes apart, here and in the probe; a drill gives one that is wrong.
    """

    name = "process"

    def __init__(self, environment: Mapping[str, str] | None = None, *, compare: Compare = compare) -> None:
        self._environment = dict(os.environ) if environment is None else environment
        self._compare = compare

    def make_config(self, launch: Launch) -> bytes:
        """Return config.json: command line, environment, user and root. Raises InvalidInputError."""
        return msgspec.json.encode(make_spec(launch, self._environment))

    def prepare(self, launch: Launch) -> Prepared:
        """Make the process and hold it at the gate, with its output going to the log.

        Raises StartError, StateDirectoryError if the bundle's config.json is damaged.
        """
        spec = read_spec(launch.bundle_path)
        try:
            pid, gate_end, report_end = _spawn(spec, launch.log_path)
        except OSError as error:
            name = quote_path(error.filename or "process")
            raise StartError(f"container {launch.id}: {name}: {error.strerror}") from error
        pidfd = os.pidfd_open(pid)
        try:
            requested = launch.resources
            return Prepared(
                identity=identify(pid, pidfd),
                pidfd=pidfd,
                resources=None if requested is None else apply_limits(launch.id, pid, requested),
                own=_Held(gate_end, report_end),
            )
        except BaseException as error:
            _end_held(pidfd, gate_end, report_end)
            if isinstance(error, OSError):
                raise StartError(f"container {launch.id}: its process cannot be identified: {error}") from error
            raise

    def go(self, prepared: Prepared) -> None:
        """Open the gate; returns once the program runs. Raises StartError with the reason if it does not."""
        held = prepared.own
        assert isinstance(held, _Held)
        try:
            with suppress(BrokenPipeError):  # it has ended already: the report says why, or nothing
                os.write(held.gate, b"g")
            problem = bytearray()
            while chunk := os.read(held.report, 4096):
                problem += chunk
        finally:
            os.close(held.gate)
            os.close(held.report)
        if problem:
            _reap(prepared.pidfd)
            os.close(prepared.pidfd)
            raise StartError(problem.decode(errors="replace"))

    def abort(self, prepared: Prepared) -> None:
        """Close the gate and wait until the process is gone."""
        held = prepared.own
        assert isinstance(held, _Held)
        _end_held(prepared.pidfd, held.gate, held.report)

    def adopt(self, identity: ProcessIdentity, bundle_path: str) -> int:  # noqa: ARG002  # others need it
        """Return a pidfd of the process with this identity. Raises NotFoundError if it is not there."""
        try:
            pidfd = os.pidfd_open(identity.pid)
        except OSError as error:
            raise NotFoundError(f"process {identity.pid}: {error.strerror}") from error
        found, detail = self._compare(identity, pidfd)
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

    def read_exit(self, pid: int, pidfd: int) -> int | None:
        """Return the exit code of a process that has ended, without reaping it; None if it is not known."""
        try:
            result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:  # adopted, or reaped by the program that we are part of
            result = None
        if result is None:
            return read_exit_code(pid, pidfd)
        return result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status

    def forget_exit(self, pidfd: int) -> None:
        """Reap the process if it is our child."""
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)

    def release(self, container_id: str, bundle_path: str) -> None:
        """Kill every process that is left of the container, and remove its cgroup."""
        _end_leftovers(bundle_path, find_bundle_processes().get(bundle_path, ()))
        left = remove_limits(container_id)
        if left:
            _log.warning("container %s: a cgroup is left: %s", container_id, "; ".join(left))

    def end_leftovers(self, containers_dir: str, has_ended: Callable[[str], bool]) -> None:
        """Kill processes of containers that have ended: a kill may have come between the end and this."""
        for bundle_path, pids in find_bundle_processes().items():
            directory, container_id = os.path.split(bundle_path)
            if directory == containers_dir and has_ended(container_id):
                _end_leftovers(bundle_path, pids)

    def probe(self, containers_dir: str) -> HostProbe:
        """Return what looks at the processes and the bundles."""
        return HostProbe(containers_dir, compare=self._compare)


def make_starter() -> ProcessStarter:
    """Return the starter as an engine has it by default."""
    return ProcessStarter()


def _end_leftovers(bundle_path: str, pids: Sequence[int]) -> None:
    """Kill those of `pids` that bear the bundle's path in their environment, and wait until they are gone."""
    for pid in pids:
        with suppress(ProcessLookupError, FileNotFoundError), open_pidfd(pid) as pidfd:
            # Looked at again now that the pidfd holds the process: the pid may be another's by now.
            if read_bundle_variable(pid) == bundle_path:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                _wait(pidfd, _END_TIMEOUT_SECONDS)


def _spawn(spec: Spec, log_path: str) -> tuple[int, int, int]:
    """Start the gate in a session of its own; return its pid and our ends of the gate and of the report."""
    process = spec.process
    plan = {
        "args": process.args,
        "env": process.env,
        "cwd": process.cwd,
        "root": spec.root.path,
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
