"""Looking at the fleet for asyncio: a `Fleet` whose reads are done by threads, one after the other."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TypeVar
from weakref import WeakValueDictionary

from limpet.engine.aio.answers import close_in_own_thread, in_own_thread
from limpet.engine.aio.loops import require_loop
from limpet.engine.aio.opening import Closing, Opening, as_it_is, open_whole
from limpet.engine.fleet import Fleet, FleetContainer, FleetEvent, FleetNode
from limpet.schema.metadata import Metadata
from limpet.schema.status import ContainerState

_T = TypeVar("_T")
_POLL_SECONDS = 0.5


class AsyncFleet(Closing):
    """A `Fleet` for tasks of any number of loops, with the same reads and errors.

    Tasks take turns. One that is cancelled amid a read is cancelled when that is done; closing waits for it, too.
    """

    def __init__(self, url: str) -> None:
        """See `Fleet`."""
        self._fleet = Fleet(url)
        self._turns: WeakValueDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakValueDictionary()
        """By loop: tasks wait there, without a thread. Those of several loops wait for each other in `Fleet`.

        A lock that was waited for has its loop: it goes with the last task that needs it.
        """

    @classmethod
    def open(cls, url: str) -> "Opening[AsyncFleet]":
        """Connect without blocking the loop: `await` it, or `async with` it. See `Fleet.open`."""

        async def begin() -> AsyncFleet:
            one = cls(url)
            one._fleet = await open_whole(lambda _: Fleet.open(url), 0, as_it_is)
            return one

        return Opening(begin)

    async def close(self) -> None:
        """See `Fleet.close`."""
        await close_in_own_thread(self._fleet.close)  # which waits for a read that is under way

    async def nodes(self, *, node: str = "") -> Sequence[FleetNode]:
        """See `Fleet.nodes`."""
        return await self._ask(lambda: self._fleet.nodes(node=node))

    async def list(
        self,
        *,
        node: str = "",
        labels: Mapping[str, str] | None = None,
        state: ContainerState | str | None = None,
        name: str = "",
    ) -> Sequence[FleetContainer]:
        """See `Fleet.list`."""
        return await self._ask(lambda: self._fleet.list(node=node, labels=labels, state=state, name=name))

    async def get(self, container_id: str, *, node: str = "") -> FleetContainer:
        """See `Fleet.get`."""
        return await self._ask(lambda: self._fleet.get(container_id, node=node))

    async def metadata(self, container: FleetContainer) -> Metadata:
        """See `Fleet.metadata`."""
        return await self._ask(lambda: self._fleet.metadata(container))

    async def events(
        self, *, node: str = "", since: Mapping[str, int] | None = None, follow: bool = False
    ) -> AsyncIterator[FleetEvent]:
        """See `Fleet.events`. Between two looks no turn is held."""
        pages = self._fleet.event_pages(node=node, since=since)
        while True:
            page = await self._ask(lambda: next(pages))
            for event in page:
                yield event
            if not page:
                if not follow:
                    return
                await asyncio.sleep(_POLL_SECONDS)

    async def _ask(self, read: Callable[[], _T]) -> _T:
        async with self._turns.setdefault(require_loop(), asyncio.Lock()):
            return await in_own_thread(read)
