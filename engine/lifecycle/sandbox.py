"""A sandbox: what its containers share. Its record is as durable as theirs."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from msgspec.structs import replace

from limpet.engine.lifecycle.bundle import Bundle
from limpet.engine.lifecycle.container import Container
from limpet.engine.lifecycle.cri_status import to_cri_sandbox_status
from limpet.engine.lifecycle.expiry import require_expiry
from limpet.engine.lifecycle.patience import require_seconds
from limpet.engine.lifecycle.removal import remove_ended
from limpet.engine.lifecycle.runtime import Runtime
from limpet.engine.lifecycle.stopping import DEFAULT_STOP_TIMEOUT_SECONDS, carry_out_stop, request_stop
from limpet.engine.lifecycle.stops import carry_out_stops, finish_stops, try_each
from limpet.engine.starters.abilities import Furnisher
from limpet.engine.state.process_bound import ProcessBound
from limpet.engine.store import Draft
from limpet.schema.cri import PodSandboxStatus
from limpet.schema.errors import (
    DiskFullError,
    InvalidInputError,
    InvalidStateError,
    LimpetError,
    NotFoundError,
    ResourcesError,
    StateDirectoryError,
    name_some,
)
from limpet.schema.metadata import SandboxMetadata
from limpet.schema.sandbox_status import SandboxReason, SandboxState, SandboxStatus, stop_sandbox
from limpet.schema.status import ContainerState, Status
from limpet.schema.telling import get_log

_log = get_log("limpet.sandbox")


class Sandbox(ProcessBound):
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
    def attempt(self) -> int:
        """Which attempt of its name it is, from its config."""
        return self.metadata.config.metadata.attempt

    @property
    def created_at(self) -> int:
        """When it was made, in nanoseconds since the epoch."""
        return self.metadata.created_at

    @property
    def runtime_handler(self) -> str:
        """The CRI's runtime handler; empty for the default."""
        return self.metadata.runtime_handler

    @property
    def status(self) -> SandboxStatus:
        """The status now, as a value that does not change. Raises NotFoundError once it is deleted."""
        return self._runtime.store.sandbox_status(self.id)

    @property
    def state(self) -> SandboxState:
        """READY, or NOTREADY once it is stopped, or another boot has begun."""
        return self.status.state

    @property
    def extra(self) -> Mapping[str, Any]:
        """What the runtime keeps of its own; `update` changes it."""
        return self.status.extra

    @property
    def version(self) -> int:
        """The version of its status, for `update(..., expect=version)`. Raises as `status` does."""
        return self._runtime.store.sandbox_version(self.id)

    def cri_status(self) -> PodSandboxStatus:
        """Return the status as the CRI writes it."""
        return to_cri_sandbox_status(self.metadata, self.status)

    @property
    def labels(self) -> Mapping[str, str]:
        """Its labels, from its config."""
        return dict(self.metadata.config.labels)  # whoever changes them changes nothing here

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

    def update(self, fn: Callable[[SandboxStatus], SandboxStatus], *, expect: int | None = None) -> SandboxStatus:
        """Replace its status by `fn` of it, durably, and return the new one: see `Store.update_sandbox`.

        For its namespaces, addresses and extra, and what they are decided from. One that is NOTREADY stays so; `stop`
        makes it so, and stops its containers. Raises VersionConflictError if its version is not the expected one.
        """
        return self._runtime.store.update_sandbox(self.id, fn, expect=expect)

    def stop(self, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> None:
        """Make it NOTREADY, and stop all its containers side by side, each as `Container.stop` does. May be repeated.

        That is written first, at once for all: nothing new comes in or starts from then on, and the next engine
        finishes what a kill cuts short. One that cannot be stopped keeps no other from it. Raises InvalidStateError
        afterwards, naming each that failed.
        """
        tell_problems(self.id, "stopped", self._stop(timeout))

    def _stop(self, timeout: float) -> list[LimpetError]:
        begun, problems = self.begin_stop(timeout)
        problems = [*problems, *finish_stops(self._runtime, begun)]
        if not problems:
            with self._runtime.exclusive(self.id):
                self._try_to_vacate()
        return problems

    def make(self) -> None:
        """Make its directory, and what it is to hold. Raises as `furnish` does, StateDirectoryError, DiskFullError."""
        with self._told("create"):
            self.bundle.make()
            self.furnish()

    def furnish(self) -> None:
        """Have its starter make what it is to hold beside what was given, and write that down.

        Raises InvalidInputError, UnsupportedError, ResourcesError: then it holds nothing of the starter's.
        """
        starter = self._furnisher
        if starter is None:
            return
        status = self.status
        made = starter.furnish(self.metadata, status.namespaces)
        if made.namespaces != status.namespaces or made.addresses:
            addresses = status.addresses or made.addresses
            self._runtime.store.update_sandbox(
                self.id, lambda old: replace(old, namespaces=made.namespaces, addresses=addresses)
            )

    @property
    def may_hold(self) -> bool:
        """True if it may hold what its starter has made, such as namespaces and a network."""
        return self._furnisher is not None

    def vacate(self) -> None:
        """Have its starter free what it holds. May be repeated. Raises ResourcesError if that is to be tried again."""
        self._runtime.store.require_open()
        starter = self._furnisher
        if starter is not None:
            starter.vacate(self.id)

    def _try_to_vacate(self) -> None:
        """Do the same; what cannot be freed now is freed by a later recovery, or a removal."""
        try:
            self.vacate()
        except LimpetError as error:
            _log.warning("sandbox %s still holds something: %s", self.id, error)

    def discard(self) -> None:
        """Take back one that could not be made. What cannot be taken back stays, NOTREADY, until it is deleted."""
        try:
            self.vacate()
            if self.bundle.holds_ours():
                self.bundle.remove()
            self._runtime.store.delete_sandbox(self.id)
        except LimpetError as error:
            now, why = time.time_ns(), f"it could not be made, and stays until it is deleted: {error}"
            _log.warning("sandbox %s: %s", self.id, why)
            with suppress(LimpetError):  # the store refuses: it may be READY, then, and a recovery makes its directory
                self._runtime.store.update_sandbox(
                    self.id, lambda old: stop_sandbox(old, SandboxReason.LOST, at=now, message=why)
                )

    def set_right(self) -> None:
        """See to what it holds after a crash: finish the making, free what nobody needs, find out what is lost."""
        status = self.status
        if self.bundle.is_missing():
            self.bundle.make()  # a kill came between its row and its marked directory
        starter = self._furnisher
        if starter is None:
            return
        if status.state is SandboxState.NOTREADY:
            if all(container.state is ContainerState.EXITED for container in self.containers()):
                self._try_to_vacate()
            return
        if not starter.is_furnished(self.metadata, status.namespaces):
            self.bundle.make()  # never in a directory that is not ours
            self.furnish()
        if not starter.holds(self.id, self.status.namespaces):
            now, why = time.time_ns(), "its namespaces have ended, or somebody has unmounted them; make another"
            self._runtime.store.update_sandbox(
                self.id, lambda old: stop_sandbox(old, SandboxReason.LOST, at=now, message=why)
            )

    @property
    def _furnisher(self) -> Furnisher | None:
        """Its starter, if that makes what sandboxes hold, and this engine has it."""
        try:
            starter = self._runtime.starters.choose(self.runtime_handler)
        except InvalidInputError:
            return None
        return starter if isinstance(starter, Furnisher) else None

    def begin_stop(self, timeout: float) -> tuple[Mapping[Container, Status], Sequence[LimpetError]]:
        """Do the first half of `stop`: write it down, and send the stop signals.

        Return, for `Container.finish_stop`, the status of each that is stopped, and what kept others from it.
        """
        require_seconds(timeout)
        return self._runtime.step(lambda: self._begin_stop(timeout))

    def _begin_stop(self, timeout: float) -> tuple[Mapping[Container, Status], Sequence[LimpetError]]:
        asked = self._write_stop(timeout)
        containers = self.containers()
        begun = carry_out_stops(self._runtime, [one for one in containers if one.id in asked], timeout)

        def begin(container: Container) -> None:
            is_written = container.id in asked
            begun[container] = carry_out_stop(container.life, timeout) if is_written else container.begin_stop(timeout)

        problems = try_each(begin, [one for one in containers if one not in begun])
        return begun, problems

    def renew(self, expires_at: int) -> SandboxStatus:
        """Set when it is stopped and removed with its containers, in nanoseconds since the epoch; return the status.

        0 stands for never. Raises InvalidStateError for one that is NOTREADY: it may have expired just now.
        """
        require_expiry(expires_at)

        def renew(old: SandboxStatus) -> SandboxStatus:
            if old.stopped_at:
                why = f" ({old.reason})" if old.reason else ""
                raise InvalidStateError(f"cannot renew sandbox {self.id}: it is NOTREADY{why}; make another")
            return replace(old, expires_at=expires_at)

        self._runtime.begin_timetable()
        status = self._runtime.store.update_sandbox(self.id, renew)
        self._runtime.note_sandbox(self.id)
        return status

    def _write_stop(self, timeout: float) -> set[str]:
        """Write down that it is NOTREADY and that what runs in it is to stop; return what had not been asked before."""
        asked: set[str] = set()
        with self._runtime.store.transaction() as draft, suppress(NotFoundError):
            _make_not_ready(draft, self.id)
            for key in draft.containers_of(self.id):
                status = draft.status(key)
                if status.state is ContainerState.RUNNING and not status.stop_requested_at:
                    draft.replace(key, request_stop(status, timeout))
                    asked.add(key)
        return asked

    def delete(self) -> bool:
        """Forget the sandbox and remove its directory; return False if it is gone already.

        Raises InvalidStateError while it has containers, ResourcesError if its network cannot be removed now.
        """
        return self._runtime.step(lambda: self._delete("delete"))

    def finish_removal(self) -> bool:
        """Do the last step of `remove`, once its containers are gone. Raises as `delete` does."""
        return self._runtime.step(lambda: self._delete("remove"))

    def take_back(self) -> None:
        """Delete it if nothing is in it yet: who made it was interrupted, and does not know of it."""
        with suppress(LimpetError):  # somebody else uses it, or it has to stay: then it is READY, or recovery tells
            self.delete()

    def remove(self, *, force: bool = False, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> bool:
        """Remove the sandbox with its containers: see `Container.remove`. Return False if it is gone already.

        Without `force` it refuses, and changes nothing, while some of them may run, or wait to be started; with it they
        are stopped first. It is NOTREADY from then on, so that repeating finishes what a kill cuts short. Raises
        InvalidStateError, naming each that could not be removed.
        """
        if force:
            self._stop(timeout)  # side by side; what could not be stopped cannot be removed, and is told then
        else:
            self.begin_removal()
        left = self.remove_ended()
        problems = try_each(lambda one: one.remove(force=force, timeout=timeout), left)
        tell_problems(self.id, "removed", problems)
        return self.finish_removal()

    def remove_ended(self) -> "Sequence[Container]":
        """Remove those of its containers that have ended, many at once; return the others: see `removal`."""
        containers = self.containers()
        gone = remove_ended(self._runtime, containers)
        return [one for one in containers if one.id not in gone]

    def end(self) -> None:
        """Make it NOTREADY if all its containers have ended. Raises InvalidStateError if they have not."""
        self._runtime.step(lambda: self._end("end"))

    def begin_removal(self) -> None:
        """Do the first step of `remove` without force. Raises as `end` does."""
        self._runtime.step(lambda: self._end("remove"))

    def _end(self, verb: str) -> None:
        with self._runtime.store.transaction() as draft, suppress(NotFoundError):
            is_ready = draft.sandbox_status(self.id).state is SandboxState.READY
            left = [key for key in draft.containers_of(self.id) if _is_wanted(draft.status(key), is_ready=is_ready)]
            if left:
                raise InvalidStateError(
                    f"cannot {verb} sandbox {self.id}: it has containers that have not ended ({name_some(left)});"
                    " stop it first, or remove it with force"
                )
            _make_not_ready(draft, self.id)

    def _delete(self, verb: str) -> bool:
        with self._runtime.exclusive(self.id):
            # The row last: a directory without a row is an orphan, which a recovery moves aside if it is young.
            with self._runtime.store.transaction() as draft, suppress(NotFoundError):
                draft.require_empty(self.id)
                _make_not_ready(draft, self.id)  # nothing comes in while its directory is removed
            with self._told(verb):
                self.vacate()
                self.bundle.remove()
            return self._runtime.store.delete_sandbox(self.id)

    @contextmanager
    def _told(self, verb: str) -> Iterator[None]:
        """Have what keeps its starter or the disk from something name what was called, and of which sandbox."""
        try:
            yield
        except (DiskFullError, InvalidStateError, ResourcesError, StateDirectoryError) as error:
            raise type(error)(f"cannot {verb} sandbox {self.id}: {error}") from error


def tell_problems(sandbox_id: str, done: str, problems: Sequence[LimpetError]) -> None:
    """Raise InvalidStateError that tells all of these, if there are any: why some containers were not `done`."""
    if problems:
        told = f"sandbox {sandbox_id}: {len(problems)} of its containers were not {done}"
        raise InvalidStateError(f"{told}: {'; '.join(dict.fromkeys(map(str, problems)))}") from problems[0]


def _make_not_ready(draft: Draft, sandbox_id: str) -> None:
    if draft.sandbox_status(sandbox_id).state is SandboxState.READY:
        now = time.time_ns()
        draft.update_sandbox(sandbox_id, lambda old: stop_sandbox(old, SandboxReason.STOPPED, at=now))


def _is_wanted(status: Status, *, is_ready: bool) -> bool:
    """Return whether it may run, or may yet be started: in a sandbox that is not ready nothing is."""
    if status.unknown or status.state is ContainerState.RUNNING:
        return True
    return is_ready and not status.finished_at and not status.released
