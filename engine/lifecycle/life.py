"""One container as the steps of its life see it: what is written of it, its starter, its bundle."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property

from limpet.engine.lifecycle.bundle import ContainerBundle
from limpet.engine.lifecycle.runtime import Runtime
from limpet.engine.starters import Starter
from limpet.schema.errors import InvalidStateError
from limpet.schema.identity import ProcessIdentity
from limpet.schema.metadata import Metadata
from limpet.schema.status import ContainerState, Status


class Life:
    """What the steps of one container share. Several may stand for the same one: what is true is in the store.

    Steps are functions of it, in the modules beside this one. Each writes down what it is about to do before it does
    that, so that whoever comes after a kill can finish it.
    """

    def __init__(self, runtime: Runtime, container_id: str) -> None:
        self.runtime = runtime
        self.id = container_id
        self.bundle = ContainerBundle(runtime.bundle_path(container_id), container_id, runtime.store.node)

    @cached_property
    def metadata(self) -> Metadata:
        """The immutable part. Raises StoreDamagedError if its record cannot be read."""
        return self.runtime.store.metadata(self.id)

    @property
    def starter(self) -> Starter:
        """The starter that it was made for. Raises InvalidStateError if this engine does not have it."""
        if "metadata" in self.__dict__:  # read before
            return self.runtime.starters.of(self.metadata)
        return self.runtime.starter_of(self.id)

    @property
    def status(self) -> Status:
        """The status now, as a value that does not change. Raises NotFoundError once it is deleted."""
        return self.runtime.store.status(self.id)

    @property
    def has_ended(self) -> bool:
        """True once its end is written down. Raises NotFoundError, as `status` does."""
        return bool(self.status.finished_at)

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other steps of it out while the block runs."""
        return self.runtime.exclusive(self.id)

    def update(self, change: Callable[[Status], Status]) -> Status:
        """Replace its status by `change` of it, durably, and return the new one."""
        return self.runtime.store.update(self.id, change)

    def update_unless_ended(self, change: Callable[[Status], Status]) -> Status:
        """Do the same, unless its end was written down just now: that keeps no step out, and is not overwritten."""
        return self.update(lambda old: old if old.finished_at else change(old))

    def require_running(self, verb: str) -> ProcessIdentity:
        """Return the identity of its first process. Raises InvalidStateError unless it is RUNNING."""
        status = self.status
        if status.state is not ContainerState.RUNNING or status.identity is None:
            raise self.refuse(verb, "it must be RUNNING")
        return status.identity

    def require_not_paused(self, verb: str) -> ProcessIdentity:
        """Return the same. Raises InvalidStateError also if it is paused."""
        identity = self.require_running(verb)
        if self.status.paused:
            raise InvalidStateError(f"cannot {verb} container {self.id}: it is paused; resume it first")
        return identity

    def refuse(self, verb: str, why: str) -> InvalidStateError:
        """Return the error for what cannot be done as it is now."""
        status = self.status
        detail = " and released" if status.released else ""
        if status.unknown and status.message:
            detail = f" ({status.message})"
        return InvalidStateError(f"cannot {verb} container {self.id}: it is {status.state.name}{detail}; {why}")
