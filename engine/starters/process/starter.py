"""The process starter: a container is a process of this host and all that descends from it, under a keeper."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from limpet.engine.starters.contract import Exit, Launch, Prepared
from limpet.engine.starters.environment import require_names, require_secrets
from limpet.engine.starters.log_directory import open_log_directory
from limpet.engine.starters.orphans import reap_when_over, takes_orphans
from limpet.engine.starters.pidfds import adopt_process
from limpet.engine.starters.process.cgroups.freezer import Freezer
from limpet.engine.starters.process.cgroups.limits import apply_limits, remove_limits, was_out_of_memory
from limpet.engine.starters.process.cgroups.parents import Notes
from limpet.engine.starters.process.client import (
    ANSWER_TIMEOUT_SECONDS,
    Connection,
    KeeperClient,
    KeeperGoneError,
    is_about,
    is_copying,
    is_vouched_for,
    portions,
)
from limpet.engine.starters.process.handed_on import read_handed_on
from limpet.engine.starters.process.keeper.gate import EXECUTES, is_of_program
from limpet.engine.starters.process.keeper.kernel import read_stat, read_stat_of
from limpet.engine.starters.process.keeper.messages import Message
from limpet.engine.starters.process.keeper.root import open_view, read_view
from limpet.engine.starters.process.plan import make_plan, write_plan
from limpet.engine.starters.process.root_files import make_room, write_root_files
from limpet.engine.starters.process.spec import make_spec, read_spec
from limpet.engine.starters.process.unapplied import find_abilities, find_unapplied
from limpet.engine.state.descriptors import close_all, system_errors_told
from limpet.engine.state.durable import open_made
from limpet.engine.state.names import KEEPER
from limpet.recovery.evidence import Process
from limpet.recovery.host import (
    Compare,
    compare,
    has_ended,
    identify,
    open_pidfd,
    read_wait_status,
    to_exit_code,
    wait_for_end,
    wait_readable,
)
from limpet.recovery.probe import HostProbe, Witnessed
from limpet.schema.errors import InvalidStateError, KeeperError, StartError, UnsupportedError, quote_path
from limpet.schema.file_name import file_name
from limpet.schema.identity import ProcessIdentity
from limpet.schema.layout import ROOTFS, WORKING
from limpet.schema.runtime_spec import Spec, User
from limpet.schema.telling import get_log

_log = get_log("limpet.starter")
_PROCESS_GROUP = 1 << 2  # PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9: the group, also after its leader was reaped
_END_TIMEOUT_SECONDS = 5.0
_COPY_TIMEOUT_SECONDS = 1.0
_SETTLED_SECONDS = 2.0
_LOOK_AGAIN_SECONDS = 0.005
_REOPEN_SECONDS = 5.0
_LOG_BYTES, _LOG_FILES = 10 << 20, 5
"""When a log is rotated, and how many files of it there are: kubelet's containerLogMaxSize and containerLogMaxFiles."""


