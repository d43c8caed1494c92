"""A container, as a user of the engine has it: what is true of it, and the steps of its life."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial

from limpet.engine.lifecycle.attempts import find_restart
from limpet.engine.lifecycle.cri_status import read_user, to_cri_status
from limpet.engine.lifecycle.deleted import find_last_status
from limpet.engine.lifecycle.expiry import renew, require_expiry
from limpet.engine.lifecycle.freezing import is_frozen, pause, resume
from limpet.engine.lifecycle.life import Life
from limpet.engine.lifecycle.limits import change_limits
from limpet.engine.lifecycle.patience import require_seconds
from limpet.engine.lifecycle.releasing import delete, release, remove, remove_bundle
from limpet.engine.lifecycle.runtime import Runtime
from limpet.engine.lifecycle.starting import create, start
from limpet.engine.lifecycle.stopping import DEFAULT_STOP_TIMEOUT_SECONDS, begin_stop, finish_stop, needs_stop
from limpet.engine.logs import Entry, await_output, read_log
from limpet.engine.starters import require_secrets
from limpet.engine.starters.abilities import (
    Conversant,
    Executed,
    Executor,
    LogCopier,
    LogReopener,
    Meter,
    Session,
    Stats,
    lacks,
)
from limpet.engine.state.process_bound import ProcessBound
from limpet.engine.state.steps import whole
from limpet.schema.cri import ContainerStatus, LinuxContainerResources
from limpet.schema.errors import (
    ClosedError,
    InvalidInputError,
    InvalidStateError,
    LimpetError,
    NotFoundError,
    StoreDamagedError,
    WaitTimeoutError,
    quote,
)
from limpet.schema.image import MountType
from limpet.schema.metadata import Metadata
from limpet.schema.protobuf_json import is_text
from limpet.schema.status import ContainerState, Status, find_exit_code

DEFAULT_EXEC_TIMEOUT_SECONDS = 60.0


class Container(ProcessBound):
    """One container of an engine. Several may stand for the same one: what is true is in the store.

    Steps of one container exclude each other; different containers do not wait for one another.
    """

    def __init__(self, runtime: Runtime, container_id: str) -> None:
        self._runtime = runtime
        self.id = container_id
        self.life = Life(runtime, container_id)
        """What the engine's own steps of it are done with."""

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

    @property
    def metadata(self) -> Metadata:
        """The immutable part. Raises StoreDamagedError if its record cannot be read: delete it, then."""
        return self.life.metadata

    @property
    def status(self) -> Status:
        """The status now, as a value that does not change. Raises NotFoundError once it is deleted."""
        return self.life.status

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

    @whole
    def cri_status(self) -> ContainerStatus:
        """Return the status as the CRI writes it, without times that have not come yet."""
        status = self.status
        added_at = 0
        if not status.created_at:
            added_at = next((one.at for one in self._runtime.store.history(self.id)), 0)
        return to_cri_status(
            self._runtime.locate(self.metadata), status, read_user(self.life.bundle.path), added_at=added_at
        )

    def create(self, mount_type: MountType = MountType.PLAIN) -> Status:
        """Make the bundle: unpack the image and write down what is to be run. The container is then CREATED.

        A create that was cut short may be repeated. Raises InvalidStateError if it is created already,
        InvalidInputError for an unsuitable image or config, NotFoundError for an image that is not there any more; the
        bundle is then removed again.
        """
        return self._runtime.step(lambda: create(self.life, mount_type))

    def start(self, secret_env: Mapping[str, str] | None = None) -> Status:
        """Start the program; RUNNING and durable when this returns.

        `secret_env` are variables for this start, over all others: they are written to no file, and shown in no error.
        Raises InvalidStateError for anything but CREATED, if it was stopped before, and in a sandbox that is NOTREADY;
        StartError if the program cannot be executed: the container is EXITED then, with code 128 and reason StartError;
        InvalidInputError for variables that no environment can hold.
        """
        secrets = require_secrets(secret_env or {})
        return self._runtime.step(lambda: start(self.life, secrets))

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
        return begin_stop(self.life, timeout)

    def finish_stop(self, status: Status) -> Status:
        """Wait until nothing of it is left, given what `begin_stop` returned, and return the status then."""
        return finish_stop(self.life, status)

    def pause(self) -> Status:
        """Freeze all of its processes until `resume`, and return the status: `paused`, while the state stays RUNNING.

        That it is to be paused is written first, so that the next engine freezes what a kill has left running. Raises
        InvalidStateError for one that does not run or is being stopped, UnsupportedError with the reason where there is
        no cgroup that freezes.
        """
        return self._runtime.step(lambda: pause(self.life))

    def resume(self) -> Status:
        """Let its processes go on, and return the status. Raises as `pause` does."""
        return self._runtime.step(lambda: resume(self.life))

    def is_frozen(self) -> bool:
        """Say whether its processes are frozen, whatever is written down."""
        return is_frozen(self.life)

    def renew(self, expires_at: int) -> Status:
        """Set when it is stopped and released, in nanoseconds since the epoch, 0 for never; return the status.

        Nothing is ended early: see `docs/ARCHITECTURE.md` for what is promised when a clock is set. Raises
        InvalidStateError for one that is released, or was asked to stop: it may have expired just now.
        """
        require_expiry(expires_at)
        return self._runtime.step(lambda: renew(self.life, expires_at))

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
            raise self.life.refuse("wait for", "start it first")
        if status.unknown and not is_watched:
            raise self.life.refuse("wait for", "recover() may find out what became of it")
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
        starter = self.life.starter
        if not isinstance(starter, Executor):
            raise lacks(starter, "execute a command in a container")
        return starter.execute(self.id, self.life.require_not_paused("execute a command in"), args, timeout=timeout)

    def open_command(self, args: Sequence[str], *, terminal: bool = False, size: tuple[int, int] = (0, 0)) -> Session:
        """Run a command in the container, connected to its input and output.

        With `terminal` it has one, of `size` rows and columns to begin with; zeros leave that open.

        Close the session in the end. Raises as `execute` does.
        """
        _require_args(args)
        starter = self.life.starter
        if not isinstance(starter, Conversant):
            raise lacks(starter, "execute a command in a container")
        identity = self.life.require_not_paused("execute a command in")
        return starter.open_command(self.id, identity, args, terminal=terminal, size=size)

    def attach(self) -> Session:
        """Connect to the input, the output and the terminal of its program, as its config has them.

        Close the session in the end. Raises InvalidStateError unless it is RUNNING, UnsupportedError.
        """
        starter = self.life.starter
        if not isinstance(starter, Conversant):
            raise lacks(starter, "attach to a container")
        config = self.metadata.config
        identity = self.life.require_running("attach to")
        return starter.attach(self.id, identity, terminal=config.tty, has_input=config.stdin)

    def measure(self) -> Stats:
        """Return what it uses now. Raises InvalidStateError unless it is RUNNING, UnsupportedError."""
        starter = self.life.starter
        if not isinstance(starter, Meter):
            raise lacks(starter, "measure a container")
        return starter.measure(self.id, self.life.require_running("measure"))

    def change_limits(self, limits: LinuxContainerResources) -> Status:
        """Put limits into force while it runs; those that are not given stay. `Status.resources` then has all.

        Raises InvalidInputError for what the host refuses, InvalidStateError unless it is RUNNING, UnsupportedError.
        """
        return self._runtime.step(lambda: change_limits(self.life, limits))

    @whole
    def reopen_log(self) -> None:
        """Begin a new log, after the old one was renamed. Raises InvalidStateError, UnsupportedError."""
        if not self.metadata.log_path:
            raise InvalidInputError(f"container {self.id}: its config has no log_path")
        starter = self.life.starter
        if not isinstance(starter, LogReopener):
            raise lacks(starter, "reopen a log")
        path = self._runtime.bring_home(self.metadata).log_path
        starter.reopen_log(self.id, self.life.require_running("reopen the log of"), path)

    def release(self) -> Status:
        """Give up what the container holds: kill what is left of it, unmount and remove its bundle.

        That it is released is written first, so that recovery finishes what a kill cuts short. Releasing again
        is fine; of one that is deleted the status says no more than that it is released. Raises InvalidStateError while
        it is RUNNING or Unknown.
        """
        return self._runtime.step(lambda: release(self.life))

    def remove_bundle(self) -> None:
        """Remove what is on disk of a container that is released or was never created. May be repeated.

        Raises InvalidStateError for any other.
        """
        self._runtime.step(lambda: remove_bundle(self.life))

    def delete(self) -> bool:
        """Forget the container; return False if it is gone already.

        Raises InvalidStateError unless it is released, was never created, or is damaged.
        """
        return self._runtime.step(lambda: delete(self.life))

    def remove(self, *, force: bool = False, timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS) -> bool:
        """Release and delete the container; return False if it is gone already. May be repeated.

        With `force` it is stopped before, as `stop` does with `timeout`. Raises InvalidStateError while it is RUNNING
        or Unknown without `force`, and if it cannot be shown that nothing of it is left.
        """
        if force:
            self._stop_if_needed(timeout)
        try:
            return self._runtime.step(lambda: remove(self.life))
        except InvalidStateError:
            if not (force and self.was_just_started()):
                raise
        self._stop_if_needed(timeout)
        return self._runtime.step(lambda: remove(self.life))

    def _stop_if_needed(self, timeout: float) -> None:
        with suppress(NotFoundError):
            if needs_stop(self.life):
                self.stop(timeout)

    def was_just_started(self) -> bool:
        """Say whether it runs, though it did not a moment ago: its policy may have started it, which happens once."""
        with suppress(NotFoundError):
            return self.state is ContainerState.RUNNING
        return False

    def _is_over(self) -> bool:
        """Say whether there is nothing to wait for. Raises StoreError if it has ended, and nobody can be told how."""
        if self.life.has_ended:
            return True
        self._runtime.watcher.require_written(self.id)
        return False

    def _await_output(self) -> None:
        """Wait until the log of one that has ended has all that it wrote, if that can be known and is soon."""
        with suppress(LimpetError):  # a log can be read also of a container that is damaged, or another runtime's
            starter = self.life.starter
            if isinstance(starter, LogCopier) and self.life.has_ended:
                await_output(partial(self._is_copying, starter))

    @whole
    def _is_copying(self, starter: LogCopier) -> bool:
        return starter.is_copying(self.id)


def _require_args(args: object) -> None:
    """Raise InvalidInputError for what is no command and its arguments, as a container's config would."""
    if isinstance(args, str) or not isinstance(args, Sequence) or not args:
        raise InvalidInputError(f"args: a command is needed, as a list of texts, not {quote(args)}")
    for number, each in enumerate(args):
        if not is_text(each):
            raise InvalidInputError(
                f"args[{number}] must be a text without NUL characters and lone surrogates, not {quote(each)}"
            )
