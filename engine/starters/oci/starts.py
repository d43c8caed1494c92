"""How a container of an OCI runtime is started: conmon has the runtime make it and hold it, then it is let go."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from limpet.engine.starters.contract import Launch, Prepared
from limpet.engine.starters.environment import require_secrets
from limpet.engine.starters.log_directory import open_log_directory
from limpet.engine.starters.oci.cgroups import find_frozen_place, may_make_cgroups
from limpet.engine.starters.oci.command import Outcome
from limpet.engine.starters.oci.conmon import Order, free_of_limits, make_container
from limpet.engine.starters.oci.ends import Ends
from limpet.engine.starters.oci.executable import find_flaw
from limpet.engine.starters.oci.exits import (
    Program,
    await_program,
    explain_never_ran,
    is_monitor_alive,
    is_of_run,
    let_held_go_on,
    read_cgroups,
    read_conmon_exit,
    read_program,
    settle_program,
)
from limpet.engine.starters.oci.family import have_go_on, is_child
from limpet.engine.starters.oci.namespaces import require_namespace
from limpet.engine.starters.oci.resources import find_unapplied_limits, list_applied
from limpet.engine.starters.oci.root import to_oci_id
from limpet.engine.starters.oci.rootless import adapt, is_rootless
from limpet.engine.starters.oci.run_directory import KnownRuns, Processes, RunDirectory, make_run_directory
from limpet.engine.starters.oci.runtime import Runtime
from limpet.engine.starters.oci.sandboxes import SandboxHoldings, has_first, is_pin, require_pinned
from limpet.engine.starters.oci.spec import complete
from limpet.engine.starters.oci.target import open_target
from limpet.engine.starters.oci.tools import has_unified_cgroups
from limpet.engine.starters.oci.written import PLAIN_CONFIG
from limpet.engine.starters.pidfds import KEPT_DESCRIPTORS
from limpet.engine.state.descriptors import close_all, has_free_descriptors
from limpet.engine.state.durable import open_made
from limpet.engine.state.names import OCI
from limpet.recovery.files import read_small_file
from limpet.recovery.host import has_ended, identify, read_exit_code, read_stat, wait_for_end
from limpet.schema.errors import StartError, StateDirectoryError, UnsupportedError, quote_path
from limpet.schema.identity import ProcessIdentity
from limpet.schema.layout import CONFIG_BYTES, CONFIG_FILE, ROOTFS
from limpet.schema.telling import get_log

_log = get_log("limpet.starter.oci")
_EXECUTE_SECONDS = 10.0
"""How long a process that was let go may take to execute its program: a slow disk."""
_LATE_SECONDS = 0.1
"""The same after a start that has failed: it may have come far enough."""
_EXIT_FILE_SECONDS = 2.0
_END_SECONDS = 5.0
_LOOK_SECONDS, _LOOK_AGAIN_SECONDS = 0.01, 0.001
"""How long to look at a conmon that was just started: less than any runtime needs to make a container."""
_UNEXPLAINED = ("in time", "ended before its program", "was killed", "read from the init process")
"""What is in the texts of starts that fail somewhere on the way; the last is crun's."""
_NOT_EXECUTED = re.compile(r"\bexec\b.*permission denied", re.IGNORECASE)


@dataclass(frozen=True)
class Held:
    """A container that is made and not started."""

    container_id: str
    run: RunDirectory
    processes: Processes


def held_of(prepared: Prepared) -> Held:
    """Return what `Starts.prepare` has made."""
    assert isinstance(prepared.own, Held)
    return prepared.own


class _Look:
    """What is found out of a start while the runtime makes the container, and nobody has to wait for it."""

    def __init__(self) -> None:
        self.flaw: str | None = None
        self.monitor: ProcessIdentity | None = None
        self.pidfd = -1
        """The monitor's; whoever made this closes it."""

    def take(self, run: RunDirectory, config: Mapping[str, Any], *, seconds: float = 0) -> None:
        """Look, for so long until conmon has opened its doors. May be repeated; what cannot be seen stays as it is."""
        self.flaw = _find_flaw(config)
        pid, deadline = run.read_pid("conmon-pidfile"), time.monotonic() + seconds
        if pid <= 0 or self.pidfd >= 0:
            return
        with suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                while not (is_ours := is_of_run(run, pid)) and time.monotonic() < deadline:
                    time.sleep(_LOOK_AGAIN_SECONDS)
                if is_ours:  # asked after it was opened: it is the one
                    self.monitor, self.pidfd = identify(pid, pidfd), pidfd
            finally:
                if self.pidfd != pidfd:
                    os.close(pidfd)

    def keep(self) -> int:
        """Return the monitor's pidfd for the caller to close, -1 if the last descriptors are to be kept for steps."""
        if not has_free_descriptors(KEPT_DESCRIPTORS):
            close_all((self.pidfd,))
            self.pidfd = -1
        kept, self.pidfd = self.pidfd, -1
        return kept


