"""The keeper's loop: one epoll set, and what is called when a descriptor of it can be read."""

import os
import select
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress


class Loop:
    """Descriptors that are watched, each with its handler."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self.anonymous = os.fstat(self._poll.fileno())
        """What fstat(2) says of the epoll set: the same as of each pidfd before Linux 6.9."""

    def watch(self, descriptor: int, handler: Callable[[], None]) -> None:
        """Have `handler` called whenever the descriptor can be read. Raises OSError."""
        self._handlers[descriptor] = handler
        try:
            self._poll.register(descriptor, select.EPOLLIN)
        except OSError:
            del self._handlers[descriptor]
            raise

    def unwatch(self, descriptor: int) -> None:
        """Have it called no more; to be done before the descriptor is closed. May be repeated."""
        if self._handlers.pop(descriptor, None) is not None:
            with suppress(OSError):  # it goes with the descriptor in any case
                self._poll.unregister(descriptor)

    def watch_children(self, notice: Callable[[], None]) -> None:
        """Have `notice` called after SIGCHLD: daemons that came to us have to be reaped when they end."""
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.siginterrupt(signal.SIGCHLD, False)  # no call is cut short by it

        def handle() -> None:
            notice()
            _drain(read)

        self.watch(read, handle)

    def wait(self, seconds: float) -> "list[tuple[int, int]]":
        """Wait until something can be read, for so long at most; return what `serve` is to be given."""
        return self._poll.poll(seconds)

    def serve(self, ready: Sequence[tuple[int, int]]) -> None:
        """Call the handlers of what can be read."""
        # As it was when that was told: a handler before may have closed it, and its number be another's by now.
        for descriptor, handler in [(each, self._handlers.get(each)) for each, _ in ready]:
            if handler is not None and self._handlers.get(descriptor) is handler:
                with suppress(Exception):  # one that cannot be served now; the next tick looks at all again
                    handler()


def _drain(descriptor: int) -> None:
    with suppress(BlockingIOError):
        while os.read(descriptor, 4096):
            pass