@dataclass(frozen=True)
class _Held:
    """The process at the gate is held for as long as this connection is open."""

    container_id: str
    connection: Connection
    report: int = -1
    """A descriptor of the pipe that is closed when its program is executed, and by its end; -1 if there is none."""
    plan: int = -1
    """Its plan, whose offset tells how far the gate has come."""

    def close(self) -> None:
        """Close the gate."""
        self.connection.close()
        self.give_up()

    def give_up(self) -> None:
        """Give up waiting for its program to be executed."""
        close_all(each for each in (self.report, self.plan) if each >= 0)

    @property
    def is_left_at_gate(self) -> bool:
        """Say whether it is certain that no program is executed, if its process is gone. Raises OSError."""
        return self.connection.tells_offset and os.lseek(self.plan, 0, os.SEEK_CUR) < EXECUTES


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
        self._keeper = KeeperClient("")
        self._cgroups = Notes("")
        self._scope = ""
        """What tells this state directory from others on this host, also when it is renamed."""
        self._doubtful: set[str] = set()
        """Containers of which it is not known whether their programs were executed: what the kernel tells of an end may
        be their gates'."""
        self._bare: set[str] = set()
        """Containers started here, of which there is nothing but processes: no log, no cgroup."""
        self._spent: set[str] = set()
        """Of these the keeper has told that no process is left, either."""
        self._inherited_ends: dict[str, tuple[int, int]] = {}
        """Pidfds and pids of what has ended without a keeper, where this process takes orphans."""

    def open(self, state_dir: str) -> None:
        """Look for the keeper that serves this state directory; one is begun when it is needed.

        That is at the first start, and here if the keeper that was there has left ends which nobody has taken. Where
        it cannot begin, the containers that did not end before are Unknown. Beside one of another pid namespace the
        evidence alone decides, and nothing can be started.
        """
        self._keeper = KeeperClient(os.path.join(state_dir, KEEPER), self._interpreter)
        self._cgroups = Notes(os.path.join(state_dir, KEEPER))
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
        while self._inherited_ends:
            close_all((self._inherited_ends.popitem()[1][0],))

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
        self._doubtful.discard(launch.id)
        if launch.resources is None and not launch.log_path:
            self._bare.add(launch.id)
        spec = read_spec(launch.bundle_path)
        try:
            held, pid, pidfd = self._fork_gate(launch, spec)
        except (KeeperError, UnsupportedError) as error:
            raise StartError(str(error)) from error
        except OSError as error:
            name = quote_path(error.filename or "its process")
            raise StartError(f"{name}: {error.strerror}") from error
        try:
            requested = launch.resources
            return Prepared(
                identity=identify(pid, pidfd),
                pidfd=pidfd,
                resources=None
                if requested is None
                else apply_limits(launch.id, pid, requested, self._keeper.keeper_pid, self._cgroups.note),
                own=held,
            )
        except BaseException as error:
            held.close()
            close_all((pidfd,))
            if isinstance(error, OSError):
                raise StartError(f"its process cannot be identified: {error}") from error
            raise

    def go(self, prepared: Prepared) -> None:
        """Open the gate; returns once the program is executed. Raises StartError with the reason if it is not."""
        held = prepared.own
        assert isinstance(held, _Held)
        request: Message = {"op": "go", "id": held.container_id}
        self._doubtful.add(held.container_id)
        try:
            held.connection.tell(request)
            if _has_executed(held, prepared):
                held.connection.forgo_answer()
                answer: Message = {"executed": True}
            else:
                answer, _ = held.connection.wait_for_answer(request)
        except KeeperError as error:
            held.connection.close()
            answer = self._settle_start(held, prepared, str(error))
        except BaseException:
            held.connection.close()
            raise
        else:
            self._keeper.give_back(held.connection)
        finally:
            held.give_up()
        if answer["executed"] is not None:
            self._doubtful.discard(held.container_id)
        if answer["executed"] is False:
            close_all((prepared.pidfd,))
            raise StartError(self._explain(held.container_id, answer))

    def abort(self, prepared: Prepared) -> None:
        """Close the gate, and wait until the process is gone."""
        held = prepared.own
        assert isinstance(held, _Held)
        held.close()
        try:
            if not wait_for_end(prepared.pidfd, _END_TIMEOUT_SECONDS):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(prepared.pidfd, signal.SIGKILL)
        finally:
            close_all((prepared.pidfd,))

    def adopt(self, container_id: str, identity: ProcessIdentity) -> int:
        """Return a pidfd of the process with this identity.

        Raises NotFoundError if it is not there, ResourcesError if no descriptor is left but those kept for steps.
        """
        return adopt_process(identity, lambda pidfd: self._why_not(container_id, identity, pidfd))

    def _why_not(self, container_id: str, identity: ProcessIdentity, pidfd: int) -> str:
        """Return why the process behind a pidfd cannot be shown to be the container's; empty if it can."""
        found, detail = self._compare(identity, pidfd)
        if found is Process.UNPROVEN and is_vouched_for(self._ask_about(container_id, identity)):
            return ""
        return "" if found is Process.ALIVE else detail or "it is another"

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
        answer = self._ask_about(container_id, identity)
        if answer is None or not is_vouched_for(answer):
            self._hold_inherited(container_id, identity.pid, pidfd)
        if answer is None:
            found = self._read_exit_alone(container_id, identity, pidfd)
            if found is None or found.code is not None:
                return found
            with suppress(KeeperError, UnsupportedError):
                answer = self._ask_about(container_id, identity, begin=self._keeper.has_left_ends)
            if answer is None:
                return found
        return self._read_exit(container_id, answer, identity, pidfd)

    def _hold_inherited(self, container_id: str, pid: int, pidfd: int) -> None:
        """Hold a process that comes to us, if it does, until its end is written down: nobody else will reap it."""
        if pidfd >= 0 and container_id not in self._inherited_ends and takes_orphans():
            with suppress(OSError):
                self._inherited_ends[container_id] = os.dup(pidfd), pid

    def _read_exit(self, container_id: str, answer: Message, identity: ProcessIdentity, pidfd: int) -> Exit | None:
        if "end" not in answer:
            return None
        found = self._to_exit(container_id, answer)
        if found.is_all and container_id in self._bare:
            self._spent.add(container_id)
        if found.code is None and not found.never_ran and pidfd >= 0:  # the keeper came too late; our pidfd may tell
            return Exit(self._read_code(container_id, identity, pidfd))
        return found

    def _read_exit_alone(self, container_id: str, identity: ProcessIdentity, pidfd: int) -> Exit | None:
        """Return how a process ended that no keeper knows; None while its parent may still reap it."""
        if pidfd < 0:
            return Exit(None)
        code = self._read_code(container_id, identity, pidfd)
        if code is not None:
            return Exit(code)
        is_reaped = read_stat_of(identity.pid, pidfd) is None
        return Exit(None) if is_reaped else None

    def _read_code(self, container_id: str, identity: ProcessIdentity, pidfd: int) -> int | None:
        """Return the exit code that the kernel tells, None if it tells none, or may tell that of a gate."""
        status = read_wait_status(identity.pid, pidfd)
        if status is None or (container_id in self._doubtful and not is_of_program(status)):
            return None
        return to_exit_code(status)

    def read_exits(self, ended: Mapping[str, tuple[ProcessIdentity, int]]) -> dict[str, Exit | None]:
        """Do what `read_exit` does for many, each with its pidfd; what the keeper has not seen itself is left out."""
        answers = self._keeper.ask_for_many({"op": "end"}, [{"id": key} for key in ended])
        return {
            key: self._read_exit(key, answer, identity, pidfd)
            for (key, (identity, pidfd)), answer in zip(ended.items(), answers, strict=False)
            if is_about(answer, identity) and is_vouched_for(answer)
        }

    def forget_exits(self, container_ids: Sequence[str]) -> None:
        """Let the keeper reap them; those that have come to this process are reaped here."""
        for key in container_ids:
            pidfd, pid = self._inherited_ends.pop(key, (-1, 0))
            if pidfd >= 0:
                reap_when_over(pidfd, pid)  # its keeper may be about to end still
                close_all((pidfd,))
        for ids in portions(container_ids):
            self._keeper.tell({"op": "ack", "ids": ids})

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
        for known in (self._spent, self._bare, self._doubtful):
            known.discard(container_id)
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
        """Say what the keeper knows of a container's process. Raises KeeperError, UnsupportedError.

        Not without a keeper where one has left a journal, however often it is killed: to whoever looks at the process
        alone, what is at its gate, or has ended there, is the container.
        """
        begin = self._keeper.has_left_ends
        if identity is None:
            answer = self._keeper.ask({"op": "end", "id": container_id}, begin=begin)
            # One that is held at its gate runs no program, and ends with the step that holds it.
            is_alive = answer is not None and bool(answer.get("running") and answer["executed"])
            return Witnessed(Process.ALIVE) if is_alive else None
        answer = self._ask_until_known(container_id, identity, begin=begin)
        if answer is None or ("end" not in answer and not is_vouched_for(answer)):
            return None
        if "end" not in answer:
            return self._witness_alive(container_id, identity, answer)
        found = self._to_exit(container_id, answer)
        if found.never_ran:
            return Witnessed(Process.NEVER_RAN, finished_at=found.finished_at, detail=found.never_ran)
        if found.code is None:
            return Witnessed(Process.GONE)
        return Witnessed(Process.ENDED, found.code, found.finished_at, found.is_out_of_memory)

    def _witness_alive(self, container_id: str, identity: ProcessIdentity, answer: Message) -> Witnessed:
        if answer.get("executed") is None:
            # Its engine was killed before it knew: the keeper ends it, or knows soon.
            return Witnessed(Process.UNPROVEN, detail="whether its program was executed is not known yet")
        return Witnessed(Process.PAUSED if self.is_frozen(container_id, identity) else Process.ALIVE)

    def _fork_gate(self, launch: Launch, spec: Spec) -> tuple[_Held, int, int]:
        """Return what holds the gate, the pid and a pidfd. Raises KeeperError, OSError."""
        secrets = require_secrets(launch.secret_env)
        opened = [plan := write_plan(make_plan(spec, self._environment, self._inherited, secrets, read_handed_on()))]
        try:
            request: Message = {"op": "prepare", "id": launch.id, "report": True}
            if launch.log_path:
                directory = os.path.dirname(launch.log_path)
                descriptor, name = open_log_directory(launch.log_directory or directory, launch.log_path)
                opened.append(descriptor)
                _make_log(descriptor, name)
                request["owner"] = spec.process.user.uid or 0
                request["log"] = {
                    "directory": directory,
                    "name": name,
                    "max_bytes": _LOG_BYTES,
                    "max_files": _LOG_FILES,
                    "pipes": file_name(launch.id),
                }
                state_dir = os.path.dirname(os.path.dirname(launch.bundle_path))
                if f"{directory}/".startswith(f"{state_dir}/"):
                    request["log"]["within"] = directory[len(state_dir) + 1 :]
            own = [*opened]
            for last in (False, False, True):
                connection = self._keeper.take(begin=True)
                assert connection is not None
                try:
                    view = _open_view(connection)
                    opened += view
                    answer, given = connection.ask(request | {"view": bool(view)}, [*own, *view])
                    if not given:
                        raise KeeperGoneError("the keeper has answered something else than a process")
                except BaseException as error:
                    connection.close()
                    self._keeper.forget_connections()
                    if isinstance(error, KeeperGoneError) and not last:
                        continue  # what it held for us has ended with the connection
                    raise
                pidfd, *report = given  # a keeper of an older version gives no report
                opened.remove(plan)
                return _Held(launch.id, connection, report[0] if report else -1, plan), answer["pid"], pidfd
            raise AssertionError
        finally:
            close_all(opened)  # none of them was written to; an error here would lose the process

    def _settle_start(self, held: _Held, prepared: Prepared, problem: str) -> Message:
        """Return what became of a start whose keeper died or did not answer; if it still hangs, it is ended."""
        container_id = held.container_id
        why: Message = {}
        answer = None
        with suppress(KeeperError):  # it hangs, or dies in its turn: then the process tells, as where there is none
            answer = self._ask_about(container_id, prepared.identity)
            if answer is not None and is_vouched_for(answer) and answer.get("executed") is None:
                why = {"why": f"it did not come through its gate: {problem}"}
                self._keeper.ask({"op": "signal", "id": container_id, "number": signal.SIGKILL})
                wait_for_end(prepared.pidfd, _END_TIMEOUT_SECONDS)
                answer = self._ask_about(container_id, prepared.identity)
        if answer is not None and is_vouched_for(answer) and answer.get("executed") is not None:
            return why | answer
        executed = _settle_without_keeper(held, prepared)
        if executed is False:
            reap_when_over(prepared.pidfd)
        return {"executed": executed, "why": f"its keeper was killed or hangs: {problem}"} | why

    def _ask_until_known(self, container_id: str, identity: ProcessIdentity, *, begin: bool) -> Message | None:
        """Do the same, and give one whose engine was killed amid its start a moment to execute its program, or end."""
        end = time.monotonic() + _SETTLED_SECONDS
        while (answer := self._ask_about(container_id, identity, begin=begin)) is not None and time.monotonic() < end:
            if "end" in answer or answer.get("executed") is not None:
                break
            time.sleep(_LOOK_AGAIN_SECONDS)
        return answer

    def _ask_about(self, container_id: str, identity: ProcessIdentity, *, begin: bool = False) -> Message | None:
        """Return what the keeper knows of the very process; None if it knows nothing of it, or there is none."""
        answer = self._keeper.ask({"op": "end", "id": container_id}, begin=begin)
        return answer if answer is not None and is_about(answer, identity) else None

    def _explain(self, container_id: str, answer: Message) -> str:
        """Say why a program was not executed."""
        end = answer.get("end") or {}
        if answer.get("why"):
            return str(answer["why"])
        if self._was_out_of_memory(container_id, end):
            return "its memory limit leaves no room to execute its program; raise memory_limit_in_bytes"
        if end.get("signal"):
            return f"it was ended by {_name_signal(end['code'])} before its program was executed"
        return "its program was never executed"

    def _to_exit(self, container_id: str, record: Message) -> Exit:
        end = record["end"]
        finished_at = end.get("time", 0)
        if record.get("executed") is None:  # "never ran" is not said of what may have run
            return Exit(None, finished_at)
        if not record["executed"]:
            return Exit(None, finished_at, never_ran=self._explain(container_id, record))
        if end.get("unseen"):
            return Exit(None)
        code = 128 + end["code"] if end["signal"] else end["code"]
        is_out_of_memory = self._was_out_of_memory(container_id, end)
        return Exit(code, finished_at, is_out_of_memory=is_out_of_memory, is_all=bool(record.get("empty")))

    def _was_out_of_memory(self, container_id: str, end: Message) -> bool:
        is_killed = end.get("signal") and end["code"] == signal.SIGKILL
        return bool(is_killed) and was_out_of_memory(container_id, self._keeper.keeper_pid, self._cgroups.noted)

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


