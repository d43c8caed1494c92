"""The watcher: one thread that sees every running container end, and has that written down.

It sees an end by the process's pidfd, or where there is none by looking again and again; asks the starter how the
container ended; and hands all ends that came together to the store as one change. Only once that is durable may the
starter reap. It never waits for the disk: while an end cannot be written, the container is Unknown, with the reason.
"""

import errno
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

from limpet.engine.starters import Exit, Starter
from limpet.engine.starters.abilities import Monitored, Plural, by_starter
from limpet.engine.state.descriptors import NOTICED_SECONDS, close_all
from limpet.engine.store import Draft, Request, Store
from limpet.recovery.evidence import Process
from limpet.recovery.host import has_ended, observe_process
from limpet.recovery.queues import Empty, Queue
from limpet.recovery.thread import Thread, go_on
from limpet.schema.errors import (
    LimpetError,
    NotFoundError,
    OutcomeUnknownError,
    ResourcesError,
    StoreFencedError,
    StoreReplacedError,
)
from limpet.schema.identity import ProcessIdentity
from limpet.schema.status import Reason, Status, end, end_never_run
from limpet.schema.telling import get_log

_log = get_log("limpet.watcher")
_LOOK_AGAIN_SECONDS = 0.2
"""Between two looks at a process that no pidfd tells of; longer where there are many of them."""
_LOOKING_SHARE = 0.1
"""Of a processor: how much may be spent on such looks."""
_OVER = frozenset({Process.ENDED, Process.GONE, Process.STRANGER})
_PERHAPS = frozenset({Process.ALIVE, Process.UNPROVEN, Process.HIDDEN})
_ASK_AGAIN_SECONDS = (0.001, 0.02)
"""Between two questions how a process has ended: as long as it has been asked already, within these bounds."""
_RETRY_SECONDS = 1.0
_ALONE_SECONDS = 0.5
"""How long after its monitor's end a container's own is waited for, which is why most of them end."""
_WAKE_TRIES = 3
_EXIT_SECONDS = 10.0
"""How long to ask for the exit of a process that has ended."""
_SLOW_SECONDS = 0.5
"""After this, a container whose end is still being written is Unknown."""
_NOT_OURS = {errno.EBADF, errno.EINVAL}
"""What epoll says if its descriptor was closed, and if its number is that of another file by now."""
_FINAL = (OutcomeUnknownError, StoreFencedError, StoreReplacedError)
"""After such an error a store writes nothing more."""
_lost: "list[select.epoll]" = []
"""Whose descriptors somebody else has closed; kept, for each would close its number once nobody has it."""


@dataclass(slots=True)
class _Watch:
    container_id: str
    identity: ProcessIdentity
    pidfd: int
    """-1 where none is to be had."""
    starter: Starter
    is_registered: bool = False
    """True once the kernel tells of its end. Written by the thread that registers it; the rest is the watcher's."""
    due: float = 0.0
    """When to look again, in seconds of the monotonic clock."""
    noticed_at: int = 0
    """When it was first seen to have ended, in nanoseconds since the epoch."""
    asked_since: float = 0.0
    """When nobody knew yet how, for the first time, in seconds of the monotonic clock: the other one may be set."""
    exit: Exit | None = None
    is_told: bool = False
    """True while its end is with the store."""
    monitor: int = -1
    """A pidfd of who sees its end, -1 if there is nobody."""
    alone_at: float = 0.0
    """When to take note that its monitor has ended, and it has not; 0 if that is done, or need not be."""

    @property
    def is_polled(self) -> bool:
        """True if the loop has to look at it again and again, for the kernel does not tell, or no more."""
        return not self.is_told and (not self.is_registered or self.noticed_at > 0)

    @property
    def needs_attention(self) -> bool:
        """True while the loop has to look at it, or to see to it that its end is written down."""
        return not self.is_registered or self.noticed_at > 0 or self.alone_at > 0


