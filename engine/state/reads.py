"""Looks at memory, amid which a finalizer of the host program's may come, on the same thread, and ask for something.

Python collects garbage amid anything. What a finalizer asks for may need other threads, and these a lock that the look
holds, which cannot go on before the finalizer returns. So a look gives way (`View`): its lock is given up for so long,
and what was looked at is looked at again. A change does not; its thread does by itself what is asked for then.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

_T = TypeVar("_T")
_NOTHING = nullcontext()
_views: "list[weakref.ref[View]]" = []


def is_amid_a_change() -> bool:
    """Say whether this thread changes what is in memory: who asks is a finalizer, and no other thread may get on."""
    views = [reference() for reference in _views]
    return any(view is not None and view.is_changed_here() for view in views)


class View:
    """What is in memory, seen whole: a change comes before a read, or after it, or it is read again."""

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()
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

    def is_changed_here(self) -> bool:
        """Say whether this thread is amid a change of it."""
        return self._is_changing and self._is_held_here()

    def giving_way(self) -> AbstractContextManager[None]:
        """Let other threads change it while the block runs, if this one is amid a read."""
        if self._is_changing or not self._is_held_here():
            return _NOTHING
        return self._give_way()

    def _is_held_here(self) -> bool:
        return bool(self._lock._is_owned())  # noqa: SLF001  # as threading.Condition does

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
