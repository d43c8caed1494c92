"""Group commit: many callers, one writer, one flush for all who came in the meantime.

Who finds the store idle commits on its own thread, with nobody in between. Who finds it busy joins the queue;
when the commit under way is over, the committer thread takes the whole queue as the next batch. So a batch
is as large as the disk is slow, and nobody waits for a timer.

Order: requests are taken in the order in which they came, and each batch holds all that were waiting, so
nobody starves and two requests of one caller, or for one container, never change places. Outcome: a caller
returns when the flush of its batch has returned; a request that is refused fails alone; a commit that fails
fails its whole batch. Crash: a batch is one transaction, so a kill leaves all of it or nothing, and nobody had
been told. A caller that is interrupted while it waits is interrupted after its outcome is known.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Self

from limpet.schema.errors import ClosedError, InvalidStateError

MAX_BATCH = 512


class Request:
    """One thread's change, and what became of it. `apply` runs on the committing thread and may raise."""

    __slots__ = ("apply", "error", "following", "result", "settled", "wake")

    def __init__(self, apply: Callable[..., Any]) -> None:
        self.apply = apply
        self.result: Any = None
        self.error: BaseException | None = None
        self.settled = False
        self.following: Request | None = None
        self.wake = threading.Lock()

    def wait(self) -> None:
        """Wait until `result` or `error` is set. An interrupt is raised after that: the outcome is due soon."""
        interrupt: BaseException | None = None
        while not self.settled:
            try:
                self.wake.acquire()
            except BaseException as error:  # noqa: BLE001  # a signal handler may raise anything
                interrupt = error
        if self.following is not None:
            self.following.finish()
        if interrupt is not None:
            raise interrupt

    def finish(self) -> None:
        """Wake the thread that waits for this request."""
        self.settled = True
        self.wake.release()

    @classmethod
    def settle(cls, requests: Sequence[Self]) -> None:
        """Tell the callers of `requests` that they are settled.

        One thread is woken, which wakes the next: so the committer is not held up by a herd.
        """
        for request, following in pairwise(requests):
            request.following = following
        requests[0].finish()


class _Turn(Request):
    """A request to be the only writer for a while: it is given the right to commit, not an outcome."""

    __slots__ = ()


class Committer:
    """Lets one thread at a time commit, and gathers the requests of all others into batches.

    `commit(requests)` sets `result` or `error` of each request; what it raises becomes the error of all.
    """

    def __init__(self, commit: Callable[[Sequence[Request]], None]) -> None:
        self._commit = commit
        self._guard = threading.Lock()  # over the four fields below; held for a few instructions only
        self._queue: deque[Request] = deque()
        self._busy = False
        self._holder = 0  # the thread that commits or has the turn, to catch calls from within
        self._closed = False
        self._work = threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def run(self, request: Request) -> Any:
        """Commit `request`, alone or in a batch; return its result or raise its error."""
        if self._begin(request):
            try:
                self._commit_batch([request])
            finally:
                self._pass_on()
        else:
            request.wait()
        if request.error is not None:
            raise request.error
        return request.result

    def submit(self, request: Request) -> None:
        """Hand `request` to the committer thread and return; it is settled from there."""
        if self._begin(request, at_once=False):
            self._wake_committer()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Be the only one who commits, for as long as the block runs; requests that come meanwhile wait."""
        request = _Turn(_nothing)
        if not self._begin(request):
            request.wait()
        self._holder = threading.get_ident()
        try:
            yield
        finally:
            self._holder = 0
            self._pass_on()

    def close(self) -> None:
        """Refuse new requests, let those that wait be committed, and stop the thread."""
        with self._guard:
            self._closed = True
        try:
            with self.turn():
                pass
        finally:
            if self._thread is not None:
                self._work.release()
                self._thread.join()

    def _begin(self, request: Request, *, at_once: bool = True) -> bool:
        """Return True if the caller may commit now (or, for `submit`, must wake the thread); else queue it."""
        if self._holder == threading.get_ident():
            raise InvalidStateError(
                "the store was called from within a transaction or an update function;"
                " use the transaction, or return the new status"
            )
        with self._guard:
            if self._closed and not isinstance(request, _Turn):
                raise ClosedError("the store is closed; open it again")
            if not self._busy:
                self._busy = True
                if at_once:
                    return True
                self._queue.append(request)
                return True
            request.wake.acquire()
            self._queue.append(request)
            return False

    def _commit_batch(self, batch: Sequence[Request]) -> None:
        self._holder = threading.get_ident()
        try:
            self._commit(batch)
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is the outcome of every caller
            for request in batch:
                request.error = error
        finally:
            self._holder = 0

    def _pass_on(self) -> None:
        """Give up the right to commit: to nobody, or to the committer thread if somebody waits."""
        with self._guard:
            if not self._queue:
                self._busy = False
                return
        self._wake_committer()

    def _wake_committer(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_committer, name="limpet-commit", daemon=True)
            self._thread.start()
        self._work.release()

    def _run_committer(self) -> None:
        while True:
            self._work.acquire()
            while batch := self._take_batch():
                if isinstance(batch[0], _Turn):
                    batch[0].finish()  # it has the right to commit now, and will pass it on
                    break
                self._commit_batch(batch)
                for kind in {type(request) for request in batch}:
                    kind.settle([request for request in batch if type(request) is kind])
            else:
                if self._closed:
                    return

    def _take_batch(self) -> list[Request]:
        """Take all that wait, up to the first turn; a turn comes alone. None left: the store is idle."""
        batch: list[Request] = []
        with self._guard:
            while self._queue and len(batch) < MAX_BATCH:
                if isinstance(self._queue[0], _Turn):
                    return batch or [self._queue.popleft()]
                batch.append(self._queue.popleft())
            if not batch:
                self._busy = False
        return batch


def _nothing() -> None:
    """Stand in for the change that a turn does not have."""
