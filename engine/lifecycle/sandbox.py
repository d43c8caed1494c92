"""A sandbox: what its containers share. Its record is as durable as theirs."""

from collections.abc import Sequence

from limpet.engine.lifecycle.bundle import Bundle
from limpet.engine.lifecycle.container import DEFAULT_STOP_TIMEOUT_SECONDS, Container
from limpet.engine.lifecycle.runtime import Runtime
from limpet.schema.errors import InvalidStateError, LimpetError, NotFoundError
from limpet.schema.metadata import SandboxMetadata
from limpet.schema.status import Status


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
        return self._runtime.log_directory(self.metadata)

    def containers(self) -> Sequence[Container]:
        """Return its containers; none once it is deleted."""
        store = self._runtime.store
        records = store.list(sandbox_id=self.id)
        if self.id not in store.sandbox_ids:
            return []  # the id of a sandbox that is gone would mean all whose ids begin with it
        return [Container(self._runtime, record.id) for record in records]

    def stop(self, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> None:
        """Stop all its containers side by side, each as `Container.stop` does.

        One that cannot be stopped keeps no other from it. Raises InvalidStateError afterwards, naming each that failed.
        """
        begun: list[tuple[Container, Status]] = []
        problems: list[LimpetError] = []
        for container in self.containers():
            try:
                begun.append((container, container.begin_stop(timeout)))
            except NotFoundError:  # deleted in the meantime
                continue
            except LimpetError as error:
                problems.append(error)
        for container, status in begun:
            try:
                container.finish_stop(status)
            except NotFoundError:
                continue
            except LimpetError as error:
                problems.append(error)
        if problems:
            told = f"sandbox {self.id}: {len(problems)} of its containers were not stopped"
            raise InvalidStateError(f"{told}: {'; '.join(map(str, problems))}") from problems[0]

    def delete(self) -> None:
        """Forget the sandbox and remove its directory. Raises InvalidStateError while it has containers."""
        with self._runtime.exclusive(self.id):
            # The row first: a directory without a row is an orphan, which recovery removes.
            self._runtime.store.delete_sandbox(self.id)
            self.bundle.remove()
