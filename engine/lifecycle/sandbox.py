"""A sandbox: what its containers share. Its record is as durable as theirs."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from limpet.engine.lifecycle.bundle import Bundle
from limpet.schema.errors import InvalidInputError, quote_path
from limpet.schema.metadata import SandboxMetadata

if TYPE_CHECKING:
    from limpet.engine.engine import Engine
    from limpet.engine.lifecycle.container import Container


class Sandbox:
    """One sandbox of an engine."""

    def __init__(self, engine: "Engine", metadata: SandboxMetadata, path: str) -> None:
        self._engine = engine
        self.metadata = metadata
        # Not where its record says: in a copy of a state directory that would be the original's.
        self.bundle = Bundle(path, metadata.id, engine.store.node)

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

    def containers(self) -> "Sequence[Container]":
        """Return its containers."""
        return self._engine.list(sandbox_id=self.id)

    def stop(self, timeout: float) -> None:
        """Stop all its containers, one after the other, each as `Container.stop` does."""
        for container in self.containers():
            container.stop(timeout)

    def delete(self) -> None:
        """Forget the sandbox and remove its directory. Raises InvalidStateError while it has containers."""
        with self._engine.exclusive(self.id):
            # The row first: a directory without a row is an orphan, which recovery removes.
            self._engine.store.delete_sandbox(self.id)
            self.bundle.remove()


def choose_log_path(log_directory: str, log_path: str) -> str:
    """Return the absolute path of a container's log, "" if it keeps none.

    Raises InvalidInputError if it would leave the log directory, also through a link in it.
    """
    if not log_path:
        return ""
    if not os.path.isabs(log_directory):
        raise InvalidInputError(f"log_directory {quote_path(log_directory)}: an absolute path is needed")
    root = os.path.realpath(log_directory)
    path = os.path.join(root, log_path)
    directory = os.path.realpath(os.path.dirname(path))
    name = os.path.basename(path)
    if os.path.isabs(log_path) or name in {"", ".", ".."} or os.path.commonpath([root, directory]) != root:
        raise InvalidInputError(f"log_path {quote_path(log_path)}: a path within the log directory {root} is needed")
    return os.path.join(directory, name)
