"""What a store has to do with the fleet: nothing, unless it is opened with one; then it is told what was written."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from limpet.engine.database import Changes
from limpet.engine.state.directory import StateDirectory
from limpet.engine.state.fleet_choice import FleetChoice
from limpet.engine.state.identity import read_identity
from limpet.engine.state.names import DATABASE
from limpet.engine.store.commit import Request, settle
from limpet.schema.errors import InvalidInputError, StateDirectoryError, UnsupportedError, quote

if TYPE_CHECKING:
    from limpet.engine.fleet import Address, FleetLag, Shipper

_ACKS = ("async", "sync")


class FleetLink:
    """A store's place in a fleet, or in none."""

    def __init__(self, choice: FleetChoice) -> None:
        """Raise InvalidInputError for a choice that is none, UnsupportedError if the driver is not installed."""
        if choice.ack not in _ACKS:
            raise InvalidInputError(f"fleet_ack {quote(choice.ack)}: use {' or '.join(_ACKS)}")
        timeout: object = choice.timeout
        if not (isinstance(timeout, int | float) and timeout > 0):
            raise InvalidInputError(f"fleet_timeout {quote(timeout)}: give seconds, more than 0")
        self._address = _parse(choice.url) if choice.url else None
        self._timeout = min(choice.timeout, threading.TIMEOUT_MAX)  # for ever is as good as three hundred years
        self._is_sync = choice.ack == "sync"
        self._shipper: Shipper | None = None
        self._later = threading.local()

    def join(self, directory: StateDirectory, node: str, doubts: Callable[[], Mapping[str, tuple[str, str]]]) -> None:
        """Begin to send, if there is a fleet, and what is in doubt here with it.

        Raises StateDirectoryError, StoreError.
        """
        if self._address is None:
            return
        from limpet.engine.fleet import Shipper  # noqa: PLC0415  # see `_parse`

        identity = read_identity(directory.path)
        if identity is None:
            raise StateDirectoryError(f"state directory {directory.path}: its identity cannot be read")
        self._shipper = Shipper(
            self._address,
            directory.join(DATABASE),
            node,
            (identity.id, directory.path),
            doubts,
            is_awaited=self._is_sync,
        )
        self._shipper.start()  # only now: whatever interrupts this, `leave` knows of it

    @property
    def lag(self) -> "FleetLag | None":
        """How far the fleet is behind; None without a fleet."""
        return None if self._shipper is None else self._shipper.lag

    @property
    def is_awaited(self) -> bool:
        """True if a change is waited for until the fleet has it."""
        return self._is_sync and self._shipper is not None

    def note(self, changes: Changes, revision: int) -> None:
        """Have it sent what has become durable, in the order of commits. May be repeated at once."""
        if self._shipper is not None:
            self._shipper.note(changes, revision)

    def wait(self) -> None:
        """Return once the fleet has what was noted, if that is asked for and not put off.

        Raises FleetUnknownError, FleetFencedError.
        """
        if self._shipper is not None and self._is_to_wait:
            self._shipper.wait(self._timeout)

    @property
    def _is_to_wait(self) -> bool:
        return self.is_awaited and not getattr(self._later, "depth", 0)

    def expect(self, request: Request) -> None:
        """Have a request's caller woken once, by the fleet; before it is submitted. See `require_sent`."""
        if self._is_to_wait:
            request.until_sent, request.patience = True, self._timeout

    def answer(self, requests: Sequence[Request]) -> None:
        """Tell callers what became of their requests; who waits for the fleet is told when it has them.

        May be repeated.
        """
        kept: list[Request] = []
        others: list[Request] = []
        for request in requests:
            is_kept = request.until_sent and request.error is None
            if is_kept:
                request.settled = True
                is_kept = request.until_sent  # whoever has just lost patience sees that it is settled, or is told now
            (kept if is_kept else others).append(request)
        if kept:
            self.keep(kept)
        if others:
            settle(others)

    def keep(self, requests: Sequence[Request]) -> None:
        """Have callers told once the fleet has all that was noted until now, or will not have it."""
        assert self._shipper is not None
        promise = self._shipper.make_promise(partial(settle, requests), len(requests))
        for request in requests:
            request.promise = promise
        self._shipper.keep(promise)

    def wait_for(self, request: Request) -> None:
        """Return once the fleet has what a request has written, if its caller expects that.

        Raises FleetUnknownError, FleetFencedError.
        """
        if self._shipper is None or not request.until_sent:
            return
        if request.promise is None:  # its caller has committed it
            self._shipper.wait(self._timeout)
        else:
            self._shipper.wait_for(request.promise, request.wake, self._timeout)

    def require_sent(self, request: Request) -> None:
        """Raise what `wait_for` raises unless the fleet has what a request has written; wait for nothing."""
        if self._shipper is not None and request.promise is not None:
            self._shipper.require_sent(request.promise, self._timeout)

    def forget(self, request: Request) -> None:
        """Keep nothing for a caller who waits no more."""
        if self._shipper is not None and request.promise is not None:
            self._shipper.leave(request.promise)

    def time_left(self, request: Request) -> float:
        """Return for how many seconds a request's caller is still to wait for the fleet."""
        since = None if request.promise is None else request.promise.since
        return self._timeout if since is None else since + self._timeout - time.monotonic()

    @contextmanager
    def later(self) -> Iterator[None]:
        """Do not wait on this thread while the block runs: no step is cut in two because a fleet is away."""
        self._later.depth = getattr(self._later, "depth", 0) + 1
        try:
            yield
        finally:
            self._later.depth -= 1

    def leave(self) -> None:
        """Send what there is, for a few seconds at most, and stop. May be repeated."""
        if self._shipper is not None:
            self._shipper.close()

    def abandon(self) -> None:
        """In a fork: leave everything to the parent."""
        if self._shipper is not None:
            self._shipper.abandon()


def _parse(url: str) -> "Address":
    try:
        # Imported here: whoever has no fleet needs no driver, and does not wait for it.
        from limpet.engine.fleet import Address  # noqa: PLC0415
    except ImportError as error:
        raise UnsupportedError(
            f"fleet: the driver of PostgreSQL is missing ({error}); pip install limpet[fleet]"
        ) from error
    return Address(url)
