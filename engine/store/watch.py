"""Watching the log of changes: every event once, in order, and none that could still be lost.

A `Watch` asks a `Feed`, which reads the log and says when to look again: that of a store in the same process, or that
of a snapshot in another. What is read is checked for gaps, so that whoever watches is told of what was missed.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from time import monotonic
from typing import Protocol, Self

from limpet.engine.database import EventPage
from limpet.engine.state.process_bound import ProcessBound
from limpet.engine.store.match import Filter
from limpet.schema.codec import row_to_event
from limpet.schema.errors import CursorTooOldError, InvalidInputError, StoreDamagedError, quote
from limpet.schema.events import Event, EventKind
from limpet.schema.rows import EventRow, NameRow

PAGE = 256
"""So many events are read at once."""
_LAST = 2**63 - 1
"""SQLite has no greater number, so no event has a later revision."""


class Feed(Protocol):
    """A node's log of changes, to be read and waited for."""

    @property
    def node(self) -> str:
        """The node's name."""

    def name_sandboxes(self) -> Mapping[str, str]:
        """Return the name of each sandbox that is there now by its id."""

    def read(self, after: int, limit: int) -> EventPage:
        """Return up to `limit` events that follow the revision `after` and are durable.

        Raises ClosedError, StoreError.
        """

    def wait(self, after: int, timeout: float | None) -> None:
        """Return once there may be events that follow `after`, or after `timeout` seconds. Raises ClosedError."""

    def close(self) -> None:
        """Give up what waiting needs; whoever waits gets ClosedError. May be repeated."""


class Wanted:
    """Which events are asked for."""

    def __init__(
        self,
        id: str = "",
        name: str = "",
        sandbox_id: str = "",
        labels: Mapping[str, str] | None = None,
        kinds: Iterable[str] = (),
    ) -> None:
        """Raise InvalidInputError for a kind that is none, and for what is no text."""
        self._filter = Filter.of(id, name, sandbox_id, labels)
        if isinstance(kinds, str):
            raise InvalidInputError(f"kinds {quote(kinds)}: give a list of them")
        try:
            self._kinds = frozenset(map(EventKind, kinds))
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"kinds: {error}; use {', '.join(EventKind)}") from error

    def accepts(self, row: EventRow, feed: Feed) -> bool:
        """Say whether an event is asked for."""
        if self._kinds and row.kind not in self._kinds:
            return False
        if self._filter == Filter():
            return True
        if self._filter.sandbox_id and not self._is_inside(row.sandbox_id, feed.name_sandboxes()):
            return False
        return self._filter.accepts(NameRow(row.id, row.sandbox_id, row.name, row.labels), {row.sandbox_id})

    def _is_inside(self, sandbox_id: str, sandboxes: Mapping[str, str]) -> bool:
        """Say whether it is of a sandbox that is meant, as lists mean it, or of one that is not there any more."""
        text = self._filter.sandbox_id
        if text in sandboxes:
            return sandbox_id == text
        named = {key for key, name in sandboxes.items() if name == text}
        return sandbox_id in named if named else sandbox_id.startswith(text)


class Cursor:
    """How far somebody has come in the log: `revision` is that of the last event that was given or passed over."""

    def __init__(self, feed: Feed, since: int, wanted: Wanted) -> None:
        """Begin after the revision `since`. Raises InvalidInputError, CursorTooOldError, StoreError."""
        self._feed = feed
        self._wanted = wanted
        self._rows: deque[EventRow] = deque()
        """What was read and not yet given."""
        if type(since) is not int or since < 0:
            raise InvalidInputError(f"since: {quote(since)} is no revision; give that of a list or an event")
        self.revision = since
        page = feed.read(min(since, _LAST), PAGE)
        if since > page.newest:
            raise InvalidInputError(
                f"since: revision {quote(since)} is to come yet, the newest is {page.newest}; if an older database was"
                " put back, list anew and watch from the list's revision"
            )
        self.add(page)

    def add(self, page: EventPage) -> None:
        """Take in what was read after `last`. Raises CursorTooOldError, StoreDamagedError if events are missing."""
        expected = self.last + 1
        whole = [row for number, row in enumerate(page.rows, expected) if row.revision == number]
        is_whole = len(whole) == len(page.rows) and (whole or expected > page.newest)
        if is_whole or (whole and page.pruned <= self.last):  # what comes before a gap is given
            self._rows.extend(whole)
            return
        if page.pruned > self.last:
            raise CursorTooOldError(
                f"the events after revision {self.last} are not kept any more, the oldest is {page.pruned + 1}; list"
                " anew, then watch from the list's revision",
                oldest=page.pruned + 1,
            )
        raise StoreDamagedError(
            f"event {expected} is missing, and the log goes to {page.newest}; list anew, then watch from the list's"
            " revision, and see what limpet check finds"
        )

    @property
    def last(self) -> int:
        """The revision after which to read on."""
        return self._rows[-1].revision if self._rows else self.revision

    def next(self) -> Event | None:
        """Return the next event among what was read, None if there is none. Raises StoreDamagedError."""
        while self._rows:
            row = self._rows[0]
            event = row_to_event(self._feed.node, row)  # whether a damaged one is wanted cannot be said
            self._rows.popleft()
            self.revision = row.revision
            if self._wanted.accepts(row, self._feed):
                return event
        return None


class Watch(ProcessBound):
    """An iterator of events that waits for more. For one thread; made by `Store.watch` and `Snapshot.watch`.

    If the store or the snapshot is closed, whoever waits gets ClosedError. After an interrupt it is known what was
    given, but perhaps not to the caller: begin anew with the revision of the last event that you have dealt with.
    """

    def __init__(self, feed: Feed, since: int, wanted: Wanted) -> None:
        self._feed = feed
        try:
            self._cursor = Cursor(feed, since, wanted)
        except BaseException:
            feed.close()
            raise

    @property
    def revision(self) -> int:
        """That of the last event that was given, or passed over because nobody asked for it."""
        return self._cursor.revision

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        event = self.next()
        assert event is not None  # without a time limit there is one
        return event

    def next(self, timeout: float | None = None) -> Event | None:
        """Return the next event; None if there is none within `timeout` seconds, None for any time.

        Raises ClosedError; CursorTooOldError if more has happened than is kept since the last call; StoreDamagedError
        for an event that is damaged or missing, which a watch from a later revision passes over; another StoreError.
        """
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            event = self._cursor.next()
            if event is not None:
                return event
            page = self._feed.read(self._cursor.last, PAGE)
            if page.newest > self._cursor.last:
                self._cursor.add(page)
                continue
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0:
                return None
            self._feed.wait(self._cursor.last, left)

    def close(self) -> None:
        """End it: whoever waits gets ClosedError. May be repeated."""
        self._feed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
