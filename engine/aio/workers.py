"""The threads behind an engine for asyncio: a bounded number, whatever the number of tasks.

Quick steps (a start, a signal) and slow ones (an image to unpack, a tree to remove) have threads of their own, so that
the slow never hold up the quick. Steps of one container run one after another in the order of their coming, and wait
for that without a thread: so no container takes more than one, however many tasks ask for it. Nothing that waits for a
container to end is a step.
"""

import _thread
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from limpet.engine.aio.answers import NO_THREAD, Step, wait_for
from limpet.recovery.queues import Empty, Queue
from limpet.schema.errors import ClosedError, ResourcesError

_T = TypeVar("_T")
_THREADS = 16
"""At most, of each kind."""
_IDLE_SECONDS = 5.0
"""After so long without work a thread ends."""
_PAUSE_SECONDS = 0.01
"""After a failure of its own a thread tries again."""


class _Pool:
    """Threads that do what is put into their queue."""

    def __init__(self, on_done: Callable[[str], None]) -> None:
        self._on_done = on_done
        self._queue: Queue[tuple[str, Step[Any]]] = Queue()
        self._guard = threading.Lock()
        self._threads = 0
        self._unfinished = 0

    def put(self, key: str, step: Step[Any]) -> bool:
        """Have a step done; False if no thread can be started for it, and none is there."""
        with self._guard:
            if self._unfinished >= self._threads < _THREADS:
                try:
                    _thread.start_new_thread(self._serve, ())
                    self._threads += 1
                except RuntimeError:  # no more threads: those that are there will come to it
                    if not self._threads:
                        return False
            self._unfinished += 1
            self._queue.put((key, step))
            return True

    def _serve(self) -> None:
        done: str | None = None  # the key of what was done last, until those behind it know
        while True:
            try:
                if done is None and (done := self._do_next()) is None:
                    return
                self._on_done(done)
                done = None
            except BaseException:  # noqa: BLE001  # for want of memory: tried again, for the others wait for this thread
                time.sleep(_PAUSE_SECONDS)

    def _do_next(self) -> str | None:
        """Do the next step, and return its key; None once none has come for a while, and this thread is to end."""
        while True:
            try:
                key, step = self._queue.get(timeout=_IDLE_SECONDS)
                break
            except Empty:
                with self._guard:
                    if self._queue.empty():
                        self._threads -= 1
                        return None
        step.run()
        with self._guard:
            self._unfinished -= 1
        return key


class Workers:
    """Does steps for tasks of any number of event loops."""

    def __init__(self) -> None:
        self._quick, self._slow = _Pool(self._go_on), _Pool(self._go_on)
        self._pid = os.getpid()  # a fork has none of the threads
        self._guard = threading.Lock()
        self._waiting: dict[str, deque[tuple[_Pool, Step[Any]]]] = {}
        """By container or sandbox of which a step is under way, the steps that come after it."""

    async def quick(self, act: Callable[[], _T], key: object = "") -> _T:
        """Return what `act` returns, after all steps before it that have the same key. It should be quick."""
        return await self._do(self._quick, act, key)

    async def slow(self, act: Callable[[], _T], key: object = "") -> _T:
        """Do the same with what may take long, such as unpacking an image."""
        return await self._do(self._slow, act, key)

    async def _do(self, pool: _Pool, act: Callable[[], _T], key: object) -> _T:
        if os.getpid() != self._pid:
            raise ClosedError("this engine was opened by another process; a fork cannot use it: open one in the child")
        step = Step(act)
        name = key if isinstance(key, str) else ""  # what is no text is refused by the step
        if not self._must_wait(pool, step, name):
            self._put(pool, step, name)
        result: _T = await wait_for(step)
        return result

    def _must_wait(self, pool: _Pool, step: Step[Any], key: str) -> bool:
        if not key:
            return False
        with self._guard:
            if key in self._waiting:
                self._waiting[key].append((pool, step))
                return True
            self._waiting[key] = deque()
            return False

    def _put(self, pool: _Pool, step: Step[Any], key: str) -> None:
        try:
            if pool.put(key, step):
                return
            self._refuse(step)
        except BaseException:
            self._go_on(key)  # those behind it do not wait for what will not be done
            raise
        self._go_on(key)

    def _refuse(self, step: Step[Any]) -> None:
        step.refuse(ResourcesError(f"{NO_THREAD}; nothing was done"))

    def _go_on(self, key: str) -> None:
        """Let the next step of this key begin."""
        while key:
            with self._guard:
                following = self._waiting[key]
                if not following:
                    del self._waiting[key]
                    return
                pool, step = following.popleft()
            try:
                if pool.put(key, step):
                    return
            except BaseException:
                following.appendleft((pool, step))  # it is tried again
                raise
            self._refuse(step)
