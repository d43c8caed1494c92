"""Commands that the runtime runs in a container: their files, and how they end, also when their engine was killed.

Each has files in the directory of the start: `exec-<token>.json`, what is to be run, with the environment,
`exec-<token>.pid`, which the runtime writes, and perhaps `exec-<token>.sock`. They are there as long as the engine that
asked lives and waits. Those of a dead engine tell the next one to look for the runtime, which is the command's parent,
and works in that directory.
"""

import json
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from limpet.engine.starters.oci.cgroups import list_processes as list_members
from limpet.engine.starters.oci.executable import MISSING, find_flaw
from limpet.engine.starters.oci.exits import FAILED_TO_EXECUTE, is_process, read_program
from limpet.engine.starters.oci.family import have_go_on, kill_family, list_children, list_processes
from limpet.engine.starters.oci.resources import lowest_oom_score
from limpet.engine.starters.oci.run_directory import Processes, RunDirectory
from limpet.engine.starters.oci.written import read_config
from limpet.engine.starters.orphans import reap_when_over, takes_orphans
from limpet.engine.state.durable import open_made
from limpet.recovery.host import open_pidfd, read_machine_clock, read_name, read_start_ticks, read_stat
from limpet.schema.errors import InvalidStateError

_PREFIX = "exec-"
_INIT = b"runc:["
"""How runc names what becomes the command; it may execute a copy of its own file."""
_ENDED = {b"Z", b"X"}
_CLOCK_SLACK_SECONDS = 0.1
_under_way: set[str] = set()
"""The tokens of this process's own commands: nobody's leftovers."""


