"""Work spread over forked processes, with a deadline: a job that hangs or crashes is reported, not waited for.

A job yields its results one by one, so that the results before a crash are kept.
"""

import contextlib
import functools
import mmap
import select
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Final, Generic, NamedTuple, TypeVar

from limpet.testing.process import own_descendants, read_failure, start, thread_count

Job = TypeVar("Job")
Result = TypeVar("Result")
Mark = Callable[[str], None]
"""Called when a job begins something: gives its name, and shows that the job is alive."""

Prepare = Callable[[int], Callable[[Job, Mark], Iterator[Result]]]

_COUNTER: Final = struct.Struct("=Q")
_MARK_SIZE: Final = 256


class Lost(NamedTuple):
    """A job that did not finish: what it was doing, and what happened to it."""

    mark: str
    reason: str


class Ended(NamedTuple):
    """A job that has ended, after its last result."""


class _End(NamedTuple):
    """How a job ended, as reported by its process."""

    error: Exception | None
    can_fork: bool


class Pool(Generic[Job, Result]):
    """Processes that do jobs; a context manager that ends them and everything they started.

    In each process `prepare(index)` returns the function that does its jobs. Jobs and results are pickled; `prepare`
    and all it refers to reach the processes by the fork.
    """

    def __init__(self, prepare: "Prepare[Job, Result]", *, workers: int, deadline_seconds: float) -> None:
        self._workers: list[_Worker[Job, Result]] = []
        try:
            for index in range(workers):
                self._workers.append(_Worker(functools.partial(prepare, index), deadline_seconds))
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> "Pool[Job, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def map(self, jobs: Iterable[Job]) -> Iterator[Result | Lost | Ended]:
        """Yield the results as they arrive, and how each job ended. Jobs are taken from `jobs` ahead of idle processes.

        An exception raised by a job is raised here.
        """
        for job in jobs:
            while not (idle := [worker for worker in self._workers if not worker.is_busy]):
                yield from self._collect()
            idle[0].send(job)
        while any(worker.is_busy for worker in self._workers):
            yield from self._collect()

    def _collect(self) -> Iterator[Result | Lost | Ended]:
        busy = [worker for worker in self._workers if worker.is_busy]
        waiting = min(worker.seconds_left for worker in busy)
        poll = select.poll()
        for worker in busy:
            for descriptor in worker.descriptors:
                poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(max(0.0, waiting) * 1000 + 1)}
        for worker in busy:
            result = worker.receive(ready)
            if result is not None:
                yield result

    def _close(self) -> None:
        for worker in self._workers:
            worker.close()


class _Worker(Generic[Job, Result]):
    def __init__(self, prepare: Callable[[], Callable[[Job, Mark], Iterator[Result]]], deadline_seconds: float) -> None:
        self._prepare, self._deadline_seconds = prepare, deadline_seconds
        self._memory = mmap.mmap(-1, _COUNTER.size + _MARK_SIZE)
        self.is_busy = False
        self._start()

    def _start(self) -> None:
        self._memory[:] = bytes(len(self._memory))
        self._connection, theirs = Pipe()
        mine = self._connection
        try:
            self._family = start(lambda _report: _serve(self._prepare, mine, theirs, self._memory))
        finally:
            theirs.close()
        self.descriptors = (self._connection.fileno(), self._family.fileno())

    @property
    def seconds_left(self) -> float:
        return self._since + self._deadline_seconds - time.monotonic()

    def send(self, job: Job) -> None:
        self._connection.send(job)
        self.is_busy = True
        self._note_life()

    def receive(self, ready: set[int]) -> Result | Lost | Ended | None:
        """Return the next result, or how the job ended; None while it is running."""
        if self.descriptors[0] in ready:
            with contextlib.suppress(EOFError, ConnectionResetError):
                answer: Result | _End = self._connection.recv()
                self._note_life()
                return self._end(answer) if isinstance(answer, _End) else answer
        if not set(self.descriptors).isdisjoint(ready):
            status, said = self._family.wait(), read_failure(self._family)
            last_line = said.strip().rpartition("\n")[2]
            return self._lose(f"the checking process ended with status {status}" + (last_line and f": {last_line}"))
        if self.seconds_left > 0:
            return None
        if self._counter() != self._seen:
            self._note_life()
            return None
        return self._lose(f"no progress for {self._deadline_seconds:g} s; killed")

    def close(self) -> None:
        self._family.close()
        self._connection.close()

    def _end(self, end: _End) -> Ended:
        self.is_busy = False
        if not end.can_fork:
            self._restart()
        if end.error is not None:
            raise end.error
        return Ended()

    def _lose(self, reason: str) -> Lost:
        mark = self._memory[_COUNTER.size :].split(b"\0", 1)[0].decode()
        self.is_busy = False
        self._restart()
        return Lost(mark, reason)

    def _restart(self) -> None:
        self.close()
        self._start()

    def _note_life(self) -> None:
        self._since, self._seen = time.monotonic(), self._counter()

    def _counter(self) -> int:
        counter: int = _COUNTER.unpack_from(self._memory)[0]
        return counter


def _serve(
    prepare: Callable[[], Callable[[Job, Mark], Iterator[Result]]],
    parents: Connection,
    connection: Connection,
    memory: mmap.mmap,
) -> None:
    parents.close()  # otherwise the parent's end would go unnoticed
    own_descendants()
    function = prepare()

    def mark(name: str) -> None:
        _COUNTER.pack_into(memory, 0, _COUNTER.unpack_from(memory)[0] + 1)
        memory[_COUNTER.size :] = name.encode()[:_MARK_SIZE].ljust(_MARK_SIZE, b"\0")

    can_fork = True
    while can_fork:
        try:
            job = connection.recv()
        except EOFError:
            return
        failure: Exception | None = None
        try:
            for result in function(job, mark):
                connection.send(result)
        except Exception as error:  # noqa: BLE001 - raised again where the results are read
            failure = error
        can_fork = thread_count() == 1  # otherwise a check left threads: the next job gets a new process
        connection.send(_End(failure, can_fork))
