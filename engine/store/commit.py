"""Group commit: many callers, one writer, one flush for a whole batch of requests.

A caller that finds the store idle commits on its own thread. A caller that finds it busy joins the queue; the committer
thread takes the whole queue as the next batch. So batches grow when the disk is slow, and no caller waits for a timer.

Order: requests are taken in order of arrival, and each batch takes all that are waiting. So no caller starves, and two
requests of one caller are never reordered. Outcome: a caller returns when the flush of its batch has returned; a
refused request fails alone; a failed commit fails its whole batch. Crash: a batch is one transaction, so a kill leaves
all of it or nothing, and no caller had been answered. A caller that is interrupted while it waits raises after its
outcome is known.

A signal handler may raise in the main thread between any two calls, and a call may fail for want of memory anywhere. So
whoever has the right to commit holds a lock of the interpreter's own in a `with` statement, which nothing can leave
locked, and nobody has to be told of it; the committer thread is never interrupted, keeps what it has taken until
everybody was answered, and tries again after a failure of its own. If no thread can be started, callers take turns.
"""

import _thread
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

from limpet.engine.state.steps import asker
from limpet.schema.errors import ClosedError, InvalidStateError, StoreError

if TYPE_CHECKING:
    from limpet.engine.fleet import Promise

MAX_BATCH = 512
_START_SECONDS = 10.0
"""So long the first who has to wait gives the committer thread to begin."""
_PAUSE_SECONDS = 0.01
"""After a failure of its own the committer thread waits so long before it tries again."""
_TRIES = 5
"""So often a batch is tried that fails for want of memory, of which nothing was written then."""


class Request:
    """One thread's change, and its outcome. `apply` runs on the committing thread and may raise."""

    is_turn = False
    """True if it receives the right to commit, not an outcome.

    It has that from `finish` on for as long as `inside` is held, which is taken before it is submitted.
    """
    __slots__ = (
        *("apply", "asker", "error", "inside", "patience", "promise", "result", "settled", "taken", "thread"),
        *("until_sent", "wake"),
    )

    def __init__(self, apply: Callable[..., Any]) -> None:
        self.apply = apply
        self.thread = threading.get_ident()
        self.asker = asker()
        """The thread that waits for it, if that is another: the main thread, whose step it is."""
        self.result: Any = None
        self.error: BaseException | None = None
        self.taken = False
        """The committer has taken it: there will be an outcome."""
        self.settled = False
        """There is an outcome."""
        self.until_sent = False
        """Its caller is woken only when the fleet has what it has written. Whoever is in a hurry takes that back."""
        self.patience = -1.0
        """For so many seconds that is waited for; then whether there is an outcome is looked at without being woken."""
        self.promise: Promise | None = None
        """By which the fleet will wake its caller."""
        self.wake = threading.Lock()
        """Held until its caller is to be woken."""
        self.inside = threading.Lock()
        """Held by `thread` while it has the right to commit, or waits for a turn."""

    def wait(self) -> None:
        """Wait until `result` or `error` is set. An interrupt is raised afterwards, because the outcome is imminent."""
        interrupt: BaseException | None = None
        while not self.settled:
            try:
                self.wake.acquire(timeout=self.patience)
            except BaseException as error:  # noqa: BLE001  # a signal handler may raise anything
                self.until_sent, interrupt = False, error
        if interrupt is not None:
            raise interrupt

    def finish(self) -> None:
        """Wake the thread waiting for this request. May be repeated."""
        self.settled = True
        if self.wake.locked():
            self.wake.release()

    @classmethod
    def settle(cls, requests: Sequence[Self]) -> None:
        """Tell the callers of `requests` that they are settled. May be repeated."""
        for request in requests:
            request.finish()


class _Turn(Request):
    """A request to be the only writer for a while."""

    __slots__ = ()
    is_turn = True


