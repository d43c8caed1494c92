"""The engine as those see it who ask it for something, and how they find what they mean."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from limpet.engine.images import ImageStore
from limpet.engine.lifecycle.container import Container
from limpet.engine.lifecycle.sandbox import Sandbox
from limpet.engine.starters import Starter
from limpet.engine.store import Store
from limpet.recovery.report import Report
from limpet.schema.cri import PodSandboxConfig
from limpet.schema.errors import NotFoundError, quote
from limpet.schema.restart import RestartKind
from limpet.schema.status import ContainerState, Status


class Served(Protocol):
    """What an engine has for those who ask."""

    store: Store

    @property
    def starter(self) -> Starter:
        """What starts its containers."""

    @property
    def images(self) -> ImageStore:
        """The images that containers are made from."""

    def get(self, container_id: str) -> Container:
        """Return a container."""

    def get_sandbox(self, sandbox_id: str) -> Sandbox:
        """Return a sandbox."""

    def list(self, *, state: ContainerState | None = None) -> "Sequence[Container]":
        """Return the containers in this state."""

    def list_sandboxes(self) -> "Sequence[Sandbox]":
        """Return all sandboxes."""

    def create_sandbox(self, config: PodSandboxConfig, *, id: str | None = None, runtime_handler: str = "") -> Sandbox:
        """Make a sandbox."""

    def create_container(
        self, config: Mapping[str, Any], sandbox_id: str, *, id: str | None = None, restart: str = RestartKind.NO
    ) -> Container:
        """Make a container."""

    def declare_gone(self, container_id: str, why: str) -> Status:
        """Record that a container is gone."""

    def recover(self) -> Report:
        """Recover."""


def find(engine: Served, text: str) -> Container | Sandbox:
    """Return what `text` means: an exact id first, then a container, then a sandbox.

    Raises NotFoundError, AmbiguousError.
    """
    if text in engine.store.sandbox_ids and text not in engine.store:
        return engine.get_sandbox(text)
    try:
        return engine.get(text)
    except NotFoundError:
        try:
            return engine.get_sandbox(text)
        except NotFoundError:
            raise NotFoundError(f"no container or sandbox has the id or name {quote(text)}") from None
