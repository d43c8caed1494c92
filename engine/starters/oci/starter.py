"""The OCI starter: a container is what an OCI runtime (runc, crun) makes of its config, under a conmon of its own.

prepare: conmon has the runtime make the container, whose first process is held by the runtime; which processes these
are is written down. go: the runtime lets it run. The ends are seen by conmon, whether or not an engine lives.
"""

import json
import os
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from limpet.engine.starters.abilities import Executed, Holdings, Session, Stats
from limpet.engine.starters.contract import Exit, Launch, Prepared
from limpet.engine.starters.oci import abilities, calls
from limpet.engine.starters.oci.busy import busy_of
from limpet.engine.starters.oci.cgroups import (
    is_frozen,
    require_cgroup_parent,
    signal_processes,
    thaw,
)
from limpet.engine.starters.oci.cni import PLUGINS, Plugins
from limpet.engine.starters.oci.ends import Ends
from limpet.engine.starters.oci.exits import (
    explain_never_ran,
    is_monitor_alive,
    is_process,
    keep_seen,
    let_monitor_go_on,
    may_be,
    may_be_of_held,
    read_conmon_exit,
    was_out_of_memory,
)
from limpet.engine.starters.oci.mounts import keep_sysfs_writable
from limpet.engine.starters.oci.namespaces import (
    config_in_sandbox,
    make_namespaces,
    require_given,
)
from limpet.engine.starters.oci.places import require_places
from limpet.engine.starters.oci.probe import BundleWitness
from limpet.engine.starters.oci.ranges import require_room
from limpet.engine.starters.oci.root import to_oci_id
from limpet.engine.starters.oci.rootless import adapt, is_rootless, name_engine, require_admin, require_own_pids
from limpet.engine.starters.oci.run_directory import (
    KnownRuns,
    Processes,
    RunDirectory,
    list_runs,
)
from limpet.engine.starters.oci.runtime import Runtime
from limpet.engine.starters.oci.sandboxes import (
    SandboxHoldings,
    choose_kinds,
    try_sysctls,
)
from limpet.engine.starters.oci.sessions import AttachedSession
from limpet.engine.starters.oci.spec import make_spec, require_ids_of_runc
from limpet.engine.starters.oci.starts import Starts, held_of
from limpet.engine.starters.oci.tools import has_unified_cgroups
from limpet.engine.starters.oci.unapplied import find_unapplied
from limpet.engine.starters.pidfds import adopt_process
from limpet.engine.starters.process.root_files import make_room, write_root_files
from limpet.engine.state.names import SANDBOXES
from limpet.engine.state.turn import require_wait
from limpet.recovery.host import has_ended, is_reaped, open_pidfd, read_exit_code
from limpet.recovery.probe import HostProbe
from limpet.schema.cri import LinuxContainerResources
from limpet.schema.errors import (
    InvalidInputError,
    InvalidStateError,
    LimpetError,
    NotFoundError,
    ResourcesError,
    StartError,
    UnsupportedError,
    quote,
    quote_path,
)
from limpet.schema.identity import ProcessIdentity
from limpet.schema.layout import ROOTFS
from limpet.schema.metadata import SandboxMetadata, require_name
from limpet.schema.status import Resources
from limpet.schema.telling import get_log

