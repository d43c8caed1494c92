"""Watching a store's log of changes from tasks: as many as there are, without a thread for each."""

import asyncio
from contextlib import suppress
from functools import partial
from typing import Self

from limpet.engine.aio.answers import look_in_own_thread
from limpet.engine.aio.loops import require_loop
from limpet.engine.state.process_bound import ProcessBound
from limpet.engine.store import Cursor, StoreFeed, Wanted
from limpet.schema.events import Event

_NET_SECONDS = 1.0
"""Each loop looks so often whether it was forgotten: an interrupt may have cut a ring off."""
_PAGE = 256
"""So many events are read at once."""


class LoopBell:
    """Wakes all tasks of one event loop that wait for events, with one call for all of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, feed: StoreFeed) -> None:
        self._loop = loop
        self._feed = feed
        self._waiting: set[asyncio.Future[None]] = set()
        self._is_called = False
        """True from a ring until the loop has heard it."""
        self._net: asyncio.TimerHandle | None = None

    async def wait(self, after: int) -> None:
        """Return once there may be events that follow `after`, or the store is closed."""
        future = self._loop.create_future()
        self._waiting.add(future)
        self._feed.ring_me(self, self._ring)
        self._net = self._net or self._loop.call_later(_NET_SECONDS, self._look, self._feed.revision)
        try:
            if not self._feed.has_news(after):
                await future
        finally:
            self._waiting.discard(future)
            if not self._waiting:
                self._feed.ring_no_more(self)
                if self._net is not None:
                    self._net.cancel()
                    self._net = None

    def _ring(self) -> None:
        """Call the loop, from any thread, unless it was called and has not come yet."""
        if not self._is_called:
            self._is_called = True
            with suppress(RuntimeError):  # a loop that was closed has nobody left to tell
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_called = False
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    def _look(self, revision: int) -> None:
        self._net = self._loop.call_later(_NET_SECONDS, self._look, self._feed.revision)
        if self._feed.has_news(revision):
            self._wake()


class AsyncWatch(ProcessBound):
    """An asynchronous iterator of events that waits for more. For one task; made by `AsyncStore.watch`.

    If the store is closed, whoever waits gets ClosedError. A task that is cancelled while it waits has missed nothing,
    and may go on.
    """

    def __init__(self, feed: StoreFeed, bell: LoopBell, since: int, wanted: Wanted) -> None:
        self._feed = feed
        self._bell = bell
        self._since = since
        self._wanted = wanted
        self._cursor: Cursor | None = None

    @property
    def revision(self) -> int:
        """That of the last event that was given, or passed over because nobody asked for it."""
        return self._since if self._cursor is None else self._cursor.revision

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """Return the next event. Raises what `Store.watch` and `Watch.next` raise."""
        event = await self.next()
        assert event is not None  # without a time limit there is one
        return event

    async def next(self, timeout: float | None = None) -> Event | None:
        """Return the next event; None if there is none within `timeout` seconds, None for any time.

        Raises what `Store.watch` and `Watch.next` raise. What is there already is given in any case.
        """
        now = require_loop().time
        deadline = None if timeout is None else now() + timeout
        if self._cursor is None:
            self._cursor = await look_in_own_thread(lambda: Cursor(self._feed, self._since, self._wanted))
        while True:
            event = self._cursor.next()
            if event is not None:
                return event
            last = self._cursor.last
            if self._feed.has_news(last):
                page = self._feed.read_at_once(last, _PAGE)
                if page is None:
                    page = await look_in_own_thread(partial(self._feed.read, last, _PAGE))
                self._cursor.add(page)
            elif deadline is not None and now() >= deadline:
                return None
            else:
                limit = asyncio.timeout_at(deadline)
                try:
                    async with limit:
                        await self._bell.wait(last)
                except TimeoutError:
                    if not limit.expired():  # a signal handler's of the host program
                        raise