class _Kill(NamedTuple):
    """What is left of a container is to be killed."""

    container_id: str
    identity: ProcessIdentity
    when: float
    """In seconds of the monotonic clock."""
    starter: Starter
    why_not: str = ""
    """Why that has failed; it is tried again."""


class _Recording(Request):
    """The ends that are written down together."""

    __slots__ = ("begun", "failed", "is_slow", "queue", "wake_watcher", "watches")

    def __init__(self, watches: Sequence[_Watch], queue: "Queue[_Recording]", wake_watcher: Callable[[], None]) -> None:
        super().__init__(self._put_into)
        self.watches = watches
        self.queue = queue
        self.wake_watcher = wake_watcher
        self.failed: dict[str, LimpetError] = {}
        self.begun = time.monotonic()
        self.is_slow = False

    def _put_into(self, draft: Draft) -> None:
        for watch in self.watches:
            try:
                draft.update(watch.container_id, partial(_end, watch))
            except NotFoundError:
                continue  # deleted in the meantime
            except LimpetError as error:
                self.failed[watch.container_id] = error

    @classmethod
    def settle(cls, requests: Sequence[Self]) -> None:
        for request in requests:
            request.queue.put(request)
            request.wake_watcher()


class Watcher:
    """Watches processes until they end. `on_end` is told each container whose end is durable.

    `on_alone` is told, by a thread of its own, each that runs on while its monitor has ended; `on_unwritten` each whose
    end will not be written down.
    """

    def __init__(
        self,
        store: Store,
        on_end: Callable[[str], None],
        on_alone: Callable[[str], object] = lambda _: None,
        on_unwritten: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._store = store
        self._on_end = on_end
        self._on_alone = on_alone
        self._on_unwritten = on_unwritten
        self._lock = threading.Lock()
        self._watches: dict[str, _Watch] = {}
        self._attended: dict[str, _Watch] = {}
        """Of these, those that the loop has to look at, or soon may: few, however many are watched."""
        self._by_pidfd: dict[int, _Watch] = {}
        self._by_monitor: dict[int, _Watch] = {}
        self._unwritten: dict[str, LimpetError] = {}
        """Why the ends of these will not be written down as long as this store is open."""
        self._kills: dict[str, _Kill] = {}
        self._next_kill = math.inf
        """When the first of them is due, or was: there may be none by now."""
        self._recordings: list[_Recording] = []
        self._done: Queue[_Recording] = Queue()
        self._finishing: _Recording | None = None
        """What was taken from there, until all is done that is to be done then."""
        self._is_closing = False
        self._has_descriptors = True
        self._epoll = select.epoll()
        try:
            self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self._epoll.register(self._wake_read, select.EPOLLIN)
            self._thread = Thread(target=self._run, name="limpet-watch")
            self._thread.start()
            store.expect_requests()
        except BaseException as error:
            self._close_descriptors()
            if isinstance(error, RuntimeError):
                raise ResourcesError(f"no thread can be started that watches the containers: {error}") from error
            raise

    def watch(
        self, container_id: str, identity: ProcessIdentity, pidfd: int, starter: Starter, *, monitor: int = -1
    ) -> None:
        """Start watching a process, and take over `pidfd`, -1 if none could be had, and `monitor`, its monitor's.

        A container that is already watched keeps its watch. Never fails: what cannot be told by the kernel is looked
        at again and again.
        """
        with self._lock:
            if container_id in self._watches or self._is_closing:
                close_all(each for each in (pidfd, monitor) if each >= 0)
                return
            watch = _Watch(container_id, identity, pidfd, starter)
            self._watches[container_id] = watch
            self._register(watch)
            if watch.is_polled:
                self._attended[container_id] = watch
        self._watch_monitor(watch, monitor)
        if watch.is_polled:
            self._wake()

    def _watch_monitor(self, watch: _Watch, monitor: int) -> None:
        """Be told when the container's monitor ends, if it has one that lives: `monitor`, or what the starter says."""
        with suppress(LimpetError):  # it goes unnoticed, then, until the next recovery
            if monitor < 0 and isinstance(watch.starter, Monitored):
                monitor = watch.starter.open_monitor(watch.container_id, watch.identity)
            if monitor < 0:
                return
            with self._lock:
                if self._watches.get(watch.container_id) is not watch:  # it has ended already
                    close_all((monitor,))
                    return
                watch.monitor = monitor
                self._by_monitor[monitor] = watch
                with suppress(OSError):
                    self._epoll.register(monitor, select.EPOLLIN)

    def is_watched(self, container_id: str) -> bool:
        """Say whether the container is watched: its end will be written down."""
        return container_id in self._watches

    def require_written(self, container_id: str) -> None:
        """Raise a StoreError if the container has ended, and that will not be written down by this engine."""
        error = self._unwritten.get(container_id)
        if error is not None:
            raise type(error)(f"container {container_id}: it has ended, and that cannot be recorded: {error}")

    def kill_at(self, container_id: str, identity: ProcessIdentity, seconds: float, starter: Starter) -> None:
        """Have all that is left of a container ended by SIGKILL in so many seconds; the earliest time stands."""
        self.kill_many_at({container_id: identity}, seconds, starter)

    def kill_many_at(self, identities: Mapping[str, ProcessIdentity], seconds: float, starter: Starter) -> None:
        """Do the same for many containers."""
        at = time.monotonic() + seconds
        with self._lock:
            for key, identity in identities.items():
                before = self._kills.get(key)
                when = min(at, before.when) if before is not None and before.identity == identity else at
                self._kills[key] = _Kill(key, identity, when, starter)
            is_next = at < self._next_kill
            self._next_kill = min(at, self._next_kill)
        if is_next:
            self._wake()

    def why_not_killed(self, container_id: str) -> str:
        """Return why SIGKILL, whose time has come, could not be sent to a container; "" if nothing is known of that."""
        with self._lock:
            kill = self._kills.get(container_id)
        return kill.why_not if kill is not None else ""

    def close(self) -> None:
        """Stop watching. The containers run on; recovery finds what has not been written down. May be repeated."""
        with self._lock:
            self._is_closing = True
        while self._thread.is_alive():
            self._wake()
            self._thread.join(_LOOK_AGAIN_SECONDS)
        with self._lock:
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        descriptors = [
            *self._by_pidfd,
            *self._by_monitor,
            *(getattr(self, name, -1) for name in ("_wake_read", "_wake_write")),
        ]
        self._by_pidfd, self._by_monitor, self._wake_read, self._wake_write = {}, {}, -1, -1
        self._watches, self._attended = {}, {}
        self._epoll.close()
        close_all(descriptor for descriptor in descriptors if descriptor >= 0)

    def _wake(self) -> None:
        for _ in range(_WAKE_TRIES):
            try:
                os.write(self._wake_write, b"x")
            except BlockingIOError:
                return  # a full pipe wakes as well
            except OSError:  # closed, and nobody is there to wake; or refused, and tried again
                continue
            return

    def _register(self, watch: _Watch) -> None:
        if watch.pidfd < 0:
            return
        self._by_pidfd[watch.pidfd] = watch
        with suppress(OSError):  # too many watches on this host (max_user_watches), or no memory: looked at instead
            self._epoll.register(watch.pidfd, select.EPOLLIN)
            watch.is_registered = True

    # The thread

    def _run(self) -> None:
        go_on(lambda: self._look(self._poll()), self._look_anew, lambda: self._is_closing, _log, "the watcher")

    def _look_anew(self) -> None:
        """Have all be done that a turn which has failed was about to do; to do it once more changes nothing."""
        if self._finishing is not None:
            self._finish(self._finishing)
            self._finishing = None
        self._recordings = []
        with self._lock:
            for watch in self._watches.values():
                watch.is_told, watch.due = False, 0.0
            self._attended = dict(self._watches)

    def _poll(self) -> "list[tuple[int, int]]":
        """Sleep until something is to be done."""
        try:
            return self._epoll.poll(self._patience())
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise
            _log.warning("descriptors of the engine were closed behind its back, as os.closerange() does")
            with self._lock:
                self._begin_anew()
            return []

    def _begin_anew(self) -> None:
        """Watch without the descriptors that were closed. Their numbers are somebody else's: they are left alone."""
        epoll = select.epoll()
        wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        epoll.register(wake_read, select.EPOLLIN)
        _lost.append(self._epoll)
        self._epoll, self._wake_read, self._wake_write = epoll, wake_read, wake_write
        self._by_pidfd, self._by_monitor = {}, {}
        for watch in self._watches.values():
            watch.pidfd = watch.monitor = -1
            watch.is_registered = False
        self._attended = dict(self._watches)  # the kernel tells of none of them any more

    def _patience(self) -> float:
        now = time.monotonic()
        with self._lock:
            due = [watch.due for watch in self._attended.values() if watch.is_polled]
            due += [self._next_kill]
            due += [watch.alone_at for watch in self._attended.values() if watch.alone_at]
        due += [recording.begun + _SLOW_SECONDS for recording in self._recordings if not recording.is_slow]
        return max(0.0, min(min(due) - now, NOTICED_SECONDS))

    def _look(self, ready: Sequence[tuple[int, int]]) -> None:
        now = time.monotonic()
        ended = []
        for descriptor, _ in ready:
            if descriptor == self._wake_read:
                with suppress(BlockingIOError):
                    os.read(descriptor, 4096)
            elif (watch := self._by_pidfd.get(descriptor)) is not None:
                ended.append(watch)
            elif (watch := self._by_monitor.get(descriptor)) is not None:
                self._leave_monitor(watch)
                watch.alone_at = now + _ALONE_SECONDS
                if watch.noticed_at:
                    watch.due = now  # that was its last act: to tell how the container has ended
                self._attend(watch)
        self._notice(ended)
        with self._lock:
            polled = [one for one in self._attended.values() if one.is_polled and one.due <= now]
        self._has_descriptors = True
        for watch in polled:
            watch.due = now + _LOOK_AGAIN_SECONDS
            self._look_at(watch)
        next_look = now + (time.monotonic() - now) / _LOOKING_SHARE
        for watch in polled:
            if not watch.noticed_at:
                watch.due = max(watch.due, next_look)
        with self._lock:
            known = [one for one in self._attended.values() if one.exit is not None and not one.is_told]
        self._record(known)
        self._finish_recordings()
        self._kill_overdue(now)
        self._tell_alone(now)
        with self._lock:
            for watch in [one for one in self._attended.values() if not one.needs_attention]:
                del self._attended[watch.container_id]

    def _attend(self, watch: _Watch) -> None:
        with self._lock:
            if self._watches.get(watch.container_id) is watch:
                self._attended[watch.container_id] = watch

    def _leave_monitor(self, watch: _Watch) -> None:
        with self._lock:
            if watch.monitor >= 0:
                self._by_monitor.pop(watch.monitor, None)
                with suppress(OSError):  # a fork that has not executed yet would keep it registered
                    self._epoll.unregister(watch.monitor)
                close_all((watch.monitor,))
                watch.monitor = -1

    def _tell_alone(self, now: float) -> None:
        """Tell which containers run on without their monitors, on a thread: this one does not wait for the disk."""
        with self._lock:
            due = [watch for watch in self._attended.values() if watch.alone_at and watch.alone_at <= now]
        for watch in due:
            watch.alone_at = 0.0
            if watch.noticed_at:
                continue
            _log.warning("container %s: its monitor has ended, and it runs on", watch.container_id)
            thread = Thread(target=self._on_alone, args=(watch.container_id,), name="limpet-alone")
            with suppress(RuntimeError):  # no thread to be had: the next recovery tells
                thread.start()

    def _notice(self, watches: Sequence[_Watch]) -> None:
        """Take note that processes have ended, by their pidfds; from here on each is asked how, until that is known."""
        for watch in watches:
            watch.noticed_at = time.time_ns()
            self._attend(watch)
            with suppress(OSError):
                self._epoll.unregister(watch.pidfd)
        for watch in self._ask_many(watches) if len(watches) > 1 else watches:
            self._ask(watch)

    def _look_at(self, watch: _Watch) -> None:
        """Find out whether a process that no pidfd tells of has ended; watch it by pidfd again where that works."""
        if watch.exit is not None:
            return  # its end waits to be written
        if watch.noticed_at:
            self._ask(watch)
            return
        if self._is_over(watch):
            watch.noticed_at = time.time_ns()
            self._ask(watch)

    def _is_over(self, watch: _Watch) -> bool:
        if watch.pidfd >= 0:
            return has_ended(watch.pidfd)
        try:
            if self._has_descriptors:
                watch.pidfd = watch.starter.adopt(watch.container_id, watch.identity)
                with self._lock:
                    self._register(watch)
                return False
        except NotFoundError:  # or it cannot be shown to be the one, which says nothing of its end
            return observe_process(watch.identity)[0] not in _PERHAPS
        except ResourcesError:
            self._has_descriptors = False
        except LimpetError:
            return False  # looked at again
        return observe_process(watch.identity)[0] in _OVER  # with one of those that are kept for looks

    def _ask_many(self, watches: Sequence[_Watch]) -> "list[_Watch]":
        """Ask how processes have ended, those of a starter at once; return those that are to be asked one by one."""
        for starter, group in by_starter((one.starter, one) for one in watches):
            if not isinstance(starter, Plural):
                continue
            with suppress(LimpetError):
                exits = starter.read_exits({one.container_id: (one.identity, one.pidfd) for one in group})
                for watch in group:
                    watch.exit = exits.get(watch.container_id)
        return [one for one in watches if one.exit is None]

    def _ask(self, watch: _Watch) -> None:
        try:
            watch.exit = watch.starter.read_exit(watch.container_id, watch.identity, watch.pidfd)
        except LimpetError as error:
            self._doubt(watch, f"it has ended, and how cannot be asked: {error}")
            watch.due = time.monotonic() + _RETRY_SECONDS
            return
        now = time.monotonic()
        watch.asked_since = watch.asked_since or now
        asked_for, (least, most) = now - watch.asked_since, _ASK_AGAIN_SECONDS
        watch.due = now + min(max(asked_for, least), most)
        if watch.exit is None and asked_for > _EXIT_SECONDS:
            watch.exit = Exit(None)

    def _record(self, watches: Sequence[_Watch]) -> None:
        if not watches:
            return
        for watch in watches:
            watch.is_told = True
            self._end_rest(watch)
        recording = _Recording(watches, self._done, self._wake)
        self._recordings.append(recording)
        try:
            self._store.submit(recording)
        except (LimpetError, RuntimeError) as error:
            recording.error = error
            self._done.put(recording)

    def _end_rest(self, watch: _Watch) -> None:
        """End what is left in the session of the first process, as a terminal's hangup would; a stop gives it time.

        What has left that session is ended when the container is released, or by the next recovery.
        """
        if watch.exit is not None and watch.exit.is_all:
            return
        with suppress(LimpetError):
            if not self._store.status(watch.container_id).stop_requested_at:
                watch.starter.signal(watch.container_id, watch.identity, signal.SIGKILL, only_session=True)

    def _finish_recordings(self) -> None:
        while True:
            try:
                recording = self._done.get_nowait()
            except Empty:
                break
            self._finishing = recording
            with suppress(ValueError):  # forgotten after a failure
                self._recordings.remove(recording)
            self._finish(recording)
            self._finishing = None
        for recording in self._recordings:
            if not recording.is_slow and time.monotonic() - recording.begun >= _SLOW_SECONDS:
                recording.is_slow = True
                for watch in recording.watches:
                    self._doubt(watch, "it has ended, and the disk takes its time to record it")

    def _finish(self, recording: _Recording) -> None:
        written = []
        for watch in recording.watches:
            error = recording.failed.get(watch.container_id) or recording.error
            if error is None:
                written.append(watch)
                continue
            if isinstance(error, _FINAL):
                self._doubt(watch, f"it has ended, and that cannot be recorded: {error}")
                self._unwritten[watch.container_id] = error
                self._on_unwritten(watch.container_id)
                continue
            self._doubt(watch, f"it has ended, and that cannot be recorded yet: {error}")
            watch.is_told = False
            watch.due = time.monotonic() + _RETRY_SECONDS
        if written:
            for starter, group in by_starter((watch.starter, watch) for watch in written):
                with suppress(LimpetError):  # the keeper keeps them for longer, then
                    starter.forget_exits([watch.container_id for watch in group])
        self._forget(written)
        for watch in written:
            self._on_end(watch.container_id)

    def _forget(self, watches: Sequence[_Watch]) -> None:
        """Watch them no more. May be repeated."""
        with self._lock:
            for watch in watches:
                if self._watches.get(watch.container_id) is watch:
                    del self._watches[watch.container_id]
                    self._attended.pop(watch.container_id, None)
                if watch.pidfd >= 0:
                    self._by_pidfd.pop(watch.pidfd, None)
                    close_all((watch.pidfd,))
                    watch.pidfd = -1
        for watch in watches:
            self._leave_monitor(watch)

    def _doubt(self, watch: _Watch, message: str) -> None:
        _log.warning("container %s: %s", watch.container_id, message)
        with suppress(LimpetError):
            self._store.doubt(watch.container_id, (Reason.UNVERIFIED, message))

    def _kill_overdue(self, now: float) -> None:
        if now < self._next_kill:
            return
        with self._lock:
            due = [kill for kill in self._kills.values() if kill.when <= now]
        kills = [kill for kill in due if self._is_still_of(kill.container_id, kill.identity)]
        killed: set[str] = set()
        for starter, group in by_starter((kill.starter, kill) for kill in kills) if len(kills) > 1 else ():
            if isinstance(starter, Plural):
                killed.update(starter.signal_many({one.container_id: one.identity for one in group}, signal.SIGKILL))
        left = ((kill, self._kill(kill)) for kill in kills if kill.container_id not in killed)
        later = [kill._replace(why_not=why_not) for kill, why_not in left if why_not]
        with self._lock:  # only now: what fails on the way is done again
            for kill in due:
                if self._kills.get(kill.container_id) is kill:
                    del self._kills[kill.container_id]
            for kill in later:
                self._kills.setdefault(kill.container_id, kill._replace(when=time.monotonic() + _RETRY_SECONDS))
            self._next_kill = min((kill.when for kill in self._kills.values()), default=math.inf)

    def _kill(self, kill: _Kill) -> str:
        """Kill it; return why that failed, and is to be tried again."""
        try:
            kill.starter.signal(kill.container_id, kill.identity, signal.SIGKILL)
        except LimpetError as error:
            _log.warning("container %s cannot be killed now: %s", kill.container_id, error)
            return str(error)
        return ""

    def _is_still_of(self, container_id: str, identity: ProcessIdentity) -> bool:
        """Say whether a container is the one that had this process: it may be deleted, and another have its id."""
        try:
            found = self._store.status(container_id).identity
        except NotFoundError:
            return False
        except LimpetError:  # it cannot be read: the starter looks whose process it is
            return True
        return found is None or found == identity  # none: its record is damaged


def _end(watch: _Watch, status: Status) -> Status:
    """Return the status of a container that has ended, unless that is known already."""
    found = watch.exit
    assert found is not None
    if status.finished_at:
        return status
    finished_at = found.finished_at or watch.noticed_at
    if found.never_ran:
        return end_never_run(status, found.never_ran, finished_at=finished_at)
    return end(status, found.code, finished_at=finished_at, is_out_of_memory=found.is_out_of_memory)
