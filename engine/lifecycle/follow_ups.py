"""What was decided is carried out: restarts, expiries, pauses. By whoever comes next, if not by who decided it.

Each look reads what is true and what was decided, asks the table in `recovery.intents`, and does that one step, which
may be repeated. Each step checks again, where it writes, that it is still wanted.
"""

import time
from collections.abc import Sequence
from contextlib import suppress

from limpet.engine.lifecycle.attempts import add_next, find_attempt, find_place
from limpet.engine.lifecycle.container import Container
from limpet.engine.lifecycle.freezing import carry_out_pause, thaw
from limpet.engine.lifecycle.limits import carry_out_limits
from limpet.engine.lifecycle.releasing import release_expired
from limpet.engine.lifecycle.runtime import Runtime
from limpet.engine.lifecycle.sandbox import Sandbox
from limpet.engine.lifecycle.starting import fail_start, is_in_stopped_sandbox
from limpet.engine.lifecycle.stopping import expire
from limpet.engine.lifecycle.timetable import Entry, Kind
from limpet.recovery.host import read_boot_clock
from limpet.recovery.intents import Place, Step, decide_step, make_intent
from limpet.schema.deadline import DeadlineKind
from limpet.schema.errors import (
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    StartError,
    StoreDamagedError,
    StoreError,
    UnsupportedError,
)
from limpet.schema.metadata import Metadata
from limpet.schema.restart import RestartKind, next_delay
from limpet.schema.sandbox_status import SandboxReason, SandboxStatus, stop_sandbox
from limpet.schema.status import ContainerState, Status
from limpet.schema.telling import get_log

_log = get_log("limpet.follow_ups")
_LOOK_AGAIN_SECONDS = 0.1
"""Between two looks at what a stop gives time to."""


