"""A container for asyncio: what `Container` does, awaited."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice

from limpet.engine.aio.loops import require_loop
from limpet.engine.aio.opening import as_it_is, open_once
from limpet.engine.aio.workers import Workers
from limpet.engine.lifecycle.container import DEFAULT_EXEC_TIMEOUT_SECONDS, Container
from limpet.engine.lifecycle.stopping import (
    DEFAULT_STOP_TIMEOUT_SECONDS,
    be_patient,
    find_followers,
    is_stopped,
    needs_stop,
)
from limpet.engine.logs import Entry
from limpet.engine.starters.abilities import Executed, Session, Stats
from limpet.engine.state.process_bound import ProcessBound
from limpet.schema.cri import ContainerStatus, LinuxContainerResources
from limpet.schema.errors import InvalidStateError, NotFoundError, WaitTimeoutError
from limpet.schema.image import MountType
from limpet.schema.metadata import Metadata
from limpet.schema.status import ContainerState, Status

_ENTRIES = 256
"""How many entries of a log are read at a time."""


class AsyncContainer(ProcessBound):
    """One container of an `AsyncEngine`. A task that waits for its end, or for a stop, holds no thread.

    A task that is cancelled leaves each step whole: one that has not begun is taken back, and otherwise the task is
    cancelled once it is done. Only waiting ends at once; a stop that was begun goes on, and a session that the task
    does not get is closed.
    """

    def __init__(self, container: Container, workers: Workers) -> None:
        self.container = container
        """The same container for threads."""
        self._workers = workers

    def __repr__(self) -> str:
        return f"<Async{repr(self.container).removeprefix('<')}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AsyncContainer) and self.container == other.container

    def __hash__(self) -> int:
        return hash(self.container)

    @property
    def id(self) -> str:
        """The container's id."""
        return self.container.id

    @property
    def metadata(self) -> Metadata:
        """See `Container.metadata`."""
        return self.container.metadata

    @property
    def name(self) -> str:
        """See `Container.name`."""
        return self.container.name

    @property
    def sandbox_id(self) -> str:
        """See `Container.sandbox_id`."""
        return self.container.sandbox_id

    @property
    def labels(self) -> Mapping[str, str]:
        """See `Container.labels`."""
        return self.container.labels

    @property
    def status(self) -> Status:
        """See `Container.status`."""
        return self.container.status

    @property
    def state(self) -> ContainerState:
        """See `Container.state`."""
        return self.container.state

    @property
    def exit_code(self) -> int | None:
        """See `Container.exit_code`."""
        return self.container.exit_code

    @property
    def restart_at(self) -> int:
        """See `Container.restart_at`."""
        return self.container.restart_at

    async def cri_status(self) -> ContainerStatus:
        """See `Container.cri_status`."""
        return await self._workers.quick(self.container.cri_status)

    async def create(self, mount_type: MountType = MountType.PLAIN) -> Status:
        """See `Container.create`."""
        return await self._workers.slow(lambda: self.container.create(mount_type), self.id)

    async def start(self, secret_env: Mapping[str, str] | None = None) -> Status:
        """See `Container.start`."""
        return await self._workers.quick(lambda: self.container.start(secret_env), self.id)

    async def stop(self, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> Status:
        """See `Container.stop`. It holds no thread while the container has time to end."""
        return await self.finish_stop(await self.begin_stop(timeout))

    async def begin_stop(self, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> Status:
        """See `Container.begin_stop`."""
        return await self._workers.quick(lambda: self.container.begin_stop(timeout), self.id)

    async def finish_stop(self, status: Status) -> Status:
        """See `Container.finish_stop`."""
        life = self.container.life
        for follower in await self._workers.quick(lambda: find_followers(life)):
            container = Container(follower.runtime, follower.id)
            await AsyncContainer(container, self._workers).finish_stop(follower.status)
        patience = be_patient(life, status)
        if patience is None:
            return status
        try:
            with suppress(WaitTimeoutError):
                await self.container.wait_async(patience.left())
            while not await self._workers.quick(lambda: is_stopped(life, status)):
                await asyncio.sleep(patience.next_pause())
            return self.container.status
        except NotFoundError:
            return await self._workers.quick(lambda: self.container.last_status(status))

    async def pause(self) -> Status:
        """See `Container.pause`."""
        return await self._workers.slow(self.container.pause, self.id)

    async def resume(self) -> Status:
        """See `Container.resume`."""
        return await self._workers.quick(self.container.resume, self.id)

    async def execute(self, args: Sequence[str], timeout: float = DEFAULT_EXEC_TIMEOUT_SECONDS) -> Executed:
        """See `Container.execute`. It holds a thread; other steps of the container do not wait for it."""
        return await self._workers.slow(lambda: self.container.execute(args, timeout))

    async def open_command(
        self, args: Sequence[str], *, terminal: bool = False, size: tuple[int, int] = (0, 0)
    ) -> Session:
        """See `Container.open_command`. The session is one for threads: its reads block."""
        return await open_once(
            lambda: self.container.open_command(args, terminal=terminal, size=size), self._workers.slow, as_it_is
        )

    async def attach(self) -> Session:
        """See `Container.attach`. The session is one for threads: its reads block."""
        return await open_once(self.container.attach, self._workers.slow, as_it_is)

    async def measure(self) -> Stats:
        """See `Container.measure`."""
        return await self._workers.quick(self.container.measure)

    async def change_limits(self, limits: LinuxContainerResources) -> Status:
        """See `Container.change_limits`."""
        return await self._workers.quick(lambda: self.container.change_limits(limits), self.id)

    async def reopen_log(self) -> None:
        """See `Container.reopen_log`."""
        await self._workers.quick(self.container.reopen_log)

    async def renew(self, expires_at: int) -> Status:
        """See `Container.renew`."""
        return await self._workers.quick(lambda: self.container.renew(expires_at), self.id)

    async def wait(self, timeout: float | None = None) -> Status:
        """See `Container.wait`. It holds no thread."""
        require_loop()
        return await self.container.wait_async(timeout)

    async def read_log(self) -> AsyncIterator[Entry]:
        """See `Container.read_log`."""
        entries = await self._workers.slow(self.container.read_log)  # output may have to be waited for
        while read := await self._workers.quick(lambda: list(islice(entries, _ENTRIES))):
            for entry in read:
                yield entry

    async def release(self) -> Status:
        """See `Container.release`."""
        return await self._workers.slow(self.container.release, self.id)

    async def remove_bundle(self) -> None:
        """See `Container.remove_bundle`."""
        await self._workers.slow(self.container.remove_bundle, self.id)

    async def delete(self) -> bool:
        """See `Container.delete`."""
        return await self._workers.slow(self.container.delete, self.id)

    async def remove(self, *, force: bool = False, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> bool:
        """See `Container.remove`."""
        if force:
            await self._stop_if_needed(timeout)
        try:
            return await self._workers.slow(self.container.remove, self.id)
        except InvalidStateError:
            if not (force and self.container.was_just_started()):
                raise
        await self._stop_if_needed(timeout)
        return await self._workers.slow(self.container.remove, self.id)

    async def _stop_if_needed(self, timeout: float) -> None:
        with suppress(NotFoundError):  # deleted in the meantime
            if needs_stop(self.container.life):
                await self.stop(timeout)
