"""A starter without processes, for the tests of a program that uses an engine: what happens is what the test says.

    fake = FakeStarter()
    with Engine.open(directory, starter=fake) as engine:
        container = engine.create_container(config, sandbox.id)
        container.start()
        fake.end(container.id, 3)
        assert container.wait(timeout=5).exit_code == 3

Containers outlive the engine, as real ones do: give the next engine the same FakeStarter. Nothing is isolated, limited
or executed; limits that a config asks for are listed as not applied.
"""

import itertools
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from limpet.engine.starters import Exit, Launch, Prepared
from limpet.recovery.evidence import Boot, Bundle, Observation, Process
from limpet.recovery.host import read_boot_id, read_pid_namespace
from limpet.recovery.probe import Subject
from limpet.schema.errors import NotFoundError, StartError
from limpet.schema.identity import ProcessIdentity
from limpet.schema.status import Resources


@dataclass
class _Fake:
    """A process that is none: a pipe, whose reader sees its end when the writer is closed."""

    container_id: str
    identity: ProcessIdentity
    reader: int
    writer: int
    exit_code: int | None = None
    signals: list[int] = field(default_factory=list)


class FakeStarter:
    """Starts containers that exist in its memory alone. Thread-safe."""

    name = "fake"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pids = itertools.count(1)
        self._by_container: dict[str, _Fake] = {}
        self._next_failure = ""
        self.ends_on = frozenset({signal.SIGTERM, signal.SIGKILL})
        """The signals that end a container, with 128 + their number. Take SIGTERM out for one that is stubborn."""

    def fail_next_start(self, reason: str) -> None:
        """Let the next start fail as if its program could not be executed, with this reason."""
        self._next_failure = reason

    def end(self, container_id: str, exit_code: int = 0) -> None:
        """End a container, as if its program had exited. Raises NotFoundError if it does not run."""
        with self._lock:
            self._end(self._find(container_id), exit_code)

    def is_running(self, container_id: str) -> bool:
        """Say whether the container was started and has not ended, whatever an engine says of it."""
        with self._lock:
            fake = self._by_container.get(container_id)
            return fake is not None and fake.exit_code is None

    def signals(self, container_id: str) -> list[int]:
        """Return the signals that were sent to the container, in order. Raises NotFoundError."""
        with self._lock:
            return list(self._find(container_id, running=False).signals)

    def open(self, state_dir: str) -> None:
        """Do nothing: it serves any engine."""

    def close(self) -> None:
        """Do nothing: containers outlive their engine."""

    def make_config(self, launch: Launch) -> bytes:
        """Return an empty config: nothing is run."""
        return b"{}"

    def find_unapplied(self, launch: Launch) -> dict[str, str]:
        """Return nothing: whatever a config asks for, no program is there to miss it."""
        return {}

    def keeps(self, container_id: str) -> bool:
        """Say whether the container was started here."""
        with self._lock:
            return container_id in self._by_container

    def prepare(self, launch: Launch) -> Prepared:
        """Make the process that is none."""
        with self._lock:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            pid = next(self._pids)
            identity = ProcessIdentity(
                pid=pid,
                start_ticks=pid,
                boot_id=read_boot_id() or "",
                pidfd_inode=os.fstat(reader).st_ino,
                pid_namespace=read_pid_namespace(),
            )
            fake = self._by_container[launch.id] = _Fake(launch.id, identity, reader, writer)
        asked = launch.resources
        return Prepared(
            identity=identity,
            pidfd=os.dup(reader),
            resources=None if asked is None else Resources(requested=asked),
            own=fake,
        )

    def go(self, prepared: Prepared) -> None:
        """Let it run. Raises StartError after `fail_next_start`."""
        reason, self._next_failure = self._next_failure, ""
        if reason:
            self.abort(prepared)
            raise StartError(reason)

    def abort(self, prepared: Prepared) -> None:
        """Forget it: it has not run."""
        with self._lock:
            fake = prepared.own
            assert isinstance(fake, _Fake)
            self._end(fake, 128)
            os.close(fake.reader)
            del self._by_container[fake.container_id]
        os.close(prepared.pidfd)

    def adopt(self, container_id: str, identity: ProcessIdentity) -> int:
        """Return a descriptor of the container that was started as this. Raises NotFoundError."""
        with self._lock:
            fake = self._by_container.get(container_id)
            if fake is not None and fake.identity == identity:
                return os.dup(fake.reader)
        raise NotFoundError(f"process {identity.pid}: this FakeStarter has not started it")

    def signal(self, container_id: str, identity: ProcessIdentity, number: int, *, only_session: bool = False) -> int:
        """Note the signal, and end the container if it is one of `ends_on`."""
        with self._lock:
            fake = self._by_container.get(container_id)
            if fake is None or fake.identity != identity or fake.exit_code is not None:
                return 0
            if number:
                fake.signals.append(number)
            if number in self.ends_on:
                self._end(fake, 128 + number)
            return int(fake.exit_code is None)

    def read_exit(self, container_id: str, identity: ProcessIdentity, pidfd: int) -> Exit | None:
        """Return the exit code that the test gave it."""
        with self._lock:
            fake = self._by_container.get(container_id)
            return Exit(fake.exit_code if fake is not None and fake.identity == identity else None)

    def forget_exits(self, container_ids: Sequence[str]) -> None:
        """Do nothing: there is no process to reap."""

    def release(self, container_id: str) -> None:
        """Forget the container."""
        with self._lock:
            fake = self._by_container.pop(container_id, None)
            if fake is not None:
                self._end(fake, 128 + signal.SIGKILL)
                os.close(fake.reader)

    def end_leftovers(self, has_ended: Callable[[str], bool]) -> None:
        """Do nothing: nothing is ever left."""

    def probe(self, containers_dir: str) -> "_FakeProbe":
        """Return what sees the containers as they are in memory."""
        return _FakeProbe(self)

    def observe(self, container_id: str, identity: ProcessIdentity | None) -> tuple[Process, int | None]:
        """Return what became of a container's process, and its exit code if it has ended."""
        with self._lock:
            fake = self._by_container.get(container_id)
            if identity is None:
                return Process.NONE, None
            if fake is None or fake.identity != identity:
                return Process.GONE, None
            return (Process.ALIVE if fake.exit_code is None else Process.ENDED), fake.exit_code

    def _find(self, container_id: str, *, running: bool = True) -> _Fake:
        fake = self._by_container.get(container_id)
        if fake is None or (running and fake.exit_code is not None):
            raise NotFoundError(f"container {container_id} does not run in this FakeStarter")
        return fake

    def _end(self, fake: _Fake, exit_code: int) -> None:
        if fake.exit_code is None:
            fake.exit_code = exit_code
            os.close(fake.writer)


class _FakeProbe:
    """Looks into a FakeStarter."""

    def __init__(self, starter: FakeStarter) -> None:
        self._starter = starter

    def observe(self, container: Subject) -> Observation:
        """Return what became of the container. Its bundle is not looked at."""
        process, exit_code = self._starter.observe(container.id, container.status.identity)
        return Observation(boot=Boot.SAME, process=process, bundle=Bundle.NOT_KEPT, exit_code=exit_code)