class Committer:
    """Lets one thread at a time commit, and collects the requests of all others into batches.

    `commit(requests)` sets `result` or `error` of each request; an exception becomes the error of all. After a
    MemoryError nothing was written.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Request]], None],
        answer: "Callable[[Sequence[Request]], None] | None" = None,
    ) -> None:
        """Begin. `answer` tells callers that their requests are settled, or sees to it; it may be called again."""
        self._commit = commit
        self._answer = answer or settle
        self._right = threading.Lock()
        """The right to commit. The committer thread holds it for whoever it gives a turn."""
        self._next = threading.Lock()
        """Held by who commits on its own thread or waits for the right to: the committer thread lets it go first."""
        self._holder: Request | None = None
        """Whose the right is, or was last."""
        self._ahead: Request | None = None
        """Who commits on its own thread or waits for the right to; whoever sees another one here joins the queue.

        Without it all who wait for the right would be taken for nobody in the instant in which it is given up, and each
        who calls again would wait for it, too: as many commits as callers. An interrupt may leave it: the committer
        thread clears it, for nothing but speed depends on it.
        """
        self._guard = threading.Lock()  # guards the queue; held for a few instructions only
        self._queue: deque[Request] = deque()
        self._closed = False
        self._is_served = False
        """True once a committer thread runs. Only then is anything queued."""
        self._work = threading.Lock()  # released when there is something to do
        self._work.acquire()
        self._taken: Sequence[Request] = ()
        """What the committer thread has taken from the queue and not yet answered."""
        self._tries = 0
        self._is_tried = False
        """True once it is known what became of the commit of that batch."""
        self._failure: BaseException | None = None

    def begin(self) -> None:
        """Have the committer thread run, if one can be started; it is tried again when it is needed."""
        self._can_queue()

    def run(self, request: Request) -> Any:
        """Commit `request`, alone or in a batch; return its result or raise its error."""
        self._require_open()
        self._require_outside(request)
        if self._is_idle() or not self._can_queue():
            self._ahead = request
            try:
                with self._next, self._right, request.inside:
                    self._holder = request
                    self._require_open()
                    self._commit((request,))
            finally:
                self._fall_back(request)
        else:
            self._wait_in_queue(request)
        if request.error is not None:
            raise request.error
        return request.result

    def submit(self, request: Request) -> None:
        """Pass `request` to the committer thread and return; the thread settles it. Raises StoreError without one."""
        self._require_open()
        self._require_outside(request)
        if not self._can_queue():
            raise StoreError(
                "no thread can be started to commit this change (RLIMIT_NPROC? or the program ends); nothing was"
                " written"
            )
        try:
            self._enqueue(request)
        except BaseException:
            self._withdraw(request)
            raise

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the exclusive right to commit while the block runs; requests that arrive meanwhile wait."""
        turn = _Turn(_nothing)
        self._require_open()
        self._require_outside(turn)
        if self._is_idle() or not self._can_queue():
            self._ahead = turn
            try:
                with self._next, self._right, turn.inside:
                    self._holder = turn
                    self._require_open()
                    yield
            finally:
                self._fall_back(turn)
        else:
            with turn.inside:  # the committer thread waits until it is given up
                self._wait_in_queue(turn)
                yield

    def close(self) -> None:
        """Refuse new requests, and let waiting ones be committed. May be repeated.

        Within a turn of this thread, or of one that an interrupt has cut off and that is not collected yet, it does not
        wait: nothing must be committed any more then.
        """
        last = _Turn(_nothing)
        with self._guard:
            self._closed = True
            if self._is_inside(last):
                return
            if self._right.locked():
                self._require_no_shutdown()
            if self._is_served and not sys.is_finalizing():
                self._enqueue_guarded(last)
        if last.wake.locked():
            last.wait()  # all that were queued come before it
        else:
            with self._right:
                pass

    def _is_idle(self) -> bool:
        """Say whether nobody waits or commits. May be out of date at once: whoever believes it may have to wait."""
        return self._ahead is None and not (self._queue or self._next.locked() or self._right.locked())

    def _fall_back(self, request: Request) -> None:
        if self._ahead is request:  # not if another has come at the same time, and waits now
            self._ahead = None

    def _can_queue(self) -> bool:
        """Say whether there is a committer thread; start it if there is none yet."""
        self._require_no_shutdown()
        if not self._is_served:
            begun = threading.Lock()
            begun.acquire()
            try:
                _thread.start_new_thread(self._serve, (begun,))  # an interrupt can cut Thread.start() short
            except RuntimeError:  # there may be no more threads
                return False
            begun.acquire(timeout=_START_SECONDS)  # it may have failed for want of memory before it began
        return self._is_served

    def _require_no_shutdown(self) -> None:
        if sys.is_finalizing():  # other threads do not run any more, one of them perhaps amid a commit
            raise ClosedError("the interpreter is ending, and another thread was using the store; close it earlier")

    def _wait_in_queue(self, request: Request) -> None:
        try:
            try:
                self._enqueue(request)
                request.wait()
            finally:
                self._withdraw(request)
        finally:
            self._withdraw(request)

    def _enqueue(self, request: Request) -> None:
        with self._guard:
            self._require_open()
            self._enqueue_guarded(request)

    def _enqueue_guarded(self, request: Request) -> None:
        request.wake.acquire()
        self._wake_server()  # before, so that an interrupt in between does no harm: it waits for the guard
        self._queue.append(request)

    def _withdraw(self, request: Request) -> None:
        """See to it that a request whose caller was interrupted has an outcome, or is never committed."""
        if request.settled:
            return
        with self._guard:
            if not request.taken and request in self._queue:
                self._queue.remove(request)
        if request.taken:
            request.wait()

    def _require_outside(self, request: Request) -> None:
        if self._is_inside(request):
            raise InvalidStateError(
                "the store was called from within a transaction or an update function, and would wait for itself;"
                " use the transaction's draft, or return the new status"
            )

    def _is_inside(self, request: Request) -> bool:
        """Say whether the request's thread, or the one whose step it is, has the right to commit already."""
        holder = self._holder
        return holder is not None and holder.thread in {request.thread, request.asker} and holder.inside.locked()

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the store is closed; open it again")

    def _wake_server(self) -> None:
        """Wake the committer thread. Call it with the guard held."""
        if self._work.locked():
            self._work.release()

    def _serve(self, begun: Any) -> None:
        """Serve the queue until it is closed and empty: the committer thread.

        A second thread, which an interrupt while the first one started may bring, does no harm.
        """
        own: Request | None = None
        has_failed = False
        while True:
            try:
                if has_failed:
                    time.sleep(_PAUSE_SECONDS)
                own = own or Request(_nothing)
                self._is_served = True
                if begun.locked():
                    begun.release()
                if not has_failed and not self._queue:
                    self._work.acquire()
                has_failed = True
                with self._next:  # let go at once
                    pass
                with self._right, own.inside:
                    self._serve_queue(own)
                if self._is_over():
                    return
                has_failed = False
            except BaseException:  # noqa: BLE001  # whatever happened to this thread, everybody gets an answer
                has_failed = True

    def _is_over(self) -> bool:
        """Return whether nothing will ever be queued again; if so, wake another committer thread to see that, too."""
        with self._guard:
            if self._closed and not self._queue:
                self._is_served = False  # who closes again must not wait for this thread
                self._wake_server()
                return True
            return False

    def _serve_queue(self, own: Request) -> None:
        """Answer all that are waiting, or a batch of them if another thread waits for the right.

        After a failure it goes on where that one struck.
        """
        while self._taken or self._take_batch():
            first = self._taken[0]
            if first.is_turn:
                self._holder = first
                first.finish()
                with first.inside:  # until its caller has left
                    pass
            else:
                self._holder = own
                if not self._is_tried:
                    self._commit_taken()
                self._answer_taken()
            self._taken = ()
            if self._next.locked():
                break

    def _take_batch(self) -> bool:
        """Take all waiting requests up to the first turn, or that turn alone. False if nobody waits."""
        with self._guard:
            found = list(islice(self._queue, MAX_BATCH))
            size = next((number for number, one in enumerate(found) if one.is_turn), len(found)) or 1
            batch = found[:size]
            for request in batch:
                request.taken = True
            self._tries, self._is_tried, self._failure = 0, False, None
            self._ahead = None
            self._taken = batch  # from here on nothing needs memory
            while self._queue and self._queue[0].taken:
                self._queue.popleft()
            return bool(batch)

    def _commit_taken(self) -> None:
        try:
            self._commit(self._taken)
            self._is_tried = True
        except MemoryError as error:
            self._tries += 1
            if self._tries < _TRIES:
                raise
            self._failure, self._is_tried = error, True
        except BaseException as error:  # noqa: BLE001  # any exception is the outcome of every caller
            self._failure, self._is_tried = error, True

    def _answer_taken(self) -> None:
        if self._failure is not None:
            for request in self._taken:
                request.error = request.error or self._failure
        self._answer(self._taken)


def settle(requests: Sequence[Request]) -> None:
    """Tell the callers of all kinds of requests that they are settled. May be repeated."""
    for kind in {type(request) for request in requests}:
        kind.settle([request for request in requests if type(request) is kind])


def _nothing() -> None:
    """Change nothing: a turn has no change of its own."""