def _open_view(connection: Connection) -> list[int]:
    """Return descriptors of what this thread sees of files, nothing if its keeper sees the same. Raises OSError."""
    return open_view() if connection.view and connection.view != read_view() else []


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


def _has_executed(held: _Held, prepared: Prepared) -> bool:
    """Wait until the program is executed, and say so; False if it is not, or if the keeper has to be asked.

    The pipe's end alone says nothing: a gate that is killed closes it, too. What was written to it is the keeper's.
    Raises KeeperError if nothing happens in time.
    """
    if held.report < 0 or not held.connection.wait_for_either(held.report):
        return False
    try:
        stat = read_stat(prepared.identity.pid)
    except OSError:
        return False
    return stat is not None and stat.start_ticks == prepared.identity.start_ticks and stat.has_executed


def _settle_without_keeper(held: _Held, prepared: Prepared) -> bool | None:
    """Say whether a process that no keeper is the parent of has executed its program; if it has not, it is ended.

    The gate closed with the last keeper, so the process goes on or ends, or was killed by a keeper that took over and
    is gone, too; and anybody may reap it. Its report tells then, or how far it came. None if it may have, and nobody
    knows: "never ran" is not said of what may have run, nor a code that may be its gate's. Raises OSError.
    """
    told = _read_report(held.report)
    if told:
        return False
    if told is None and _has_gone_on(prepared) is False:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(prepared.pidfd, signal.SIGKILL)
        wait_for_end(prepared.pidfd, _END_TIMEOUT_SECONDS)
    has_gone_on = _has_gone_on(prepared)
    return False if has_gone_on is None and held.is_left_at_gate else has_gone_on


