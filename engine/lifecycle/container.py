"""A container's life: create, start, stop, release, each step written down before the next one begins."""

import os
import signal
import time
from collections.abc import Callable
from functools import cached_property

from msgspec.structs import replace

from limpet.engine.lifecycle.bundle import ContainerBundle
from limpet.engine.lifecycle.cri_status import to_cri_status
from limpet.engine.lifecycle.runtime import Runtime
from limpet.engine.starters import Launch
from limpet.schema.cri import ContainerStatus
from limpet.schema.errors import InvalidStateError, LimpetError, NotFoundError, StartError, StoreDamagedError
from limpet.schema.image import MountType
from limpet.schema.metadata import Metadata
from limpet.schema.status import EXIT_CODE_START_ERROR, ContainerState, Reason, Status, end

DEFAULT_STOP_TIMEOUT_SECONDS = 10.0
_KILL_TIMEOUT_SECONDS = 10.0


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
    def status(self) -> Status:
        """The status now, as a value that does not change. Raises NotFoundError once it is deleted."""
        return self._runtime.store.status(self.id)

    @property
    def state(self) -> ContainerState:
        """The state now."""
        return self.status.state

    def cri_status(self) -> ContainerStatus:
        """Return the status as the CRI writes it, without times that have not come yet."""
        return to_cri_status(self.metadata, self.status)

    def create(self, mount_type: MountType = MountType.PLAIN) -> Status:
        """Make the bundle: unpack the image and write down what is to be run. The container is then CREATED.

        A create that was cut short may be repeated. Raises InvalidStateError if it is created already,
        InvalidInputError for an unsuitable image or config; the bundle is then removed again.
        """
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
                self._bundle.finish(self._runtime.starter.make_config(self._launch()))
            except LimpetError:
                self._bundle.remove()
                raise
            return self._update(lambda old: replace(old, created_at=_now(), reason="", message="", unknown=False))

    def start(self) -> Status:
        """Start the program; RUNNING and durable when this returns.

        Raises InvalidStateError for anything but CREATED, StartError if the program cannot be executed: the
        container is EXITED then, with code 128 and reason StartError.
        """
        with self._runtime.exclusive(self.id):
            status = self.status
            if status.state is not ContainerState.CREATED or status.released:
                raise self._refuse("start", "only a CREATED one that was not released can be")
            if self.metadata.starter != self._runtime.starter.name:
                raise self._refuse(
                    "start",
                    f"it was made for the starter {self.metadata.starter!r}, this engine has"
                    f" {self._runtime.starter.name!r}; open one with that",
                )
            try:
                return self._start()
            except StartError as error:
                message = str(error)
                self._update(
                    lambda old: replace(
                        end(old, EXIT_CODE_START_ERROR, finished_at=_now(), message=message),
                        reason=Reason.START_ERROR,
                    )
                )
                raise StartError(f"container {self.id}: {message}") from error

    def stop(self, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> Status:
        """Stop the container: its stop signal to the whole group, SIGKILL after `timeout` seconds.

        One that has ended stays as it is. An Unknown one is looked at first: its process is signalled if it is
        shown to be the very one, and otherwise the container is EXITED only if the process is shown to be gone.
        Raises InvalidStateError if neither can be shown.
        """
        if self.status.unknown:
            self._runtime.reexamine(self.id)
        with self._runtime.exclusive(self.id):
            status = self.status
            if status.unknown:
                return self._stop_unknown(status)
            if status.state is not ContainerState.RUNNING:
                return status
            number = signal.Signals[self.metadata.stop_signal]
            for each, patience in ((number, timeout), (signal.SIGKILL, _KILL_TIMEOUT_SECONDS)):
                pidfd = self._runtime.watcher.pidfd(self.id)
                if pidfd is not None:
                    self._runtime.starter.signal(pidfd, each)
                if self._runtime.wait_until_ended(self.id, patience):
                    return self.status
            raise InvalidStateError(
                f"container {self.id}: process {status.pid} has not ended {_KILL_TIMEOUT_SECONDS:.0f} s after"
                " SIGKILL; it may hang in the kernel (state D); stop it again later"
            )

    def wait(self, timeout: float | None = None) -> Status:
        """Wait until the container has ended, for `timeout` seconds at most, and return its status at that time.

        Raises InvalidStateError for one that does not run: nobody would see it end.
        """
        if self.state not in {ContainerState.RUNNING, ContainerState.EXITED}:
            raise self._refuse("wait for", "start it first, or recover() if it is Unknown")
        self._runtime.wait_until_ended(self.id, timeout)
        return self.status

    def release(self) -> Status:
        """Give up what the container holds: kill what is left of it, unmount and remove its bundle.

        That it is released is written first, so that recovery finishes what a kill cuts short. Releasing again
        is fine. Raises InvalidStateError while it is RUNNING or Unknown.
        """
        with self._runtime.exclusive(self.id):
            status = self.status
            if status.unknown or status.state is ContainerState.RUNNING:
                raise self._refuse("release", "stop it first")
            if not status.released:
                status = self._update(lambda old: replace(old, released=True))
            self.remove_bundle()
            return status

    def remove_bundle(self) -> None:
        """Remove what is on disk of a container that is released or was never created. May be repeated."""
        self._runtime.starter.release(self.id, self._bundle.path)
        self._runtime.images.unmount(self._bundle.rootfs)
        self._bundle.remove()

    def delete(self) -> None:
        """Forget the container. Raises InvalidStateError unless it is released, was never created, or is damaged."""
        with self._runtime.exclusive(self.id):
            if self._is_damaged():
                # What it was cannot be read. Its bundle, if there is one, becomes an orphan that recovery judges.
                self._runtime.store.delete(self.id)
                return
            status = self.status
            never_created = not status.created_at and not status.finished_at
            if not status.released and not never_created:
                raise self._refuse("delete", "release it first")
            if status.state is not ContainerState.RUNNING and not status.unknown:
                self.remove_bundle()
            self._runtime.store.delete(self.id)

    def _is_damaged(self) -> bool:
        if self._runtime.store.is_damaged(self.id):
            return True
        try:
            self._runtime.store.metadata(self.id)
        except StoreDamagedError:
            return True
        return False

    def _start(self) -> Status:
        starter = self._runtime.starter
        prepared = starter.prepare(self._launch())
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
        self._runtime.watcher.watch(self.id, prepared.identity.pid, prepared.pidfd)
        return self.status

    def _stop_unknown(self, status: Status) -> Status:
        if status.identity is not None:
            try:
                pidfd = self._runtime.starter.adopt(status.identity, self._bundle.path)
            except NotFoundError as error:
                raise self._refuse("stop", f"{error}; nothing was signalled, and recover() may tell later") from error
            os.close(pidfd)  # it lives after all: the next look will say so
            raise self._refuse("stop", "its process has appeared just now; recover() and stop it again")
        if not status.created_at:
            raise self._refuse("stop", f"{status.message}; delete it")
        # It holds no process: nothing to signal.
        return self._update(lambda old: end(old, None, finished_at=_now(), message=old.message))

    def _launch(self) -> Launch:
        metadata = self.metadata
        try:
            sandbox = self._runtime.store.get_sandbox(metadata.sandbox_id)
        except (NotFoundError, StoreDamagedError):
            sandbox = None
        return Launch(id=self.id, bundle_path=self._bundle.path, metadata=metadata, sandbox=sandbox)

    def _update(self, change: Callable[[Status], Status]) -> Status:
        return self._runtime.store.update(self.id, change)

    def _refuse(self, verb: str, why: str) -> InvalidStateError:
        status = self.status
        detail = " and released" if status.released else ""
        if status.unknown and status.message:
            detail = f" ({status.message})"
        return InvalidStateError(f"cannot {verb} container {self.id}: it is {status.state.name}{detail}; {why}")


def _now() -> int:
    return max(time.time_ns(), 1)  # 0 would mean "not yet", and a clock may be anywhere
