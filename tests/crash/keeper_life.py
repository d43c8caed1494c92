"""A life of the keeper for kills and power cuts, and lives of keepers with one promise broken."""

import fcntl
import os
import select
import socket
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import ClassVar, NamedTuple, NoReturn

import msgspec

from limpet.engine.starters.process.client import Connection
from limpet.engine.starters.process.handed_on import read_handed_on
from limpet.engine.starters.process.keeper import journal, keeper
from limpet.engine.starters.process.keeper.copies import Copies
from limpet.engine.starters.process.keeper.journal import Journal, Record
from limpet.engine.starters.process.keeper.kernel import become_subreaper
from limpet.engine.starters.process.keeper.listener import SOCKET
from limpet.engine.starters.process.keeper.main import LOCK
from limpet.engine.starters.process.plan import make_plan, write_plan
from limpet.recovery.host import read_boot_id
from limpet.schema.runtime_spec import ProcessSpec, Root, Spec
from limpet.testing import Violation

_PATIENCE_MS = 20_000


class _Program(NamedTuple):
    script: str
    code: int
    by_signal: bool
    is_acknowledged: bool
    """The engine has written its end down, and the keeper may forget it."""


_PROGRAMS = {
    "a": _Program("exit 0", 0, by_signal=False, is_acknowledged=True),
    "b": _Program("exit 7", 7, by_signal=False, is_acknowledged=False),
    "c": _Program("kill -USR1 $$", 10, by_signal=True, is_acknowledged=True),
    "d": _Program("kill -KILL $$", 9, by_signal=True, is_acknowledged=False),
    "e": _Program("exit 3", 3, by_signal=False, is_acknowledged=True),
    "f": _Program("exit 4", 4, by_signal=False, is_acknowledged=True),
    "g": _Program("kill -TERM $$", 15, by_signal=True, is_acknowledged=False),
    "h": _Program("exit 5", 5, by_signal=False, is_acknowledged=True),
}
"""By container, in the order of their lives."""
_LIVES = ("a", "b", "c", "d", "e", "fgh")
"""Which live at the same time: they are asked about at once."""


class Told(msgspec.Struct, frozen=True):
    """What the keeper has let its engine rely on: the end of one container."""

    id: str
    forgotten: bool = False


class KeeperLife:
    """A keeper in the foreground, under an engine that starts containers one after the other.

    It acknowledges what survives the keeper's SIGKILL, an end that was told; `flushed`, what survives a power cut:
    an end whose process the keeper has reaped though no engine had acknowledged it.
    """

    journal: ClassVar[type[Journal]] = Journal

    def __init__(self, *, flushed: bool = False) -> None:
        self._flushed = flushed

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        """Start each program, see its end, and acknowledge it."""
        # A keeper that is slow to answer, as on a busy machine, is one by the lock that it holds.
        lock = os.open(os.path.join(directory, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # It listens elsewhere; where no socket had its socket's name, it would have been removed, and be made again.
        os.mknod(os.path.join(directory, SOCKET), stat.S_IFSOCK | 0o600)
        name = f"\0limpet-keeper-life-{os.getpid()}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(name)
        listener.listen()
        if not os.fork():
            self._be_the_keeper(directory, listener)
        listener.close()
        for keys in _LIVES:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            link.connect(name)
            self._run(Connection(link, directory), keys, acknowledge)
            link.close()

    def _be_the_keeper(self, directory: str, listener: socket.socket) -> NoReturn:
        try:
            become_subreaper()
            setattr(journal, "_WORTH_REWRITING", 0)  # noqa: B010  # it is rewritten as soon as it may be
            opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            setattr(keeper, "Journal", self.journal)  # noqa: B010
            keeper.Keeper(opened, listener, os.getpid(), Copies(opened)).run()
        finally:
            os._exit(1)

    def _run(self, connection: Connection, keys: str, acknowledge: Callable[[bytes], None]) -> None:
        pidfds = [self._start(connection, key) for key in keys]
        for pidfd in pidfds:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(_PATIENCE_MS)
            os.close(pidfd)
        pids = self._ask_for_ends(connection, keys)
        assert len(pids) == len(keys)
        for key in keys if not self._flushed else ():
            acknowledge(msgspec.json.encode(Told(key)))
        forgotten = [key for key in keys if _PROGRAMS[key].is_acknowledged]
        if forgotten:
            for key in forgotten:
                acknowledge(msgspec.json.encode(Told(key, forgotten=True)))
            connection.tell({"op": "ack", "ids": forgotten})
            self._ask_for_ends(connection, keys)  # it is done once this is answered
        for key in sorted(set(keys).difference(forgotten)) if self._flushed else ():
            _wait_until_reaped(pids[key])
            acknowledge(msgspec.json.encode(Told(key)))

    def _start(self, connection: Connection, key: str) -> int:
        args = ("sh", "-c", _PROGRAMS[key].script)
        spec = Spec(process=ProcessSpec(args=args, env=(), cwd="/"), root=Root(path=""))
        plan = write_plan(make_plan(spec, os.environb, (), {}, read_handed_on()))
        _, (pidfd,) = connection.ask({"op": "prepare", "id": key}, [plan])
        os.close(plan)
        answer, _ = connection.ask({"op": "go", "id": key})
        assert answer["executed"], answer
        return pidfd

    def _ask_for_ends(self, connection: Connection, keys: str) -> dict[str, int]:
        """Ask how all have ended that the keeper has not forgotten; return their pids."""
        if len(keys) == 1:
            answers = [connection.ask({"op": "end", "id": keys})[0]]
        else:
            answers = connection.ask({"op": "end", "many": [{"id": key} for key in keys]})[0]["answers"]
        assert len(answers) == len(keys)
        assert all("end" in each or each.get("unknown") for each in answers), answers
        return {each["id"]: each["pid"] for each in answers if "id" in each}

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        """Read the journal as the next keeper does: every end that was told is there, and none that was not so."""
        known = _load(directory)
        for key, record in known.items():
            program, end = _PROGRAMS[key], record.get("end")
            if end is not None and (end.get("code"), end.get("signal")) != (program.code, program.by_signal):
                raise Violation("false_verdict", f"{key} ended with {program.code}; the journal has {end}")
            if record.get("executed") is False:
                raise Violation("false_verdict", f"{key} was executed; the journal has {record}")
        told = [msgspec.json.decode(each, type=Told) for each in acknowledged]
        for key in {each.id for each in told} - {each.id for each in told if each.forgotten}:
            if "end" not in known.get(key, {}):
                raise Violation("lost", f"the end of {key}; the journal has {known.get(key)}")


def _load(directory: str) -> dict[str, Record]:
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return Journal(opened, read_boot_id() or "").load()
    finally:
        os.close(opened)


def _wait_until_reaped(pid: int) -> None:
    while os.path.exists(f"/proc/{pid}"):
        with suppress(InterruptedError):
            select.select([], [], [], 0.005)


class _LateJournal(Journal):
    """Writes a record when the next one comes, and not before."""

    def write(self) -> None:
        pass

    def append(self, *records: Record) -> None:
        super().write()
        self._unwritten += [journal._encode(record) for record in records]


class LateKeeperLife(KeeperLife):
    """Tells an end before it has written it down."""

    journal = _LateJournal


class _UnflushedJournal(Journal):
    def _flush_and_exit(self) -> NoReturn:
        os._exit(0)


class UnflushedKeeperLife(KeeperLife):
    """Reaps without having flushed the end."""

    journal = _UnflushedJournal
