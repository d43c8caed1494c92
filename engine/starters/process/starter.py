"""The process starter: a container is a process of this host and all that descends from it, under a keeper."""

import errno
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

import msgspec

from limpet.engine.starters.contract import Exit, Launch, Prepared
from limpet.engine.starters.environment import require_names
from limpet.engine.starters.pidfds import adopt_process
from limpet.engine.starters.process.cgroups.freezer import Freezer
from limpet.engine.starters.process.cgroups.limits import remove_limits
from limpet.engine.starters.process.cgroups.parents import Notes
from limpet.engine.starters.process.client import (
    ANSWER_TIMEOUT_SECONDS,
    KeeperClient,
    is_copying,
    is_vouched_for,
)
from limpet.engine.starters.process.ends import Ends
from limpet.engine.starters.process.keeper.messages import Message
from limpet.engine.starters.process.root_files import make_room, write_root_files
from limpet.engine.starters.process.spec import make_spec
from limpet.engine.starters.process.starts import Starts
from limpet.engine.starters.process.unapplied import find_abilities, find_unapplied
from limpet.engine.state.descriptors import system_errors_told
from limpet.engine.state.names import KEEPER
from limpet.recovery.evidence import Process
from limpet.recovery.host import (
    Compare,
    compare,
    has_ended,
    open_pidfd,
)
from limpet.recovery.probe import HostProbe, Witnessed
from limpet.schema.errors import InvalidStateError, KeeperError, UnsupportedError
from limpet.schema.identity import ProcessIdentity
from limpet.schema.layout import ROOTFS, WORKING
from limpet.schema.runtime_spec import User
from limpet.schema.telling import get_log

_log = get_log("limpet.starter")
_PROCESS_GROUP = 1 << 2  # PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9: the group, also after its leader was reaped
_END_TIMEOUT_SECONDS = 5.0
_COPY_TIMEOUT_SECONDS = 1.0
_SETTLED_SECONDS = 2.0
_LOOK_AGAIN_SECONDS = 0.005
_REOPEN_SECONDS = 5.0


