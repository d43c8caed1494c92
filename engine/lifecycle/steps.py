"""Steps run whole: an interrupt (Ctrl-C) of the main thread never cuts one in two.

Python raises what a signal handler raises in the main thread, between any two instructions. So what the main thread
asks for is done by a thread of its own, which no signal reaches; the main thread waits. Interrupted, it takes back a
step that has not begun, and otherwise waits for its end, which is near, before it lets the interrupt through. A second
interrupt does not wait: the step goes on behind it.
"""

import _thread
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

_T = TypeVar("_T")
_BEGIN_SECONDS = 1.0
"""How long a thread may take to begin before its step is taken from it."""


class _Step(Generic[_T]):
    """One step, and its outcome."""

    def __init__(self, step: Callable[[], _T]) -> None:
        self._step = step
        self._claim = threading.Lock()
        self._result: _T | None = None
        self._error: BaseException | None = None
        self._is_over = False
        self._done: SimpleQueue[None] = SimpleQueue()

    def run(self) -> None:
        """Run it, unless it was taken back."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._result = self._step()
        except BaseException as error:  # noqa: BLE001  # it is the caller's
            self._error = error
        finally:
            self._is_over = True
            self._done.put(None)

    def wait(self) -> _T:
        """Return its result or raise its error.

        A thread that was started may yet not begin, for want of memory, and nobody is told. Then it is done here.
        """
        while not self._is_over:
            try:
                self._done.get(timeout=_BEGIN_SECONDS)
            except Empty:
                self.run()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # it has ended without an error

    def take_back(self) -> None:
        """See to it that it does not run, or wait until it has. May be interrupted, and repeated."""
        if self._claim.acquire(blocking=False):
            self._is_over = True
        while not self._is_over:
            self._done.get()


def run_whole(step: Callable[[], _T]) -> _T:
    """Return what `step` returns, or raise what it raises. Other threads than the main one run it themselves."""
    if threading.current_thread() is not threading.main_thread():
        return step()
    one = _Step(step)
    try:
        try:
            _thread.start_new_thread(one.run, ())
        except RuntimeError:  # no more threads: then interrupts are not kept away
            one.run()
        return one.wait()
    except BaseException:
        one.take_back()
        raise
