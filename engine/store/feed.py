"""The log of changes of a store in this process: who wants to be woken, and when there is something to read."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

from limpet.engine.database import EventPage
from limpet.engine.state.surroundings import require_no_shutdown
from limpet.schema.errors import ClosedError

if TYPE_CHECKING:
    from limpet.engine.store.store import Store

_NET_SECONDS = 1.0
"""Whoever waits looks so often by itself: an interrupt may have cut a ring off."""


class Bells:
    """Who wants to be woken when there are new events. Ringing never waits, and may be repeated."""

    def __init__(self) -> None:
        self._wakers: dict[object, Callable[[], None]] = {}

    def add(self, key: object, wake: Callable[[], None]) -> None:
        """Call `wake`, which must be quick, at each ring until `remove`."""
        self._wakers[key] = wake

    def remove(self, key: object) -> None:
        """Wake no more. May be repeated."""
        self._wakers.pop(key, None)

    def ring(self) -> None:
        """Wake everybody."""
        if self._wakers:
            for wake in list(self._wakers.values()):
                wake()

    def wait(self, is_over: Callable[[], bool], timeout: float) -> None:
        """Wait for a ring, unless `is_over` is true already, or `timeout` seconds."""
        rung = Lock()
        rung.acquire()

        def wake() -> None:
            with suppress(RuntimeError):  # it was woken before
                rung.release()

        try:
            self.add(rung, wake)
            if not is_over():
                rung.acquire(timeout=timeout)
        finally:
            self.remove(rung)


class StoreFeed:
    """The log of changes of a store in this process."""

    def __init__(self, store: "Store", bells: Bells) -> None:
        self._store = store
        self._bells = bells
        self._is_closed = False
        self.node = store.node

    @property
    def revision(self) -> int:
        """That of the newest event."""
        return self._store.revision

    def name_sandboxes(self) -> Mapping[str, str]:
        """Return the name of each sandbox that is there now by its id."""
        return self._store.name_sandboxes()

    def read(self, after: int, limit: int) -> EventPage:
        """Return up to `limit` events that follow the revision `after`. Raises ClosedError, StoreError."""
        self._require_open()
        return self._store.load_events(after, limit)

    def read_at_once(self, after: int, limit: int) -> EventPage | None:
        """Return what `read` does, if that is in memory. Raises ClosedError."""
        self._require_open()
        return self._store.recent_events(after, limit)

    def wait(self, after: int, timeout: float | None) -> None:
        """Return once there may be events that follow `after`, or after `timeout` seconds. Raises ClosedError."""
        require_no_shutdown()
        seconds = _NET_SECONDS if timeout is None else min(timeout, _NET_SECONDS)
        self._bells.wait(lambda: self.has_news(after), seconds)
        self._require_open()

    def has_news(self, after: int) -> bool:
        """Say whether nothing is to be waited for."""
        return self._is_closed or self._store.is_closed or self._store.revision > after

    def ring_me(self, key: object, wake: Callable[[], None]) -> None:
        """Call `wake` at each new event and when the store is closed, until `ring_no_more`."""
        self._bells.add(key, wake)

    def ring_no_more(self, key: object) -> None:
        """Undo `ring_me`. May be repeated."""
        self._bells.remove(key)

    def close(self) -> None:
        """Let whoever waits get ClosedError. May be repeated."""
        self._is_closed = True
        self._bells.ring()

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the watch was closed; begin another with the revision of the last event")
        self._store.require_open()
