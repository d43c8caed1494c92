"""How a container's process is started: the keeper makes it and holds it at a gate, then the gate is opened."""

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from limpet.engine.starters.contract import Launch, Prepared
from limpet.engine.starters.environment import require_secrets
from limpet.engine.starters.log_directory import open_log_directory
from limpet.engine.starters.orphans import reap_when_over
from limpet.engine.starters.process.cgroups.limits import apply_limits
from limpet.engine.starters.process.cgroups.parents import Notes
from limpet.engine.starters.process.client import Connection, KeeperClient, KeeperGoneError, is_vouched_for
from limpet.engine.starters.process.ends import Ends
from limpet.engine.starters.process.handed_on import read_handed_on
from limpet.engine.starters.process.keeper.gate import EXECUTES
from limpet.engine.starters.process.keeper.kernel import read_stat, read_stat_of
from limpet.engine.starters.process.keeper.messages import Message
from limpet.engine.starters.process.keeper.root import open_view, read_view
from limpet.engine.starters.process.plan import make_plan, write_plan
from limpet.engine.starters.process.spec import read_spec
from limpet.engine.state.descriptors import close_all
from limpet.engine.state.durable import open_made
from limpet.recovery.host import identify, wait_for_end, wait_readable
from limpet.schema.errors import KeeperError, StartError, UnsupportedError, quote_path
from limpet.schema.file_name import file_name
from limpet.schema.runtime_spec import Spec

_END_TIMEOUT_SECONDS = 5.0
_GONE_SECONDS = 0.5
_LOG_BYTES, _LOG_FILES = 10 << 20, 5
"""When a log is rotated, and how many files of it there are: kubelet's containerLogMaxSize and containerLogMaxFiles."""


@dataclass(frozen=True)
class Held:
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


class Starts:
    """Starts containers. Thread-safe; one container by one thread at a time."""

    def __init__(
        self,
        keeper: KeeperClient,
        cgroups: Notes,
        ends: Ends,
        environment: Mapping[bytes, bytes],
        inherited: tuple[str, ...],
    ) -> None:
        self._keeper = keeper
        self._cgroups = cgroups
        self._ends = ends
        self._environment = environment
        self._inherited = inherited

    def prepare(self, launch: Launch) -> Prepared:
        """Have the keeper make the process and hold it at the gate, with its output going to the log.

        Raises StartError, StateDirectoryError if the bundle's config.json is damaged.
        """
        self._ends.settle(launch.id)
        spec = read_spec(launch.bundle_path)
        try:
            held, pid, pidfd = self._fork_gate(launch, spec)
        except (KeeperError, UnsupportedError) as error:
            raise StartError(str(error)) from error
        except OSError as error:
            name = quote_path(error.filename) if error.filename else "its process cannot be made"
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
            is_hidden = _is_hidden(error, pid, pidfd)
            held.close()
            close_all((pidfd,))
            if is_hidden:
                raise StartError(
                    f"its process, {pid}, lives and /proc does not show it: /proc is mounted with hidepid (proc(5);"
                    " systemd: ProtectProc=), and the keeper has been begun in another user namespace than this one"
                    " (systemd: PrivateUsers=); leave one of the two out once the containers that run have ended, or"
                    " have them ended with the engine"
                ) from error
            if isinstance(error, OSError):
                raise StartError(f"its process cannot be identified: {error}") from error
            raise

    def go(self, prepared: Prepared) -> None:
        """Open the gate; returns once the program is executed. Raises StartError with the reason if it is not."""
        held = prepared.own
        assert isinstance(held, Held)
        request: Message = {"op": "go", "id": held.container_id}
        self._ends.doubt(held.container_id)
        try:
            held.connection.tell(request)
            if _has_executed(held, prepared):
                held.connection.forgo_answer()
                answer: Message = {"executed": True}
            else:
                answer, _ = held.connection.wait_for_answer(request)
        except KeeperError as error:
            held.connection.close()
            answer = self._settle(held, prepared, str(error))
        except BaseException:
            held.connection.close()
            raise
        else:
            self._keeper.give_back(held.connection)
        finally:
            held.give_up()
        if answer["executed"] is not None:
            self._ends.settle(held.container_id)
        if answer["executed"] is False:
            close_all((prepared.pidfd,))
            raise StartError(self._ends.explain(held.container_id, answer))

    def abort(self, prepared: Prepared) -> None:
        """Close the gate, and wait until the process is gone."""
        held = prepared.own
        assert isinstance(held, Held)
        held.close()
        try:
            if not wait_for_end(prepared.pidfd, _END_TIMEOUT_SECONDS):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(prepared.pidfd, signal.SIGKILL)
        finally:
            close_all((prepared.pidfd,))

    def _fork_gate(self, launch: Launch, spec: Spec) -> tuple[Held, int, int]:
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
                return Held(launch.id, connection, report[0] if report else -1, plan), answer["pid"], pidfd
            raise AssertionError
        finally:
            close_all(opened)  # none of them was written to; an error here would lose the process

    def _settle(self, held: Held, prepared: Prepared, problem: str) -> Message:
        """Return what became of a start whose keeper died or did not answer; if it still hangs, it is ended."""
        container_id = held.container_id
        why: Message = {}
        answer = None
        with suppress(KeeperError):  # it hangs, or dies in its turn: then the process tells, as where there is none
            answer = self._ends.ask_about(container_id, prepared.identity)
            if answer is not None and is_vouched_for(answer) and answer.get("executed") is None:
                why = {"why": f"it did not come through its gate: {problem}"}
                self._keeper.ask({"op": "signal", "id": container_id, "number": signal.SIGKILL})
                wait_for_end(prepared.pidfd, _END_TIMEOUT_SECONDS)
                answer = self._ends.ask_about(container_id, prepared.identity)
        if answer is not None and is_vouched_for(answer) and answer.get("executed") is not None:
            return why | answer
        executed = _settle_without_keeper(held, prepared)
        if executed is False:
            reap_when_over(prepared.pidfd)
        return {"executed": executed, "why": f"its keeper was killed or hangs: {problem}"} | why


def _open_view(connection: Connection) -> list[int]:
    """Return descriptors of what this thread sees of files, nothing if its keeper sees the same. Raises OSError."""
    return open_view() if connection.view and connection.view != read_view() else []


def _is_hidden(error: BaseException, pid: int, pidfd: int) -> bool:
    """Say whether a process that is held cannot be identified because /proc does not show it to us."""
    if not isinstance(error, FileNotFoundError | PermissionError):
        return False
    # Of one that is gone /proc says nothing more, and does not a moment before, either.
    return str(error.filename).startswith(f"/proc/{pid}/") and not wait_for_end(pidfd, _GONE_SECONDS)


def _has_executed(held: Held, prepared: Prepared) -> bool:
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


def _settle_without_keeper(held: Held, prepared: Prepared) -> bool | None:
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
