"""Steps run whole: an interrupt (Ctrl-C) of the main thread never cuts one in two.

Python raises what a signal handler raises in the main thread, between any two instructions. So what the main thread
asks for is done by a thread of its own, which no signal reaches; the main thread waits. Interrupted, it takes back a
step that has not begun, and otherwise waits for its end, which is near, before it lets the interrupt through. A second
interrupt does not wait: the step goes on behind it. What a step has made for a caller that will not hear of it is
undone, where it can be: nobody would own it. A thread that has done a step stays for a moment, for the next one: to
start a thread takes longer than many a step. It does none once the main thread has another standing (CPUs, niceness)
than when it began it: what is started in a step gets that of its thread.

A signal handler of the host program may itself call limpet. The call that it has interrupted cannot go on before the
handler returns, so it must hold no lock that the handler's call waits for: where there is such a handler, the main
thread's calls of a store are steps, too (`whole`). What a finalizer asks for amid a change of what is in memory
(`reads`), its thread does.
"""

import _signal  # type: ignore[import-not-found]  # signal.getsignal takes ten times as long: it makes enums
import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from limpet.engine.state.descriptors import is_of_handler
from limpet.engine.state.reads import giving_way, is_amid_a_change
from limpet.recovery.queues import Empty, Queue

_P = ParamSpec("_P")
_S = TypeVar("_S")
_T = TypeVar("_T")
_Undo = Callable[[_T], object] | None
_BEGIN_SECONDS = 1.0
"""How long a thread may take to begin before its step is taken from it."""
_STAY_SECONDS = 0.1
"""How long a thread waits for another step."""
_CATCHABLE = tuple(sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}))
_HARMLESS = {id(known) for known in (0, 1, None, signal.default_int_handler)}  # 0: SIG_DFL, 1: SIG_IGN
"""What is done about a signal that calls nothing of the host program's; None stands for a handler not of Python's."""
_WAKE_ONLY = {"asyncio.runners", "asyncio.unix_events"}
"""Whose handlers wake the loop or cancel its task, and no more."""


class _Step(Generic[_T]):
    """One step, and its outcome."""

    def __init__(self, step: Callable[[], _T], undo: _Undo[_T]) -> None:
        self._step = step
        self._undo = [undo] if undo else []  # who pops it does it
        self._is_unwanted = False
        self._claim = threading.Lock()
        self._result: _T | None = None
        self._has_result = False
        self._error: BaseException | None = None
        self._is_over = False
        self._done: Queue[None] = Queue()

    def run(self) -> None:
        """Run it, unless it was taken back."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._result = self._step()
            self._has_result = True
            if self._is_unwanted:
                self.undo()
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

    def undo(self) -> None:
        """Undo what it has made, unless that is done already."""
        with suppress(IndexError):
            undo = self._undo.pop()
            undo(self._result)  # type: ignore[arg-type]  # it has ended without an error

    def take_back(self) -> None:
        """See to it that it does not run, or wait until it has, and is undone. May be interrupted, and repeated."""
        self._is_unwanted = True  # before the look at the result, which the step's thread does in the other order
        if self._claim.acquire(blocking=False):
            self._is_over = True
        while not self._is_over:
            with suppress(Empty):  # its end may not have been told, for want of memory
                self._done.get(timeout=_BEGIN_SECONDS)
        if self._has_result and self._undo:
            run_whole(self.undo)


_asker = threading.local()
"""Of a thread that does something for another: who waits for it."""
_Steps = Queue[_Step[Any]]
_waiting: list[tuple[object, _Steps]] = []
"""Of each thread that has nothing to do, its standing, and where it takes a step from. Who pops it may put one."""
os.register_at_fork(after_in_child=_waiting.clear)  # a child has none of these threads


def _read_standing() -> object:
    """Return what this thread hands on to one that it begins."""
    try:
        scheduling = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority, os.sched_getaffinity(0)
        return os.getpriority(os.PRIO_PROCESS, 0), scheduling
    except OSError as error:  # a sandbox around us
        if is_of_handler(error):
            raise
        return None


def _run_steps(standing: object, steps: _Steps) -> None:
    """Run step after step. One that comes too late stays where it is, and is run by its caller."""
    with acting_for(threading.main_thread().ident or 0), suppress(Empty):
        while True:
            steps.get(timeout=_STAY_SECONDS).run()
            _waiting.append((standing, steps))
    with suppress(ValueError):
        _waiting.remove((standing, steps))


def _begin(step: _Step[_T]) -> None:
    """Have a thread run it. Raises RuntimeError if there is none and none can be started."""
    standing = _read_standing()
    began, steps = None, None
    with suppress(IndexError):
        began, steps = _waiting.pop()
    if steps is None or began != standing:  # that one ends by itself
        steps = _Steps()
        if sys.is_finalizing():  # it would be started, and never run
            raise RuntimeError("the interpreter is ending")
        _thread.start_new_thread(_run_steps, (standing, steps))
    steps.put(step)


def run_whole(step: Callable[[], _T], undo: _Undo[_T] = None) -> _T:
    """Return what `step` returns, or raise what it raises. Other threads than the main one run it themselves.

    `undo` is called with the result if the caller is interrupted and will not get it.
    """
    if threading.get_ident() != threading.main_thread().ident or is_amid_a_change():
        return step()
    with giving_way():
        return _run_elsewhere(step, undo)


def _run_elsewhere(step: Callable[[], _T], undo: _Undo[_T]) -> _T:
    one = _Step(step, undo)
    try:
        try:
            _begin(one)
        except RuntimeError:  # no more threads: then interrupts are not kept away
            one.run()
        return one.wait()
    except BaseException:
        one.take_back()
        raise


def asker() -> int:
    """Return who waits for what this thread does: a thread, or what stands for a task; this thread, if nobody else."""
    return getattr(_asker, "who", 0) or threading.get_ident()


@contextmanager
def acting_for(who: int) -> Iterator[None]:
    """Have `asker` return `who` on this thread while the block runs; 0 stands for nobody else."""
    before = getattr(_asker, "who", 0)
    _asker.who = who
    try:
        yield
    finally:
        _asker.who = before


def whole(method: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], _T]:
    """Have a method be a step where the main thread calls it and the host program handles signals itself."""

    @wraps(method)
    def call(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        if may_be_called_again():
            return run_whole(lambda: method(self, *args, **kwargs))
        return method(self, *args, **kwargs)

    return call


def may_be_called_again() -> bool:
    """Say whether this is the main thread, amid whose calls a signal handler of the host program's may make others."""
    return threading.get_ident() == threading.main_thread().ident and _has_handlers()


def _has_handlers() -> bool:
    """Say whether a signal may call something of the host program's."""
    handlers = list(map(_signal.getsignal, _CATCHABLE))
    if _HARMLESS.issuperset(map(id, handlers)):  # by identity: one of the program's own need not be hashable
        return False
    own = [handler for handler in handlers if id(handler) not in _HARMLESS]
    return any(getattr(getattr(each, "func", each), "__module__", "") not in _WAKE_ONLY for each in own)
