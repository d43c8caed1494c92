"""A sandbox for asyncio: what `Sandbox` does, awaited."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from limpet.engine.aio.container import AsyncContainer
from limpet.engine.aio.workers import Workers
from limpet.engine.lifecycle.sandbox import Sandbox, tell_problems
from limpet.engine.lifecycle.stopping import DEFAULT_STOP_TIMEOUT_SECONDS
from limpet.engine.state.process_bound import ProcessBound
from limpet.schema.cri import PodSandboxStatus
from limpet.schema.errors import LimpetError, NotFoundError
from limpet.schema.metadata import SandboxMetadata
from limpet.schema.sandbox_status import SandboxState, SandboxStatus
from limpet.schema.status import Status


class AsyncSandbox(ProcessBound):
    """One sandbox of an `AsyncEngine`."""

    def __init__(self, sandbox: Sandbox, workers: Workers) -> None:
        self.sandbox = sandbox
        """The same sandbox for threads."""
        self._workers = workers

    def __repr__(self) -> str:
        return f"<Async{repr(self.sandbox).removeprefix('<')}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AsyncSandbox) and self.sandbox == other.sandbox

    def __hash__(self) -> int:
        return hash(self.sandbox)

    @property
    def id(self) -> str:
        """The sandbox's id."""
        return self.sandbox.id

    @property
    def metadata(self) -> SandboxMetadata:
        """The immutable part."""
        return self.sandbox.metadata

    @property
    def name(self) -> str:
        """See `Sandbox.name`."""
        return self.sandbox.name

    @property
    def attempt(self) -> int:
        """See `Sandbox.attempt`."""
        return self.sandbox.attempt

    @property
    def created_at(self) -> int:
        """See `Sandbox.created_at`."""
        return self.sandbox.created_at

    @property
    def runtime_handler(self) -> str:
        """See `Sandbox.runtime_handler`."""
        return self.sandbox.runtime_handler

    @property
    def status(self) -> SandboxStatus:
        """See `Sandbox.status`."""
        return self.sandbox.status

    @property
    def state(self) -> SandboxState:
        """See `Sandbox.state`."""
        return self.sandbox.state

    @property
    def extra(self) -> Mapping[str, Any]:
        """See `Sandbox.extra`."""
        return self.sandbox.extra

    @property
    def version(self) -> int:
        """See `Sandbox.version`."""
        return self.sandbox.version

    async def cri_status(self) -> PodSandboxStatus:
        """See `Sandbox.cri_status`."""
        return self.sandbox.cri_status()

    async def update(self, fn: Callable[[SandboxStatus], SandboxStatus], *, expect: int | None = None) -> SandboxStatus:
        """See `Sandbox.update`. `fn` must not await."""
        return await self._workers.quick(lambda: self.sandbox.update(fn, expect=expect), self.id)

    @property
    def labels(self) -> Mapping[str, str]:
        """See `Sandbox.labels`."""
        return self.sandbox.labels

    @property
    def log_directory(self) -> str:
        """See `Sandbox.log_directory`."""
        return self.sandbox.log_directory

    async def containers(self) -> Sequence[AsyncContainer]:
        """See `Sandbox.containers`."""
        found = await self._workers.quick(self.sandbox.containers)
        return [AsyncContainer(container, self._workers) for container in found]

    async def stop(self, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> None:
        """See `Sandbox.stop`. It holds no thread while the containers have time to end."""
        tell_problems(self.id, "stopped", await self._stop(timeout))

    async def begin_stop(self, timeout: float) -> tuple[Mapping[AsyncContainer, Status], Sequence[LimpetError]]:
        """See `Sandbox.begin_stop`."""
        begun, problems = await self._workers.slow(lambda: self.sandbox.begin_stop(timeout), self.id)
        return {AsyncContainer(one, self._workers): status for one, status in begun.items()}, problems

    async def end(self) -> None:
        """See `Sandbox.end`."""
        await self._workers.quick(self.sandbox.end, self.id)

    async def renew(self, expires_at: int) -> SandboxStatus:
        """See `Sandbox.renew`."""
        return await self._workers.quick(lambda: self.sandbox.renew(expires_at), self.id)

    async def delete(self) -> bool:
        """See `Sandbox.delete`."""
        return await self._workers.slow(self.sandbox.delete, self.id)

    async def remove(self, *, force: bool = False, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> bool:
        """See `Sandbox.remove`."""
        if force:
            await self._stop(timeout)
        else:
            await self._workers.quick(self.sandbox.begin_removal, self.id)
        left = await self.remove_ended()
        problems = await _try_each(lambda one: one.remove(force=force, timeout=timeout), left)
        tell_problems(self.id, "removed", problems)
        return await self._workers.slow(self.sandbox.finish_removal, self.id)

    async def remove_ended(self) -> Sequence[AsyncContainer]:
        """See `Sandbox.remove_ended`."""
        left = await self._workers.slow(self.sandbox.remove_ended, self.id)
        return [AsyncContainer(one, self._workers) for one in left]

    async def _stop(self, timeout: float) -> list[LimpetError]:
        begun, problems = await self.begin_stop(timeout)
        return [*problems, *await _try_each(lambda one: one.finish_stop(begun[one]), begun)]


async def _try_each(
    act: Callable[[AsyncContainer], Awaitable[object]], containers: Iterable[AsyncContainer]
) -> list[LimpetError]:
    """Do it for all, side by side, and return what failed. All are over when this is, also if it is cancelled.

    Raises what else one of them raises.
    """
    problems = []
    for outcome in await asyncio.gather(*map(act, containers), return_exceptions=True):
        if isinstance(outcome, LimpetError):
            if not isinstance(outcome, NotFoundError):  # deleted in the meantime
                problems.append(outcome)
        elif isinstance(outcome, BaseException):
            raise outcome
    return problems