_log = get_log("limpet.starter.oci")
TIMEOUT_SECONDS = 30.0
"""How long the runtime may take for one step, unless the caller says otherwise."""


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
        self._runtime = Runtime(runtime, conmon, self.name, timeout)
        self._plugins = Plugins(cni, cni_plugins) if cni else None
        self._runs = KnownRuns()
        self._serve("")

    def open(self, state_dir: str) -> None:
        """Begin to serve this state directory.

        What the runtime kept of earlier boots is removed, and calls of it that an engine has not lived to see end are
        ended, before anything is decided by what they may change.
        """
        self._serve(state_dir)
        root = self._runtime.root
        try:
            root.remove_old()
            self._holdings.remove_old()
        except OSError as error:
            _log.warning("%s: what the runtime kept before the last boot stays: %s", root.above, error)
        try:
            self._holdings.end_plugins()
            if found := root.find():
                calls.end_left(found)
        except OSError as error:
            _log.warning("%s: whether calls of the runtime are left is not known: %s", root.above, error)

    def _serve(self, state_dir: str) -> None:
        self._runtime.open(state_dir)
        self._busy = busy_of(state_dir)
        self._ends = Ends(self._runtime, self._runs, self._busy)
        self._holdings = SandboxHoldings(os.path.join(state_dir, SANDBOXES), self._runtime.root, self._plugins)
        self._starts = Starts(self._runtime, self._runs, self._ends, self._holdings)

    def close(self) -> None:
        """Do nothing: containers and their conmons run on."""

    def make_config(self, launch: Launch) -> bytes:
        """Return config.json as the runtime-spec has it, and write the root file system's files in /etc.

        Raises InvalidInputError, UnsupportedError if runtime or conmon are not installed, StateDirectoryError.
        """
        with _told(f"container {launch.id}"):
            return json.dumps(self._make_spec(launch)).encode()

    def _make_spec(self, launch: Launch) -> dict[str, Any]:
        self._runtime.require_conmon()
        kind = self._runtime.kind
        if is_rootless() and kind != "runc":
            raise UnsupportedError(f"{self._runtime.program}: {name_engine()} can use runc alone")
        if is_rootless():
            require_admin(self._runtime.program)
        self._runtime.command()
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
        is_apart = len(self._runtime.command()) > 1
        kind = self._runtime.kind
        return find_unapplied(launch, is_unified=has_unified_cgroups(), is_apart=is_apart, kind=kind)

    def keeps(self, container_id: str) -> bool:
        """Say whether a start of the container has left anything."""
        return next(list_runs(self._runtime.bundle(container_id)), None) is not None

    # What sandboxes hold: see `limpet.engine.starters.abilities.Furnisher`

    def furnish(self, sandbox: SandboxMetadata, given: Mapping[str, str]) -> Holdings:
        """Pin the sandbox's namespaces, and write its files in /etc. An ordinary user's sandboxes hold nothing."""
        require_given(sandbox.config, given)
        require_cgroup_parent(sandbox.config)
        if is_rootless():
            with _told(f"sandbox {sandbox.id}"):
                try_sysctls(sandbox.config, self._runtime.timeout)
            if self._plugins is not None and "network" in choose_kinds(sandbox.config):
                raise UnsupportedError("cni: only root's sandboxes get networks from plugins; open one without it")
            return Holdings(given)
        with _told(f"sandbox {sandbox.id}"):
            return self._holdings.furnish(sandbox, given, self._runtime.timeout)

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
            self._holdings.vacate(sandbox_id, self._runtime.timeout)

    def vacate_others(self, find_ids: Callable[[], Collection[str]]) -> None:
        """Unpin what belongs to none of these."""
        with _told("sandboxes that are gone"):
            for problem in self._holdings.vacate_others(find_ids):
                _log.warning("a sandbox that is gone still holds something: %s", problem)

    def prepare(self, launch: Launch) -> Prepared:
        """Have conmon and the runtime make the container, its first process held.

        Raises StartError, StateDirectoryError if the bundle's config.json is damaged.
        """
        self._busy.take(launch.id)
        try:
            return self._starts.prepare(launch)
        except BaseException:
            self._busy.give_back(launch.id)
            raise

    def go(self, prepared: Prepared) -> None:
        """Have the runtime let it run; returns once the program is executed. Raises StartError if it is not."""
        try:
            self._starts.go(prepared)
        finally:
            self._busy.give_back(held_of(prepared).container_id)

    def abort(self, prepared: Prepared) -> None:
        """End the container that is held, and its conmon."""
        try:
            self._starts.abort(prepared)
        finally:
            self._busy.give_back(held_of(prepared).container_id)

    def adopt(self, container_id: str, identity: ProcessIdentity) -> int:
        """Return a pidfd of the process with this identity.

        Raises NotFoundError if it is not there, ResourcesError if no descriptor is left but those kept for steps.
        """
        with _told(f"container {container_id}"):
            found = self._runs.find(self._runtime.bundle(container_id), identity)
        cgroups = found[1].cgroups if found else ()
        pidfd = adopt_process(
            identity, lambda pidfd: "" if is_process(identity, pidfd, cgroups) else "nothing proves that it is"
        )
        if found is not None and keep_seen(*found):
            self._runs.note_executed(self._runtime.bundle(container_id), identity)
        return pidfd

    def open_monitor(self, container_id: str, identity: ProcessIdentity) -> int:
        """Return a pidfd of its conmon, -1 if that has ended."""
        with _told(f"container {container_id}"):
            found = self._runs.find(self._runtime.bundle(container_id), identity)
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
            found = self._runs.find(self._runtime.bundle(container_id), identity)
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
                        thaw(cgroups, self._runtime.cgroup_of(processes))  # or it would not take it (cgroup v1)
        except ProcessLookupError:
            pass
        except PermissionError as error:
            raise UnsupportedError(f"signal {number}: {error.strerror}; run as root, with CAP_KILL") from error
        except OSError as error:
            raise ResourcesError(f"signal {number} to container {container_id}: {error.strerror}") from error
        if number and found is not None:
            let_monitor_go_on(found[0], found[1].monitor)
        if processes is None or processes.has_own_pids or only_session:
            return left
        name = self._runtime.cgroup_of(processes)
        return max(left, signal_processes(cgroups, name, number if number == signal.SIGKILL else 0))

    def read_exit(self, container_id: str, identity: ProcessIdentity, pidfd: int) -> Exit | None:
        """Return how the process ended, as conmon has written it down; without conmon, as the kernel tells it."""
        with _told(f"container {container_id}"):
            return self._read_exit(container_id, identity, pidfd)

    def _read_exit(self, container_id: str, identity: ProcessIdentity, pidfd: int) -> Exit | None:
        found = self._runs.find(self._runtime.bundle(container_id), identity)
        if found is None:
            return _read_exit_alone(identity, pidfd)
        directory, processes = found
        ended = read_conmon_exit(directory)
        if ended is None:
            if is_monitor_alive(processes):
                let_monitor_go_on(directory, processes.monitor)  # one that was stopped would write nothing
                return None
            ended = read_conmon_exit(directory)  # its last act
        is_known = self._runs.was_executed(self._runtime.bundle(container_id), identity)
        if not is_known and directory.was_never_let_go():
            return Exit(None, ended.finished_at if ended else 0, never_ran="it ended before its program was executed")
        if ended is None:
            told = _read_exit_alone(identity, pidfd)
        else:
            seen = read_exit_code(identity.pid, pidfd) if pidfd >= 0 else None
            code = ended.code if seen is None else seen
            if code != ended.code:
                _log.warning(
                    "container %s: it ended with %d, and its exit file says %d", container_id, code, ended.code
                )
            # The kernel ends all before the first.
            is_all = processes.has_own_pids and pidfd >= 0 and has_ended(pidfd)
            told = Exit(code, ended.finished_at, is_all=is_all)
        return told and self._say_of_program(directory, processes, told, is_known=is_known)

    def _say_of_program(self, run: RunDirectory, processes: Processes, told: Exit, *, is_known: bool) -> Exit:
        """Return an end as the program's, unless it may be that of the runtime's init, before it executed it."""
        if told.code is None:
            return told
        if not is_known:
            why = explain_never_ran(run, processes, told.code)
            if why != "" or may_be_of_held(run, processes, told.code):
                return Exit(None, told.finished_at, never_ran=why or "")
        return told._replace(is_out_of_memory=was_out_of_memory(run, processes, self._runtime.cgroup_of(processes)))

    def forget_exits(self, container_ids: Sequence[str]) -> None:
        """Do nothing: what conmon has written stays in the bundle until the release."""

    def release(self, container_id: str) -> None:
        """Kill what is left of the container, remove what is kept of it, and see its conmon end.

        Raises InvalidStateError if the runtime cannot, UnsupportedError if it is not installed any more.
        """
        with self._busy.claim(container_id), _told(f"container {container_id}"):
            self._ends.end(container_id)

    def end_leftovers(self, has_ended: Callable[[str], bool]) -> None:
        """End containers that were made and never started, and what is left of those that have ended."""
        try:
            if self._runtime.root.find():
                self._ends.end_leftovers(has_ended)
        except OSError as error:
            _log.warning("%s: what is left of starts cannot be looked at: %s", self._runtime.root.above, error)

    def probe(self, containers_dir: str) -> HostProbe:
        """Return what looks at the processes and the bundles, and at what conmon has left in them."""
        return HostProbe(containers_dir, witness=BundleWitness(containers_dir, is_owner=True))

    # What it can do with a container that runs: see `limpet.engine.starters.abilities`

    def execute(self, container_id: str, identity: ProcessIdentity, args: Sequence[str], *, timeout: float) -> Executed:
        """Run a command in the container, with its user and environment."""
        with _told(f"container {container_id}"):
            directory, processes = self._find(container_id, identity)
            try:
                return abilities.execute(self._runtime, directory, processes, args, timeout)
            except (StartError, InvalidStateError):
                self._ends.reap_lost()
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
            wanted = size if terminal else None
            return abilities.open_command(
                self._runtime, directory, processes, args, size=wanted, reap_lost=self._ends.reap_lost
            )

    def attach(self, container_id: str, identity: ProcessIdentity, *, terminal: bool, has_input: bool) -> Session:
        """Connect to the container's own input and output."""
        with _told(f"container {container_id}"):
            run, processes = self._find(container_id, identity)
            let_monitor_go_on(run, processes.monitor)
            return AttachedSession(run, processes, terminal=terminal, has_input=has_input)

    def freeze(self, container_id: str, identity: ProcessIdentity) -> None:
        """Freeze all processes of the container. Raises UnsupportedError with the reason if that cannot be done."""
        with _told(f"container {container_id}"):
            _, processes = self._find(container_id, identity)
            abilities.freeze(self._runtime, processes)

    def thaw(self, container_id: str, identity: ProcessIdentity) -> None:
        """Let them go on. Raises UnsupportedError with the reason."""
        found = self._runs.find(self._runtime.bundle(container_id), identity)
        if found is not None:
            abilities.thaw(found[1], self._runtime.cgroup_of(found[1]))

    def is_frozen(self, container_id: str, identity: ProcessIdentity) -> bool:
        """Return whether they are frozen."""
        found = self._runs.find(self._runtime.bundle(container_id), identity)
        return found is not None and is_frozen(found[1].cgroups, self._runtime.cgroup_of(found[1]))

    def measure(self, container_id: str, identity: ProcessIdentity) -> Stats:
        """Return what the container uses, as its cgroups tell."""
        with _told(f"container {container_id}"):
            _, processes = self._find(container_id, identity)
            return abilities.measure_container(processes, self._runtime.cgroup_of(processes))

    def change_limits(self, container_id: str, identity: ProcessIdentity, limits: LinuxContainerResources) -> Resources:
        """Put these limits into force."""
        with _told(f"container {container_id}"):
            run, processes = self._find(container_id, identity)
            return abilities.change_limits(self._runtime, run, processes, limits)

    def reopen_log(self, container_id: str, identity: ProcessIdentity, log_path: str) -> None:
        """Have conmon begin a new log where the old one was renamed."""
        with _told(f"container {container_id}"):
            run, processes = self._find(container_id, identity)
            let_monitor_go_on(run, processes.monitor)
            abilities.reopen_log(run, processes, log_path)

    def _find(self, container_id: str, identity: ProcessIdentity) -> tuple[RunDirectory, Processes]:
        found = self._runs.find(self._runtime.bundle(container_id), identity)
        if found is None:
            raise InvalidStateError(f"container {container_id}: its bundle no longer tells which processes it has")
        return found


def _read_exit_alone(identity: ProcessIdentity, pidfd: int) -> Exit | None:
    """Return how a process ended that has no conmon; None while the kernel tells that to its parent alone."""
    if pidfd < 0:
        return Exit(None)
    code = read_exit_code(identity.pid, pidfd)
    if code is None and not is_reaped(pidfd):
        return None
    return Exit(read_exit_code(identity.pid, pidfd) if code is None else code)


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
