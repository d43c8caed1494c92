"""A container's life: create, start, stop, release, each step written down before the next one begins."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace as replace_field
from functools import cached_property

from msgspec.structs import replace

from limpet.engine.lifecycle.bundle import ContainerBundle
from limpet.engine.lifecycle.cri_status import read_user, to_cri_status
from limpet.engine.lifecycle.runtime import Runtime
from limpet.engine.logs import Entry, read_log
from limpet.engine.starters import Launch, Starter, number_of_signal, require_secrets
from limpet.engine.starters.abilities import (
    Executed,
    Executor,
    Limiter,
    LogReopener,
    Meter,
    Pauser,
    Stats,
    lacks,
)
from limpet.recovery.evidence import Boot, Process
from limpet.recovery.host import observe_boot, observe_process
from limpet.schema.cri import ContainerStatus, LinuxContainerResources
from limpet.schema.errors import (
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    StartError,
    StoreDamagedError,
    WaitTimeoutError,
)
from limpet.schema.identity import ProcessIdentity
from limpet.schema.image import MountType
from limpet.schema.metadata import Metadata
from limpet.schema.status import ContainerState, Reason, Status, end, end_never_run

DEFAULT_STOP_TIMEOUT_SECONDS = 10.0
DEFAULT_EXEC_TIMEOUT_SECONDS = 60.0
_KILL_TIMEOUT_SECONDS = 10.0
_FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 0.002, 0.1
"""Between two looks at what a stop has left."""
_LATEST = 2**63 - 1
"""The latest time that can be stored, in nanoseconds since the epoch."""


class Container:
    """One container of an engine. Several may stand for the same one: what is true is in the store.

    Steps of one container exclude each other; different containers do not wait for one another.
    """

    def __init__(self, runtime: Runtime, container_id: str) -> None:
        self._runtime = runtime
        self.id = container_id
        self._bundle = ContainerBundle(runtime.bundle_path(container_id), container_id, runtime.store.node)

    def __repr__(self) -> str:
        return f"<Container {self.id}: {self.state.name}>"

    @cached_property
    def metadata(self) -> Metadata:
        """The immutable part. Raises StoreDamagedError if its record cannot be read: delete it, then."""
        return self._runtime.store.metadata(self.id)

    @property
    def _starter(self) -> Starter:
        """The starter that it was made for. Raises InvalidStateError if this engine does not have it."""
        if "metadata" in self.__dict__:  # read before
            return self._runtime.starters.of(self.metadata)
        return self._runtime.starter_of(self.id)

    @property
    def status(self) -> Status:
        """The status now, as a value that does not change. Raises NotFoundError once it is deleted."""
        return self._runtime.store.status(self.id)

    @property
    def state(self) -> ContainerState:
        """The state now."""
        return self.status.state

    def cri_status(self) -> ContainerStatus:
        """Return the status as the CRI writes it, without times that have not come yet."""
        return to_cri_status(self.metadata, self.status, read_user(self._bundle.path))

    def create(self, mount_type: MountType = MountType.PLAIN) -> Status:
        """Make the bundle: unpack the image and write down what is to be run. The container is then CREATED.

        A create that was cut short may be repeated. Raises InvalidStateError if it is created already,
        InvalidInputError for an unsuitable image or config; the bundle is then removed again.
        """
        return self._runtime.step(lambda: self._create(mount_type))

    def start(self, secret_env: Mapping[str, str] | None = None) -> Status:
        """Start the program; RUNNING and durable when this returns.

        `secret_env` are variables for this start, over all others: they are written to no file, and shown in no error.
        Raises InvalidStateError for anything but CREATED, StartError if the program cannot be executed: the
        container is EXITED then, with code 128 and reason StartError. Raises InvalidInputError for variables that no
        environment can hold.
        """
        secrets = require_secrets(secret_env or {})
        return self._runtime.step(lambda: self._start(secrets))

    def stop(self, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> Status:
        """Stop the container: its stop signal to all of its processes, SIGKILL to what is left after `timeout` seconds.

        That it is to stop is written first, so that the next engine finishes what a kill cuts short. With 0 it is
        killed at once. Another, shorter stop hurries one that waits. One that has ended stays as it is. An Unknown one
        is looked at first: its processes are signalled if they are shown to be the very ones, and otherwise the
        container is EXITED only if they are shown to be gone. Raises InvalidStateError if neither can be shown.
        """
        return self.finish_stop(self.begin_stop(timeout))

    def begin_stop(self, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> Status:
        """Do the first half of `stop`: write down that it is to stop, send the stop signal, and return the status."""
        _require_seconds(timeout)
        if self._runtime.store.is_damaged(self.id):
            return self._runtime.step(self._end_damaged)
        if self.status.unknown:
            self._runtime.step(lambda: self._runtime.reexamine(self.id))
        return self._runtime.step(lambda: self._begin_stop(timeout))

    def finish_stop(self, status: Status) -> Status:
        """Wait until nothing of it is left, given what `begin_stop` returned, and return the status then."""
        if status.identity is None or status.state is not ContainerState.RUNNING:
            return status
        self._wait_for_stop(status.identity, (status.stop_deadline - status.stop_requested_at) / 1e9)
        return self.status

    def resume_stop(self, status: Status, identity: ProcessIdentity) -> None:
        """Go on with a stop that an engine before this one has begun, with what is left of its time."""
        grace = status.stop_deadline - status.stop_requested_at  # a clock that was set back lengthens nothing
        left = min(grace, status.stop_deadline - time.time_ns()) / 1e9
        self._send_stop(identity, max(left, 0.0), signals=True)

    def wait(self, timeout: float | None = None) -> Status:
        """Wait until the container has ended, and return its status.

        Raises WaitTimeoutError if it has not after `timeout` seconds, ClosedError if the engine is closed meanwhile,
        InvalidStateError for one that does not run: nobody would see it end.
        """
        self._require_waitable(timeout)
        return self._tell_wait(self._runtime.wait_for_change(self.id, self._has_ended, timeout), timeout)

    async def wait_async(self, timeout: float | None = None) -> Status:
        """Wait as `wait` does, in a task of asyncio and without a thread."""
        self._require_waitable(timeout)
        return self._tell_wait(await self._runtime.await_change(self.id, self._has_ended, timeout), timeout)

    def _require_waitable(self, timeout: float | None) -> None:
        if timeout is not None:
            _require_seconds(timeout)
        status = self.status
        if not status.finished_at and not status.started_at:
            raise self._refuse("wait for", "start it first")
        if status.unknown and not self._runtime.watcher.is_watched(self.id):
            raise self._refuse("wait for", "recover() may find out what became of it")

    def _tell_wait(self, has_ended: bool, timeout: float | None) -> Status:
        if not has_ended:
            raise WaitTimeoutError(f"container {self.id}: it has not ended after {timeout:g} s")
        return self.status

    def read_log(self) -> Iterator[Entry]:
        """Yield what its program has written, oldest first; `release` has all of it reach the log.

        Raises NotFoundError if it keeps no log, or has none yet.
        """
        path = self.metadata.log_path
        if not path:
            raise NotFoundError(f"container {self.id}: its config has no log_path")
        return read_log(os.path.dirname(path), path)

    def execute(self, args: Sequence[str], timeout: float = DEFAULT_EXEC_TIMEOUT_SECONDS) -> Executed:
        """Run a command in the container to its end, and return code and output; nothing of it is written down.

        Raises WaitTimeoutError if it was killed after `timeout` seconds, StartError if it cannot be executed,
        InvalidStateError unless the container is RUNNING, UnsupportedError if its starter has no way.
        """
        _require_seconds(timeout)
        if not args:
            raise InvalidInputError("args: a command is needed")
        starter = self._starter
        if not isinstance(starter, Executor):
            raise lacks(starter, "execute a command in a container")
        return starter.execute(self.id, self._require_running("execute a command in"), args, timeout=timeout)

    def pause(self) -> Status:
        """Freeze all of its processes, until `resume` or SIGKILL. Pausing again is fine.

        Raises InvalidStateError unless it is RUNNING, UnsupportedError if its starter has no way.
        """
        return self._runtime.step(lambda: self._set_paused(paused=True))

    def resume(self) -> Status:
        """Let its processes go on. Resuming again is fine; see `pause` for what is raised."""
        return self._runtime.step(lambda: self._set_paused(paused=False))

    def measure(self) -> Stats:
        """Return what it uses now. Raises InvalidStateError unless it is RUNNING, UnsupportedError."""
        starter = self._starter
        if not isinstance(starter, Meter):
            raise lacks(starter, "measure a container")
        return starter.measure(self.id, self._require_running("measure"))

    def change_limits(self, limits: LinuxContainerResources) -> Status:
        """Put limits into force while it runs; those that are not given stay. `Status.resources` then has all.

        Raises InvalidInputError for what the host refuses, InvalidStateError unless it is RUNNING, UnsupportedError.
        """
        return self._runtime.step(lambda: self._change_limits(limits))

    def reopen_log(self) -> None:
        """Begin a new log, after the old one was renamed. Raises InvalidStateError, UnsupportedError."""
        path = self.metadata.log_path
        if not path:
            raise InvalidInputError(f"container {self.id}: its config has no log_path")
        starter = self._starter
        if not isinstance(starter, LogReopener):
            raise lacks(starter, "reopen a log")
        path = self._runtime.bring_home(self.metadata).log_path
        starter.reopen_log(self.id, self._require_running("reopen the log of"), path)

    def release(self) -> Status:
        """Give up what the container holds: kill what is left of it, unmount and remove its bundle.

        That it is released is written first, so that recovery finishes what a kill cuts short. Releasing again
        is fine. Raises InvalidStateError while it is RUNNING or Unknown.
        """
        return self._runtime.step(self._release)

    def remove_bundle(self) -> None:
        """Remove what is on disk of a container that is released or was never created. May be repeated."""
        self._starter.release(self.id)
        self._runtime.images.unmount(self._bundle.rootfs)
        self._bundle.remove()

    def delete(self) -> None:
        """Forget the container. Raises InvalidStateError unless it is released, was never created, or is damaged."""
        self._runtime.step(self._delete)

    def _create(self, mount_type: MountType) -> Status:
        with self._runtime.exclusive(self.id):
            status = self.status
            if status.created_at or status.finished_at or status.released:
                raise self._refuse("create", "only one that was never created can be")
            try:
                self._bundle.begin()
                image = self.metadata.image_manifest
                if not image.is_builtin:
                    self._bundle.flush_marker()
                self._runtime.images.mount(image.name, mount_type, self._bundle.rootfs)
                launch = self._launch()
                unapplied = self._starter.find_unapplied(launch)
                self._bundle.finish(self._starter.make_config(launch))
            except BaseException:
                self._bundle.remove()
                raise
            return self._update(
                lambda old: replace(old, created_at=_now(), reason="", message="", unapplied=unapplied, unknown=False)
            )

    def _start(self, secrets: Mapping[str, str]) -> Status:
        with self._runtime.exclusive(self.id):
            status = self.status
            if status.state is not ContainerState.CREATED or status.released:
                raise self._refuse("start", "only a CREATED one that was not released can be")
            starter = self._starter
            try:
                return self._prepare_and_go(starter, secrets)
            except StartError as error:
                message = str(error)
                self._update(lambda old: end_never_run(old, message, finished_at=_now()))
                starter.forget_exits([self.id])
                raise StartError(f"container {self.id}: {message}") from error

    def _prepare_and_go(self, starter: Starter, secrets: Mapping[str, str]) -> Status:
        launch = self._launch()
        if self.metadata.root_dir != self._bundle.path:
            self._bundle.finish(starter.make_config(launch))  # it names paths of where the state directory was then
        prepared = starter.prepare(replace_field(launch, secret_env=secrets))
        try:
            # Written before it may run: a kill until here closes the gate, and nothing has run.
            self._update(
                lambda old: replace(
                    old,
                    pid=prepared.identity.pid,
                    identity=prepared.identity,
                    started_at=_now(),
                    resources=prepared.resources,
                    reason="",
                    message="",
                )
            )
        except BaseException:
            starter.abort(prepared)
            raise
        starter.go(prepared)
        self._runtime.watcher.watch(self.id, prepared.identity, prepared.pidfd, starter)
        return self.status

    def _set_paused(self, *, paused: bool) -> Status:
        with self._runtime.exclusive(self.id):
            verb = "pause" if paused else "resume"
            starter = self._starter
            if not isinstance(starter, Pauser):
                raise lacks(starter, "pause a container")
            identity = self._require_running(verb)
            (starter.pause if paused else starter.resume)(self.id, identity)
            return self._update(lambda old: replace(old, paused=paused and not old.finished_at))

    def _change_limits(self, limits: LinuxContainerResources) -> Status:
        with self._runtime.exclusive(self.id):
            starter = self._starter
            if not isinstance(starter, Limiter):
                raise lacks(starter, "change limits")
            identity = self._require_running("change the limits of")
            before = self.status.resources
            given = {name: getattr(limits, name) for name in limits.__struct_fields__ if getattr(limits, name)}
            changed = starter.change_limits(self.id, identity, replace(before.requested, **given) if before else limits)
            return self._update(lambda old: replace(old, resources=changed))

    def _require_running(self, verb: str) -> ProcessIdentity:
        """Return the identity of its first process. Raises InvalidStateError unless it is RUNNING."""
        status = self.status
        if status.state is not ContainerState.RUNNING or status.identity is None:
            raise self._refuse(verb, "it must be RUNNING")
        return status.identity

    def _begin_stop(self, timeout: float) -> Status:
        """Write down that it is to stop and until when, then signal; whoever comes next finishes it."""
        with self._runtime.exclusive(self.id):
            status = self.status
            if status.unknown:
                return self._stop_unknown(status)
            if status.state is not ContainerState.RUNNING or status.identity is None:
                return status
            is_first = not status.stop_requested_at
            status = self._update(lambda old: _request_stop(old, timeout))
            assert status.identity is not None
            # By the monotonic clock where this step sets the time; the earlier one of a former engine tells the wall's.
            left = timeout if is_first else max(0.0, (status.stop_deadline - time.time_ns()) / 1e9)
            self._send_stop(status.identity, min(timeout, left), signals=is_first)
            return status

    def _send_stop(self, identity: ProcessIdentity, seconds: float, *, signals: bool) -> None:
        """Have it killed in so many seconds, and send the stop signal if that is to be sent and there is time."""
        starter = self._starter
        self._runtime.watcher.kill_at(self.id, identity, seconds, starter)
        if signals and seconds:
            starter.signal(self.id, identity, number_of_signal(self._find_stop_signal()))

    def _find_stop_signal(self) -> str:
        try:
            return self.metadata.stop_signal
        except StoreDamagedError:  # a container can be stopped whatever became of its record
            return signal.SIGTERM.name

    def _end_damaged(self) -> Status:
        """End all that the starter knows to be of this container: which process its record named cannot be read."""
        with self._runtime.exclusive(self.id):
            self._starter.release(self.id)
            return self.status

    def _wait_for_stop(self, identity: ProcessIdentity, grace: float) -> None:
        """Wait until nothing of the container is left: the watcher sends SIGKILL after `grace` seconds at most."""
        patience, latest = _FIRST_LOOK_SECONDS, time.monotonic() + grace + _KILL_TIMEOUT_SECONDS
        while not self._runtime.wait_for_change(self.id, self._has_ended, patience) or (
            self._starter.signal(self.id, identity, 0)
        ):
            if time.monotonic() > latest:
                raise InvalidStateError(
                    f"container {self.id}: process {identity.pid}, or one that it left, has not ended"
                    f" {_KILL_TIMEOUT_SECONDS:.0f} s after SIGKILL; it may hang in the kernel (state D); try again"
                )
            if self._has_ended():
                time.sleep(patience)
            patience = min(patience * 2, _LONGEST_LOOK_SECONDS)

    def _has_ended(self) -> bool:
        return bool(self._runtime.store.status(self.id).finished_at)

    def _release(self) -> Status:
        with self._runtime.exclusive(self.id):
            status = self.status
            if self._runtime.store.is_damaged(self.id):
                self._discard_damaged()
                return status
            if status.unknown or status.state is ContainerState.RUNNING:
                raise self._refuse("release", "stop it first")
            if not status.released:
                status = self._update(lambda old: replace(old, released=True))
            self.remove_bundle()
            return status

    def _delete(self) -> None:
        with self._runtime.exclusive(self.id):
            if self._runtime.store.is_damaged(self.id):
                self._discard_damaged()
                self._runtime.store.delete(self.id)
                return
            status = self.status
            is_running = status.state is ContainerState.RUNNING
            is_doubtful = status.unknown and status.reason != Reason.BUNDLE_LOST
            if is_doubtful:
                raise self._refuse("delete", "a process of it may be left")
            never_created = not status.created_at and not status.finished_at
            is_settled = status.released or never_created or self._has_damaged_metadata()
            if is_running or not is_settled:
                raise self._refuse("delete", "stop and release it first")
            # The bundle is the last that a release removes: with it gone, nothing is left.
            if not status.unknown and not (status.released and not os.path.lexists(self._bundle.path)):
                self.remove_bundle()
            self._runtime.store.delete(self.id)

    def _discard_damaged(self) -> None:
        """End what the starter knows to be of a container whose record cannot be read, and remove its bundle if ours.

        Raises InvalidStateError while the process lives that the damaged record names: it may be the container's.
        """
        self._starter.release(self.id)
        suspect = self._runtime.store.find_suspect(self.id)
        is_here = suspect is not None and observe_boot(suspect) is Boot.SAME
        if suspect is not None and is_here and observe_process(suspect)[0] is Process.ALIVE:
            raise InvalidStateError(
                f"container {self.id}: its damaged record names process {suspect.pid}, which lives and may be of it;"
                " find out whose it is, and delete the container once it has ended"
            )
        with suppress(InvalidStateError):  # not ours, or something is mounted in it: recovery judges what is left
            self._runtime.images.unmount(self._bundle.rootfs)
            self._bundle.remove()

    def _has_damaged_metadata(self) -> bool:
        try:
            self._runtime.store.metadata(self.id)
        except StoreDamagedError:
            return True
        return False

    def _stop_unknown(self, status: Status) -> Status:
        if status.reason == Reason.COPIED:
            raise self._refuse("stop", "nothing was signalled")
        if status.identity is not None:
            try:
                pidfd = self._starter.adopt(self.id, status.identity)
            except NotFoundError as error:
                raise self._refuse("stop", f"{error}; nothing was signalled, and recover() may tell later") from error
            os.close(pidfd)  # it lives after all: the next look will say so
            raise self._refuse("stop", "its process has appeared just now; recover() and stop it again")
        if not status.created_at:
            raise self._refuse("stop", "it was never created")
        # It holds no process: nothing to signal.
        return self._update(lambda old: end(old, None, finished_at=_now(), message=old.message))

    def _launch(self) -> Launch:
        metadata = self._runtime.bring_home(self.metadata)
        try:
            sandbox = self._runtime.store.get_sandbox(metadata.sandbox_id)
            namespaces = self._runtime.store.sandbox_status(sandbox.id).namespaces
        except (NotFoundError, StoreDamagedError):
            sandbox, namespaces = None, {}
        return Launch(
            id=self.id,
            bundle_path=self._bundle.path,
            metadata=metadata,
            sandbox=sandbox,
            log_directory=self._runtime.log_directory(sandbox) if sandbox else "",
            namespaces=namespaces,
        )

    def _update(self, change: Callable[[Status], Status]) -> Status:
        return self._runtime.store.update(self.id, change)

    def _refuse(self, verb: str, why: str) -> InvalidStateError:
        status = self.status
        detail = " and released" if status.released else ""
        if status.unknown and status.message:
            detail = f" ({status.message})"
        return InvalidStateError(f"cannot {verb} container {self.id}: it is {status.state.name}{detail}; {why}")


def _request_stop(status: Status, timeout: float) -> Status:
    """Return the status with a stop requested: the first request's time stands, and the earliest deadline."""
    now = _now()
    deadline = min(now + int(timeout * 1e9), _LATEST)
    if status.stop_requested_at:
        deadline = min(deadline, status.stop_deadline)
    return replace(
        status,
        stop_requested_at=status.stop_requested_at or now,
        stop_deadline=deadline,
        reason=Reason.STOPPING,
        message="it was asked to stop",
    )


def _require_seconds(timeout: float) -> None:
    if not 0 <= timeout < math.inf:  # not a number is neither
        raise InvalidInputError(f"timeout {timeout!r}: seconds are needed, 0 or more")


def _now() -> int:
    return max(time.time_ns(), 1)  # 0 would mean "not yet", and a clock may be anywhere
