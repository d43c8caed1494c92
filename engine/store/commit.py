"""Group commit: many callers, one writer, one flush for a whole batch of requests.

A caller that finds the store idle commits on its own thread. A caller that finds it busy joins the queue; when the
current commit is done, the committer thread takes the whole queue as the next batch. So batches grow when the disk is
slow, and no caller waits for a timer.

Order: requests are taken in order of arrival, and each batch takes all that are waiting. So no caller starves, and two
requests of one caller, or for one container, are never reordered. Outcome: a caller returns when the flush of its batch
has returned; a refused request fails alone; a failed commit fails its whole batch. Crash: a batch is one transaction,
so a kill leaves all of it or nothing, and no caller had been answered. A caller that is interrupted while waiting
raises after its outcome is known.

A signal handler may raise in the main thread between any two instructions. So the owner is a single field, and a
caller's cleanup can be repeated: an interrupt can cut one run of it short, but not both.
"""

import _thread
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from queue import SimpleQueue
from typing import Any, Self

from limpet.schema.errors import ClosedError, InvalidStateError

MAX_BATCH = 512


class Request:
    """One thread's change, and its outcome. `apply` runs on the committing thread and may raise."""

    __slots__ = ("apply", "error", "following", "result", "settled", "taken", "thread", "wake")

    def __init__(self, apply: Callable[..., Any]) -> None:
        self.apply = apply
        self.thread = threading.get_ident()
        self.result: Any = None
        self.error: BaseException | None = None
        self.taken = False
        """The committer has taken it: there will be an outcome."""
        self.settled = False
        self.following: Request | None = None
        self.wake = threading.Lock()

    def wait(self) -> None:
        """Wait until `result` or `error` is set. An interrupt is raised afterwards, because the outcome is imminent."""
        interrupt: BaseException | None = None
        while not self.settled:
            try:
                self.wake.acquire()
            except BaseException as error:  # noqa: BLE001  # a signal handler may raise anything
                interrupt = error
        self.pass_wake()
        if interrupt is not None:
            raise interrupt

    def pass_wake(self) -> None:
        """Wake the next thread of the batch. May be repeated."""
        if self.following is not None:
            self.following.finish()
            self.following = None

    def finish(self) -> None:
        """Wake the thread waiting for this request. May be repeated."""
        self.settled = True
        if self.wake.locked():
            self.wake.release()

    @classmethod
    def settle(cls, requests: Sequence[Self]) -> None:
        """Tell the callers of `requests` that they are settled.

        Only one thread is woken; it wakes the next. So a large batch does not delay the committer.
        """
        for request, following in pairwise(requests):
            request.following = following
        requests[0].finish()


class _Turn(Request):
    """A request to be the only writer for a while: it receives the right to commit, not an outcome."""

    __slots__ = ()