class CommandFiles:
    """The files of one command, and who it is."""

    def __init__(self, run: RunDirectory, token: str, config: Mapping[str, Any] | None = None) -> None:
        self._run, self._token, self._config = run, token, config or {}
        self.process = run.join(f"{_PREFIX}{token}.json")
        self._door = f"{_PREFIX}{token}.sock"
        self.pid = run.join(f"{_PREFIX}{token}.pid")

    @classmethod
    def write(cls, run: RunDirectory, args: Sequence[str], size: tuple[int, int] | None) -> "CommandFiles":
        """Write down for the runtime what to run, as the container's user; with a terminal if that has a size.

        Raises InvalidStateError, OSError.
        """
        config = read_config(run)
        if not config:
            raise InvalidStateError(f"{run.path}: its config.json cannot be read")
        process = {**config["process"], "args": list(args), "terminal": size is not None}
        if size and all(size):
            process["consoleSize"] = {"height": size[0], "width": size[1]}
        if size is not None and not any(each.startswith("TERM=") for each in process["env"]):
            process["env"] = [*process["env"], "TERM=xterm"]
        files = cls(run, _make_token(), {**config, "process": process})
        _under_way.add(files._token)
        try:
            descriptor = open_made(files.process, os.O_WRONLY | os.O_EXCL)
            with open(descriptor, "wb") as file:
                file.write(json.dumps(process).encode())
        except BaseException:
            files.remove()
            raise
        return files

    @property
    def oom_score(self) -> int:
        """The command's oom_score_adj, which is the container's, as far as this process may give it."""
        given: int = self._config.get("process", {}).get("oomScoreAdj", 0)
        return max(given, lowest_oom_score())

    def arguments(self, oci_id: str, *, has_door: bool = False) -> list[str]:
        """Return the arguments for the runtime, which works in the directory of the start."""
        console = ["--console-socket", self._door] if has_door else []
        return ["exec", "--process", self.process, "--pid-file", self.pid, *console, oci_id]

    def listen(self) -> socket.socket:
        """Make the socket at which the runtime hands over the command's terminal. Raises OSError."""
        door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            directory = os.open(self._run.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                door.bind(f"/proc/self/fd/{directory}/{self._door}")  # a path may be longer than a socket's address
            finally:
                os.close(directory)
            door.listen(1)
        except BaseException:
            door.close()
            raise
        return door

    def read_pid(self) -> int:
        """Return the command's pid, 0 if the runtime has not written it."""
        return self._run.read_pid(f"{_PREFIX}{self._token}.pid")

    def has_ended(self, processes: Processes, cgroup: str) -> bool:
        """Return whether the command is known, and not there any more: its runtime may wait for what it has started."""
        pid = self.read_pid()
        try:
            return pid > 0 and (read_stat(pid)[0] in _ENDED or not is_inside(pid, processes, cgroup))
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:
            return False

    def find_flaw(self, code: int) -> str:
        """Return why a command that ended so cannot have been executed, "" if it was, or if that cannot be told."""
        if code != FAILED_TO_EXECUTE:
            return ""
        with suppress(OSError):
            flaw = find_flaw(self._config)
            return "" if flaw == MISSING else flaw
        return ""

    def remove(self) -> None:
        """Remove them. May be repeated."""
        for path in (self.process, self.pid, self._run.join(self._door)):
            with suppress(FileNotFoundError):
                os.unlink(path)
        _under_way.discard(self._token)

    def end_orphan(self, processes: Processes, cgroup: str) -> None:
        """Kill a command whose runtime was killed, with what it has started; nobody waits for it any more."""
        with suppress(OSError):
            pid, asked_at = self.read_pid(), _read_time(self._token)
            with open_pidfd(pid) as pidfd:
                started = read_start_ticks(pid) / os.sysconf("SC_CLK_TCK")
                is_younger = asked_at is not None and started >= asked_at / 1e9 - _CLOCK_SLACK_SECONDS
                if is_younger and is_inside(pid, processes, cgroup):
                    kill_family(pid, pidfd, sessions=True)


def _make_token() -> str:
    """Return a name that no other command has. It tells when this is, by the machine's clock, which nobody sets."""
    return f"{read_machine_clock():x}-{os.urandom(6).hex()}"


def _read_time(token: str) -> int | None:
    """Return what a token tells, in nanoseconds since the boot; None of one that an older version has made."""
    with suppress(ValueError):
        time_ns, dash, _ = token.partition("-")
        return int(time_ns, 16) if dash else None
    return None


def have_runtime_go_on(pid: int) -> None:
    """Continue a runtime that runs a command, as `family.have_go_on` does; but not the command."""
    with suppress(OSError):
        program = read_program(pid)
        have_go_on(pid, lambda each: read_program(each) == program or read_name(each).startswith(_INIT))


def is_inside(pid: int, processes: Processes, cgroup: str) -> bool:
    """Return whether a process is one of the container's, by its cgroup, or by a pid namespace of the container's own.

    Raises OSError.
    """
    if pid in list_members(processes.cgroups, cgroup):
        return True
    if not processes.has_own_pids:
        return False
    with open_pidfd(processes.init.pid) as pidfd:
        namespaces = [os.stat(f"/proc/{each}/ns/pid") for each in (pid, processes.init.pid)]
        return is_process(processes.init, pidfd, processes.cgroups) and os.path.samestat(*namespaces)


def find_left(runs: Iterable[RunDirectory]) -> list[tuple[RunDirectory, CommandFiles]]:
    """Return the commands of engines that were killed. Raises OSError."""
    found = []
    for run in runs:
        with suppress(FileNotFoundError, NotADirectoryError):
            names = [name for name in os.listdir(run.path) if name.startswith(_PREFIX)]
            tokens = {name.removeprefix(_PREFIX).partition(".")[0] for name in names}
            found += [(run, CommandFiles(run, token)) for token in sorted(tokens - _under_way)]
    return found


def end_left(
    left: Iterable[tuple[RunDirectory, CommandFiles]],
    name_cgroup: Callable[[Processes], str],
    is_ours: Callable[[Processes], bool],
) -> None:
    """Kill these commands with what they have started, and their runtimes, and remove their files. Raises OSError.

    In a copy of a state directory the files are there, too, and the commands are the original's: see `is_ours`.
    """
    left = list(left)
    for pid, run in _find_runtimes({os.path.realpath(run.path): run for run, _ in left}):
        processes = run.read_processes()
        with suppress(OSError), open_pidfd(pid) as pidfd:
            is_program = processes is not None and is_inside(pid, processes, name_cgroup(processes))
            # Asked after it was opened: it is the one. A shell of somebody who looks around there has a terminal.
            if not is_program and _is_in(pid, os.path.realpath(run.path)) and not int(read_stat(pid)[4]):
                kill_family(pid, pidfd, sessions=True)
    for run, files in left:
        processes = run.read_processes()
        if processes is not None and is_ours(processes):
            files.end_orphan(processes, name_cgroup(processes))
        files.remove()


def reap_lost(runs: Iterable[RunDirectory]) -> None:
    """Kill and reap commands whose runtime was killed before it had said which these are, if they have come to us.

    Such a child of this process is in the pid namespace of a container's own, which does not end before it is reaped.
    `runs` are those of all containers: the first process of one comes to us, too, when its conmon is killed. Raises
    OSError.
    """
    if not takes_orphans():
        return
    known = [processes for run in runs if (processes := run.read_processes()) is not None]
    namespaces = {each for processes in known if (each := _find_own_pids(processes))}
    firsts = {processes.init.pid for processes in known}
    for pid in list_children() if namespaces else ():
        with suppress(OSError), open_pidfd(pid) as pidfd:
            is_lost = pid not in firsts and _stat_pids(pid) in namespaces
            if is_lost and int(read_stat(pid)[1]) == os.getpid():  # asked after it was opened: it is the one
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                reap_when_over(pidfd)


def _find_own_pids(processes: Processes) -> tuple[int, int] | None:
    """Return what tells the pid namespace of a container's own from others, None if it has none, or has ended."""
    with suppress(OSError):
        if processes.has_own_pids:
            with open_pidfd(processes.init.pid) as pidfd:
                found = _stat_pids(processes.init.pid)
                return found if is_process(processes.init, pidfd, processes.cgroups) else None
    return None


def _stat_pids(pid: int) -> tuple[int, int]:
    found = os.stat(f"/proc/{pid}/ns/pid")
    return found.st_dev, found.st_ino


def _find_runtimes(runs: Mapping[str, RunDirectory]) -> Iterator[tuple[int, RunDirectory]]:
    """Yield the runtimes of commands, by their working directory, that are not this process's own."""
    for pid, parent, session in list_processes():
        if pid == session and parent != os.getpid():
            for path, run in runs.items():
                if _is_in(pid, path):
                    yield pid, run


def _is_in(pid: int, path: str) -> bool:
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/cwd") == path
    return False