class FollowUps:
    """Looks at one container or sandbox, and does what is to be done next."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._restarts: dict[str, int] = {}
        """When the next attempt is due of what waits for that, by the boot's clock."""

    def begin(self) -> None:
        """Note everything of which something was decided: an engine before this one may have left it."""
        for container_id in self._find_intended():
            self._runtime.timetable.note(Entry(Kind.CONTAINER, container_id))
        for metadata in self._runtime.store.list_sandboxes():
            if self._runtime.store.sandbox_status(metadata.id).expires_at:
                self._runtime.timetable.note(Entry(Kind.SANDBOX, metadata.id))

    def _find_intended(self) -> Sequence[str]:
        store = self._runtime.store
        try:
            return store.list_intended() if len(store) else ()
        except StoreError as error:  # part of the table cannot be read: what can be is looked at one by one
            _log.warning("all containers are looked at for what was decided of them: %s", error)
            return [record.id for record in store.list()]

    def look(self, entry: Entry) -> float | None:
        """Do what is to be done next, and return in how many seconds to look again; None if there is no such time.

        Raises NotFoundError for what is deleted, and what the step raises.
        """
        try:
            if entry.kind is Kind.SANDBOX:
                return self._look_at_sandbox(entry)
            return self._look_at_container(entry)
        except NotFoundError:
            self._restarts.pop(entry.id, None)
            raise

    def _look_at_container(self, entry: Entry) -> float | None:
        store, container = self._runtime.store, Container(self._runtime, entry.id)
        status = store.status(entry.id)
        try:
            metadata = store.metadata(entry.id)
            sandbox = store.sandbox_status(metadata.sandbox_id)
        except StoreDamagedError:
            return None  # nothing is done to what cannot be read
        self._finish_limits(container)
        own_left = self._find_left(DeadlineKind.EXPIRY, entry.id, status.expires_at)
        is_sandbox_over = self._is_over(metadata.sandbox_id, sandbox)
        has_policy = metadata.restart_policy != RestartKind.NO
        intent = make_intent(
            metadata,
            status,
            is_frozen=status.state is ContainerState.RUNNING and container.is_frozen(),
            is_over=own_left == 0 or is_sandbox_over,
            place=find_place(store, metadata) if has_policy and _is_still(status) else Place.LAST,
            is_ready=not sandbox.stopped_at,
        )
        step = decide_step(intent).step
        if step is not Step.RESTART:
            self._restarts.pop(entry.id, None)
        seconds = self._do(step, container, metadata, status)
        if is_sandbox_over and store.status(entry.id).released:
            container.delete()
            self._runtime.timetable.note(Entry(Kind.SANDBOX, metadata.sandbox_id))
            return None
        waits = [each for each in (seconds, None if not own_left else own_left / 1e9) if each is not None]
        return min(waits, default=None)

    def _finish_limits(self, container: Container) -> None:
        try:
            carry_out_limits(container.life)
        except (InvalidInputError, InvalidStateError, UnsupportedError) as error:
            _log.warning("container %s: a change of its limits that was cut short: %s", container.id, error)

    def _do(self, step: Step, container: Container, metadata: Metadata, status: Status) -> float | None:
        match step:
            case Step.FINISH_STOP:
                thaw(container.life)
            case Step.EXPIRE:
                expire(container.life, status.expires_at)
                return _LOOK_AGAIN_SECONDS
            case Step.RELEASE:
                return self._release(container, status)
            case Step.FREEZE | Step.THAW:
                carry_out_pause(container.life)
            case Step.START:
                return self._start(container, metadata)
            case Step.RESTART:
                return self._restart(metadata, status)
            case Step.FORGET:
                self._forget(container, metadata)
        return None

    def _release(self, container: Container, status: Status) -> float | None:
        """Release it; what is left of one that was stopped keeps its grace."""
        if (
            status.stop_requested_at
            and self._runtime.store.time_left(DeadlineKind.STOP, container.id, status.stop_deadline)
            and status.identity
            and self._runtime.starter_of(container.id).signal(container.id, status.identity, 0)
        ):
            expire(container.life, status.expires_at)
            return _LOOK_AGAIN_SECONDS
        release_expired(container.life, status.expires_at)
        return None if container.status.released else 0.0

    def _restart(self, metadata: Metadata, status: Status) -> float | None:
        """Add the next attempt if its time has come; return in how many seconds it comes otherwise."""
        boot, delay = read_boot_clock(), next_delay(metadata, status)
        left = min(delay, status.finished_at + delay - time.time_ns())  # a clock that was set back lengthens nothing
        due = self._restarts.setdefault(metadata.id, boot + max(0, left))
        if boot < due:
            return (due - boot) / 1e9
        added = add_next(self._runtime, metadata)
        if added is not None:
            self._runtime.timetable.note(Entry(Kind.CONTAINER, added))
        del self._restarts[metadata.id]
        return None

    def _start(self, container: Container, metadata: Metadata) -> float | None:
        """Make and start an attempt that the policy has added, once nothing is left of the one before it."""
        store = self._runtime.store
        before = find_attempt(store, metadata, -1)
        if before is not None:
            with self._runtime.exclusive(before), suppress(NotFoundError):
                status = store.status(before)
                if status.finished_at and not status.unknown:
                    self._runtime.starter_of(before).release(before)
        outdated = find_attempt(store, metadata, -2)
        if outdated is not None:
            self._runtime.timetable.note(Entry(Kind.CONTAINER, outdated))
        try:
            if not container.status.created_at:
                container.create()
            container.start()
        except StartError:
            return 0.0  # that is written down, and its policy asked again
        except InvalidStateError:
            status = container.status
            if status.stop_requested_at or status.started_at or is_in_stopped_sandbox(container.life):
                return None  # somebody has stopped or started it, or stopped its sandbox, in the meantime
            raise
        except (InvalidInputError, NotFoundError) as error:
            fail_start(container.life, str(error))
            return 0.0
        return None

    def _forget(self, container: Container, metadata: Metadata) -> None:
        """Release and delete an outdated attempt; those before it first, which are told by those after them."""
        store = self._runtime.store
        before = find_attempt(store, metadata, -1) if metadata.restart_count else None
        if before is not None and store.status(before).finished_at and not store.status(before).unknown:
            self._forget(Container(self._runtime, before), store.metadata(before))
        container.release()
        container.delete()

    def _look_at_sandbox(self, entry: Entry) -> float | None:
        store = self._runtime.store
        status = store.sandbox_status(entry.id)
        left = self._find_left(DeadlineKind.SANDBOX_EXPIRY, entry.id, status.expires_at)
        if left != 0 and status.reason != SandboxReason.EXPIRED:
            return None if left is None else left / 1e9
        if not status.stopped_at:
            due = status.expires_at

            def expire(old: SandboxStatus) -> SandboxStatus:
                if old.expires_at != due:
                    return old  # it was renewed just now
                return stop_sandbox(old, SandboxReason.EXPIRED, at=time.time_ns(), message="its time was over")

            if not store.update_sandbox(entry.id, expire).stopped_at:
                return 0.0
        sandbox = Sandbox(self._runtime, store.get_sandbox(entry.id))
        containers = sandbox.containers()
        for container in containers:
            self._runtime.timetable.note(Entry(Kind.CONTAINER, container.id))
        if not containers:
            sandbox.delete()
            self._runtime.timetable.forget(entry)
        return None

    def _is_over(self, sandbox_id: str, status: SandboxStatus) -> bool:
        """Say whether the containers of a sandbox are to go with it: that it is NOTREADY is durable before."""
        if not status.stopped_at:
            return False
        is_over = self._find_left(DeadlineKind.SANDBOX_EXPIRY, sandbox_id, status.expires_at) == 0
        return is_over or status.reason == SandboxReason.EXPIRED

    def _find_left(self, kind: DeadlineKind, key: str, expires_at: int) -> int | None:
        """Return how many nanoseconds are left; None for one that does not expire."""
        return self._runtime.store.time_left(kind, key, expires_at) if expires_at else None


def _is_still(status: Status) -> bool:
    """Say whether it does not run: then it matters which attempt it is."""
    return status.state is not ContainerState.RUNNING
