"""The engine for asyncio: what `Engine` does, awaited; thousands of tasks may wait without a thread for each."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from limpet.engine.aio.answers import close_in_own_thread, in_own_thread
from limpet.engine.aio.container import AsyncContainer
from limpet.engine.aio.opening import Closing, Opening, open_whole
from limpet.engine.aio.sandbox import AsyncSandbox
from limpet.engine.aio.store import AsyncStore
from limpet.engine.aio.workers import Workers
from limpet.engine.engine import Engine
from limpet.engine.images import ImageStore
from limpet.engine.lifecycle.container import Container
from limpet.engine.lifecycle.prune import Pruned
from limpet.engine.lifecycle.sandbox import Sandbox
from limpet.engine.starters import Starter
from limpet.engine.state.fleet_choice import FLEET_TIMEOUT_SECONDS
from limpet.engine.store import Listing
from limpet.recovery.looks import LOOK_TIMEOUT_SECONDS
from limpet.recovery.report import Report
from limpet.schema.cri import ContainerConfig, PodSandboxConfig
from limpet.schema.history import Transition
from limpet.schema.image import MountType
from limpet.schema.metadata import DEFAULT_NODE
from limpet.schema.restart import RestartKind
from limpet.schema.status import ContainerState, Status


class AsyncEngine(Closing):
    """An `Engine` for tasks of any number of event loops; threads may use the same engine beside them.

    Its steps are done by at most 32 threads of its own, and no step waits for a container to end. A task that is
    cancelled leaves each step whole: one that has not begun is taken back, and otherwise the task is cancelled once it
    is done.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        """The same engine for threads."""
        self.store = AsyncStore(engine.store)
        self._workers = Workers()

    @classmethod
    def open(
        cls,
        state_dir: str | os.PathLike[str],
        *,
        node: str = DEFAULT_NODE,
        images: ImageStore | None = None,
        starter: Starter | None = None,
        runtimes: Mapping[str, Starter] | None = None,
        inherit_env: Iterable[str] = (),
        look_timeout: float = LOOK_TIMEOUT_SECONDS,
        wait: float = 0,
        fleet: str = "",
        fleet_ack: str = "async",
        fleet_timeout: float = FLEET_TIMEOUT_SECONDS,
    ) -> "Opening[AsyncEngine]":
        """Open an engine without blocking the loop: `await` it, or `async with` it. See `Engine.open`."""
        inherited = tuple(inherit_env) if isinstance(inherit_env, Iterator) else inherit_env  # each try reads it

        def open_engine(part: float) -> Engine:
            return Engine.open(
                state_dir,
                node=node,
                images=images,
                starter=starter,
                runtimes=runtimes,
                inherit_env=inherited,
                look_timeout=look_timeout,
                wait=part,
                fleet=fleet,
                fleet_ack=fleet_ack,
                fleet_timeout=fleet_timeout,
            )

        async def begin() -> AsyncEngine:
            return await open_whole(open_engine, wait, cls)

        return Opening(begin)

    def __repr__(self) -> str:
        return f"<Async{repr(self.engine).removeprefix('<')}"

    @property
    def recovery(self) -> Report:
        """What the last recovery pass found."""
        return self.engine.recovery

    @property
    def starter(self) -> Starter:
        """See `Engine.starter`."""
        return self.engine.starter

    @property
    def images(self) -> ImageStore:
        """See `Engine.images`. Its own methods block: call them in a thread."""
        return self.engine.images

    async def close(self) -> None:
        """See `Engine.close`. Tasks that wait get ClosedError."""
        await close_in_own_thread(self.engine.close)

    async def create_sandbox(
        self,
        config: PodSandboxConfig | bytes | str | Mapping[str, Any],
        *,
        id: str | None = None,
        strict: bool = False,
        runtime_handler: str = "",
        namespaces: Mapping[str, str] | None = None,
        addresses: Iterable[str] = (),
        extra: Mapping[str, Any] | None = None,
        expires_at: int = 0,
    ) -> AsyncSandbox:
        """See `Engine.create_sandbox`."""

        def create() -> Sandbox:
            return self.engine.create_sandbox(
                config,
                id=id,
                strict=strict,
                runtime_handler=runtime_handler,
                namespaces=namespaces,
                addresses=addresses,
                extra=extra,
                expires_at=expires_at,
            )

        return self._sandbox(await self._workers.slow(create, id))

    async def get_or_create_sandbox(
        self, config: PodSandboxConfig | bytes | str | Mapping[str, Any], *, id: str | None = None
    ) -> AsyncSandbox:
        """See `Engine.get_or_create_sandbox`."""
        return self._sandbox(await self._workers.slow(lambda: self.engine.get_or_create_sandbox(config, id=id)))

    async def create_container(
        self,
        config: ContainerConfig | bytes | str | Mapping[str, Any],
        sandbox: AsyncSandbox | Sandbox | str,
        *,
        id: str | None = None,
        mount_type: MountType = MountType.PLAIN,
        strict: bool = False,
        restart: str = RestartKind.NO,
        expires_at: int = 0,
        extra: Mapping[str, Any] | None = None,
    ) -> AsyncContainer:
        """See `Engine.create_container`."""
        place = _plain(sandbox)
        made = await self._workers.slow(
            lambda: self.engine.create_container(
                config,
                place,
                id=id,
                mount_type=mount_type,
                strict=strict,
                restart=restart,
                expires_at=expires_at,
                extra=extra,
            ),
            id,
        )
        return self._container(made)

    async def add_container(
        self,
        config: ContainerConfig | bytes | str | Mapping[str, Any],
        sandbox: AsyncSandbox | Sandbox | str,
        *,
        id: str | None = None,
        strict: bool = False,
        restart: str = RestartKind.NO,
        expires_at: int = 0,
        extra: Mapping[str, Any] | None = None,
    ) -> AsyncContainer:
        """See `Engine.add_container`."""
        place = _plain(sandbox)
        added = await self._workers.quick(
            lambda: self.engine.add_container(
                config, place, id=id, strict=strict, restart=restart, expires_at=expires_at, extra=extra
            ),
            id,
        )
        return self._container(added)

    async def get(self, container_id: str) -> AsyncContainer:
        """See `Engine.get`."""
        return self._container(await self._workers.quick(lambda: self.engine.get(container_id)))

    async def list(
        self,
        *,
        id: str = "",
        name: str = "",
        sandbox_id: str = "",
        state: ContainerState | str | None = None,
        labels: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> "Listing[AsyncContainer]":
        """See `Engine.list`."""
        found = await self._workers.quick(
            lambda: self.engine.list(id=id, name=name, sandbox_id=sandbox_id, state=state, labels=labels, extra=extra)
        )
        return Listing((self._container(container) for container in found), found.revision)

    async def get_sandbox(self, sandbox_id: str) -> AsyncSandbox:
        """See `Engine.get_sandbox`."""
        return self._sandbox(await self._workers.quick(lambda: self.engine.get_sandbox(sandbox_id)))

    async def list_sandboxes(self) -> "Sequence[AsyncSandbox]":
        """See `Engine.list_sandboxes`."""
        return [self._sandbox(sandbox) for sandbox in await self._workers.quick(self.engine.list_sandboxes)]

    async def delete(self, container_id: str) -> bool:
        """See `Engine.delete`."""
        return await self._workers.slow(lambda: self.engine.delete(container_id), container_id)

    async def prune(self, *, sandboxes: bool = False) -> Pruned:
        """See `Engine.prune`."""
        return await in_own_thread(lambda: self.engine.prune(sandboxes=sandboxes))

    async def history(self, container_id: str) -> "Sequence[Transition]":
        """See `Engine.history`."""
        return await self._workers.quick(lambda: self.engine.history(container_id))

    async def back_up(self, target_path: str) -> None:
        """See `Engine.back_up`."""
        await in_own_thread(lambda: self.engine.back_up(target_path))

    async def recover(self) -> Report:
        """See `Engine.recover`."""
        return await in_own_thread(self.engine.recover)

    async def declare_gone(self, container_id: str, why: str) -> Status:
        """See `Engine.declare_gone`."""
        return await self._workers.slow(lambda: self.engine.declare_gone(container_id, why))

    def _container(self, container: Container) -> AsyncContainer:
        return AsyncContainer(container, self._workers)

    def _sandbox(self, sandbox: Sandbox) -> AsyncSandbox:
        return AsyncSandbox(sandbox, self._workers)


def _plain(sandbox: AsyncSandbox | Sandbox | str) -> Sandbox | str:
    return sandbox.sandbox if isinstance(sandbox, AsyncSandbox) else sandbox
