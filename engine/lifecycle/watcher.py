"""The watcher: one thread that waits for the exit of every running container, by pidfd.

It observes each exit, has it recorded, and only then reaps the process: a kill in between leaves a zombie whose exit
code the next engine may still read. One epoll set holds all pidfds, so waiting costs nothing per container. An exit
that cannot be recorded (a full disk) is kept and retried; meanwhile the container is Unknown.
"""

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from limpet.engine.starters import Starter
from limpet.schema.errors import ClosedError, LimpetError

_log = logging.getLogger("limpet.watcher")
_REAP_TIMEOUT_SECONDS = 10.0
_RETRY_SECONDS = 1.0

OnExit = Callable[[str, int | None, int], None]
"""(container id, exit code or None, nanoseconds since the epoch): records the exit durably."""


@dataclass(slots=True)
class _Watch:
    container_id: str
    pid: int
    pidfd: int
    finished_at: int = 0
    exit_code: int | None = None
    deadline: float = 0.0
    """When to stop waiting for another process to reap this one, or when to try recording again."""


class Watcher:
    """Watches the processes of a starter until they end, and has what is left of their groups ended."""

    def __init__(self, on_exit: OnExit, starter: Starter) -> None:
        self._on_exit = on_exit
        self._starter = starter
        self._epoll = select.epoll()
        self._lock = threading.Lock()
        self._watches: dict[int, _Watch] = {}  # by pidfd
        self._by_container: dict[str, _Watch] = {}
        self._waiting: list[_Watch] = []  # ended; waiting for their exit code or a retry
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._pipe = [self._wake_read, self._wake_write]
        self._epoll.register(self._wake_read, select.EPOLLIN)
        self._closing = False
        self._ending = threading.RLock()
        self._thread = threading.Thread(target=self._run, name="limpet-watch", daemon=True)
        self._thread.start()

    def watch(self, container_id: str, pid: int, pidfd: int) -> None:
        """Start watching a process, and take over `pidfd`. A container that is already watched keeps its watch."""
        with self._lock:
            if container_id in self._by_container or self._closing:
                os.close(pidfd)
                return
            watch = _Watch(container_id, pid, pidfd)
            self._watches[pidfd] = self._by_container[container_id] = watch
            self._epoll.register(pidfd, select.EPOLLIN)

    def pidfd(self, container_id: str) -> int | None:
        """Return the pidfd of a watched container, valid until its exit is recorded."""
        with self._lock:
            watch = self._by_container.get(container_id)
            return None if watch is None else watch.pidfd

    def close(self) -> None:
        """Stop watching. The containers keep running; recovery finds exits that are not recorded yet.

        May be repeated, and called by several threads: each descriptor is closed once, whatever interrupts it.
        """
        with self._lock:
            self._closing = True
        with self._ending:
            if self._thread.is_alive():
                os.write(self._wake_write, b"x")
                self._thread.join()
            self._epoll.close()
            while self._watches:
                os.close(self._watches.popitem()[0])
            while self._pipe:
                os.close(self._pipe.pop())

    def _run(self) -> None:
        while True:
            timeout = 0.05 if self._waiting else -1
            for descriptor, event in self._epoll.poll(timeout):
                if descriptor == self._wake_read:
                    return
                watch = self._watches.get(descriptor)
                if watch is not None:
                    self._notice(watch, reaped=bool(event & select.EPOLLHUP))
            for watch in [watch for watch in self._waiting if self._is_due(watch)]:
                self._waiting.remove(watch)
                self._write_down(watch)

    def _notice(self, watch: _Watch, *, reaped: bool) -> None:
        """Get the exit code of an ended process: at once, or when its parent has reaped it."""
        first = not watch.finished_at
        if first:
            watch.finished_at = time.time_ns()
        watch.exit_code = self._starter.read_exit(watch.pid, watch.pidfd)
        if watch.exit_code is not None or reaped:
            self._epoll.unregister(watch.pidfd)
            with suppress(ValueError):
                self._waiting.remove(watch)
            self._write_down(watch)
        elif first:
            # Not our child, and a zombie that we may not inspect: its code is readable once it is reaped (EPOLLHUP).
            self._epoll.modify(watch.pidfd, 0)
            watch.deadline = time.monotonic() + _REAP_TIMEOUT_SECONDS
            self._waiting.append(watch)

    def _is_due(self, watch: _Watch) -> bool:
        return time.monotonic() >= watch.deadline

    def _write_down(self, watch: _Watch) -> None:
        try:
            self._starter.signal(watch.pidfd, signal.SIGKILL)  # what is left of its group
            self._on_exit(watch.container_id, watch.exit_code, watch.finished_at)
        except ClosedError:
            return  # recovery will find it
        except LimpetError as error:
            _log.warning("container %s ended, but its exit cannot be recorded yet: %s", watch.container_id, error)
            watch.deadline = time.monotonic() + _RETRY_SECONDS
            self._waiting.append(watch)
            return
        self._starter.forget_exit(watch.pidfd)
        with self._lock:
            del self._watches[watch.pidfd]
            del self._by_container[watch.container_id]
            os.close(watch.pidfd)
