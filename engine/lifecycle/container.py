"""A container's life: create, start, stop, release, each step written down before the next one begins."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace as replace_field
from functools import cached_property

from msgspec.structs import replace

from limpet.engine.lifecycle.attempts import cancel_next, delete_attempt, find_follower, find_restart
from limpet.engine.lifecycle.bundle import ContainerBundle
from limpet.engine.lifecycle.cri_status import read_user, to_cri_status
from limpet.engine.lifecycle.deleted import find_last_status
from limpet.engine.lifecycle.patience import Patience, require_seconds
from limpet.engine.lifecycle.runtime import Runtime
from limpet.engine.logs import Entry, await_output, read_log
from limpet.engine.starters import Launch, Prepared, Starter, number_of_signal, require_secrets
from limpet.engine.starters.abilities import (
    Conversant,
    Executed,
    Executor,
    Freezer,
    Limiter,
    LogCopier,
    LogReopener,
    Meter,
    Session,
    Stats,
    lacks,
)
from limpet.engine.state.presence import is_there
from limpet.engine.state.steps import run_whole
from limpet.engine.store import Draft
from limpet.recovery.evidence import Boot, Process
from limpet.recovery.host import observe_boot, observe_process
from limpet.schema.cri import ContainerStatus, LinuxContainerResources, NamespaceMode
from limpet.schema.deadline import DeadlineKind
from limpet.schema.errors import (
    ClosedError,
    InvalidInputError,
    InvalidStateError,
    LimpetError,
    NotFoundError,
    StartError,
    StoreDamagedError,
    UnsupportedError,
    WaitTimeoutError,
    quote,
)
from limpet.schema.identity import ProcessIdentity
from limpet.schema.image import MountType
from limpet.schema.metadata import Metadata
from limpet.schema.protobuf_json import is_text
from limpet.schema.restart import RestartKind
from limpet.schema.sandbox_status import SandboxState
from limpet.schema.status import ContainerState, Reason, Status, end, end_never_run, find_exit_code

DEFAULT_STOP_TIMEOUT_SECONDS = 10.0
DEFAULT_EXEC_TIMEOUT_SECONDS = 60.0
_LATEST = 2**63 - 1
"""The latest time that can be stored, in nanoseconds since the epoch."""
_EARLIEST = 10**17
"""Of an expiry: less are seconds, milliseconds or microseconds, and would end at once what is to last for hours."""


class Container:
    """One container of an engine. Several may stand for the same one: what is true is in the store.

    Steps of one container exclude each other; different containers do not wait for one another.
    """

    def __init__(self, runtime: Runtime, container_id: str) -> None:
        self._runtime = runtime
        self.id = container_id
        self._bundle = ContainerBundle(runtime.bundle_path(container_id), container_id, runtime.store.node)

    def __repr__(self) -> str:
        try:
            state = self.state.name if self.id in self._runtime.store else "deleted"
        except LimpetError as error:  # a debugger shows what it can, and a log what it is given
            state = "closed" if isinstance(error, ClosedError) else "deleted"
        return f"<Container {self.id}: {state}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Container):
            return NotImplemented
        return self.id == other.id and self._runtime is other._runtime

    def __hash__(self) -> int:
        return hash(self.id)

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

    @property
    def name(self) -> str:
        """Its name, from its config. Raises StoreDamagedError, as `metadata` does."""
        return self.metadata.name

    @property
    def sandbox_id(self) -> str:
        """The id of the sandbox that it is in. Raises StoreDamagedError, as `metadata` does."""
        return self.metadata.sandbox_id

    @property
    def labels(self) -> Mapping[str, str]:
        """Its labels, from its config. Raises StoreDamagedError, as `metadata` does."""
        return dict(self.metadata.config.labels)  # whoever changes them changes nothing here

    @property
    def exit_code(self) -> int | None:
        """Its exit code; None while it has not ended, if nobody saw how it ended, and if its program never ran."""
        return find_exit_code(self.status)

    @property
    def restart_at(self) -> int:
        """When its policy makes the next attempt, in nanoseconds since the epoch; 0 if it does not, or has made it."""
        try:
            return find_restart(self._runtime.store, self.metadata, self.status)
        except StoreDamagedError:  # then no policy is followed
            return 0

    def cri_status(self) -> ContainerStatus:
        """Return the status as the CRI writes it, without times that have not come yet."""
        status = self.status
        added_at = 0
        if not status.created_at:
            added_at = next((one.at for one in self._runtime.store.history(self.id)), 0)
        return to_cri_status(
            self._runtime.locate(self.metadata), status, read_user(self._bundle.path), added_at=added_at
        )

    def create(self, mount_type: MountType = MountType.PLAIN) -> Status:
        """Make the bundle: unpack the image and write down what is to be run. The container is then CREATED.

        A create that was cut short may be repeated. Raises InvalidStateError if it is created already,
        InvalidInputError for an unsuitable image or config, NotFoundError for an image that is not there any more; the
        bundle is then removed again.
        """
        return self._runtime.step(lambda: self._create(mount_type))

    def start(self, secret_env: Mapping[str, str] | None = None) -> Status:
        """Start the program; RUNNING and durable when this returns.

        `secret_env` are variables for this start, over all others: they are written to no file, and shown in no error.
        Raises InvalidStateError for anything but CREATED, if it was stopped before, and in a sandbox that is NOTREADY;
        StartError if the program cannot be executed: the container is EXITED then, with code 128 and reason StartError;
        InvalidInputError for variables that no environment can hold.
        """
        secrets = require_secrets(secret_env or {})
        return self._runtime.step(lambda: self._start(secrets))

    def stop(self, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> Status:
        """Stop the container: its stop signal to all of its processes, SIGKILL to what is left after `timeout` seconds.

        That it is to stop is written first, so that the next engine finishes what a kill cuts short. With 0 it is
        killed at once. Another, shorter stop hurries one that waits. One that has ended stays as it is. An Unknown one
        is looked at first: its processes are signalled if they are shown to be the very ones, and otherwise the
        container is EXITED only if they are shown to be gone. Raises InvalidStateError if neither can be shown.

        No restart policy undoes a stop: one that waits for its restart is not restarted, and an attempt that the policy
        has made after this one is stopped, too. One that is paused goes on first. If somebody deletes it meanwhile, its
        last status is returned.
        """
        return self.finish_stop(self.begin_stop(timeout))

    def begin_stop(self, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> Status:
        """Do the first half of `stop`: write down that it is to stop, send the stop signal, and return the status."""
        require_seconds(timeout)
        if self._runtime.store.is_damaged(self.id):
            return self._runtime.step(self._end_damaged)
        if self.status.unknown:
            self._runtime.step(lambda: self._runtime.reexamine(self.id))
        status = self._runtime.step(lambda: self._begin_stop(timeout))
        for follower in self.find_followers():
            follower.begin_stop(timeout)
        return status

    def carry_out_stop(self, timeout: float) -> Status:
        """Do what is left of `begin_stop` where somebody has just written, by `request_stop`, that it is to stop."""
        return self._runtime.step(lambda: self._begin_stop(timeout, is_written=True))

    def finish_stop(self, status: Status) -> Status:
        """Wait until nothing of it is left, given what `begin_stop` returned, and return the status then."""
        for follower in self.find_followers():
            follower.finish_stop(follower.status)
        patience = self.be_patient(status)
        if patience is None:
            return status
        try:
            self._runtime.wait_for_change(self.id, self._has_ended, patience.left())
            while not self.is_stopped(status):
                time.sleep(patience.next_pause())
            return self.status
        except NotFoundError:
            return self.last_status(status)

    def be_patient(self, status: Status) -> Patience | None:
        """Return how long `finish_stop` is to wait, given what `begin_stop` returned; None if there is nothing to do.

        The watcher sends SIGKILL when the time of the stop is over.
        """
        if status.identity is None or status.state is not ContainerState.RUNNING:
            return None
        grace = (status.stop_deadline - status.stop_requested_at) / 1e9
        return Patience(self.id, status.identity.pid, grace, self._find_doubt)

    def _find_doubt(self) -> str:
        """Return why it is Unknown, if it is, or why it could not be killed."""
        status = self._runtime.store.status(self.id)
        if status.unknown:
            return status.message
        why_not = self._runtime.watcher.why_not_killed(self.id)
        return f"it cannot be killed: {why_not}" if why_not else ""

    def is_stopped(self, status: Status) -> bool:
        """Say whether its end is written down and nothing of it is left, given what `begin_stop` returned."""
        identity = status.identity
        assert identity is not None
        return self._has_ended() and not run_whole(lambda: self._starter.signal(self.id, identity, 0))

    def resume_stop(self, status: Status, identity: ProcessIdentity) -> None:
        """Go on with a stop that an engine before this one has begun, with what is left of its time."""
        grace = (status.stop_deadline - status.stop_requested_at) / 1e9  # a clock that was set back lengthens nothing
        self.thaw()
        self._send_stop(identity, min(grace, self._find_grace(status)), signals=True)

    def _find_grace(self, status: Status) -> float:
        """Return how many seconds are left of the time that it has to stop."""
        return self._runtime.store.time_left(DeadlineKind.STOP, self.id, status.stop_deadline) / 1e9

    def pause(self) -> Status:
        """Freeze all of its processes until `resume`, and return the status: `paused`, while the state stays RUNNING.

        That it is to be paused is written first, so that the next engine freezes what a kill has left running. Raises
        InvalidStateError for one that does not run or is being stopped, UnsupportedError with the reason where there is
        no cgroup that freezes.
        """
        return self._runtime.step(lambda: self._pause(is_wanted=True))

    def resume(self) -> Status:
        """Let its processes go on, and return the status. Raises as `pause` does."""
        return self._runtime.step(lambda: self._pause(is_wanted=False))

    def renew(self, expires_at: int) -> Status:
        """Set when it is stopped and released, in nanoseconds since the epoch, 0 for never; return the status.

        Nothing is ended early: see `docs/ARCHITECTURE.md` for what is promised when a clock is set. Raises
        InvalidStateError for one that is released, or was asked to stop: it may have expired just now.
        """
        require_expiry(expires_at)
        return self._runtime.step(lambda: self._renew(expires_at))

    def is_in_stopped_sandbox(self) -> bool:
        """Say whether its sandbox is NOTREADY; not if that, or which one it is, cannot be read."""
        try:
            return self._runtime.store.sandbox_status(self.metadata.sandbox_id).state is SandboxState.NOTREADY
        except (NotFoundError, StoreDamagedError):
            return False

    def wait(self, timeout: float | None = None) -> Status:
        """Wait until the container has ended, and return its status: the last one, if it is deleted right then.

        Raises WaitTimeoutError if it has not after `timeout` seconds, ClosedError if the engine is closed meanwhile,
        InvalidStateError for one that does not run: nobody would see it end. StoreReplacedError, StoreFencedError or
        OutcomeUnknownError say that it has ended, and this engine can write nothing more: the next one tells how.
        """
        since, seen = self._runtime.store.revision, self._require_waitable(timeout)
        try:
            return self._tell_wait(self._runtime.wait_for_change(self.id, self._is_over, timeout), timeout)
        except NotFoundError:
            return self.last_status(seen, since)

    async def wait_async(self, timeout: float | None = None) -> Status:
        """Wait as `wait` does, in a task of asyncio and without a thread."""
        since, seen = self._runtime.store.revision, self._require_waitable(timeout)
        try:
            return self._tell_wait(await self._runtime.await_change(self.id, self._is_over, timeout), timeout)
        except NotFoundError:
            return self.last_status(seen, since)

    def last_status(self, seen: Status, since: int = 0) -> Status:
        """Return its last status, given that it was `seen` and was deleted after the revision `since` of the store.

        Raises NotFoundError if the log of changes does not have it.
        """
        return find_last_status(self._runtime.store, self.id, seen, since)

    def _require_waitable(self, timeout: float | None) -> Status:
        if timeout is not None:
            require_seconds(timeout)
        is_watched = self._runtime.watcher.is_watched(self.id)  # first: that is over once its end is written down
        status = self.status
        if not status.finished_at and not status.started_at:
            raise self._refuse("wait for", "start it first")
        if status.unknown and not is_watched:
            raise self._refuse("wait for", "recover() may find out what became of it")
        return status

    def _tell_wait(self, has_ended: bool, timeout: float | None) -> Status:
        if not has_ended:
            raise WaitTimeoutError(f"container {self.id}: it has not ended after {timeout:g} s")
        return self.status

    def notify(self, ring: Callable[[], object]) -> AbstractContextManager[None]:
        """Have `ring` called after each change of it, and when the engine is closed, while the block runs.

        By any thread, which must not be kept waiting; `wait(0)` then says whether it has ended.
        """
        return self._runtime.bell(self.id, ring)

    def read_log(self) -> Iterator[Entry]:
        """Yield what its program has written, oldest first: of one that has ended, all.

        What is on its way to the log is waited for, for two seconds at most: less is yielded only if the log cannot be
        written, or if what the program left behind still writes to it. Raises NotFoundError if it keeps no log, or has
        none yet.
        """
        path = self._runtime.locate(self.metadata).log_path
        if not path:
            raise NotFoundError(f"container {self.id}: its config has no log_path")
        self._await_output()
        return read_log(os.path.dirname(path), path)

    def execute(self, args: Sequence[str], timeout: float = DEFAULT_EXEC_TIMEOUT_SECONDS) -> Executed:
        """Run a command in the container to its end, and return code and output; nothing of it is written down.

        Raises WaitTimeoutError if it was killed after `timeout` seconds, StartError if it cannot be executed,
        InvalidStateError unless the container is RUNNING, UnsupportedError if its starter has no way.
        """
        require_seconds(timeout)
        _require_args(args)
        starter = self._starter
        if not isinstance(starter, Executor):
            raise lacks(starter, "execute a command in a container")
        return starter.execute(self.id, self._require_not_paused("execute a command in"), args, timeout=timeout)

    def open_command(self, args: Sequence[str], *, terminal: bool = False, size: tuple[int, int] = (0, 0)) -> Session:
        """Run a command in the container, connected to its input and output.

        With `terminal` it has one, of `size` rows and columns to begin with; zeros leave that open.

        Close the session in the end. Raises as `execute` does.
        """
        _require_args(args)
        starter = self._starter
        if not isinstance(starter, Conversant):
            raise lacks(starter, "execute a command in a container")
        identity = self._require_not_paused("execute a command in")
        return starter.open_command(self.id, identity, args, terminal=terminal, size=size)

    def attach(self) -> Session:
        """Connect to the input, the output and the terminal of its program, as its config has them.

        Close the session in the end. Raises InvalidStateError unless it is RUNNING, UnsupportedError.
        """
        starter = self._starter
        if not isinstance(starter, Conversant):
            raise lacks(starter, "attach to a container")
        config = self.metadata.config
        identity = self._require_running("attach to")
        return starter.attach(self.id, identity, terminal=config.tty, has_input=config.stdin)

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
        if not self.metadata.log_path:
            raise InvalidInputError(f"container {self.id}: its config has no log_path")
        starter = self._starter
        if not isinstance(starter, LogReopener):
            raise lacks(starter, "reopen a log")
        path = self._runtime.bring_home(self.metadata).log_path
        starter.reopen_log(self.id, self._require_running("reopen the log of"), path)

    def release(self) -> Status:
        """Give up what the container holds: kill what is left of it, unmount and remove its bundle.

        That it is released is written first, so that recovery finishes what a kill cuts short. Releasing again
        is fine; of one that is deleted the status says no more than that it is released. Raises InvalidStateError while
        it is RUNNING or Unknown.
        """
        return self._runtime.step(self._release)

    def expire(self, expires_at: int) -> None:
        """Begin to stop it because its time is over, unless it was renewed since it had this one.

        A stop that was asked for before, and gives it more time, is hurried, also for what one that has ended left.
        """

        def request(old: Status) -> Status:
            if old.expires_at != expires_at:
                return old
            stopping = request_stop(old, DEFAULT_STOP_TIMEOUT_SECONDS)
            return replace(stopping, reason=Reason.EXPIRED, message="its time was over; it was asked to stop")

        with self._runtime.exclusive(self.id):
            status = self.status
            if status.stop_requested_at:
                self._hurry(status)
            elif status.state is ContainerState.RUNNING:
                status = self._update_unless_ended(request)
                if status.stop_requested_at and status.identity is not None:
                    self.thaw()
                    self._send_stop(status.identity, DEFAULT_STOP_TIMEOUT_SECONDS, signals=True)

    def _hurry(self, status: Status) -> None:
        """Leave what is being stopped no more time than a stop has."""
        if self._find_grace(status) > DEFAULT_STOP_TIMEOUT_SECONDS:
            latest = _now() + int(DEFAULT_STOP_TIMEOUT_SECONDS * 1e9)
            status = self._update(lambda old: replace(old, stop_deadline=min(old.stop_deadline, latest)))
        if status.state is ContainerState.RUNNING and status.identity is not None:
            self.thaw()
            self._send_stop(status.identity, self._find_grace(status), signals=False)

    def release_expired(self, expires_at: int) -> None:
        """Release it because its time is over, unless it was started, or was renewed since it had this one."""

        def note(old: Status) -> Status:
            if old.expires_at != expires_at or old.unknown or old.state is ContainerState.RUNNING:
                return old
            how = ": ".join(filter(None, (old.reason, old.message))) if old.finished_at else "it was not started"
            return replace(old, released=True, reason=Reason.EXPIRED, message=f"its time was over ({how})")

        with self._runtime.exclusive(self.id):
            if not self.status.released and self._update(note).released:
                self._release()

    def fail_start(self, why: str) -> None:
        """Write down that it ended without having been started, and why."""
        with self._runtime.exclusive(self.id):
            if not self.status.started_at:
                self._update(lambda old: end_never_run(old, why, finished_at=_now()))

    def is_frozen(self) -> bool:
        """Say whether its processes are frozen, whatever is written down."""
        identity = self.status.identity
        starter = self._starter
        return identity is not None and isinstance(starter, Freezer) and starter.is_frozen(self.id, identity)

    def thaw(self) -> None:
        """Let its processes go on if they are frozen; nothing is written down. Raises UnsupportedError."""
        identity = self.status.identity
        starter = self._starter
        if identity is not None and isinstance(starter, Freezer):
            starter.thaw(self.id, identity)

    def carry_out_pause(self) -> None:
        """Freeze it or let it go on, as is written down; where it cannot be frozen, write down that it is not."""
        with self._runtime.exclusive(self.id):
            status = self.status
            if status.state is not ContainerState.RUNNING:
                return
            if not status.paused:
                self.thaw()
                return
            try:
                self._freeze(status)
            except UnsupportedError as error:
                message = str(error)
                self._update_unless_ended(lambda old: replace(old, paused=False, message=message))

    def is_changing_limits(self) -> bool:
        """Say whether limits are being put into force, or were when a kill came. Raises StateDirectoryError."""
        return self._bundle.read_limits() is not None

    def carry_out_limits(self) -> None:
        """Put the limits into force whose change a kill has cut short, and write them down. Raises what forbids it."""
        with self._runtime.exclusive(self.id):
            wanted = self._bundle.read_limits()
            status, starter = self.status, self._starter
            if wanted is None:
                return
            if status.state is ContainerState.RUNNING and status.identity and isinstance(starter, Limiter):
                self._put_into_force(starter, status.identity, wanted)

    def remove_bundle(self) -> None:
        """Remove what is on disk of a container that is released or was never created. May be repeated.

        Raises InvalidStateError for any other.
        """
        self._runtime.step(self._remove_bundle)

    def remove_files(self) -> None:
        """Remove what is on disk of one that its starter has released."""
        self._runtime.store.require_open()
        self._runtime.images.unmount(self._bundle.rootfs)
        self._bundle.remove()

    def delete(self) -> bool:
        """Forget the container; return False if it is gone already.

        Raises InvalidStateError unless it is released, was never created, or is damaged.
        """
        return self._runtime.step(self._delete)

    def remove(self, *, force: bool = False, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> bool:
        """Release and delete the container; return False if it is gone already. May be repeated.

        With `force` it is stopped before, as `stop` does with `timeout`. Raises InvalidStateError while it is RUNNING
        or Unknown without `force`, and if it cannot be shown that nothing of it is left.
        """
        if force:
            self._stop_if_needed(timeout)
        try:
            return self._runtime.step(self._remove)
        except InvalidStateError:
            if not (force and self.was_just_started()):
                raise
        self._stop_if_needed(timeout)
        return self._runtime.step(self._remove)

    def _stop_if_needed(self, timeout: float) -> None:
        with suppress(NotFoundError):
            if self.needs_stop():
                self.stop(timeout)

    def was_just_started(self) -> bool:
        """Say whether it runs, though it did not a moment ago: its policy may have started it, which happens once."""
        with suppress(NotFoundError):
            return self.state is ContainerState.RUNNING
        return False

    def take_back(self) -> None:
        """Remove it if it is still as it was made: who made it was interrupted, and does not know of it."""
        with suppress(LimpetError), self._runtime.exclusive(self.id):  # what cannot be removed stays, and is CREATED
            if self.state is ContainerState.CREATED:
                self._runtime.step(self._remove)

    def needs_stop(self) -> bool:
        """Say whether it runs, or may run, or was restarted. Raises NotFoundError once it is deleted."""
        return self.state in {ContainerState.RUNNING, ContainerState.UNKNOWN} or bool(self.find_followers())

    def _create(self, mount_type: MountType) -> Status:
        with self._runtime.exclusive(self.id):
            status = self.status
            if status.created_at or status.finished_at or status.released:
                raise self._refuse("create", "only one that was never created can be")
            try:
                image = self.metadata.image_manifest
                if image.is_builtin and mount_type != MountType.PLAIN:
                    raise UnsupportedError(f"mount type {quote(mount_type)}: a built-in image has nothing to mount")
                self._bundle.begin(has_root=not image.is_builtin)
                if not image.is_builtin:
                    self._bundle.flush_marker()
                    self._runtime.images.mount(image.exact_name, mount_type, self._bundle.rootfs)
                launch = self._launch()
                unapplied = self._starter.find_unapplied(launch)
                self._bundle.finish(self._starter.make_config(launch), has_content=not image.is_builtin)
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
            if status.stop_requested_at:
                raise self._refuse("start", "it was stopped before it was started; create another")
            if self.is_in_stopped_sandbox():
                raise self._refuse("start", f"its sandbox {self.metadata.sandbox_id} is NOTREADY; make another")
            starter = self._starter
            try:
                return self._prepare_and_go(starter, secrets)
            except StartError as error:
                message = str(error)
                self._update(lambda old: end_never_run(old, message, finished_at=_now()))
                with suppress(LimpetError):  # the keeper keeps it for longer, then
                    starter.forget_exits([self.id])
                self._note_restart()
                raise StartError(f"container {self.id}: {message}") from error

    def _prepare_and_go(self, starter: Starter, secrets: Mapping[str, str]) -> Status:
        launch = self._launch()
        if self.metadata.root_dir != self._bundle.path:
            # It names paths of where the state directory was then.
            self._bundle.finish(starter.make_config(launch), has_content=not self.metadata.image_manifest.is_builtin)
        prepared = starter.prepare(replace_field(launch, secret_env=secrets))
        try:
            # Written before it may run: a kill until here closes the gate, and nothing has run.
            self._runtime.store.update(
                self.id,
                lambda old: replace(
                    old,
                    pid=prepared.identity.pid,
                    identity=prepared.identity,
                    started_at=_now(),
                    resources=prepared.resources,
                    reason="",
                    message="",
                ),
                ready_sandbox=launch.metadata.sandbox_id,  # which may have been stopped just now
            )
        except BaseException:
            starter.abort(prepared)
            raise
        self._note_restart()
        try:
            starter.go(prepared)
        except StartError:
            raise
        except BaseException:  # what became of it is not known: its end will be seen, and how it was is asked then
            self._watch(prepared, starter)
            raise
        self._watch(prepared, starter)
        return self.status

    def _watch(self, prepared: Prepared, starter: Starter) -> None:
        watcher = self._runtime.watcher
        watcher.watch(self.id, prepared.identity, prepared.pidfd, starter, monitor=prepared.monitor)

    def _note_restart(self) -> None:
        """Have its policy asked when it has ended, or now if it has."""
        if self.metadata.restart_policy != RestartKind.NO:
            self._runtime.note_container(self.id)

    def _begin_stop(self, timeout: float, *, is_written: bool = False) -> Status:
        """Write down that it is to stop and until when, then signal; whoever comes next finishes it."""
        with self._runtime.exclusive(self.id):
            status = self.status
            if status.unknown:
                return self._stop_unknown(status)
            if status.state is not ContainerState.RUNNING or status.identity is None:
                return self._cancel_restart(status)
            is_first = is_written or not status.stop_requested_at
            if not is_written:
                status = self._update_unless_ended(lambda old: request_stop(old, timeout))
                if status.finished_at:
                    return self._cancel_restart(status)
            assert status.identity is not None
            left = timeout if is_first else self._find_grace(status)
            self.thaw()
            self._send_stop(status.identity, min(timeout, left), signals=is_first)
            return status

    def _cancel_restart(self, status: Status) -> Status:
        """See to it that what does not run is not restarted, or started, by its policy."""
        try:
            metadata = self.metadata
        except StoreDamagedError:  # then no policy is followed
            return status
        if metadata.restart_policy == RestartKind.NO:
            return status
        cancel_next(self._runtime.store, metadata)
        return self.status

    def find_followers(self) -> "list[Container]":
        """Return the attempt that the policy has made after this one, if there is one."""
        try:
            follower = find_follower(self._runtime.store, self.metadata)
        except (NotFoundError, StoreDamagedError):
            return []
        return [] if follower is None else [Container(self._runtime, follower)]

    def _pause(self, *, is_wanted: bool) -> Status:
        verb = "pause" if is_wanted else "resume"
        with self._runtime.exclusive(self.id):
            status = self.status
            if status.state is not ContainerState.RUNNING or status.identity is None:
                raise self._refuse(verb, "only one that runs can be")
            if status.stop_requested_at:
                raise self._refuse(verb, "it is being stopped")
            if not isinstance(self._starter, Freezer):
                raise UnsupportedError(
                    f"container {self.id}: the starter {self._starter.name!r} cannot freeze anything"
                )
            if status.paused is not is_wanted:
                self._runtime.note_container(self.id)
                status = self._update_unless_ended(lambda old: replace(old, paused=is_wanted))
                if status.finished_at:
                    raise self._refuse(verb, "only one that runs can be")
            if not is_wanted:
                self.thaw()
                return status
            try:
                self._freeze(status)
            except BaseException:
                self._update_unless_ended(lambda old: replace(old, paused=False))
                raise
            return status

    def _change_limits(self, limits: LinuxContainerResources) -> Status:
        with self._runtime.exclusive(self.id):
            starter = self._starter
            if not isinstance(starter, Limiter):
                raise lacks(starter, "change limits")
            identity = self._require_running("change the limits of")
            if not isinstance(limits, LinuxContainerResources):
                raise InvalidInputError(f"limits {quote(limits)}: LinuxContainerResources are needed")
            before = self.status.resources
            given = {name: getattr(limits, name) for name in limits.__struct_fields__ if getattr(limits, name)}
            wanted = replace(before.requested, **given) if before else limits
            self._bundle.note_limits(wanted)
            return self._put_into_force(starter, identity, wanted)

    def _put_into_force(self, starter: Limiter, identity: ProcessIdentity, wanted: LinuxContainerResources) -> Status:
        try:
            changed = starter.change_limits(self.id, identity, wanted)
        except LimpetError:
            self._bundle.forget_limits()
            raise
        status = self._update(lambda old: replace(old, resources=changed))
        self._bundle.forget_limits()
        return status

    def _require_running(self, verb: str) -> ProcessIdentity:
        """Return the identity of its first process. Raises InvalidStateError unless it is RUNNING."""
        status = self.status
        if status.state is not ContainerState.RUNNING or status.identity is None:
            raise self._refuse(verb, "it must be RUNNING")
        return status.identity

    def _require_not_paused(self, verb: str) -> ProcessIdentity:
        """Return the same. Raises InvalidStateError also if it is paused."""
        identity = self._require_running(verb)
        if self.status.paused:
            raise InvalidStateError(f"cannot {verb} container {self.id}: it is paused; resume it first")
        return identity

    def _freeze(self, status: Status) -> None:
        starter = self._starter
        if status.identity is not None:
            if not isinstance(starter, Freezer):
                raise UnsupportedError(f"the starter {starter.name!r} cannot freeze anything")
            starter.freeze(self.id, status.identity)

    def _renew(self, expires_at: int) -> Status:
        def renew(draft: Draft) -> None:
            status = draft.checkpoint(self.id)
            if status is None:
                raise StoreDamagedError(f"container {self.id}: {draft.status(self.id).message}")
            if status.released or status.stop_requested_at:
                raise self._refuse("renew", "it was stopped or released, or its time was over")
            doubt = draft.status(self.id)
            draft.replace(self.id, replace(doubt, expires_at=expires_at))

        with self._runtime.exclusive(self.id):
            self._runtime.begin_timetable()
            with self._runtime.store.transaction() as draft:
                renew(draft)
        self._runtime.note_container(self.id)
        return self.status

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

    def _is_over(self) -> bool:
        """Say whether there is nothing to wait for. Raises StoreError if it has ended, and nobody can be told how."""
        if self._has_ended():
            return True
        self._runtime.watcher.require_written(self.id)
        return False

    def _has_ended(self) -> bool:
        return bool(self._runtime.store.status(self.id).finished_at)

    def _await_output(self) -> None:
        """Wait until the log of one that has ended has all that it wrote, if that can be known and is soon."""
        with suppress(LimpetError):  # a log can be read also of a container that is damaged, or another runtime's
            starter = self._starter
            if isinstance(starter, LogCopier) and self._has_ended():
                await_output(lambda: starter.is_copying(self.id))

    def _remove(self) -> bool:
        with self._runtime.exclusive(self.id):
            if self.id not in self._runtime.store:
                return False
            status = self.status
            if status.created_at or status.finished_at:
                self._release()
            return self._delete()

    def _release(self) -> Status:
        with self._runtime.exclusive(self.id):
            if self.id not in self._runtime.store:
                return Status(released=True)
            status = self.status
            if self._runtime.store.is_damaged(self.id):
                self._discard_damaged()
                return status
            if status.unknown or status.state is ContainerState.RUNNING:
                raise self._refuse("release", "stop it first")
            if not status.released:
                status = self._update(lambda old: replace(old, released=True))
            self._clear()
            return status

    def _remove_bundle(self) -> None:
        with self._runtime.exclusive(self.id):
            status = self.status
            if self._runtime.store.is_damaged(self.id) or (status.created_at and not status.released):
                raise self._refuse("remove the bundle of", "stop and release it first")
            self._clear()

    def _clear(self) -> None:
        """End what is left of it, and remove what is on disk."""
        self._starter.release(self.id)
        self.remove_files()

    def _delete(self) -> bool:
        with self._runtime.exclusive(self.id):
            if self.id not in self._runtime.store:
                return False
            if self._runtime.store.is_damaged(self.id):
                self._discard_damaged()
                return self._runtime.store.delete(self.id)
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
            if not status.unknown and not (status.released and not is_there(self._bundle.path)):
                self._clear()
            return self._forget()

    def _forget(self) -> bool:
        self._runtime.forget_container(self.id)
        try:
            metadata = self.metadata
        except StoreDamagedError:
            return self._runtime.store.delete(self.id)
        if metadata.restart_count:
            return delete_attempt(self._runtime.store, metadata)
        return self._runtime.store.delete(self.id)

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
            self.remove_files()

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
            raise self._refuse(
                "stop", "its process is there; see what kept the look from saying so, recover() and stop it again"
            )
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
            target=self._find_target(metadata),
        )

    def _find_target(self, metadata: Metadata) -> ProcessIdentity | None:
        """Return the first process of the container whose pid namespace it asks to see, if it runs in its sandbox."""
        linux = metadata.config.linux
        options = linux.security_context.namespace_options if linux and linux.security_context else None
        if options is None or options.pid is not NamespaceMode.TARGET:
            return None
        with suppress(NotFoundError, StoreDamagedError):
            target = self._runtime.store.get(options.target_id)
            is_here = target.id == options.target_id and target.metadata.sandbox_id == metadata.sandbox_id
            if is_here and target.status.state is ContainerState.RUNNING and target.id != self.id:
                return target.status.identity
        return None

    def _update(self, change: Callable[[Status], Status]) -> Status:
        return self._runtime.store.update(self.id, change)

    def _update_unless_ended(self, change: Callable[[Status], Status]) -> Status:
        """Do the same, unless its end was written down just now: that keeps no step out, and is not overwritten."""
        return self._update(lambda old: old if old.finished_at else change(old))

    def _refuse(self, verb: str, why: str) -> InvalidStateError:
        status = self.status
        detail = " and released" if status.released else ""
        if status.unknown and status.message:
            detail = f" ({status.message})"
        return InvalidStateError(f"cannot {verb} container {self.id}: it is {status.state.name}{detail}; {why}")


def request_stop(status: Status, timeout: float) -> Status:
    """Return the status with a stop requested: the first request's time stands, and the earliest deadline."""
    now = _now()
    deadline = min(now + int(timeout * 1e9), _LATEST)
    if status.stop_requested_at:
        deadline = min(deadline, status.stop_deadline)
    return replace(
        status,
        stop_requested_at=status.stop_requested_at or now,
        stop_deadline=deadline,
        paused=False,
        reason=Reason.STOPPING,
        message="it was asked to stop",
    )


def require_expiry(expires_at: object) -> None:
    """Raise InvalidInputError for what is no time of an expiry, in nanoseconds since the epoch, or 0."""
    if type(expires_at) is not int or (expires_at and not _EARLIEST <= expires_at <= _LATEST):
        raise InvalidInputError(
            f"expires_at {quote(expires_at)}: nanoseconds since the epoch are needed, as of time.time_ns(), or 0 for"
            " never"
        )


def _require_args(args: object) -> None:
    """Raise InvalidInputError for what is no command and its arguments, as a container's config would."""
    if isinstance(args, str) or not isinstance(args, Sequence) or not args:
        raise InvalidInputError(f"args: a command is needed, as a list of texts, not {quote(args)}")
    for number, each in enumerate(args):
        if not is_text(each):
            raise InvalidInputError(
                f"args[{number}] must be a text without NUL characters and lone surrogates, not {quote(each)}"
            )


def _now() -> int:
    return max(time.time_ns(), 1)  # 0 would mean "not yet", and a clock may be anywhere
