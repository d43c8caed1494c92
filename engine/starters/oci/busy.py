"""Which containers somebody works on: steps of one container come one after the other."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

from limpet.schema.file_name import file_name

_guard = threading.Lock()
_served: "WeakValueDictionary[str, Busy]" = WeakValueDictionary()


class Busy:
    """The containers that somebody works on. Thread-safe; who takes one need not be the thread that gives it back."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._is_free = threading.Condition()

    def take(self, container_id: str, *, wait: bool = True) -> bool:
        """Begin to work on a container; False if somebody does, and that is not to be waited for."""
        with self._is_free:
            while container_id in self._ids:
                if not wait:
                    return False
                self._is_free.wait()
            self._ids.add(container_id)
            return True

    def give_back(self, container_id: str) -> None:
        """Let others work on it. May be repeated."""
        with self._is_free:
            self._ids.discard(container_id)
            self._is_free.notify_all()

    @contextmanager
    def claim(self, container_id: str) -> Iterator[None]:
        """Work on a container while the block runs."""
        self.take(container_id)
        try:
            yield
        finally:
            self.give_back(container_id)

    def has_bundle(self, name: str) -> bool:
        """Say whether somebody works on the container whose bundle has this name."""
        with self._is_free:
            return any(file_name(each) == name for each in self._ids)


def busy_of(state_dir: str) -> Busy:
    """Return what all starters of a state directory share: each looks for what is left in all bundles there."""
    with _guard:
        return _served.setdefault(state_dir, Busy())
