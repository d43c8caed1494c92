"""A sandbox: what its containers share. Its record is as durable as theirs."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec.structs import replace

from limpet.engine.lifecycle.bundle import Bundle
from limpet.engine.lifecycle.container import DEFAULT_STOP_TIMEOUT_SECONDS, Container, require_expiry
from limpet.engine.lifecycle.runtime import Runtime
from limpet.schema.errors import InvalidStateError, LimpetError, NotFoundError
from limpet.schema.metadata import SandboxMetadata
from limpet.schema.sandbox_status import SandboxStatus
from limpet.schema.status import Status


class Sandbox:
    """One sandbox of an engine."""

    def __init__(self, runtime: Runtime, metadata: SandboxMetadata) -> None:
        self._runtime = runtime
        self.metadata = metadata
        self.bundle = Bundle(runtime.sandbox_path(metadata.id), metadata.id, runtime.store.node)

    def __repr__(self) -> str:
        return f"<Sandbox {self.id}: {self.metadata.name}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sandbox):
            return NotImplemented
        return self.id == other.id and self._runtime is other._runtime

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def id(self) -> str:
        """The sandbox's id."""
        return self.metadata.id

    @property
    def name(self) -> str:
        """The sandbox's name, from its config."""
        return self.metadata.name

    @property
    def labels(self) -> Mapping[str, str]:
        """Its labels, from its config."""
        return self.metadata.config.labels

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
        tell_problems(self.id, "stopped", self._stop(timeout))

    def _stop(self, timeout: float) -> list[LimpetError]:
        begun: dict[Container, Status] = {}

        def begin(container: Container) -> None:
            begun[container] = container.begin_stop(timeout)

        problems = _try_each(begin, self.containers())
        return problems + _try_each(lambda container: container.finish_stop(begun[container]), begun)

    def renew(self, expires_at: int) -> SandboxStatus:
        """Set when it is stopped and removed with its containers, in nanoseconds since the epoch; return the status.

        0 stands for never. Raises InvalidStateError for one that is NOTREADY: it may have expired just now.
        """
        require_expiry(expires_at)

        def renew(old: SandboxStatus) -> SandboxStatus:
            if old.stopped_at:
                raise InvalidStateError(f"cannot renew sandbox {self.id}: it is NOTREADY ({old.reason}); make another")
            return replace(old, expires_at=expires_at)

        self._runtime.begin_timetable()
        status = self._runtime.store.update_sandbox(self.id, renew)
        self._runtime.note_sandbox(self.id)
        return status

    def delete(self) -> bool:
        """Forget the sandbox and remove its directory; return False if it is gone already.

        Raises InvalidStateError while it has containers.
        """
        return self._runtime.step(self._delete)

    def remove(self, *, force: bool = False, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> bool:
        """Delete the sandbox, with `force` its containers before it: see `Container.remove`. May be repeated.

        Return False if it is gone already. Raises InvalidStateError while it has containers without `force`, and
        naming each that could not be removed.
        """
        if force:
            self._stop(timeout)  # side by side; what could not be stopped cannot be removed, and is told then
            containers = self.containers()
            problems = _try_each(lambda one: one.remove(force=True, timeout=timeout), containers)
            tell_problems(self.id, "removed", problems)
        return self.delete()

    def _delete(self) -> bool:
        with self._runtime.exclusive(self.id):
            # The row first: a directory without a row is an orphan, which recovery removes.
            was_there = self._runtime.store.delete_sandbox(self.id)
            self.bundle.remove()
            return was_there


def tell_problems(sandbox_id: str, done: str, problems: Sequence[LimpetError]) -> None:
    """Raise InvalidStateError that tells all of these, if there are any: why some containers were not `done`."""
    if problems:
        told = f"sandbox {sandbox_id}: {len(problems)} of its containers were not {done}"
        raise InvalidStateError(f"{told}: {'; '.join(map(str, problems))}") from problems[0]


def _try_each(act: Callable[[Container], object], containers: Iterable[Container]) -> list[LimpetError]:
    """Do it to each container, and return what kept it from some. One that is deleted meanwhile is none of those."""
    problems = []
    for container in containers:
        try:
            act(container)
        except NotFoundError:
            continue
        except LimpetError as error:
            problems.append(error)
    return problems
