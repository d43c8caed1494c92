"""The store for asyncio: the same promises and the same errors, without a thread for each call.

Tasks hand their changes to the committer thread, which takes all that came in the meantime as one batch and
wakes each event loop once for it. Reads come from memory and do not wait, so they are plain functions.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self
from weakref import WeakKeyDictionary

from limpet.engine.aio_watch import AsyncWatch, LoopBell
from limpet.engine.store import Draft, Listing, Record, Request, Store, Wanted
from limpet.schema.metadata import DEFAULT_NODE, Metadata, SandboxMetadata
from limpet.schema.status import ContainerState, Status


class _TaskRequest(Request):
    """One task's change. Its future is resolved in the loop that it belongs to."""

    __slots__ = ("future", "loop", "told")

    def __init__(self, apply: Callable[[Draft], Any], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(apply)
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()
        self.told = False

    @classmethod
    def settle(cls, requests: Sequence[Self]) -> None:
        """Wake each loop once for all of its tasks. May be repeated."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Self]] = {}
        for request in requests:
            request.settled = True
            by_loop.setdefault(request.loop, []).append(request)
        for loop, group in by_loop.items():
            with suppress(RuntimeError):  # a loop that was closed has nobody left to tell
                loop.call_soon_threadsafe(_resolve, group)


def _resolve(requests: Sequence[_TaskRequest]) -> None:
    try:
        for request in requests:
            _tell(request)
    except BaseException:  # an interrupt that ends the loop, which may be run again
        requests[0].loop.call_soon(_resolve, requests)
        raise


def _tell(request: _TaskRequest) -> None:
    """Resolve the request's future, unless that was done. A task that is being cancelled finds that it is told."""
    if not request.future.done():
        if request.error is not None:
            request.future.set_exception(request.error)
        else:
            request.future.set_result(request.result)
    request.told = True


class AsyncStore:
    """A `Store` for tasks of any number of event loops; threads may use the same store beside them.

    A task that is cancelled while it waits is cancelled once the outcome is known, so that `status` then
    tells whether the change was made: it is never still to come.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._bells: WeakKeyDictionary[asyncio.AbstractEventLoop, LoopBell] = WeakKeyDictionary()

    @classmethod
    async def open(cls, state_dir: str, *, node: str = DEFAULT_NODE) -> Self:
        """Open a store without blocking the loop; see `Store.open`."""
        opened: list[Store] = []
        is_wanted = True

        def open_store() -> None:
            opened.append(Store.open(state_dir, node=node))
            if not is_wanted:
                opened[0].close()

        try:
            await asyncio.to_thread(open_store)
        except BaseException:
            is_wanted = False  # whoever waited is gone, and the thread may still be at it
            for store in opened:
                store.close()
            raise
        return cls(opened[0])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let the commits that wait finish, and close the store."""
        await asyncio.to_thread(self.store.close)

    def get(self, container_id: str) -> Record:
        """See `Store.get`."""
        return self.store.get(container_id)

    def status(self, container_id: str) -> Status:
        """See `Store.status`."""
        return self.store.status(container_id)

    def list(
        self,
        *,
        id: str = "",
        name: str = "",
        sandbox_id: str = "",
        state: ContainerState | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Listing[Record]:
        """See `Store.list`."""
        return self.store.list(id=id, name=name, sandbox_id=sandbox_id, state=state, labels=labels)

    def watch(
        self,
        since: int | None = None,
        *,
        id: str = "",
        name: str = "",
        sandbox_id: str = "",
        labels: Mapping[str, str] | None = None,
        kinds: Iterable[str] = (),
    ) -> AsyncWatch:
        """Return an asynchronous iterator of events; see `Store.watch`. Its errors are raised when it is first asked.

        Call it from the loop that will ask.
        """
        self.store.require_open()
        feed, loop = self.store.feed(), asyncio.get_running_loop()
        bell = self._bells.get(loop) or self._bells.setdefault(loop, LoopBell(loop, feed))
        first = self.store.revision if since is None else since
        return AsyncWatch(feed, bell, first, Wanted(id, name, sandbox_id, labels, kinds))

    async def add(self, metadata: Metadata, status: Status | None = None) -> Record:
        """See `Store.add`."""
        await self._change(lambda draft: draft.add(metadata, status or Status()))
        return self.store.get(metadata.id)

    async def delete(self, container_id: str) -> None:
        """See `Store.delete`."""
        await self._change(lambda draft: draft.delete(container_id))

    async def checkpoint(self, container_id: str, status: Status) -> Status:
        """See `Store.checkpoint`."""
        written: Status = await self._change(lambda draft: draft.replace(container_id, status))
        return written

    async def update(self, container_id: str, fn: Callable[[Status], Status]) -> Status:
        """See `Store.update`. `fn` runs on the committer thread and must not await."""
        status: Status = await self._change(lambda draft: draft.update(container_id, fn))
        return status

    async def add_sandbox(self, metadata: SandboxMetadata) -> None:
        """See `Store.add_sandbox`."""
        await self._change(lambda draft: draft.add_sandbox(metadata))

    async def delete_sandbox(self, sandbox_id: str) -> None:
        """See `Store.delete_sandbox`."""
        await self._change(lambda draft: draft.delete_sandbox(sandbox_id))

    async def transact(self, change: Callable[[Draft], None]) -> None:
        """Make all that `change` does with the draft durable and visible together, or nothing of it.

        `change` runs on the committer thread, should be quick, and must not await. What it raises is raised
        here. See `Store.transaction`.
        """

        def apply(draft: Draft) -> None:
            with draft.savepoint():
                change(draft)

        await self._change(apply)

    async def _change(self, apply: Callable[[Draft], Any]) -> Any:
        request = _TaskRequest(apply, asyncio.get_running_loop())
        self.store.submit(request)
        cancelled: asyncio.CancelledError | None = None
        while True:
            try:
                result = await request.future
                break
            except asyncio.CancelledError as error:
                if request.told:
                    raise
                # Whatever becomes of the change must be known before the task may end: wait on.
                cancelled = error
                request.future = request.loop.create_future()
                if request.settled:  # known already, and the loop may be at its end: nobody will tell this one
                    raise
            except BaseException:
                if cancelled is not None:
                    raise cancelled from None
                raise
        if cancelled is not None:
            raise cancelled
        return result