class Starts:
    """Starts containers. Thread-safe; one container by one thread at a time."""

    def __init__(self, runtime: Runtime, runs: KnownRuns, ends: Ends, holdings: SandboxHoldings) -> None:
        self._runtime = runtime
        self._runs = runs
        self._ends = ends
        self._holdings = holdings

    def prepare(self, launch: Launch) -> Prepared:
        """Have conmon and the runtime make the container, its first process held. Raises as the starter's does."""
        try:
            with _naming_host(launch), _hinting_at_seccomp(launch):
                return self._prepare(launch)
        except UnsupportedError as error:
            raise StartError(str(error)) from error
        except ProcessLookupError as error:
            raise StartError("its first process ended before its program was executed") from error
        except OSError as error:
            what = quote_path(error.filename) if error.filename else "its process cannot be made"
            raise StartError(f"{what}: {error.strerror}") from error

    def go(self, prepared: Prepared) -> None:
        """Have the runtime let it run; returns once the program is executed. Raises StartError if it is not."""
        held = held_of(prepared)
        try:
            why = self._go(held, prepared)
        except OSError as error:
            why = f"{quote_path(error.filename or self._runtime.program)}: {error.strerror}"
        except UnsupportedError as error:
            why = str(error)
        if why:
            self._mark_never_ran(held)  # before it is ended, which looks like an end of its program
            self._ends.discard(held.container_id, held.run)
            _close(prepared)
            raise StartError(why)

    def abort(self, prepared: Prepared) -> None:
        """End the container that is held, and its conmon."""
        held = held_of(prepared)
        try:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(prepared.pidfd, signal.SIGKILL)
            self._ends.discard(held.container_id, held.run)
        finally:
            _close(prepared)

    def _prepare(self, launch: Launch) -> Prepared:
        secrets = require_secrets(launch.secret_env)
        self._runtime.require_conmon()
        self._ends.end(launch.id)  # what a start that was cut short has left
        shutil.rmtree(os.path.join(launch.bundle_path, OCI), ignore_errors=True)
        with open_target(launch, self._find_target) as target:
            config = self._complete(launch, target)
            if frozen := find_frozen_place(config["linux"].get("cgroupsPath", "/")):
                raise StartError(f"the cgroup {quote_path(frozen)} is frozen, and so would be its processes; thaw it")
            for each in config["linux"]["namespaces"]:
                if is_pin(each.get("path", "")):
                    require_pinned(each["path"])
                require_namespace(each["type"], each.get("path", ""))
                if each["type"] == "pid" and is_pin(each.get("path", "")) and not has_first(each["path"]):
                    raise StartError(
                        "the first process of its sandbox's pid namespace has ended, and no other can begin there; make"
                        " another sandbox"
                    )
            return self._make(launch, config, secrets)

    def _make(self, launch: Launch, config: Mapping[str, Any], secrets: Mapping[str, str]) -> Prepared:
        conmon = self._runtime.conmon
        directory = make_run_directory(launch.bundle_path)
        look = _Look()
        try:
            with self._written(directory, config, secrets), _log_of(launch) as (log_directory, log_name):
                pid = make_container(
                    Order(
                        conmon=conmon,
                        runtime=self._runtime.command_with_root(),
                        oci_id=to_oci_id(launch.id),
                        run=directory,
                        log_directory=log_directory,
                        log_name=log_name,
                        stdin=launch.metadata.config.stdin,
                        stdin_once=launch.metadata.config.stdin_once,
                        terminal=launch.metadata.config.tty,
                    ),
                    self._runtime.timeout,
                    meanwhile=lambda: look.take(directory, config, seconds=_LOOK_SECONDS),
                )
            return self._identify(launch, directory, pid, config, look)
        except BaseException:
            self._ends.discard(launch.id, directory)
            raise
        finally:
            close_all([look.pidfd] if look.pidfd >= 0 else [])

    def _find_target(self, container_id: str, init: ProcessIdentity) -> Processes | None:
        found = self._runs.find(self._runtime.bundle(container_id), init)
        return found[1] if found else None

    def _complete(self, launch: Launch, target: str) -> dict[str, Any]:
        path = os.path.join(launch.bundle_path, CONFIG_FILE)
        try:
            spec = json.loads(read_small_file(path, CONFIG_BYTES))
            held = self._holdings.mounts_for(launch.sandbox.id, launch.namespaces) if launch.sandbox else {}
            whole = complete(
                spec,
                launch,
                cgroup=self._runtime.cgroup_path(launch),
                is_unified=has_unified_cgroups(),
                held=held,
                target=target,
            )
            return adapt(whole) if is_rootless() else whole
        except OSError as error:
            raise StateDirectoryError(f"bundle {launch.bundle_path}: {error.strerror} ({path})") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StateDirectoryError(
                f"{path} is damaged: {error!r}; release the container and make it anew"
            ) from error

    @contextmanager
    def _written(
        self, directory: RunDirectory, config: Mapping[str, Any], secrets: Mapping[str, str]
    ) -> Iterator[None]:
        """Have the config at its place while the runtime reads it; with secrets, which are on no disk, in memory.

        Raises UnsupportedError for a runtime that would keep a copy of them.
        """
        path = directory.join(CONFIG_FILE)
        _write_private(path, json.dumps(config).encode())
        if not secrets:
            yield
            return
        if self._runtime.kind != "runc":
            raise UnsupportedError("secret_env: crun keeps a copy of its config on disk; use runc for this container")
        process = config["process"]
        env = [each for each in process["env"] if each.partition("=")[0] not in secrets]
        env += [f"{name}={value}" for name, value in secrets.items()]
        whole = json.dumps({**config, "process": {**process, "env": env}}).encode()
        descriptor = os.memfd_create("config", os.MFD_CLOEXEC)
        link = directory.join("config.link")
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(whole)
            os.rename(path, directory.join(PLAIN_CONFIG))
            os.symlink(f"/proc/{os.getpid()}/fd/{descriptor}", link)
            os.rename(link, path)
            yield
        finally:
            os.close(descriptor)
            os.replace(directory.join(PLAIN_CONFIG), path)

    def _identify(
        self, launch: Launch, directory: RunDirectory, pid: int, config: Mapping[str, Any], look: _Look
    ) -> Prepared:
        """Write down which processes these are: whoever comes after a kill knows them by that."""
        if look.monitor is None:
            look.take(directory, config)
        monitor = look.monitor
        if monitor is None and directory.read_pid("conmon-pidfile") <= 0:
            raise StartError("conmon has not written its pid")
        pidfd = os.pidfd_open(pid)
        try:
            # Whatever conmon answers, nobody else's process is signalled as this container's.
            if monitor is None or int(read_stat(pid)[1]) != monitor.pid or has_ended(look.pidfd):
                raise StartError(f"conmon answered {pid}, which is no process of its own")
            free_of_limits(monitor.pid)
            processes = Processes(
                init=identify(pid, pidfd),
                monitor=monitor,
                held_program=read_program(pid),
                entry=os.path.join(self._runtime.root.make(), to_oci_id(launch.id)),
                oci_id=to_oci_id(launch.id),
                cgroups=read_cgroups(pid),
                cgroup=config["linux"].get("cgroupsPath", ""),
                flaw=look.flaw,
                has_own_pids={"type": "pid"} in config["linux"]["namespaces"],
                is_plain="hooks" not in config and "intelRdt" not in config["linux"],
            )
            self._runs.write(launch.bundle_path, directory, processes)
            limits = launch.resources
            return Prepared(
                identity=processes.init,
                pidfd=pidfd,
                monitor=look.keep(),
                resources=None
                if limits is None
                else list_applied(limits, find_unapplied_limits(limits, is_unified=has_unified_cgroups())),
                own=Held(launch.id, directory, processes),
            )
        except BaseException as error:
            # Then /proc says nothing more of it, and does not a moment before, either.
            is_gone = isinstance(error, FileNotFoundError) and str(error.filename).startswith(f"/proc/{pid}/")
            is_over = is_gone and wait_for_end(pidfd, _END_SECONDS)
            if is_gone and not is_over and monitor is not None:
                _kill_hidden(monitor, pid, pidfd)
            close_all((pidfd,))
            if is_over:
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from error
            if is_gone:
                raise StartError(
                    f"its first process, {pid}, lives and /proc does not show it, for it is another user's: /proc is"
                    " mounted with hidepid (proc(5)); have this user's group named there by gid=, or leave the"
                    " container's user out"
                ) from error
            raise

    def _go(self, held: Held, prepared: Prepared) -> str:
        """Have it started; return why its program was not executed, "" if it was. Raises OSError."""
        held.run.mark_starting()
        outcome = self._start(held)
        found = await_program(
            held.processes,
            min(_EXECUTE_SECONDS, self._runtime.timeout) if outcome.code == 0 else _LATE_SECONDS,
            has_it_go_on=True,
        )
        if found is Program.HELD:
            found = settle_program(held.processes, _END_SECONDS)
        if found is Program.HELD:
            return outcome.problem if outcome.code != 0 else "it was let go, and has not executed its program in time"
        if found is Program.ENDED:
            if outcome.code != 0:
                return outcome.problem
            why = self._explain_end(held, prepared)
            if why is None:  # its end is told as what it turns out to be
                return ""
            if why:
                return why
        self._runs.note_executed(self._runtime.bundle(held.container_id), held.processes.init)
        with suppress(OSError):  # a full disk; that it was let go is on it
            held.run.mark("executed")
        return ""

    def _start(self, held: Held) -> Outcome:
        """Run the runtime's `start`. The mark is locked while it runs, also if this engine does not outlive it."""

        def have_both_go_on(runtime: int) -> None:
            have_go_on(runtime)
            let_held_go_on(held.processes)

        lock = os.open(held.run.join("starting"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._runtime.call("start", held.processes.oci_id, pass_fds=(lock,), see_to=have_both_go_on)
        finally:
            os.close(lock)

    def _mark_never_ran(self, held: Held) -> None:
        try:
            held.run.mark_never_ran()
        except OSError as error:
            _log.warning("container %s: that it never ran cannot be written down: %s", held.container_id, error)

    def _explain_end(self, held: Held, prepared: Prepared) -> str | None:
        """Return why a process that ended at once has not executed its program, "" if it has, None if nothing tells."""
        deadline = time.monotonic() + _EXIT_FILE_SECONDS
        wait_for_end(prepared.pidfd, _EXIT_FILE_SECONDS)  # what it had executed is gone a little earlier
        # The kernel tells sooner than conmon, but not every kernel does once conmon has reaped the process.
        while (code := read_exit_code(prepared.identity.pid, prepared.pidfd)) is None:
            is_last = not is_monitor_alive(held.processes) or time.monotonic() > deadline
            ended = read_conmon_exit(held.run)  # also the last act of a conmon that has ended
            if ended is not None or is_last:
                code = None if ended is None else ended.code
                break
            time.sleep(0.002)
        return None if code is None else explain_never_ran(held.run, held.processes, code)


@contextmanager
def _hinting_at_seccomp(launch: Launch) -> Iterator[None]:
    """Name the config's own seccomp profile where a runtime comes to no end that anybody could explain."""
    try:
        yield
    except (StartError, ProcessLookupError) as error:
        linux = launch.metadata.config.linux
        profile = linux and linux.security_context and linux.security_context.seccomp
        why = "its first process ended before its program was executed" if isinstance(error, OSError) else str(error)
        if not profile or not profile.localhost_ref or not any(each in why for each in _UNEXPLAINED):
            raise
        path = quote_path(profile.localhost_ref)
        raise StartError(f"{why}; perhaps its seccomp profile {path} forbids what the runtime needs") from error


@contextmanager
def _naming_host(launch: Launch) -> Iterator[None]:
    """Name what of this host is in the way where a runtime says that something is not permitted, or not there."""
    try:
        yield
    except StartError as error:
        why, root = str(error), os.path.join(launch.bundle_path, ROOTFS)
        if _NOT_EXECUTED.search(why) and _is_noexec(root):
            raise StartError(
                f"{why}: nothing can be executed on the file system of {quote_path(root)}, which is mounted noexec;"
                " have the state directory on another"
            ) from error
        if "cgroup" in why and os.geteuid() == 0 and not may_make_cgroups():
            raise StartError(
                f"{why}: in /sys/fs/cgroup nothing can be made, as where it is mounted read-only"
            ) from error
        raise


def _is_noexec(path: str) -> bool:
    with suppress(OSError):
        return bool(os.statvfs(path).f_flag & os.ST_NOEXEC)
    return False


def _kill_hidden(monitor: ProcessIdentity, pid: int, pidfd: int) -> None:
    """Kill a first process that /proc does not show, if it is its conmon's child: its runtime takes it for ended."""
    with suppress(OSError):
        if is_child(pid, monitor.pid):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            wait_for_end(pidfd, _END_SECONDS)


def _close(prepared: Prepared) -> None:
    close_all(each for each in (prepared.pidfd, prepared.monitor) if each >= 0)


def _find_flaw(config: Mapping[str, Any]) -> str | None:
    """Return why the kernel cannot execute its program now, "" if it can; None if that cannot be found out now."""
    with suppress(OSError):
        return find_flaw(config)
    return None


def _write_private(path: str, data: bytes) -> None:
    descriptor = open_made(path, os.O_WRONLY | os.O_EXCL)
    with open(descriptor, "wb") as file:
        file.write(data)


@contextmanager
def _log_of(launch: Launch) -> Iterator[tuple[int, str]]:
    """Make the log's file if there is none, and hold its directory; -1 and "" if the container keeps no log."""
    if not launch.log_path:
        yield -1, ""
        return
    descriptor, name = open_log_directory(launch.log_directory or os.path.dirname(launch.log_path), launch.log_path)
    try:
        os.close(open_made(name, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor))
        yield descriptor, name
    finally:
        os.close(descriptor)