class Committer:
    """Lets one thread at a time commit, and collects the requests of all others into batches.

    `commit(requests)` sets `result` or `error` of each request; an exception becomes the error of all.
    """

    def __init__(self, commit: Callable[[Sequence[Request]], None]) -> None:
        self._commit = commit
        self._guard = threading.Lock()  # guards the queue and the owner; held for a few instructions only
        self._queue: deque[Request] = deque()
        self._owner: Request | None = None
        """The holder of the right to commit: a caller's request, or `_own` for the committer thread."""
        self._own = Request(_nothing)
        self._own.thread = 0  # until the committer thread runs: no thread has this number
        self._closed = False
        self._work: SimpleQueue[None] = SimpleQueue()  # not a Semaphore, which an interrupt can leave locked for ever
        self._stopped = threading.Lock()  # held until the committer thread has ended
        self._stopped.acquire()

    def run(self, request: Request) -> Any:
        """Commit `request`, alone or in a batch; return its result or raise its error."""
        try:
            try:
                if self._begin(request):
                    self._commit_batch([request])
                else:
                    request.wait()
            finally:
                self._leave(request)
        finally:
            self._leave(request)
        if request.error is not None:
            raise request.error
        return request.result

    def submit(self, request: Request) -> None:
        """Pass `request` to the committer thread and return; the thread settles it."""
        self._require_outside(request)
        with self._guard:
            self._require_open()
            self._queue.append(request)
            if self._owner is None:
                self._hand_over()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the exclusive right to commit while the block runs; requests that arrive meanwhile wait."""
        request = _Turn(_nothing)
        try:
            try:
                self._require_open()
                if not self._begin(request):
                    request.wait()
                yield
            finally:
                self._leave(request)
        finally:
            self._leave(request)

    def close(self) -> None:
        """Refuse new requests, let waiting ones be committed, and stop the thread."""
        with self.turn(), self._guard:
            self._closed = True
        if self._owner is self._own or self._own.thread:  # it was started, even if it has not run yet
            self._work.put(None)
            with self._stopped:
                pass

    def _begin(self, request: Request) -> bool:
        """Return True if the caller may commit now; else queue its request."""
        self._require_outside(request)
        with self._guard:
            self._require_open()
            if self._owner is None:
                self._owner = request
                return True
            request.wake.acquire()
            self._queue.append(request)
            return False

    def _leave(self, request: Request) -> None:
        """Give up what `request` still holds: the right to commit, a place in the queue, the next request's wake."""
        if self._owner is not request and request.settled and request.following is None:
            return
        with self._guard:
            if self._owner is request:
                if self._queue:
                    self._hand_over()
                else:
                    self._owner = None
            elif not request.taken and request in self._queue:
                self._queue.remove(request)  # interrupted before it was taken: it is never committed
        if request.taken:
            request.wait()

    def _require_outside(self, request: Request) -> None:
        owner = self._owner
        if owner is not None and owner.thread == request.thread:
            raise InvalidStateError(
                "the store was called from within a transaction or an update function, and would wait for itself;"
                " use the transaction's draft, or return the new status"
            )

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the store is closed; open it again")

    def _hand_over(self) -> None:
        """Give the right to commit to the committer thread. Call it with the guard held; may be repeated."""
        if not self._own.thread:
            _thread.start_new_thread(self._run_committer, ())  # an interrupt can cut Thread.start() short
        self._work.put(None)
        self._owner = self._own

    def _commit_batch(self, batch: Sequence[Request]) -> None:
        try:
            self._commit(batch)
        except BaseException as error:  # noqa: BLE001  # any exception is the outcome of every caller
            for request in batch:
                request.error = error

    def _run_committer(self) -> None:
        with self._guard:
            if self._own.thread:
                return  # an interrupt after the first start repeated the hand-over
            self._own.thread = threading.get_ident()
        try:
            while not self._is_done():
                self._work.get()
                self._commit_waiting()
        finally:
            self._stopped.release()

    def _is_done(self) -> bool:
        """Return whether the store is closed and the queue empty: requests queued behind a close are committed."""
        with self._guard:
            return self._closed and not self._queue

    def _commit_waiting(self) -> None:
        while batch := self._take_batch():
            if isinstance(batch[0], _Turn):
                batch[0].finish()
                break
            self._commit_batch(batch)
            for kind in {type(request) for request in batch}:
                kind.settle([request for request in batch if type(request) is kind])

    def _take_batch(self) -> list[Request]:
        """Take all waiting requests up to the first turn. A turn is taken alone and becomes the owner."""
        batch: list[Request] = []
        with self._guard:
            if self._owner is not self._own:
                return []  # a redundant wake-up
            while self._queue and len(batch) < MAX_BATCH and not isinstance(self._queue[0], _Turn):
                batch.append(self._queue.popleft())
            if not batch:
                turn = self._queue.popleft() if self._queue else None
                self._owner = turn
                batch = [turn] if turn is not None else []
            for request in batch:
                request.taken = True
        return batch


def _nothing() -> None:
    """Change nothing: a turn has no change of its own."""
