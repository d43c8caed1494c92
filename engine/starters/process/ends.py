"""What became of a container's process: as the keeper has seen it, and else as the kernel tells."""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from limpet.engine.starters.contract import Exit
from limpet.engine.starters.orphans import reap_when_over, takes_orphans
from limpet.engine.starters.process.cgroups.limits import was_out_of_memory
from limpet.engine.starters.process.cgroups.parents import Notes
from limpet.engine.starters.process.client import KeeperClient, is_about, is_vouched_for, portions
from limpet.engine.starters.process.keeper.gate import is_of_program
from limpet.engine.starters.process.keeper.kernel import read_stat_of
from limpet.engine.starters.process.keeper.messages import Message
from limpet.engine.state.descriptors import close_all
from limpet.recovery.evidence import Process
from limpet.recovery.host import read_wait_status, to_exit_code
from limpet.recovery.probe import Witnessed
from limpet.schema.errors import KeeperError, UnsupportedError
from limpet.schema.identity import ProcessIdentity

_SETTLED_SECONDS = 2.0
_LOOK_AGAIN_SECONDS = 0.005


class Ends:
    """What is known of processes, and of how they have ended. Thread-safe."""

    def __init__(self, keeper: KeeperClient, cgroups: Notes) -> None:
        self._keeper = keeper
        self._cgroups = cgroups
        self._doubtful: set[str] = set()
        """Containers of which it is not known whether their programs were executed: what the kernel tells of an end may
        be their gates'."""
        self._inherited: dict[str, tuple[int, int]] = {}
        """Pidfds and pids of what has ended without a keeper, where this process takes orphans."""

    def close(self) -> None:
        """Hold nothing any more."""
        while self._inherited:
            close_all((self._inherited.popitem()[1][0],))

    def doubt(self, container_id: str) -> None:
        """Note that its program may be executed or not, for now."""
        self._doubtful.add(container_id)

    def settle(self, container_id: str) -> None:
        """Note that this is known, or that it begins anew, or is over."""
        self._doubtful.discard(container_id)

    def read(self, container_id: str, identity: ProcessIdentity, pidfd: int) -> Exit | None:
        """Return how the process ended, as the keeper has seen it; without one, as the kernel tells, or its journal."""
        answer = self.ask_about(container_id, identity)
        if answer is None or not is_vouched_for(answer):
            self._hold_inherited(container_id, identity.pid, pidfd)
        if answer is None:
            found = self._read_alone(container_id, identity, pidfd)
            if found is None or found.code is not None:
                return found
            with suppress(KeeperError, UnsupportedError):
                answer = self.ask_about(container_id, identity, begin=self._keeper.has_left_ends)
            if answer is None:
                return found
        return self._read(container_id, answer, identity, pidfd)

    def _hold_inherited(self, container_id: str, pid: int, pidfd: int) -> None:
        """Hold a process that comes to us, if it does, until its end is written down: nobody else will reap it."""
        if pidfd >= 0 and container_id not in self._inherited and takes_orphans():
            with suppress(OSError):
                self._inherited[container_id] = os.dup(pidfd), pid

    def _read(self, container_id: str, answer: Message, identity: ProcessIdentity, pidfd: int) -> Exit | None:
        if "end" not in answer:
            return None
        found = self._to_exit(container_id, answer)
        if found.code is None and not found.never_ran and pidfd >= 0:  # the keeper came too late; our pidfd may tell
            return Exit(self._read_code(container_id, identity, pidfd))
        return found

    def _read_alone(self, container_id: str, identity: ProcessIdentity, pidfd: int) -> Exit | None:
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

    def read_many(self, ended: Mapping[str, tuple[ProcessIdentity, int]]) -> dict[str, Exit | None]:
        """Do what `read` does for many, each with its pidfd; what the keeper has not seen itself is left out."""
        answers = self._keeper.ask_for_many({"op": "end"}, [{"id": key} for key in ended])
        return {
            key: self._read(key, answer, identity, pidfd)
            for (key, (identity, pidfd)), answer in zip(ended.items(), answers, strict=False)
            if is_about(answer, identity) and is_vouched_for(answer)
        }

    def forget(self, container_ids: Sequence[str]) -> None:
        """Let the keeper reap them; those that have come to this process are reaped here."""
        for key in container_ids:
            pidfd, pid = self._inherited.pop(key, (-1, 0))
            if pidfd >= 0:
                reap_when_over(pidfd, pid)  # its keeper may be about to end still
                close_all((pidfd,))
        for ids in portions(container_ids):
            self._keeper.tell({"op": "ack", "ids": ids})

    def witness(
        self, container_id: str, identity: ProcessIdentity | None, is_frozen: Callable[[str, ProcessIdentity], bool]
    ) -> Witnessed | None:
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
            return _witness_alive(answer, lambda: is_frozen(container_id, identity))
        found = self._to_exit(container_id, answer)
        if found.never_ran:
            return Witnessed(Process.NEVER_RAN, finished_at=found.finished_at, detail=found.never_ran)
        if found.code is None:
            return Witnessed(Process.GONE)
        return Witnessed(Process.ENDED, found.code, found.finished_at, found.is_out_of_memory)

    def _ask_until_known(self, container_id: str, identity: ProcessIdentity, *, begin: bool) -> Message | None:
        """Do the same, and give one whose engine was killed amid its start a moment to execute its program, or end."""
        end = time.monotonic() + _SETTLED_SECONDS
        while (answer := self.ask_about(container_id, identity, begin=begin)) is not None and time.monotonic() < end:
            if "end" in answer or answer.get("executed") is not None:
                break
            time.sleep(_LOOK_AGAIN_SECONDS)
        return answer

    def ask_about(self, container_id: str, identity: ProcessIdentity, *, begin: bool = False) -> Message | None:
        """Return what the keeper knows of the very process; None if it knows nothing of it, or there is none."""
        answer = self._keeper.ask({"op": "end", "id": container_id}, begin=begin)
        return answer if answer is not None and is_about(answer, identity) else None

    def explain(self, container_id: str, answer: Message) -> str:
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
            return Exit(None, finished_at, never_ran=self.explain(container_id, record))
        if end.get("unseen"):
            return Exit(None)
        code = 128 + end["code"] if end["signal"] else end["code"]
        is_out_of_memory = self._was_out_of_memory(container_id, end)
        return Exit(code, finished_at, is_out_of_memory=is_out_of_memory, is_all=bool(record.get("empty")))

    def _was_out_of_memory(self, container_id: str, end: Message) -> bool:
        is_killed = end.get("signal") and end["code"] == signal.SIGKILL
        return bool(is_killed) and was_out_of_memory(container_id, self._keeper.keeper_pid, self._cgroups.noted)


def _witness_alive(answer: Message, is_frozen: Callable[[], bool]) -> Witnessed:
    if answer.get("executed") is None:
        # Its engine was killed before it knew: the keeper ends it, or knows soon.
        return Witnessed(Process.UNPROVEN, detail="whether its program was executed is not known yet")
    return Witnessed(Process.PAUSED if is_frozen() else Process.ALIVE)


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
