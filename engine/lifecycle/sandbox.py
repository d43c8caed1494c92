"""A sandbox: what its containers share. Its record is as durable as theirs."""

import os
from collections.abc import Sequence

from limpet.engine.lifecycle.bundle import Bundle
from limpet.engine.lifecycle.container import Container
from limpet.engine.lifecycle.runtime import Runtime
from limpet.schema.metadata import SandboxMetadata


class Sandbox:
    """One sandbox of an engine."""

    def __init__(self, runtime: Runtime, metadata: SandboxMetadata) -> None:
        self._runtime = runtime
        self.metadata = metadata
        self.bundle = Bundle(runtime.sandbox_path(metadata.id), metadata.id, runtime.store.node)

    def __repr__(self) -> str:
        return f"<Sandbox {self.id}: {self.metadata.name}>"

    @property
    def id(self) -> str:
        """The sandbox's id."""
        return self.metadata.id

    @property
    def log_directory(self) -> str:
        """Where its containers' logs go: the config's log_directory, else a directory of its own."""
        return self.metadata.config.log_directory or os.path.join(self.bundle.path, "logs")

    def containers(self) -> Sequence[Container]:
        """Return its containers; none once it is deleted."""
        store = self._runtime.store
        records = store.list(sandbox_id=self.id)
        if self.id not in store.sandbox_ids:
            return []  # the id of a sandbox that is gone would mean all whose ids begin with it
        return [Container(self._runtime, record.id) for record in records]

    def stop(self, timeout: float) -> None:
        """Stop all its containers, one after the other, each as `Container.stop` does."""
        for container in self.containers():
            container.stop(timeout)

    def delete(self) -> None:
        """Forget the sandbox and remove its directory. Raises InvalidStateError while it has containers."""
        with self._runtime.exclusive(self.id):
            # The row first: a directory without a row is an orphan, which recovery removes.
            self._runtime.store.delete_sandbox(self.id)
            self.bundle.remove()