class ProcessStarter:
    """Starts containers as processes of this host.

    `environment` is the engine's, of which `environment.HOST_VARIABLES` and those named in `inherit_env` are handed
    on to containers of the host's own root. Raises InvalidInputError for a name that is none.

    `interpreter` is the Python that runs the keeper, this process's own by default: needed by a program that is frozen
    or embeds Python. `compare` tells processes apart, here and in the probe; a drill gives one that is wrong.
    """

    name = "process"

    def __init__(
        self,
        environment: Mapping[bytes, bytes] | None = None,
        *,
        inherit_env: Iterable[str] = (),
        interpreter: str = "",
        compare: Compare = compare,
    ) -> None:
        self._environment = os.environb if environment is None else environment
        self._inherited = require_names(inherit_env)
        self._interpreter = interpreter
        self._compare = compare
        self._scope = ""
        """What tells this state directory from others on this host, also when it is renamed."""
        self._use("")
        self._bare: set[str] = set()
        """Containers started here, of which there is nothing but processes: no log, no cgroup."""
        self._spent: set[str] = set()
        """Of these the keeper has told that no process is left, either."""

    def _use(self, directory: str) -> None:
        """Be at work with the keeper that has this directory."""
        self._keeper = KeeperClient(directory, self._interpreter)
        self._cgroups = Notes(directory)
        self._ends = Ends(self._keeper, self._cgroups)
        self._starts = Starts(self._keeper, self._cgroups, self._ends, self._environment, self._inherited)

    def open(self, state_dir: str) -> None:
        """Look for the keeper that serves this state directory; one is begun when it is needed.

        That is at the first start, and here if the keeper that was there has left ends which nobody has taken. Where
        it cannot begin, the containers that did not end before are Unknown. Beside one of another pid namespace the
        evidence alone decides, and nothing can be started.
        """
        self._use(os.path.join(state_dir, KEEPER))
        found = os.stat(state_dir)
        self._scope = f"{found.st_dev:x}-{found.st_ino:x}"
        try:
            with self._keeper.connection(begin=self._keeper.has_left_ends):
                pass
        except (KeeperError, UnsupportedError) as error:
            _log.warning("state directory %s: %s", state_dir, error)

    def close(self) -> None:
        """Leave the keeper; what is held at a gate ends."""
        self._keeper.close()
        self._ends.close()

    def make_config(self, launch: Launch) -> bytes:
        """Return config.json: command line, environment, user, mounts and root; fill in what the bundle wants of it.

        Raises InvalidInputError, StateDirectoryError if the disk refuses.
        """
        spec = make_spec(launch, find_abilities())
        if spec.root.path:
            sandbox = None if launch.sandbox is None else launch.sandbox.config
            root, metadata = os.path.join(launch.bundle_path, ROOTFS), launch.metadata
            write_root_files(root, sandbox)
            make_room(root, metadata.image_manifest.config.volumes, metadata.config.mounts)
        elif os.geteuid() == 0:
            _give_working_directory(os.path.join(launch.bundle_path, WORKING), spec.process.user)
        return msgspec.json.encode(spec)

    def find_unapplied(self, launch: Launch) -> dict[str, str]:
        """Return what the config asks for and is not done, by the field's name, with the reason."""
        return find_unapplied(launch, find_abilities())

    def keeps(self, container_id: str) -> bool:
        """Say whether the keeper knows the container."""
        return self._keeper.ask({"op": "end", "id": container_id}) is not None

    def prepare(self, launch: Launch) -> Prepared:
        """Have the keeper make the process and hold it at the gate, with its output going to the log.

        Raises StartError, StateDirectoryError if the bundle's config.json is damaged.
        """
        self._spent.discard(launch.id)
        if launch.resources is None and not launch.log_path:
            self._bare.add(launch.id)
        return self._starts.prepare(launch)

    def go(self, prepared: Prepared) -> None:
        """Open the gate; returns once the program is executed. Raises StartError with the reason if it is not."""
        self._starts.go(prepared)

    def abort(self, prepared: Prepared) -> None:
        """Close the gate, and wait until the process is gone."""
        self._starts.abort(prepared)

    def adopt(self, container_id: str, identity: ProcessIdentity) -> int:
        """Return a pidfd of the process with this identity.

        Raises NotFoundError if it is not there, ResourcesError if no descriptor is left but those kept for steps.
        """
        return adopt_process(identity, lambda pidfd: self._why_not(container_id, identity, pidfd))

    def _why_not(self, container_id: str, identity: ProcessIdentity, pidfd: int) -> str:
        """Return why the process behind a pidfd cannot be shown to be the container's; empty if it can."""
        found, detail = self._compare(identity, pidfd)
        if found is Process.HIDDEN:
            raise OSError(errno.EIO, detail)
        if found is Process.UNPROVEN and is_vouched_for(self._ends.ask_about(container_id, identity)):
            return ""
        return "" if found is Process.ALIVE else detail or "it has ended"

    def signal(self, container_id: str, identity: ProcessIdentity, number: int, *, only_session: bool = False) -> int:
        """Send a signal to all that descends from the container's first process; return how many processes that is.

        Where no keeper knows the container, to the group of its first process. Raises UnsupportedError for a process
        that may not be signalled.
        """
        request: Message = {"op": "signal", "id": container_id, "number": number, "session": only_session}
        answer = self._keeper.ask(request | {"pid": identity.pid, "start": identity.start_ticks})
        if answer is not None and "left" in answer:
            left: int = answer["left"]
            return left
        with system_errors_told(f"container {container_id}: signal {number}"):
            return self._signal_group(identity, number)

    def signal_many(self, identities: Mapping[str, ProcessIdentity], number: int) -> dict[str, int]:
        """Do what `signal` does for many; what could not be looked at is left out."""
        many: list[Message] = [{"id": key, "pid": one.pid, "start": one.start_ticks} for key, one in identities.items()]
        answers = self._keeper.ask_for_many({"op": "signal", "number": number}, many)
        left: dict[str, int] = {}
        for (key, identity), answer in zip(identities.items(), answers, strict=False):
            if "left" in answer:
                left[key] = answer["left"]
            elif "error" not in answer:
                with suppress(OSError, UnsupportedError):
                    left[key] = self._signal_group(identity, number)
        return left

    def freeze(self, container_id: str, identity: ProcessIdentity) -> None:
        """Freeze all processes of the container through its cgroup. Raises UnsupportedError, KeeperError."""
        self._bare.discard(container_id)
        self._freezer(container_id, identity.pid).freeze(lambda: self._find_members(container_id))

    def thaw(self, container_id: str, identity: ProcessIdentity) -> None:
        """Let them go on. Raises UnsupportedError."""
        self._freezer(container_id, identity.pid).thaw()

    def is_frozen(self, container_id: str, identity: ProcessIdentity) -> bool:
        """Say whether its cgroup is frozen, or being frozen."""
        return self._freezer(container_id, identity.pid).is_frozen()

    def reopen_log(self, container_id: str, identity: ProcessIdentity, log_path: str) -> None:
        """Have the log copier begin a new log where the old one was renamed; one that was not goes on."""
        request: Message = {"op": "reopen", "id": container_id, "pid": identity.pid, "start": identity.start_ticks}
        answer = self._keeper.ask(request)
        if answer is None or "unknown" in answer:
            raise InvalidStateError(f"container {container_id}: no keeper knows it, so nothing more comes to its log")
        deadline = time.monotonic() + _REOPEN_SECONDS
        while not os.path.lexists(log_path):
            if time.monotonic() > deadline:
                raise InvalidStateError(
                    f"container {container_id}: no new log was begun after {_REOPEN_SECONDS:g} s: nothing has its"
                    " output open any more, or no log can be made there"
                )
            time.sleep(_LOOK_AGAIN_SECONDS)

    def _freezer(self, container_id: str, pid: int = 0) -> Freezer:
        return Freezer(container_id, pid, self._scope, self._cgroups, self._keeper.keeper_pid)

    def _find_members(self, container_id: str) -> Sequence[int]:
        """Return the pids of all that belongs to the container. Raises UnsupportedError if that is not known."""
        answer = self._keeper.ask({"op": "members", "id": container_id})
        if answer is None or not answer.get("all"):
            why = "no keeper knows which they are" if not answer or answer.get("unknown") else "there are too many"
            raise UnsupportedError(f"container {container_id}: its processes cannot be frozen: {why}")
        members: list[int] = answer["members"]
        return members

    def read_exit(self, container_id: str, identity: ProcessIdentity, pidfd: int) -> Exit | None:
        """Return how the process ended, as the keeper has seen it; without one, as the kernel tells, or its journal."""
        return self._note_spent(container_id, self._ends.read(container_id, identity, pidfd))

    def read_exits(self, ended: Mapping[str, tuple[ProcessIdentity, int]]) -> dict[str, Exit | None]:
        """Do what `read_exit` does for many, each with its pidfd; what the keeper has not seen itself is left out."""
        return {key: self._note_spent(key, found) for key, found in self._ends.read_many(ended).items()}

    def _note_spent(self, container_id: str, found: Exit | None) -> Exit | None:
        if found is not None and found.is_all and container_id in self._bare:
            self._spent.add(container_id)
        return found

    def forget_exits(self, container_ids: Sequence[str]) -> None:
        """Let the keeper reap them; those that have come to this process are reaped here."""
        self._ends.forget(container_ids)

    def release_many(self, container_ids: Sequence[str]) -> set[str]:
        """Do what `release` does for many; return those of which nothing is left now."""
        spent = {key for key in container_ids if self._is_spent(key)}
        freezers = {key: self._freezer(key) for key in container_ids if key not in spent}
        for freezer in freezers.values():
            _thaw(freezer)
        answers = self._keeper.ask_for_many({"op": "release"}, [{"id": key} for key in freezers])
        gone = {key for key, answer in zip(freezers, answers, strict=False) if not _holds_up(answer)}
        for key in gone:
            self._remove_cgroups(key, freezers[key])
        return gone | spent

    def release(self, container_id: str) -> None:
        """Kill every process that is left of the container, let its output reach its log, and remove its cgroup."""
        if self._is_spent(container_id):
            return
        began = time.monotonic()
        freezer = self._freezer(container_id)
        _thaw(freezer)
        while answer := self._keeper.ask({"op": "release", "id": container_id}):
            took = time.monotonic() - began
            if answer.get("left") and took > _END_TIMEOUT_SECONDS:
                _log.warning(
                    "container %s: %d of its processes do not end%s",
                    container_id,
                    answer["left"],
                    "; if they are another user's by now (sudo), end them as root" if os.geteuid() else "",
                )
                break
            if not answer.get("left") and (not answer.get("copying") or took > _COPY_TIMEOUT_SECONDS):
                break
            time.sleep(0.002)
        self._remove_cgroups(container_id, freezer)

    def is_copying(self, container_id: str) -> bool:
        """Say whether output of one that has ended is on its way to its log, and nothing is left that writes more."""
        return is_copying(self._keeper, container_id)

    def _is_spent(self, container_id: str) -> bool:
        """Say whether it is known that there is nothing to release; whoever asks again has it looked at."""
        is_spent = container_id in self._spent
        for known in (self._spent, self._bare):
            known.discard(container_id)
        self._ends.settle(container_id)
        return is_spent

    def _remove_cgroups(self, container_id: str, freezer: Freezer) -> None:
        left = remove_limits(container_id, self._keeper.keeper_pid, self._cgroups.noted)
        freezer.remove()
        if left:
            _log.warning("container %s: a cgroup is left: %s", container_id, "; ".join(left))

    def end_leftovers(self, has_ended: Callable[[str], bool]) -> None:
        """Kill processes of containers that have ended: a kill may have come between the end and this.

        What cannot be looked at keeps no other from it, unless the keeper hangs. Raises KeeperError then, too.
        """
        until = time.monotonic() + ANSWER_TIMEOUT_SECONDS
        problem = None
        for record in self._list_containers():
            if ("end" in record or record.get("acknowledged")) and has_ended(record["id"]):
                try:
                    self._keeper.ask({"op": "signal", "id": record["id"], "number": signal.SIGKILL})
                    self.forget_exits([record["id"]])
                except KeeperError as error:
                    problem = error
                    if time.monotonic() > until:
                        break
        if problem is not None:
            raise problem

    def probe(self, containers_dir: str) -> HostProbe:
        """Return what looks at the processes and the bundles, and knows the ends that the keeper has seen."""
        return HostProbe(containers_dir, witness=self._witness, compare=self._compare)

    def _witness(self, container_id: str, identity: ProcessIdentity | None) -> Witnessed | None:
        """Say what the keeper knows of a container's process. Raises KeeperError, UnsupportedError."""
        return self._ends.witness(container_id, identity, self.is_frozen)

    def _list_containers(self) -> "list[Message]":
        """Return what the keeper knows of each container; nothing if there is no keeper. Raises KeeperError."""
        found: list[Message] = []
        answer = self._keeper.ask({"op": "list", "after": ""})
        while answer is not None:
            found += answer["containers"]
            answer = self._keeper.ask({"op": "list", "after": found[-1]["id"]}) if answer["more"] else None
        return found

    def _signal_group(self, identity: ProcessIdentity, number: int) -> int:
        """Signal the process and its group through a pidfd, so that nobody else can be hit."""
        try:
            with open_pidfd(identity.pid) as pidfd:
                if self._compare(identity, pidfd)[0] is not Process.ALIVE:
                    return 0
                if number:
                    _send_to_group(pidfd, number)
                return 0 if has_ended(pidfd) else 1
        except ProcessLookupError:
            return 0
        except PermissionError as error:
            raise UnsupportedError(f"signal {number}: {error.strerror}; run as the container's user") from error


def _holds_up(answer: Message) -> bool:
    """Say whether a release has to wait for something, or whether the keeper could not look at it."""
    return bool("error" in answer or answer.get("left") or answer.get("copying"))


def _thaw(freezer: Freezer) -> None:
    try:
        freezer.thaw()
    except UnsupportedError as error:
        _log.warning("%s", error)


def make_starter(inherit_env: Iterable[str] = ()) -> ProcessStarter:
    """Return the starter as an engine has it by default."""
    return ProcessStarter(inherit_env=inherit_env)


def _give_working_directory(path: str, user: User) -> None:
    """Let the program's user own its default working directory."""
    if user.uid is not None:
        with suppress(FileNotFoundError):  # a launch without a bundle
            os.chown(path, user.uid, -1 if user.gid is None else user.gid, follow_symlinks=False)


def _send_to_group(pidfd: int, number: int) -> None:
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number, None, _PROCESS_GROUP)
    except PermissionError:
        raise
    except OSError:  # EINVAL: a kernel before 6.9, which only signals the leader through its pidfd
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
