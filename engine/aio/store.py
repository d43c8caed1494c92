"""The store for asyncio: the same promises and the same errors, without a thread for each call.

Tasks hand their changes to the committer thread, which takes all that came in the meantime as one batch and
wakes each event loop once for it. Reads do not wait for the disk to flush, so they are plain functions.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

from limpet.engine.aio.answers import close_in_own_thread, in_own_thread, settle, turn_of_task, wait_for
from limpet.engine.aio.loops import require_loop
from limpet.engine.aio.opening import Closing, Opening, open_whole
from limpet.engine.aio.watch import AsyncWatch, LoopBell
from limpet.engine.state.directory import StateDirectory
from limpet.engine.state.fleet_choice import FLEET_TIMEOUT_SECONDS
from limpet.engine.store import Draft, Listing, Record, Request, Store, Unsettled, Wanted
from limpet.schema.errors import InvalidStateError
from limpet.schema.history import Transition
from limpet.schema.identity import ProcessIdentity
from limpet.schema.item import Item
from limpet.schema.metadata import DEFAULT_NODE, Metadata, SandboxMetadata
from limpet.schema.sandbox_status import SandboxStatus
from limpet.schema.status import ContainerState, Status

if TYPE_CHECKING:
    from limpet.engine.fleet import FleetLag

_T = TypeVar("_T")
_LOOK_SECONDS, _LOOK_PART = 0.01, 0.01
"""Who has waited for long enough is looked for again after so long at least, and so great a part of that time."""


class _TaskRequest(Request):
    """One task's change: an `Answer`."""

    __slots__ = ("future", "loop", "told")

    def __init__(self, apply: Callable[[Draft], Any], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(apply)
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()
        self.told = False

    @classmethod
    def settle(cls, requests: Sequence[Self]) -> None:
        """Wake each loop once for all of its tasks. May be repeated."""
        settle(requests)

    def take_back(self) -> bool:
        """Say no: it may be in a batch already, and will be soon; but the fleet is not waited for."""
        self.until_sent = False
        return False


class _TaskTurn(Request):
    """One task's turn to be the only writer: an `Answer`, settled when it has come."""

    is_turn = True
    __slots__ = ("future", "loop", "told")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(lambda _: None)
        self.thread = -id(self)  # no thread's: the loop's may serve other tasks meanwhile
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()
        self.told = False

    def finish(self) -> None:
        """Tell the task that its turn has come."""
        super().finish()
        settle([self])

    def take_back(self) -> bool:
        """Say yes: it is over as soon as `inside` is given up."""
        return True


class _Patience:
    """Has tasks of one loop go on that have waited for the fleet for long enough.

    There is one timer for all of them: making and cancelling one for each takes a seventh of a call's time.
    """

    __slots__ = ("_is_timed", "_time_left", "_waiting")  # not the loop: by that one it is found, for as long as it is

    def __init__(self, time_left: Callable[[Request], float]) -> None:
        self._time_left = time_left
        self._waiting: dict[_TaskRequest, None] = {}
        self._is_timed = False

    def begin(self, request: _TaskRequest) -> None:
        """Mind a request, in its loop: all have the same patience, so no timer that runs is too late for it."""
        self._waiting[request] = None
        if not self._is_timed:
            request.loop.call_later(request.patience, self._look)
            self._is_timed = True

    def end(self, request: _TaskRequest) -> None:
        """Mind it no more. May be repeated."""
        self._waiting.pop(request, None)

    def _look(self) -> None:
        waiting, left = [request for request in self._waiting if not request.future.done()], [0.0]
        try:
            left = [self._time_left(request) for request in waiting]
            late = zip(waiting, left, strict=True)
            _TaskRequest.settle([request for request, seconds in late if request.settled and seconds <= 0])
        finally:  # an interrupt may end the loop, which may be run again
            if waiting:
                soonest = max(_LOOK_SECONDS, _LOOK_PART * waiting[0].patience)
                waiting[0].loop.call_later(max(soonest, min(left)), self._look)
            self._is_timed = bool(waiting)


def _nothing(_: Draft) -> None:
    """Change nothing: what is waited for is done."""


class AsyncStore(Closing):
    """A `Store` for tasks of any number of event loops; threads may use the same store beside them.

    A task that is cancelled while it waits is cancelled once the outcome is known, so that `status` then
    tells whether the change was made: it is never still to come.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._bells: WeakValueDictionary[asyncio.AbstractEventLoop, LoopBell] = WeakValueDictionary()
        """Each has its loop, and goes with the last watch of that."""
        self._patience: WeakKeyDictionary[asyncio.AbstractEventLoop, _Patience] = WeakKeyDictionary()

    @classmethod
    def open(
        cls,
        state_dir: str | os.PathLike[str],
        *,
        node: str = DEFAULT_NODE,
        wait: float = 0,
        fleet: str = "",
        fleet_ack: str = "async",
        fleet_timeout: float = FLEET_TIMEOUT_SECONDS,
    ) -> "Opening[AsyncStore]":
        """Open a store without blocking the loop: `await` it, or `async with` it. See `Store.open`."""

        def open_store(part: float) -> Store:
            return Store.open(
                state_dir, node=node, wait=part, fleet=fleet, fleet_ack=fleet_ack, fleet_timeout=fleet_timeout
            )

        async def begin() -> AsyncStore:
            return await open_whole(open_store, wait, cls)

        return Opening(begin)

    async def close(self) -> None:
        """Let the commits that wait finish, and close the store. Raises InvalidStateError within a transaction."""
        self._require_outside()
        await close_in_own_thread(self.store.close)

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
        state: ContainerState | str | None = None,
        labels: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> "Listing[Record]":
        """See `Store.list`."""
        return self.store.list(id=id, name=name, sandbox_id=sandbox_id, state=state, labels=labels, extra=extra)

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
        feed, loop = self.store.feed(), require_loop()
        bell = self._bells.get(loop) or self._bells.setdefault(loop, LoopBell(loop, feed))
        first = self.store.revision if since is None else since
        return AsyncWatch(feed, bell, first, Wanted(id, name, sandbox_id, labels, kinds))

    def get_sandbox(self, sandbox_id: str) -> SandboxMetadata:
        """See `Store.get_sandbox`."""
        return self.store.get_sandbox(sandbox_id)

    def sandbox_status(self, sandbox_id: str) -> SandboxStatus:
        """See `Store.sandbox_status`."""
        return self.store.sandbox_status(sandbox_id)

    def sandbox_version(self, sandbox_id: str) -> int:
        """See `Store.sandbox_version`."""
        return self.store.sandbox_version(sandbox_id)

    def find(self, kind: str, key: str) -> Item | None:
        """See `Store.find`."""
        return self.store.find(kind, key)

    def list_items(self, kind: str) -> "Sequence[Item]":
        """See `Store.list_items`."""
        return self.store.list_items(kind)

    def list_sandboxes(self) -> "Sequence[SandboxMetadata]":
        """See `Store.list_sandboxes`."""
        return self.store.list_sandboxes()

    def history(self, container_id: str) -> "Sequence[Transition]":
        """See `Store.history`."""
        return self.store.history(container_id)

    def metadata(self, container_id: str) -> Metadata:
        """See `Store.metadata`."""
        return self.store.metadata(container_id)

    def last_report(self) -> bytes | None:
        """See `Store.last_report`."""
        return self.store.last_report()

    def unsettled(self, leftovers: Iterable[str] = ()) -> "Sequence[Unsettled]":
        """See `Store.unsettled`."""
        return self.store.unsettled(leftovers)

    def is_damaged(self, container_id: str) -> bool:
        """See `Store.is_damaged`."""
        return self.store.is_damaged(container_id)

    def find_suspect(self, container_id: str) -> ProcessIdentity | None:
        """See `Store.find_suspect`."""
        return self.store.find_suspect(container_id)

    def doubt(self, container_id: str, doubt: tuple[str, str]) -> None:
        """See `Store.doubt`."""
        self.store.doubt(container_id, doubt)

    @property
    def node(self) -> str:
        """The node's name."""
        return self.store.node

    @property
    def directory(self) -> StateDirectory:
        """The state directory."""
        return self.store.directory

    @property
    def ids(self) -> "Collection[str]":
        """See `Store.ids`."""
        return self.store.ids

    @property
    def fleet_lag(self) -> "FleetLag | None":
        """See `Store.fleet_lag`."""
        return self.store.fleet_lag

    @property
    def revision(self) -> int:
        """See `Store.revision`."""
        return self.store.revision

    @property
    def sandbox_ids(self) -> "Collection[str]":
        """See `Store.sandbox_ids`."""
        return self.store.sandbox_ids

    @property
    def damaged_sandboxes(self) -> "Mapping[str, str]":
        """See `Store.damaged_sandboxes`."""
        return self.store.damaged_sandboxes

    @property
    def is_closed(self) -> bool:
        """See `Store.is_closed`."""
        return self.store.is_closed

    @property
    def is_foreign(self) -> bool:
        """See `Store.is_foreign`."""
        return self.store.is_foreign

    def __len__(self) -> int:
        return len(self.store)

    def __contains__(self, container_id: object) -> bool:
        return container_id in self.store

    def __repr__(self) -> str:
        return f"<Async{repr(self.store).removeprefix('<')}"

    async def add(self, metadata: Metadata, status: Status | None = None) -> Record:
        """See `Store.add`."""
        return await self._change(lambda draft: draft.add(metadata, status or Status()))

    async def delete(self, container_id: str) -> bool:
        """See `Store.delete`."""
        return await self._change(lambda draft: draft.delete(container_id))

    async def checkpoint(self, container_id: str, status: Status, *, expect: int | None = None) -> Status:
        """See `Store.checkpoint`."""
        return await self._change(lambda draft: draft.replace(container_id, status, expect))

    async def update(
        self, container_id: str, fn: Callable[[Status], Status], *, ready_sandbox: str | None = None
    ) -> Status:
        """See `Store.update`. `fn` runs on the committer thread and must not await."""
        return await self._change(lambda draft: draft.update(container_id, fn, ready_sandbox=ready_sandbox))

    async def add_sandbox(self, metadata: SandboxMetadata, status: SandboxStatus | None = None) -> None:
        """See `Store.add_sandbox`."""
        await self._change(lambda draft: draft.add_sandbox(metadata, status))

    async def update_sandbox(
        self, sandbox_id: str, fn: Callable[[SandboxStatus], SandboxStatus], *, expect: int | None = None
    ) -> SandboxStatus:
        """See `Store.update_sandbox`. `fn` runs on the committer thread and must not await."""
        return await self._change(lambda draft: draft.update_sandbox(sandbox_id, fn, expect))

    async def put(self, kind: str, key: str, value: Any, *, expect: int | None = None) -> Item:
        """See `Store.put`."""
        return await self._change(lambda draft: draft.put(kind, key, value, expect))

    async def delete_item(self, kind: str, key: str, *, expect: int | None = None) -> None:
        """See `Store.delete_item`."""
        await self._change(lambda draft: draft.delete_item(kind, key, expect))

    async def delete_sandbox(self, sandbox_id: str) -> bool:
        """See `Store.delete_sandbox`."""
        return await self._change(lambda draft: draft.delete_sandbox(sandbox_id))

    async def declare_gone(self, container_id: str, why: str) -> Status:
        """See `Store.declare_gone`."""
        return await self._change(lambda draft: draft.declare_gone(container_id, why))

    async def back_up(self, target_path: str) -> None:
        """See `Store.back_up`. A thread of its own copies."""
        await in_own_thread(lambda: self.store.back_up(target_path))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Draft]:
        """Change several containers at once: see `Store.transaction`.

        Nobody else writes until the block ends, so it should await nothing that takes long; `transact` cannot. A task
        that is cancelled in the block has changed nothing.
        """
        self._require_outside()
        turn = _TaskTurn(require_loop())
        with turn.inside:
            self.store.submit(turn)
            await wait_for(turn)
            draft, before = self.store.begin(), turn_of_task.set(turn)
            try:
                yield draft
            finally:
                draft.close()
                turn_of_task.reset(before)
            await in_own_thread(lambda: self.store.finish(draft))
        await self._await_fleet()

    async def transact(self, change: Callable[[Draft], None]) -> None:
        """Make all that `change` does with the draft durable and visible together, or nothing of it.

        `change` runs on the committer thread, should be quick, and must not await. What it raises is raised
        here. See `Store.transaction`.
        """

        def apply(draft: Draft) -> None:
            with draft.savepoint():
                change(draft)

        await self._change(apply)

    async def _change(self, apply: Callable[[Draft], _T]) -> _T:
        self._require_outside()
        request = _TaskRequest(apply, require_loop())
        self.store.fleet.expect(request)
        self.store.submit(request)
        result: _T = await self._wait_for(request)
        return result

    async def _await_fleet(self) -> None:
        request = _TaskRequest(_nothing, require_loop())
        self.store.fleet.expect(request)
        if request.until_sent:
            request.settled = True
            self.store.fleet.keep([request])
            await self._wait_for(request)

    async def _wait_for(self, request: _TaskRequest) -> Any:
        """Wait until a request is settled, and sent if that is expected of it."""
        if not request.until_sent:
            return await wait_for(request)
        fleet = self.store.fleet
        patience = self._patience.get(request.loop)
        if patience is None:
            patience = self._patience[request.loop] = _Patience(fleet.time_left)
        patience.begin(request)
        try:
            result = await wait_for(request)
            fleet.require_sent(request)
        except BaseException:
            fleet.forget(request)
            raise
        finally:
            patience.end(request)
        return result

    def _require_outside(self) -> None:
        turn = turn_of_task.get()
        if turn is not None and turn.inside.locked():  # a task that was begun in the block may outlive it
            raise InvalidStateError(
                "the store was called from within a transaction, and would wait for itself; use the transaction's draft"
            )
