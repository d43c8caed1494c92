"""A sandbox for asyncio: what `Sandbox` does, awaited."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from limpet.engine.aio.container import AsyncContainer
from limpet.engine.aio.workers import Workers
from limpet.engine.lifecycle.container import DEFAULT_STOP_TIMEOUT_SECONDS
from limpet.engine.lifecycle.sandbox import Sandbox, tell_problems
from limpet.schema.errors import LimpetError, NotFoundError
from limpet.schema.metadata import SandboxMetadata
from limpet.schema.sandbox_status import SandboxStatus


class AsyncSandbox:
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
        tell_problems(self.id, "stopped", await self._try_each(lambda container: container.stop(timeout)))

    async def renew(self, expires_at: int) -> SandboxStatus:
        """See `Sandbox.renew`."""
        return await self._workers.quick(lambda: self.sandbox.renew(expires_at), self.id)

    async def delete(self) -> bool:
        """See `Sandbox.delete`."""
        return await self._workers.slow(self.sandbox.delete, self.id)

    async def remove(self, *, force: bool = False, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> bool:
        """See `Sandbox.remove`."""
        if force:
            problems = await self._try_each(lambda container: container.remove(force=True, timeout=timeout))
            tell_problems(self.id, "removed", problems)
        return await self.delete()

    async def _try_each(self, act: Callable[[AsyncContainer], Awaitable[object]]) -> list[LimpetError]:
        async def attempt(container: AsyncContainer) -> LimpetError | None:
            try:
                await act(container)
            except NotFoundError:  # deleted in the meantime
                return None
            except LimpetError as error:
                return error
            return None

        found = await asyncio.gather(*map(attempt, await self.containers()))
        return [error for error in found if error is not None]
