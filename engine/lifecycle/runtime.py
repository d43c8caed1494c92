"""What the containers of one engine share, and how their steps keep out of each other's way."""

import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar
from weakref import WeakValueDictionary

from limpet.engine.images import ImageStore
from limpet.engine.lifecycle.timetable import Entry, Kind, Timetable
from limpet.engine.lifecycle.watcher import Watcher
from limpet.engine.starters import Starter, Starters
from limpet.engine.state.descriptors import system_errors_told
from limpet.engine.state.homes import bring_home, log_directory
from limpet.engine.state.reads import giving_way, is_amid_a_change
from limpet.engine.state.steps import run_whole
from limpet.engine.state.surroundings import require_no_shutdown
from limpet.engine.store import Store
from limpet.recovery.queues import Empty, Queue
from limpet.schema.errors import InvalidStateError, LimpetError, StoreDamagedError, quote_path
from limpet.schema.file_name import file_name
from limpet.schema.metadata import Metadata, SandboxMetadata
from limpet.schema.telling import get_log

_log = get_log("limpet.runtime")
_T = TypeVar("_T")


@dataclass(kw_only=True)
class Runtime:
    """The store, the images, the starters and the watcher behind an engine's containers."""

    store: Store
    images: ImageStore
    starters: Starters
    containers_dir: str
    sandboxes_dir: str
    reexamine: Callable[[str], object]
    """Looks at one container again, and writes down what is true of it."""
    follow_up: Callable[[Entry], float | None]
    """Does what is to be done next of a container or sandbox: see `Timetable`."""
    watcher: Watcher = field(init=False)
    timetable: Timetable = field(init=False)
    _holding: threading.local = field(default_factory=threading.local)
    _bells: dict[str, list[Callable[[], object]]] = field(default_factory=dict)
    """By container, what wakes each waiting caller. No Condition: a signal handler that raises can leave one locked."""
    _steps: WeakValueDictionary[str, threading.RLock] = field(default_factory=WeakValueDictionary)
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _bells_guard: threading.RLock = field(default_factory=threading.RLock)
    """Guards `_bells`. The main thread holds it, too, whose signal handler may wait for another container then: no step
    needs it."""

    def __post_init__(self) -> None:
        self.timetable = Timetable(self._follow_up_at_once)
        self.watcher = Watcher(self.store, self._take_end, self._take_alone, self.ring)

    def _follow_up_at_once(self, entry: Entry) -> float | None:
        with self.store.fleet.later():  # what nobody called for waits for no fleet
            return self.follow_up(entry)

    def bundle_path(self, container_id: str) -> str:
        """Return where the container's bundle is, or would be."""
        return os.path.join(self.containers_dir, file_name(container_id))

    def sandbox_path(self, sandbox_id: str) -> str:
        """Return where the sandbox's directory is, or would be.

        Not where its record says: in a copy of a state directory that would be the original's.
        """
        return os.path.join(self.sandboxes_dir, file_name(sandbox_id))

    def starter_of(self, container_id: str) -> Starter:
        """Return the starter that a container was made for; of a damaged record, the one that knows the container.

        Raises InvalidStateError if this engine does not have it, NotFoundError for no container.
        """
        try:
            return self.starters.of(self.store.metadata(container_id))
        except StoreDamagedError:
            return self.starters.find_keeper(container_id)

    def bring_home(self, metadata: Metadata) -> Metadata:
        """Return a container's metadata with the paths that it has in this state directory, wherever it was made.

        Raises InvalidStateError in a copy of a state directory, if its log is outside: that one is the original's.
        """
        home = self.locate(metadata)
        if home is metadata or not home.log_path or home.log_path != metadata.log_path:
            return home
        if self.store.directory.is_copy:  # which is read from the disk
            raise InvalidStateError(
                f"container {metadata.id}: its log {quote_path(metadata.log_path)} is outside of this state directory,"
                " and that of the one of which this is a copy; create another container, with a log of its own"
            )
        return home

    def locate(self, metadata: Metadata) -> Metadata:
        """Return the same, for who only reads: also of a log that is the original's."""
        return bring_home(metadata, self.store.directory.path)

    def log_directory(self, sandbox: SandboxMetadata) -> str:
        """Return where the logs of a sandbox's containers go: its config's log_directory, else one of its own."""
        return log_directory(sandbox, self.store.directory.path)

    def exclusive(self, owner_id: str) -> AbstractContextManager[None]:
        """Keep other steps of the same container (or sandbox) out while the block runs."""
        return self.exclusive_directory(file_name(owner_id))

    @contextmanager
    def exclusive_directory(self, name: str) -> Iterator[None]:
        """Do the same for the container or sandbox whose directory has this name, or would have it."""
        with self._lock_of(name), self._hold():
            yield

    @contextmanager
    def exclusive_of_many(self, owner_ids: Iterable[str]) -> Iterator[Collection[str]]:
        """Do the same for many of which nobody else is amid a step; yield which these are. Nobody is waited for.

        None where the main thread takes its steps itself: an interrupt there could leave a lock held.
        """
        is_whole = threading.get_ident() != threading.main_thread().ident
        with ExitStack() as stack:
            mine = []
            for key in owner_ids if is_whole else ():
                lock = self._lock_of(file_name(key))
                if lock.acquire(blocking=False):
                    stack.callback(lock.release)
                    mine.append(key)
            with self._hold():
                yield frozenset(mine)

    def _lock_of(self, name: str) -> "threading.RLock":
        with self._guard:
            lock = self._steps.get(name)
            if lock is None:
                lock = self._steps[name] = threading.RLock()
            return lock

    @contextmanager
    def _hold(self) -> Iterator[None]:
        """Note that this thread is amid a step."""
        self._holding.depth = getattr(self._holding, "depth", 0) + 1
        try:
            yield
        finally:
            self._holding.depth -= 1

    def step(self, step: Callable[[], _T], undo: Callable[[_T], object] | None = None) -> _T:
        """Run a step of a container or sandbox whole (`run_whole`); within `exclusive`, on the thread that holds it.

        `undo` is called with its result if the caller is interrupted and will not hear of that.

        Whatever the system refuses on the way is raised as a LimpetError; ClosedError at the end of the interpreter.
        """
        require_no_shutdown()
        is_within = getattr(self._holding, "depth", 0)
        result = self._step(step) if is_within else run_whole(lambda: self._step(step), undo)
        try:
            if not self.store.is_closed:
                self.store.fleet.wait()
        except LimpetError:
            raise
        except BaseException:  # what a signal handler raises
            if undo is not None:
                run_whole(partial(undo, result))
            raise
        return result

    def _step(self, step: Callable[[], _T]) -> _T:
        # In here, where no signal reaches: a handler's TimeoutError is an OSError, too, and not the system's.
        what = f"state directory {quote_path(self.store.directory.path)}"
        with system_errors_told(what), self.store.fleet.later():
            return step()

    def wait_for_change(self, container_id: str, is_done: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until `is_done()`, which is asked whenever the container has changed; say whether it is.

        For `timeout` seconds at most. Raises ClosedError when the engine is closed meanwhile, InvalidStateError in a
        finalizer that has come amid a change by its own thread: what it waits for could not be written.
        """
        require_no_shutdown()
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        queue: Queue[None] = Queue()
        with giving_way(), self.bell(container_id, partial(queue.put, None)):
            if is_amid_a_change() and not is_done():
                raise InvalidStateError(
                    f"container {container_id}: a finalizer amid a change cannot wait for it; have a thread do so"
                )
            while not is_done():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                with suppress(Empty):
                    queue.get(timeout=left)
        return True

    async def await_change(self, container_id: str, is_done: Callable[[], bool], timeout: float | None) -> bool:
        """Do the same in a task of asyncio, without a thread."""
        import asyncio  # noqa: PLC0415  # it takes as long to load as all of limpet; who awaits has it

        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def ring() -> None:
            try:
                loop.call_soon_threadsafe(changed.set)
            except RuntimeError:  # a loop that is closed has nobody left to tell
                self._forget_bell(container_id, ring)

        limit = asyncio.timeout(timeout)
        with self.bell(container_id, ring):
            try:
                async with limit:
                    while not is_done():
                        await changed.wait()
                        changed.clear()
            except TimeoutError:
                if not limit.expired():  # a signal handler's of the host program
                    raise
        return is_done()

    @contextmanager
    def bell(self, container_id: str, ring: Callable[[], object]) -> Iterator[None]:
        """Have `ring` called at each change of a container while the block runs."""
        with self._bells_guard:
            self._bells.setdefault(container_id, []).append(ring)
        try:
            yield
        finally:
            self._forget_bell(container_id, ring)

    def _forget_bell(self, container_id: str, ring: Callable[[], object]) -> None:
        with self._bells_guard:
            bells = self._bells.get(container_id, [])
            if ring in bells:
                bells.remove(ring)
            if not bells:
                self._bells.pop(container_id, None)

    def begin_timetable(self) -> None:
        """Have the thread run that looks after what is due. Raises ResourcesError, best before anything is written."""
        self.timetable.begin()

    def note_container(self, container_id: str) -> None:
        """Have it looked at what is to be done next of a container; from now on also when it ends."""
        self.timetable.note(Entry(Kind.CONTAINER, container_id))

    def note_again(self, container_id: str) -> None:
        """Have that looked at if it is looked at at all: the container has changed."""
        if self.timetable.is_known(Entry(Kind.CONTAINER, container_id)):
            self.note_container(container_id)

    def note_sandbox(self, sandbox_id: str) -> None:
        """Have it looked at what is to be done next of a sandbox."""
        self.timetable.note(Entry(Kind.SANDBOX, sandbox_id))

    def forget_container(self, container_id: str) -> None:
        """Look no more at a container that is deleted."""
        self.timetable.forget(Entry(Kind.CONTAINER, container_id))

    def _take_end(self, container_id: str) -> None:
        self.ring(container_id)
        self.note_again(container_id)

    def _take_alone(self, container_id: str) -> None:
        """Write down that a container runs on without its monitor, if that is so."""
        try:
            with self.exclusive(container_id), self.store.fleet.later():
                self.reexamine(container_id)
        except LimpetError as error:  # closed meanwhile, or the disk refuses: the next recovery tells
            _log.warning("container %s: that its monitor has ended is not written down: %s", container_id, error)

    def ring(self, container_id: str) -> None:
        """Wake those who wait for this container."""
        for bell in list(self._bells.get(container_id, ())):
            _ring(container_id, bell)

    def close(self) -> None:
        """Stop watching and give up the starters; the containers run on. May be repeated."""
        self.timetable.close()
        self.watcher.close()
        self.starters.close()

    def ring_all(self) -> None:
        """Wake all who wait: the store is closed, and they will see that."""
        for container_id in list(self._bells):
            self.ring(container_id)


def _ring(container_id: str, bell: Callable[[], object]) -> None:
    """Wake one. It may be the host program's own: what it raises keeps nobody else from being woken.

    Its SystemExit would end the thread that sees every end. What a signal handler raises in the main thread goes on.
    """
    try:
        bell()
    except BaseException as error:
        if not isinstance(error, Exception) and threading.get_ident() == threading.main_thread().ident:
            raise
        _log.exception("container %s: what was to be called at each change of it has raised", container_id)
