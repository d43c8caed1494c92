"""One life: a workload that runs in a directory under supervision, one operation on its files at a time.

The iterating caller sees each operation before it happens and may perform it (even in part), fail it, or end the
life; an operation neither performed nor failed is performed. `operations` has all that happened.
"""

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Self

from limpet.schema.errors import InvalidInputError, LimpetError
from limpet.testing.emulation import Emulation, Reply
from limpet.testing.nodes import Nodes
from limpet.testing.operations import (
    Acknowledge,
    Create,
    Open,
    Operation,
    Sync,
    SyncFailed,
    Trace,
    Write,
    describe_tree,
)
from limpet.testing.process import require_single_thread
from limpet.testing.supervisor import Event, Supervisor
from limpet.testing.translate import emulate

Live = Callable[[str, Callable[[bytes], None]], None]
"""A workload's live(): it gets the directory and the function that acknowledges."""


class LifeFailedError(LimpetError):
    """The workload failed although nothing was done to it; the message has its traceback."""


class NotReachedError(InvalidInputError):
    """The life ended before the requested point."""


class Step:
    """One operation that the stopped process is about to do."""

    def __init__(self, life: "Life", event: Event, made: Emulation) -> None:
        self.operation = made.operation
        self.call = event.name
        """The system call, for messages."""
        self._life, self._plan = life, made
        self._reply: Reply | int | None = None  # an int is an errno
        self._written = 0

    def perform(self, size: int | None = None) -> None:
        """Do the operation, and record it if it succeeds; of a Write only its first `size` bytes.

        The rest of a Write may follow by another call; otherwise the process sees a short write.
        """
        try:
            if isinstance(self.operation, Write) and self._plan.put is not None:
                self._reply = self._put(self.operation, self._plan.put, size)
            elif self._reply is None:
                self._reply = self._plan.act()
                if not isinstance(self.operation, Open):
                    self._life.operations.append(self.operation)
        except OSError as error:
            self._reply = Reply(self._written) if self._written else error.errno or 0

    def fail(self, error: int) -> None:
        """Make the call return this errno without doing anything. A failing fsync is recorded as such."""
        if isinstance(self.operation, Sync):
            self._life.operations.append(SyncFailed(self.operation.node))
        self._reply = error

    def conclude(self) -> Reply | int:
        """Do what is not done yet, and return the answer to the call: a reply or an errno."""
        if self._reply is None:
            self.perform()
        return Reply() if self._reply is None else self._reply

    def _put(self, write: Write, put: Callable[[bytes, int], int], size: int | None) -> Reply:
        data = write.data[self._written : size]
        if data:
            offset = write.offset + self._written
            count = put(data, offset)
            self._life.operations.append(Write(write.node, offset, data[:count]))
            self._written += count
        return Reply(self._written)


class Life:
    """A context manager that starts `live(directory, acknowledge)` and ends all of it; iterate it once.

    `directory` exists and may contain files, which are taken as durable. Raises UnsupportedError if the system cannot
    stop a process at its system calls, BlindSpotError (a subclass) at a change that is not modelled, and HungError if
    the life exceeds its time.
    """

    def __init__(self, live: Live, directory: str, *, deadline_seconds: float = 60.0) -> None:
        self.directory = os.path.realpath(directory)
        self.operations: list[Operation] = []
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC)
        try:
            self._nodes = Nodes(self._writing)
            self._start = tuple(describe_tree(self.directory, self._nodes.register))
            for operation in self._start:
                if isinstance(operation, Create):
                    self._nodes.note_name(operation.node, operation.name)
            self._supervisor = Supervisor(
                lambda: live(self.directory, self._acknowledge), deadline_seconds=deadline_seconds
            )
        except BaseException:
            self._close_pipe()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._supervisor.close()
        self._close_pipe()

    @property
    def acknowledged(self) -> list[bytes]:
        """What the life has acknowledged so far, in order."""
        return [operation.data for operation in self.operations if isinstance(operation, Acknowledge)]

    @property
    def status(self) -> int | None:
        """How the process ended (negative: the signal); None while it lives."""
        return self._supervisor.status

    @property
    def trace(self) -> Trace:
        """All operations so far."""
        return Trace(self._start, tuple(self.operations))

    def __iter__(self) -> Iterator[Step]:
        for event in self._supervisor.events():
            made = emulate(event, self._nodes)
            if made is None:
                self._supervisor.let_go(event)
                continue
            with contextlib.closing(made):
                if self._supervisor.is_waiting(event):
                    step = Step(self, event, made)
                    yield step
                    if not self._supervisor.killed:
                        self._answer(event, step.conclude())

    def kill(self) -> None:
        """SIGKILL the process where it is stopped. Its descendants stay alive, stopped, until the life is closed."""
        self._supervisor.kill()

    def failure(self) -> str:
        """Return the traceback of the exception that ended the workload, or an empty string."""
        return self._supervisor.failure()

    def _acknowledge(self, data: bytes) -> None:
        os.write(self._writing, data)

    def _answer(self, event: Event, answer: Reply | int) -> None:
        supervisor = self._supervisor
        if isinstance(answer, int):
            supervisor.fail(event, answer)
        elif answer.let_go:
            supervisor.let_go(event)
        elif answer.descriptor is not None:
            supervisor.answer_descriptor(event, answer.descriptor, close_on_exec=answer.close_on_exec)
        else:
            supervisor.answer(event, answer.value)

    def _close_pipe(self) -> None:
        os.close(self._reading)
        os.close(self._writing)


def record(live: Live, directory: str, *, deadline_seconds: float = 60.0) -> Trace:
    """Run `live` in `directory` to its end and return the trace of everything it did to the files there.

    Nothing is really flushed: the images decide what is durable. Raises LifeFailedError if it ends by an exception
    or a signal, and what Life raises.
    """
    with Life(live, directory, deadline_seconds=deadline_seconds) as life:
        for _ in life:
            pass
        require_success(life)
        return life.trace


def require_success(life: Life) -> None:
    """Raise LifeFailedError unless the life ended by itself."""
    if life.status:
        raise LifeFailedError(f"the workload ended with status {life.status}: {life.failure() or 'no traceback'}")


@functools.cache
def supported() -> str | None:
    """Return why crash tests are not possible on this system, None if they are.

    Tried with a life that creates, writes and flushes one file; the answer is remembered. Raises UnsupportedError
    only if this process is the cause: it has several threads.
    """
    require_single_thread()
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        return "the kernel does not list the children of a process (CONFIG_PROC_CHILDREN)"
    with tempfile.TemporaryDirectory(prefix="limpet-testing-") as directory:
        try:
            record(_touch, directory, deadline_seconds=10.0)
        except (LimpetError, OSError) as error:
            return f"{error}"
    return None


def _touch(directory: str, acknowledge: Callable[[bytes], None]) -> None:
    with open(f"{directory}/touched", "xb") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
    acknowledge(b"x")
