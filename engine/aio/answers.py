"""What a task waits for: the answer of a thread, which the task learns even if it is cancelled meanwhile.

A task that is cancelled takes back what has not begun; otherwise it is cancelled once the outcome is known. So nothing
that was asked for is still to come when the task has ended.
"""

import _thread
import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Generic, Protocol, TypeVar

from limpet.engine.aio.loops import require_loop
from limpet.engine.state.steps import acting_for
from limpet.engine.store import Request
from limpet.schema.errors import ResourcesError

_T = TypeVar("_T")
_PAUSE_SECONDS = 0.01
NO_THREAD = "no thread can be started (RLIMIT_NPROC? or the program ends, where Engine and Store go on)"
turn_of_task: ContextVar[Request | None] = ContextVar("limpet_turn", default=None)
"""By which the task is the store's only writer, if it is: what it asks a thread for must not wait for that."""


class Answer(Protocol):
    """An answer to come. Its future is resolved in the loop that it belongs to."""

    result: Any
    error: BaseException | None
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    settled: bool
    """A thread has set result or error."""
    told: bool
    """The loop has seen that."""

    def take_back(self) -> bool:
        """Say whether it had not begun; it never will, then."""


def settle(answers: Sequence[Answer]) -> None:
    """Wake each loop once for all of its answers. Called by the thread that has them; may be repeated."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Answer]] = {}
    for answer in answers:
        answer.settled = True
        by_loop.setdefault(answer.loop, []).append(answer)
    for loop, group in by_loop.items():
        with suppress(RuntimeError):  # a loop that was closed has nobody left to tell
            loop.call_soon_threadsafe(_resolve, group)


def _resolve(answers: Sequence[Answer]) -> None:
    try:
        for answer in answers:
            _tell(answer)
    except BaseException:  # an interrupt that ends the loop, which may be run again
        answers[0].loop.call_soon(_resolve, answers)
        raise


def _tell(answer: Answer) -> None:
    """Resolve the answer's future, unless that was done. A task that is being cancelled finds that it is told."""
    if not answer.future.done():
        if answer.error is not None:
            answer.future.set_exception(answer.error)
        else:
            answer.future.set_result(answer.result)
    answer.told = True


async def wait_for(answer: Answer) -> Any:
    """Return the result or raise the error, or CancelledError once it is known what became of it."""
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            result = await answer.future
            break
        except asyncio.CancelledError as error:
            if answer.told or (cancelled is None and answer.take_back()):
                raise
            if answer.settled:  # known already, and the loop may be at its end: nobody would tell another future
                raise
            # Whatever becomes of it must be known before the task may end: wait on.
            cancelled = error
            answer.future = answer.loop.create_future()
        except BaseException:
            if cancelled is not None:
                raise cancelled from None
            raise
    if cancelled is not None:
        raise cancelled
    return result


class Step(Generic[_T]):
    """What a thread is to do for a task, and its outcome."""

    __slots__ = ("_act", "_asker", "_claim", "error", "future", "loop", "result", "settled", "told")

    def __init__(self, act: Callable[[], _T]) -> None:
        self._act = act
        turn = turn_of_task.get()
        self._asker = 0 if turn is None else turn.thread
        self._claim = _thread.allocate_lock()
        self.result: Any = None
        self.error: BaseException | None = None
        self.loop = require_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.settled = False
        self.told = False

    def run(self) -> None:
        """Do it, unless it was taken back, and tell the task."""
        if not self._begin():
            return
        try:
            with acting_for(self._asker):
                self.result = self._act()
        except BaseException as error:  # noqa: BLE001  # it is the task's
            self.error = error
        while not self._has_told():
            time.sleep(_PAUSE_SECONDS)

    def _has_told(self) -> bool:
        """Tell the task, which waits for nothing else; say whether there was memory for that."""
        try:
            settle([self])
        except MemoryError:
            return False
        return True

    def refuse(self, error: BaseException) -> None:
        """Have the task get this error, unless the step was taken back."""
        if self.take_back():
            self.error = error
            settle([self])

    def take_back(self) -> bool:
        """Say whether it had not begun; it never will, then."""
        return self._begin()

    def _begin(self) -> bool:
        return self._claim.acquire(blocking=False)


class _Look(Step[_T]):
    """A step that changes nothing: who is cancelled does not wait until it is over."""

    __slots__ = ()

    def take_back(self) -> bool:
        """Say yes: what comes of it is of no interest."""
        self._begin()
        return True


class _Closing(Step[None]):
    """A step that is done in any case: what a cancelled task does not close, nobody closes."""

    __slots__ = ()

    def take_back(self) -> bool:
        """Say no: it will be done."""
        return False


async def in_own_thread(act: Callable[[], _T]) -> _T:
    """Return what `act` returns, done by a thread of its own: no pool is needed that others may have filled."""
    return await _in_own_thread(Step(act))


async def look_in_own_thread(look: Callable[[], _T]) -> _T:
    """Do the same with what changes nothing, and may be left to itself."""
    return await _in_own_thread(_Look(look))


async def close_in_own_thread(close: Callable[[], None]) -> None:
    """Close something by a thread of its own, also if the task is cancelled before that has begun.

    Where no thread can be started, as at the exit of a program, the loop's own closes it.
    """
    await _in_own_thread(_Closing(close))


async def _in_own_thread(step: Step[_T]) -> _T:
    try:
        _thread.start_new_thread(step.run, ())
    except RuntimeError as error:
        if not isinstance(step, _Closing):
            raise ResourcesError(f"{NO_THREAD}: {error}; nothing was done") from error
        step.run()
    result: _T = await wait_for(step)
    return result
