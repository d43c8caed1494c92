"""Reads, amid which a finalizer of the host program's may come, on the same thread, and ask for something itself.

Python collects garbage amid anything. What a finalizer asks for may need other threads, and these a lock that the read
holds, which cannot go on before the finalizer returns. So a read of memory gives way (`View`): its lock is given up for
so long, and what was read is read again. A read of a database cannot; its thread does by itself what is asked for then.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

_T = TypeVar("_T")
_guards: "list[weakref.ref[threading.RLock]]" = []
"""Locks that a finalizer may find held by its own thread."""
_NOTHING = nullcontext()
_views: "list[weakref.ref[View]]" = []


def make_guard() -> "threading.RLock":
    """Return a lock for reads. Its thread may take it again."""
    lock = threading.RLock()
    _guards.append(weakref.ref(lock, _guards.remove))
    return lock


def is_amid_a_read() -> bool:
    """Say whether this thread holds such a lock: who asks then is a finalizer, and no other thread may get on."""
    locks: list[Any] = [reference() for reference in _guards]
    return any(lock is not None and lock._is_owned() for lock in locks)  # noqa: SLF001  # as threading.Condition does


class View:
    """What is in memory, seen whole: a change comes before a read, or after it, or it is read again."""

    def __init__(self) -> None:
        self._lock: Any = make_guard()
        self._changes = 0
        self._is_changing = False
        _views.append(weakref.ref(self, _views.remove))

    def read(self, look: Callable[[], _T]) -> _T:
        """Return what `look` returns, or raise what it raises. It may be called again."""
        with self._lock:
            while True:
                before = self._changes
                try:
                    found = look()
                except Exception:
                    if self._changes == before:
                        raise
                    continue  # what it looked at was changed under it
                if self._changes == before:
                    return found

    @contextmanager
    def change(self) -> Iterator[None]:
        """Keep reads away while the block runs, which may be repeated. It does not give way."""
        with self._lock:
            self._changes += 1
            before, self._is_changing = self._is_changing, True
            try:
                yield
            finally:
                self._is_changing = before

    def giving_way(self) -> AbstractContextManager[None]:
        """Let other threads change it while the block runs, if this one is amid a read."""
        if self._is_changing or not self._lock._is_owned():  # noqa: SLF001  # as threading.Condition does
            return _NOTHING
        return self._give_way()

    @contextmanager
    def _give_way(self) -> Iterator[None]:
        held = self._lock._release_save()  # noqa: SLF001
        try:
            yield
        finally:
            self._lock._acquire_restore(held)  # noqa: SLF001


@contextmanager
def giving_way() -> Iterator[None]:
    """Let other threads get on while the block runs, wherever this one is amid a read of memory."""
    with ExitStack() as held:
        for view in [reference() for reference in _views]:
            if view is not None:
                held.enter_context(view.giving_way())
        yield
