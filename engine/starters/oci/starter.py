"""The OCI starter: a container is what an OCI runtime (runc, crun) makes of its config, under a conmon of its own.

prepare: conmon has the runtime make the container, whose first process is held by the runtime; which processes these
are is written down. go: the runtime lets it run. The ends are seen by conmon, whether or not an engine lives.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from limpet.engine.starters.abilities import Executed, Holdings, Session, Stats
from limpet.engine.starters.contract import Exit, Launch, Prepared
from limpet.engine.starters.environment import require_secrets
from limpet.engine.starters.log_directory import open_log_directory
from limpet.engine.starters.oci import abilities, calls
from limpet.engine.starters.oci.cgroups import (
    find_frozen_place,
    is_frozen,
    make_lines,
    remove,
    require_cgroup_parent,
    signal_processes,
    thaw,
)
from limpet.engine.starters.oci.cni import PLUGINS, Plugins
from limpet.engine.starters.oci.command import Outcome, is_any_left, run
from limpet.engine.starters.oci.commands import end_left, find_left, reap_lost
from limpet.engine.starters.oci.conmon import Order, end_monitor, free_of_limits, is_of_run, make_container
from limpet.engine.starters.oci.executable import find_flaw
from limpet.engine.starters.oci.exits import (
    Program,
    await_program,
    explain_never_ran,
    is_monitor_alive,
    is_process,
    let_held_go_on,
    let_monitor_go_on,
    may_be,
    observe_program,
    read_cgroups,
    read_conmon_exit,
    read_program,
    settle_program,
)
from limpet.engine.starters.oci.family import have_go_on
from limpet.engine.starters.oci.mounts import keep_sysfs_writable
from limpet.engine.starters.oci.namespaces import (
    config_in_sandbox,
    make_namespaces,
    require_given,
    require_namespace,
)
from limpet.engine.starters.oci.places import require_places
from limpet.engine.starters.oci.probe import BundleWitness
from limpet.engine.starters.oci.ranges import require_room
from limpet.engine.starters.oci.resources import find_unapplied_limits, list_applied
from limpet.engine.starters.oci.root import RuntimeRoot, remove_entry, to_oci_id
from limpet.engine.starters.oci.rootless import adapt, is_rootless, require_own_pids
from limpet.engine.starters.oci.run_directory import (
    KnownRuns,
    Processes,
    RunDirectory,
    list_runs,
    make_run_directory,
)
from limpet.engine.starters.oci.sandboxes import (
    SandboxHoldings,
    choose_kinds,
    has_first,
    is_pin,
    require_seen,
    try_sysctls,
)
from limpet.engine.starters.oci.sessions import AttachedSession
from limpet.engine.starters.oci.spec import complete, make_spec, require_ids_of_runc
from limpet.engine.starters.oci.target import open_target
from limpet.engine.starters.oci.tools import Tools, command_of, has_unified_cgroups
from limpet.engine.starters.oci.unapplied import find_unapplied
from limpet.engine.starters.oci.written import PLAIN_CONFIG, read_config
from limpet.engine.starters.orphans import reap_when_over, takes_orphans
from limpet.engine.starters.pidfds import KEPT_DESCRIPTORS, adopt_process
from limpet.engine.starters.process.root_files import make_room, write_root_files
from limpet.engine.state.descriptors import close_all, has_free_descriptors
from limpet.engine.state.durable import open_made
from limpet.engine.state.names import CONTAINERS, OCI, SANDBOXES
from limpet.engine.state.turn import require_wait
from limpet.recovery.files import read_small_file
from limpet.recovery.host import has_ended, identify, open_pidfd, read_exit_code, read_stat, wait_for_end
from limpet.recovery.probe import HostProbe
from limpet.schema.cri import LinuxContainerResources
from limpet.schema.errors import (
    InvalidInputError,
    InvalidStateError,
    LimpetError,
    NotFoundError,
    ResourcesError,
    StartError,
    StateDirectoryError,
    UnsupportedError,
    quote,
    quote_path,
)
from limpet.schema.file_name import file_name
from limpet.schema.identity import ProcessIdentity
from limpet.schema.layout import CONFIG_BYTES, CONFIG_FILE, ROOTFS
from limpet.schema.metadata import SandboxMetadata, require_name
from limpet.schema.status import Resources
from limpet.schema.telling import get_log

_log = get_log("limpet.starter.oci")
TIMEOUT_SECONDS = 30.0
"""How long the runtime may take for one step, unless the caller says otherwise."""
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
_CONMON_SECONDS = 0.5
"""How long a conmon that was just started may take to write its pid."""


@dataclass(frozen=True)
class _Held:
    """A container that is made and not started."""

    container_id: str
    run: RunDirectory
    processes: Processes


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


class OciStarter:
    """Runs containers with an OCI runtime, each under conmon. Thread-safe.

    `runtime` and `conmon` are programs by name or path. `name` is the starter's, the runtime's own if it is not given,
    and has no slash: a directory is called so.
    With `cni`, a directory of configurations such as /etc/cni/net.d, sandboxes that are not on the host's network get
    one from the plugins in `cni_plugins`, directories with ":" between them. Without, they have loopback alone.

    Each step of the runtime may take `timeout` seconds. What is missing is told when a container is to be created.
    """

    def __init__(
        self,
        runtime: str = "runc",
        *,
        name: str = "",
        conmon: str = "conmon",
        timeout: float = TIMEOUT_SECONDS,
        cni: str = "",
        cni_plugins: str = PLUGINS,
    ) -> None:
        require_wait(timeout, "timeout")
        if cni_plugins != PLUGINS and not cni:
            raise InvalidInputError(f"cni_plugins {quote(cni_plugins)}: give `cni`, too: what they are asked for")
        self.name = require_name(name or os.path.basename(runtime))
        self._runtime = runtime
        self._conmon = conmon
        self._timeout = timeout
        self._plugins = Plugins(cni, cni_plugins) if cni else None
        self._tools = Tools()
        self._runs = KnownRuns()
        self._containers_dir = ""
        self._root = RuntimeRoot("")
        self._holdings = SandboxHoldings("", self._root)
        self._busy: set[str] = set()
        self._is_free = threading.Condition()

    def open(self, state_dir: str) -> None:
        """Begin to serve this state directory.

        What the runtime kept of earlier boots is removed, and calls of it that an engine has not lived to see end are
        ended, before anything is decided by what they may change.
        """
        self._containers_dir = os.path.join(state_dir, CONTAINERS)
        self._root = RuntimeRoot(os.path.join(state_dir, OCI, self.name))
        self._holdings = SandboxHoldings(os.path.join(state_dir, SANDBOXES), self._root, self._plugins)
        try:
            self._root.remove_old()
            self._holdings.remove_old()
        except OSError as error:
            _log.warning("%s: what the runtime kept before the last boot stays: %s", self._root.above, error)
        try:
            self._holdings.end_plugins()
            if root := self._root.find():
                calls.end_left(root)
        except OSError as error:
            _log.warning("%s: whether calls of the runtime are left is not known: %s", self._root.above, error)

    def close(self) -> None:
        """Do nothing: containers and their conmons run on."""

    def make_config(self, launch: Launch) -> bytes:
        """Return config.json as the runtime-spec has it, and write the root file system's files in /etc.

        Raises InvalidInputError, UnsupportedError if runtime or conmon are not installed, StateDirectoryError.
        """
        with _told(f"container {launch.id}"):
            return json.dumps(self._make_spec(launch)).encode()

    def _make_spec(self, launch: Launch) -> dict[str, Any]:
        self._tools.find(self._conmon)
        kind = self._tools.find(self._runtime).kind
        if is_rootless() and kind != "runc":
            raise UnsupportedError(f"{self._runtime}: an engine that is not root can use runc alone")
        self._command()
        to_oci_id(launch.id)
        sandbox, config = launch.sandbox.config if launch.sandbox else None, launch.metadata.config
        spec = make_spec(launch, is_unified=has_unified_cgroups())
        require_room(spec["linux"]["resources"], kind)
        if sandbox is not None:
            require_cgroup_parent(sandbox)
        if kind == "runc":
            require_ids_of_runc(spec["process"]["user"])
        if is_rootless():
            require_own_pids(make_namespaces(config_in_sandbox(launch), launch.namespaces, is_unified=False))
            adapt(spec)  # which refuses users that cannot be had
        elif kind == "runc":
            keep_sysfs_writable(spec)
        root = os.path.join(launch.bundle_path, ROOTFS)
        write_root_files(root, sandbox)
        make_room(root, launch.metadata.image_manifest.config.volumes, config.mounts)
        require_places(config, root, is_runc=kind == "runc")
        return spec

    def find_unapplied(self, launch: Launch) -> dict[str, str]:
        """Return what the config asks for and is not done, by the field's name, with the reason."""
        is_apart = len(command_of(self._tools.find(self._runtime))) > 1
        return find_unapplied(launch, is_unified=has_unified_cgroups(), is_apart=is_apart)

    def keeps(self, container_id: str) -> bool:
        """Say whether a start of the container has left anything."""
        return next(list_runs(self._bundle(container_id)), None) is not None

    # What sandboxes hold: see `limpet.engine.starters.abilities.Furnisher`

    def furnish(self, sandbox: SandboxMetadata, given: Mapping[str, str]) -> Holdings:
        """Pin the sandbox's namespaces, and write its files in /etc. An ordinary user's sandboxes hold nothing."""
        require_given(sandbox.config, given)
        require_cgroup_parent(sandbox.config)
        if is_rootless():
            with _told(f"sandbox {sandbox.id}"):
                try_sysctls(sandbox.config, self._timeout)
            if self._plugins is not None and "network" in choose_kinds(sandbox.config):
                raise UnsupportedError("cni: only root's sandboxes get networks from plugins; open one without it")
            return Holdings(given)
        with _told(f"sandbox {sandbox.id}"):
            return self._holdings.furnish(sandbox, given, self._timeout)

    def is_furnished(self, sandbox: SandboxMetadata, namespaces: Mapping[str, str]) -> bool:
        """Say whether all was made, and is written down."""
        return is_rootless() or self._holdings.is_furnished(sandbox, namespaces)

    def holds(self, sandbox_id: str, namespaces: Mapping[str, str]) -> bool:
        """Say whether its namespaces are still pinned."""
        with _told(f"sandbox {sandbox_id}"):
            return self._holdings.holds(sandbox_id, namespaces)

    def vacate(self, sandbox_id: str) -> None:
        """Unpin its namespaces."""
        with _told(f"sandbox {sandbox_id}"):
            self._holdings.vacate(sandbox_id, self._timeout)

    def vacate_others(self, find_ids: Callable[[], Collection[str]]) -> None:
        """Unpin what belongs to none of these."""
        with _told("sandboxes that are gone"):
            for problem in self._holdings.vacate_others(find_ids):
                _log.warning("a sandbox that is gone still holds something: %s", problem)

    def prepare(self, launch: Launch) -> Prepared:
        """Have conmon and the runtime make the container, its first process held.

        Raises StartError, StateDirectoryError if the bundle's config.json is damaged.
        """
        self._take(launch.id)
        try:
            try:
                with _hinting_at_seccomp(launch):
                    return self._prepare(launch)
            except UnsupportedError as error:
                raise StartError(str(error)) from error
            except ProcessLookupError as error:
                raise StartError("its first process ended before its program was executed") from error
            except OSError as error:
                what = quote_path(error.filename) if error.filename else "its process cannot be made"
                raise StartError(f"{what}: {error.strerror}") from error
        except BaseException:
            self._give_back(launch.id)
            raise

    def go(self, prepared: Prepared) -> None:
        """Have the runtime let it run; returns once the program is executed. Raises StartError if it is not."""
        held = prepared.own
        assert isinstance(held, _Held)
        try:
            try:
                why = self._go(held, prepared)
            except OSError as error:
                why = f"{quote_path(error.filename or self._runtime)}: {error.strerror}"
            except UnsupportedError as error:
                why = str(error)
            if why:
                self._mark_never_ran(held)  # before it is ended, which looks like an end of its program
                self._discard(held.container_id, held.run)
                _close(prepared)
                raise StartError(why)
        finally:
            self._give_back(held.container_id)

    def abort(self, prepared: Prepared) -> None:
        """End the container that is held, and its conmon."""
        held = prepared.own
        assert isinstance(held, _Held)
        try:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(prepared.pidfd, signal.SIGKILL)
            self._discard(held.container_id, held.run)
        finally:
            _close(prepared)
            self._give_back(held.container_id)

    def adopt(self, container_id: str, identity: ProcessIdentity) -> int:
        """Return a pidfd of the process with this identity.

        Raises NotFoundError if it is not there, ResourcesError if no descriptor is left but those kept for steps.
        """
        with _told(f"container {container_id}"):
            found = self._runs.find(self._bundle(container_id), identity)
        cgroups = found[1].cgroups if found else ()
        return adopt_process(
            identity, lambda pidfd: "" if is_process(identity, pidfd, cgroups) else "nothing proves that it is"
        )

    def open_monitor(self, container_id: str, identity: ProcessIdentity) -> int:
        """Return a pidfd of its conmon, -1 if that has ended."""
        with _told(f"container {container_id}"):
            found = self._runs.find(self._bundle(container_id), identity)
        if found is None:
            return -1
        try:
            return adopt_process(found[1].monitor, lambda pidfd: "" if may_be(found[1].monitor, pidfd) else "another")
        except NotFoundError:
            return -1

    def signal(self, container_id: str, identity: ProcessIdentity, number: int, *, only_session: bool = False) -> int:
        """Send a signal to the container's first process, through its pidfd; return how many processes are left.

        SIGKILL goes to all processes in its cgroup; a pid namespace of its own ends with its first process anyway.
        """
        with _told(f"signal {number} to container {container_id}"):
            found = self._runs.find(self._bundle(container_id), identity)
        processes = found[1] if found else None
        cgroups = processes.cgroups if processes else ()
        left = 0
        try:
            with open_pidfd(identity.pid) as pidfd:
                if is_process(identity, pidfd, cgroups) and not has_ended(pidfd):
                    left = 1
                    if number:
                        signal.pidfd_send_signal(pidfd, number)
                    if number == signal.SIGKILL and processes is not None:
                        thaw(cgroups, self._cgroup_of(processes))  # or it would not take it (cgroup v1)
        except ProcessLookupError:
            pass
        except PermissionError as error:
            raise UnsupportedError(f"signal {number}: {error.strerror}; run as root, with CAP_KILL") from error
        except OSError as error:
            raise ResourcesError(f"signal {number} to container {container_id}: {error.strerror}") from error
        if number and processes is not None:
            let_monitor_go_on(processes.monitor)
        if processes is None or processes.has_own_pids or only_session:
            return left
        name = self._cgroup_of(processes)
        return max(left, signal_processes(cgroups, name, number if number == signal.SIGKILL else 0))

    def read_exit(self, container_id: str, identity: ProcessIdentity, pidfd: int) -> Exit | None:
        """Return how the process ended, as conmon has written it down; without conmon, as the kernel tells it."""
        with _told(f"container {container_id}"):
            return self._read_exit(container_id, identity, pidfd)

    def _read_exit(self, container_id: str, identity: ProcessIdentity, pidfd: int) -> Exit | None:
        found = self._runs.find(self._bundle(container_id), identity)
        if found is None:
            return Exit(read_exit_code(identity.pid, pidfd) if pidfd >= 0 else None)
        directory, processes = found
        ended = read_conmon_exit(directory)
        if ended is None:
            if is_monitor_alive(processes):
                let_monitor_go_on(processes.monitor)  # one that was stopped would write nothing
                return None
            ended = read_conmon_exit(directory)  # its last act
        if directory.has("never-ran") or not directory.was_let_go():
            return Exit(None, ended.finished_at if ended else 0, never_ran="it ended before its program was executed")
        if ended is None:
            return Exit(read_exit_code(identity.pid, pidfd) if pidfd >= 0 else None)
        seen = read_exit_code(identity.pid, pidfd) if pidfd >= 0 else None
        code = ended.code if seen is None else seen
        if code != ended.code:
            _log.warning("container %s: it ended with %d, and its exit file says %d", container_id, code, ended.code)
        why = explain_never_ran(directory, processes, code)
        if why != "":
            return Exit(None, ended.finished_at, never_ran=why or "")
        return Exit(
            code,
            ended.finished_at,
            is_out_of_memory=ended.is_out_of_memory,
            is_all=processes.has_own_pids and pidfd >= 0 and has_ended(pidfd),  # the kernel ends all before the first
        )

    def forget_exits(self, container_ids: Sequence[str]) -> None:
        """Do nothing: what conmon has written stays in the bundle until the release."""

    def release(self, container_id: str) -> None:
        """Kill what is left of the container, remove what is kept of it, and see its conmon end.

        Raises InvalidStateError if the runtime cannot, UnsupportedError if it is not installed any more.
        """
        with self._claim(container_id), _told(f"container {container_id}"):
            self._end(container_id)

    def end_leftovers(self, has_ended: Callable[[str], bool]) -> None:
        """End containers that were made and never started, and what is left of those that have ended."""
        try:
            if self._root.find():
                self._end_all_left(has_ended)
        except OSError as error:
            _log.warning("%s: what is left of starts cannot be looked at: %s", self._root.above, error)

    def _end_all_left(self, has_ended: Callable[[str], bool]) -> None:
        # A create that was cut short has left a conmon, and perhaps nothing at the runtime yet.
        runs = {
            name: [*list_runs(os.path.join(self._containers_dir, name))] for name in os.listdir(self._containers_dir)
        }
        for name, each in runs.items():
            for left in each:
                if left.read_processes() is None and not left.was_let_go() and not self._is_bundle_busy(name):
                    left.await_pid("conmon-pidfile", _CONMON_SECONDS)
                    end_monitor(left, now=True)
        commands = find_left(run for each in runs.values() for run in each)
        if commands:
            end_left(commands, self._cgroup_of, self._is_ours)
        self._reap_lost()
        for container_id in self._root.entries():
            self._end_if_left(container_id, has_ended)

    def _reap_lost(self) -> None:
        """Reap commands of which nobody can tell which they are; what cannot be looked at now is by a later call."""
        with suppress(OSError):
            names = os.listdir(self._containers_dir) if takes_orphans() else ()
            reap_lost(run for name in names for run in list_runs(os.path.join(self._containers_dir, name)))

    def probe(self, containers_dir: str) -> HostProbe:
        """Return what looks at the processes and the bundles, and at what conmon has left in them."""
        return HostProbe(containers_dir, witness=BundleWitness(containers_dir, is_owner=True))

    # What it can do with a container that runs: see `limpet.engine.starters.abilities`

    def execute(self, container_id: str, identity: ProcessIdentity, args: Sequence[str], *, timeout: float) -> Executed:
        """Run a command in the container, with its user and environment."""
        with _told(f"container {container_id}"):
            directory, processes = self._find(container_id, identity)
            cgroup, is_crun = self._cgroup_of(processes), self._tools.find(self._runtime).kind == "crun"
            try:
                return abilities.execute(self._call, directory, processes, cgroup, args, timeout, is_crun=is_crun)
            except StartError:
                self._reap_lost()
                raise

    def open_command(
        self,
        container_id: str,
        identity: ProcessIdentity,
        args: Sequence[str],
        *,
        terminal: bool,
        size: tuple[int, int],
    ) -> Session:
        """Run a command in the container, connected to it."""
        with _told(f"container {container_id}"):
            directory, processes = self._find(container_id, identity)
            runtime = [*self._command(), "--root", self._root.make()]
            cgroup = self._cgroup_of(processes)
            return abilities.open_command(
                runtime,
                directory,
                processes,
                cgroup,
                args,
                size=size if terminal else None,
                is_crun=self._tools.find(self._runtime).kind == "crun",
                reap_lost=self._reap_lost,
            )

    def attach(self, container_id: str, identity: ProcessIdentity, *, terminal: bool, has_input: bool) -> Session:
        """Connect to the container's own input and output."""
        with _told(f"container {container_id}"):
            run, processes = self._find(container_id, identity)
            let_monitor_go_on(processes.monitor)
            return AttachedSession(run, processes, terminal=terminal, has_input=has_input)

    def freeze(self, container_id: str, identity: ProcessIdentity) -> None:
        """Freeze all processes of the container. Raises UnsupportedError with the reason if that cannot be done."""
        with _told(f"container {container_id}"):
            _, processes = self._find(container_id, identity)
            abilities.freeze(self._call, processes, self._cgroup_of(processes))

    def thaw(self, container_id: str, identity: ProcessIdentity) -> None:
        """Let them go on. Raises UnsupportedError with the reason."""
        found = self._runs.find(self._bundle(container_id), identity)
        if found is not None:
            abilities.thaw(found[1], self._cgroup_of(found[1]))

    def is_frozen(self, container_id: str, identity: ProcessIdentity) -> bool:
        """Return whether they are frozen."""
        found = self._runs.find(self._bundle(container_id), identity)
        return found is not None and is_frozen(found[1].cgroups, self._cgroup_of(found[1]))

    def measure(self, container_id: str, identity: ProcessIdentity) -> Stats:
        """Return what the container uses, as its cgroups tell."""
        with _told(f"container {container_id}"):
            _, processes = self._find(container_id, identity)
            return abilities.measure_container(processes, self._cgroup_of(processes))

    def change_limits(self, container_id: str, identity: ProcessIdentity, limits: LinuxContainerResources) -> Resources:
        """Put these limits into force."""
        with _told(f"container {container_id}"):
            run, processes = self._find(container_id, identity)
            cgroup, is_runc = self._cgroup_of(processes), self._tools.find(self._runtime).kind == "runc"
            return abilities.change_limits(self._call, run, processes, cgroup, limits, is_runc=is_runc)

    def reopen_log(self, container_id: str, identity: ProcessIdentity, log_path: str) -> None:
        """Have conmon begin a new log where the old one was renamed."""
        with _told(f"container {container_id}"):
            run, processes = self._find(container_id, identity)
            let_monitor_go_on(processes.monitor)
            abilities.reopen_log(run, processes, log_path)

    def _find(self, container_id: str, identity: ProcessIdentity) -> tuple[RunDirectory, Processes]:
        found = self._runs.find(self._bundle(container_id), identity)
        if found is None:
            raise InvalidStateError(f"container {container_id}: its bundle no longer tells which processes it has")
        return found

    # Making

    def _prepare(self, launch: Launch) -> Prepared:
        secrets = require_secrets(launch.secret_env)
        self._tools.find(self._conmon)
        self._end(launch.id)  # what a start that was cut short has left
        shutil.rmtree(os.path.join(launch.bundle_path, OCI), ignore_errors=True)
        with open_target(launch) as target:
            config = self._complete(launch, target)
            if frozen := find_frozen_place(config["linux"].get("cgroupsPath", "/")):
                raise StartError(f"the cgroup {quote_path(frozen)} is frozen, and so would be its processes; thaw it")
            for each in config["linux"]["namespaces"]:
                if is_pin(each.get("path", "")):
                    require_seen(each["path"])
                require_namespace(each["type"], each.get("path", ""))
                if each["type"] == "pid" and is_pin(each.get("path", "")) and not has_first(each["path"]):
                    raise StartError(
                        "the first process of its sandbox's pid namespace has ended, and no other can begin there; make"
                        " another sandbox"
                    )
            return self._make(launch, config, secrets)

    def _make(self, launch: Launch, config: Mapping[str, Any], secrets: Mapping[str, str]) -> Prepared:
        conmon = self._tools.find(self._conmon)
        directory = make_run_directory(launch.bundle_path)
        look = _Look()
        try:
            with self._written(directory, config, secrets), _log_of(launch) as (log_directory, log_name):
                pid = make_container(
                    Order(
                        conmon=conmon.path,
                        runtime=[*self._command(), "--root", self._root.make()],
                        oci_id=to_oci_id(launch.id),
                        run=directory,
                        log_directory=log_directory,
                        log_name=log_name,
                        stdin=launch.metadata.config.stdin,
                        stdin_once=launch.metadata.config.stdin_once,
                        terminal=launch.metadata.config.tty,
                    ),
                    self._timeout,
                    meanwhile=lambda: look.take(directory, config, seconds=_LOOK_SECONDS),
                )
            return self._identify(launch, directory, pid, config, look)
        except BaseException:
            self._discard(launch.id, directory)
            raise
        finally:
            close_all([look.pidfd] if look.pidfd >= 0 else [])

    def _complete(self, launch: Launch, target: str) -> dict[str, Any]:
        path = os.path.join(launch.bundle_path, CONFIG_FILE)
        try:
            spec = json.loads(read_small_file(path, CONFIG_BYTES))
            held = self._holdings.mounts_for(launch.sandbox.id, launch.namespaces) if launch.sandbox else {}
            whole = complete(
                spec,
                launch,
                cgroup=self._cgroup_path(launch),
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
        if self._tools.find(self._runtime).kind != "runc":
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
        self, launch: Launch, directory: RunDirectory, pid: int, config: Mapping[str, Any], look: "_Look"
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
                entry=os.path.join(self._root.make(), to_oci_id(launch.id)),
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
                own=_Held(launch.id, directory, processes),
            )
        except BaseException as error:
            # Then /proc says nothing more of it, and does not a moment before, either.
            is_gone = isinstance(error, FileNotFoundError) and str(error.filename).startswith(f"/proc/{pid}/")
            is_over = is_gone and wait_for_end(pidfd, _END_SECONDS)
            close_all((pidfd,))
            if is_over:
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from error
            raise

    def _go(self, held: _Held, prepared: Prepared) -> str:
        """Have it started; return why its program was not executed, "" if it was. Raises OSError."""
        held.run.mark("starting")
        outcome = self._start(held)
        found = await_program(
            held.processes,
            min(_EXECUTE_SECONDS, self._timeout) if outcome.code == 0 else _LATE_SECONDS,
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
        held.run.mark("executed")
        return ""

    def _start(self, held: _Held) -> Outcome:
        """Run the runtime's `start`. The mark is locked while it runs, also if this engine does not outlive it."""

        def have_both_go_on(runtime: int) -> None:
            have_go_on(runtime)
            let_held_go_on(held.processes)

        lock = os.open(held.run.join("starting"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._call("start", held.processes.oci_id, pass_fds=(lock,), see_to=have_both_go_on)
        finally:
            os.close(lock)

    def _mark_never_ran(self, held: _Held) -> None:
        try:
            held.run.mark_never_ran()
        except OSError as error:
            _log.warning("container %s: that it never ran cannot be written down: %s", held.container_id, error)

    def _explain_end(self, held: _Held, prepared: Prepared) -> str | None:
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

    # Ending

    def _end_if_left(self, container_id: str, has_ended: Callable[[str], bool]) -> None:
        if not self._take(container_id, wait=False):
            return  # it is being started now
        try:
            runs = list(list_runs(self._bundle(container_id)))
            if has_ended(container_id):
                if runs and all(map(_is_over, runs)):
                    return  # its entry and its cgroups hold nothing, and its release removes them
            elif not runs or any(map(_may_have_run, runs)):
                return  # a look tells what became of it, or it runs on though its bundle is lost
            self._end(container_id)
        except OSError as error:
            _log.warning("container %s: what is left of it cannot be looked at: %s", container_id, error)
        except (InvalidStateError, UnsupportedError) as error:
            _log.warning("container %s: something is left of it: %s", container_id, error)
        finally:
            self._give_back(container_id)

    def _end(self, container_id: str) -> None:
        """End all that a container has. Raises InvalidStateError, UnsupportedError."""
        runs = list(list_runs(self._bundle(container_id)))
        for each in runs:
            if not _may_have_run(each):
                each.mark_never_ran()  # before it is ended, which looks like an end of its program
            _reap_first(each.read_processes())
        self._runs.forget(self._bundle(container_id))
        if len(runs) == 1 and self._forget_ended(container_id, runs[0]):
            return
        if self._root.entry(container_id):
            outcome = self._call("delete", "-f", to_oci_id(container_id))
            if outcome.code != 0 and self._root.entry(container_id):
                raise InvalidStateError(
                    f"container {container_id}: {self.name} cannot delete it: {outcome.problem}; try again"
                )
        for each in runs:
            processes = each.read_processes()
            if processes is None or self._is_ours(processes):
                self._end_rest(container_id, each)
            if not end_monitor(each, now=processes is None):
                _log.warning("container %s: its conmon does not end", container_id)

    def _forget_ended(self, container_id: str, run: RunDirectory) -> bool:
        """Remove what a container that has ended leaves, without the runtime, whose start takes as long as all else.

        Say whether that was done. Not where anything is to be killed, or more is kept of it than is known here.
        """
        processes = run.read_processes()
        if (
            processes is None
            or not processes.is_plain
            or not processes.has_own_pids
            or processes.entry != self._root.entry(container_id)
            or observe_program(processes) is not Program.ENDED
            or not end_monitor(run)
            or remove(processes.cgroups, self._cgroup_of(processes))  # some are left: something is in them
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
        name = self._cgroup_of(processes) if processes else self._cgroup_name(to_oci_id(container_id))
        deadline = time.monotonic() + _END_SECONDS
        thaw(cgroups, name)  # what is frozen takes no SIGKILL (cgroup v1)
        while signal_processes(cgroups, name, signal.SIGKILL) and time.monotonic() < deadline:
            time.sleep(0.005)
        # The runtime gives up where the kernel is not yet done with them.
        while (left := remove(cgroups, name)) and time.monotonic() < deadline:
            time.sleep(0.005)
        if left:
            _log.warning("container %s: a cgroup is left: %s", container_id, "; ".join(left))

    def _discard(self, container_id: str, directory: RunDirectory) -> None:
        """End a start that has failed; what cannot be ended is told, and ended by the next recovery."""
        try:
            if self._root.entry(container_id):
                self._call("delete", "-f", to_oci_id(container_id))
            self._end_rest(container_id, directory)
            if not end_monitor(directory, now=True) or self._root.entry(container_id):
                _log.warning("container %s: something is left of its start", container_id)
        except (OSError, UnsupportedError) as error:
            _log.warning("container %s: something is left of its start: %s", container_id, error)

    # The runtime

    def _command(self) -> Sequence[str]:
        return command_of(self._tools.find(self._runtime))

    def _call(
        self,
        *arguments: str,
        timeout: float = 0,
        most_bytes: int = 64 << 10,
        directory: str = "",
        pass_fds: Sequence[int] = (),
        begun_by: Sequence[str] = (),
        see_to: Callable[[int], None] = have_go_on,
    ) -> Outcome:
        """Run the runtime, which `begun_by` becomes.

        Raises UnsupportedError if it is not installed, OSError if it cannot be executed.

        What neither works in a `directory` nor inherits anything is ended by the next engine if this one is killed.
        """
        root = self._root.make()
        command = [*begun_by, *self._command(), "--root", root, *arguments]
        with ExitStack() as stack:
            if not directory and not pass_fds:
                directory, pass_fds = root, (stack.enter_context(calls.held(root)),)
            outcome = run(
                command,
                timeout=timeout or self._timeout,
                most_bytes=most_bytes,
                directory=directory or "/",
                pass_fds=pass_fds,
                see_to=see_to,
                begins_users=arguments[0] == "exec",
            )
            for each in () if is_any_left() else pass_fds:
                calls.release(each)
            return outcome

    def _bundle(self, container_id: str) -> str:
        return os.path.join(self._containers_dir, file_name(container_id))

    def _cgroup_name(self, oci_id: str) -> str:
        """Return the name of a new container's cgroup, which no other state directory's has, a copy of it included."""
        return f"{sha256(os.path.basename(self._root.make()).encode()).hexdigest()[:12]}-{oci_id}"

    def _cgroup_of(self, processes: Processes) -> str:
        """Return the name of a container's cgroup; one that is nobody's if it was made for another state directory."""
        name = os.path.basename(processes.cgroup) if self._is_ours(processes) else ""
        return name or self._cgroup_name(processes.oci_id)

    def _is_ours(self, processes: Processes) -> bool:
        """Return whether a container was made for this state directory, not for one of which this is a copy."""
        return os.path.dirname(processes.entry) == self._root.find()

    def _cgroup_path(self, launch: Launch) -> str:
        linux = launch.sandbox.config.linux if launch.sandbox else None
        parent = linux.cgroup_parent if linux and linux.cgroup_parent else "/limpet"
        return os.path.normpath(f"/{parent}/{self._cgroup_name(to_oci_id(launch.id))}")

    # Who works on which container

    def _take(self, container_id: str, *, wait: bool = True) -> bool:
        with self._is_free:
            while container_id in self._busy:
                if not wait:
                    return False
                self._is_free.wait()
            self._busy.add(container_id)
            return True

    def _give_back(self, container_id: str) -> None:
        with self._is_free:
            self._busy.discard(container_id)
            self._is_free.notify_all()

    @contextmanager
    def _claim(self, container_id: str) -> Iterator[None]:
        self._take(container_id)
        try:
            yield
        finally:
            self._give_back(container_id)

    def _is_bundle_busy(self, name: str) -> bool:
        with self._is_free:
            return any(file_name(each) == name for each in self._busy)


def _reap_first(processes: Processes | None) -> None:
    """Reap a container's first process once it has ended, if it has come to us, as its conmon was killed."""
    if processes is not None and takes_orphans():
        with suppress(OSError), open_pidfd(processes.init.pid) as pidfd:
            if is_process(processes.init, pidfd) and int(read_stat(processes.init.pid)[1]) == os.getpid():
                reap_when_over(pidfd)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Let no bare OSError out of the block: no descriptors, no memory, a disk that fails. `what` begins the message."""
    try:
        yield
    except LimpetError:
        raise  # one of them is a TimeoutError, which is an OSError
    except OSError as error:
        where = f" ({quote_path(error.filename)})" if error.filename else ""
        raise ResourcesError(f"{what}: {error.strerror}{where}; try again") from error


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


def _close(prepared: Prepared) -> None:
    close_all(each for each in (prepared.pidfd, prepared.monitor) if each >= 0)


def _may_have_run(run: RunDirectory) -> bool:
    """Return whether the program of a start may have been executed, or may yet be by a start under way."""
    if run.was_let_go():
        return True
    processes = run.read_processes()
    return processes is not None and observe_program(processes) is Program.EXECUTED


def _find_flaw(config: Mapping[str, Any]) -> str | None:
    """Return why the kernel cannot execute its program now, "" if it can; None if that cannot be found out now."""
    with suppress(OSError):
        return find_flaw(config)
    return None


def _is_over(run: RunDirectory) -> bool:
    """Return whether a start's first process has ended, and with it all others, and its conmon, too."""
    processes = run.read_processes()
    return (
        processes is not None
        and processes.has_own_pids
        and observe_program(processes) is Program.ENDED
        and not is_monitor_alive(processes)
    )


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