def _has_gone_on(prepared: Prepared) -> bool | None:
    """Say whether a process has executed its program; None once it is gone."""
    stat = read_stat_of(prepared.identity.pid, prepared.pidfd)
    return None if stat is None else stat.has_executed


def _read_report(report: int) -> bytes | None:
    """Return what the gate has reported; None if it has neither executed its program nor ended in time, or has none."""
    told = b""
    end = time.monotonic() + _END_TIMEOUT_SECONDS
    while report >= 0 and wait_readable(report, max(0, end - time.monotonic())):
        chunk = os.read(report, 4096)
        if not chunk:
            return told
        told += chunk
    return None


def _make_log(directory: int, name: str) -> None:
    """Make the log's file where there is none. Raises OSError for what output cannot go to: a link, a pipe."""
    os.close(open_made(name, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory))


def _give_working_directory(path: str, user: User) -> None:
    """Let the program's user own its default working directory."""
    if user.uid is not None:
        with suppress(FileNotFoundError):  # a launch without a bundle
            os.chown(path, user.uid, -1 if user.gid is None else user.gid, follow_symlinks=False)


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _send_to_group(pidfd: int, number: int) -> None:
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number, None, _PROCESS_GROUP)
    except PermissionError:
        raise
    except OSError:  # EINVAL: a kernel before 6.9, which only signals the leader through its pidfd
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
