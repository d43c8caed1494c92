"""Sending a node's log of changes to the fleet: a thread that costs the node nothing while the fleet is away.

The node's own database says what is to be sent; only which rows were written without an event is told in memory. After
an opening, and where the log does not reach back any more, all rows are compared.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar

from limpet.engine.database import Changes
from limpet.engine.database.sqlite.extract import ROWS, Extract, Extractor, Key
from limpet.engine.fleet import batch
from limpet.engine.fleet.address import Address, Connection
from limpet.engine.fleet.batch import Claim, Doubts
from limpet.engine.fleet.recent import MOST, Recent
from limpet.engine.fleet.upgrade import require_schema
from limpet.recovery.thread import Thread
from limpet.schema.errors import FleetError, FleetFencedError, FleetUnknownError, LimpetError, ResourcesError, quote
from limpet.schema.events import OF_ITEMS, OF_SANDBOXES, EventKind
from limpet.schema.rows import EventRow
from limpet.schema.telling import get_log

PAGE = 1024
"""So many events or rows go into one transaction."""
_LINGER_SECONDS, _LONGEST_LINGER = 0.02, 0.25
"""Where nobody waits for the fleet, changes are gathered for so long at least, and at most."""
_REST = 15
"""And for so many times as long as the last sending took: what is sent shares a lock, cores and a disk with callers."""
_PART = 0.5
"""Where callers wait, as many as last are expected again, for this part of the last sending's time."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 15.0
_CLOSE_SECONDS = 5.0
_PRUNED_AT_ONCE = 1024
_STATUS = "container_status"
_TOGETHER = (("sandbox", "sandbox_status"), ("container", _STATUS), ("item",))
"""The tables of present rows; a row of one alone would look damaged to whoever comes in between."""

_Any = TypeVar("_Any")
_log = get_log("limpet.fleet")


class FleetLag(NamedTuple):
    """How far the fleet is behind this node."""

    revisions: int
    """So many events were not sent yet, as far as is known."""
    seconds: float
    """For how long the oldest change has waited that was not sent yet; 0 if none waits."""
    error: str = ""
    """Why nothing can be sent at present; empty while all is well."""


class Promise:
    """That callers are told once the fleet has what they have written, or will never have it."""

    __slots__ = ("count", "is_told", "since", "tell", "ticket")

    def __init__(self, tell: Callable[[], object], count: int = 1) -> None:
        self.tell = tell
        self.count = count
        """So many wait for it still."""
        self.ticket = 0
        self.since = time.monotonic()
        self.is_told = False

    def let_go(self) -> None:
        """Keep nothing of who was told, or waits no more: they keep this, and only the collector would free both."""
        self.tell = _nobody


def _nobody() -> None:
    """Tell nobody."""


class Shipper:
    """Sends one node's changes, in their order. Thread-safe."""

    def __init__(
        self,
        address: Address,
        path: str,
        node: str,
        directory: tuple[str, str],
        doubts: Callable[[], Doubts],
        *,
        is_awaited: bool,
    ) -> None:
        """Nothing is sent until `start`.

        `path` is that of the node's database, `directory` identity and path of its state directory; `doubts` is asked
        what the node does not vouch for. Raises StoreError if the database cannot be read.
        """
        self._address = address
        self._node = node
        self._directory = directory
        self._is_awaited = is_awaited
        self._doubts = doubts
        self._told: Doubts | None = None
        """The doubts that the fleet has, told on this connection. There may be as many as there are containers."""
        self._extractor = Extractor(path, node)
        self._held: Claim | None = None
        self._is_whole = False
        """True if the fleet had all rows at some instant of this opening, so that what changed since is enough."""
        self._cursor = 0
        self._pruned = 0
        self._turn = threading.Condition()  # guards what follows; the sending thread alone waits for it
        self._promises: deque[Promise] = deque()
        """In the order of their tickets."""
        self._waiting = 0
        """So many callers wait for them."""
        self._callers = 0
        """So many waited when something was sent last, for that or for what has come since."""
        self._expected: int | None = None
        """The sending thread is to be woken once so many wait; None while it does not wait for them."""
        self._rows: dict[str, set[Key]] = {_STATUS: set(), "sandbox_status": set()}
        self._recent = Recent(is_whole=False)
        self._before: Extract | None = None
        """What was sent last on this connection."""
        self._read_until = 0
        """The disk was looked at when this was the newest event."""
        self._ticket = 1  # whatever there is at the opening waits, too
        self._sent = 0
        self._newest = 0
        self._waiting_since: float | None = time.monotonic()
        self._trouble: LimpetError | None = None
        self._closing = threading.Event()
        self._is_over = False
        self._thread = Thread(target=self._run, name="limpet-fleet")

    def start(self) -> None:
        """Begin to send. Raises ResourcesError. Whatever else is raised meanwhile: `close` ends what has begun."""
        try:
            self._thread.start()
        except RuntimeError as error:
            raise ResourcesError("no thread can be started that sends to the fleet") from error

    def note(self, changes: Changes, revision: int) -> None:
        """Have it sent what has just become durable, in the order of commits; `revision` is the newest event's."""
        with self._turn:
            self._recent.add(changes)
            self._rows[_STATUS].update((key,) for key in changes.statuses)
            self._rows["sandbox_status"].update((key,) for key in changes.sandbox_statuses)
            self._newest = max(self._newest, revision)
            self._ticket += 1
            if self._waiting_since is None:
                self._waiting_since = time.monotonic()
            if self._expected is None:
                self._turn.notify_all()

    @property
    def lag(self) -> FleetLag:
        """How far the fleet is behind."""
        with self._turn:
            waits = 0.0 if self._waiting_since is None else time.monotonic() - self._waiting_since
            return FleetLag(max(self._newest - self._cursor, 0), waits, str(self._trouble or ""))

    def make_promise(self, tell: Callable[[], object], count: int) -> Promise:
        """Return what is kept by `keep`: `tell` wakes so many callers, may be called twice, by another thread."""
        return Promise(tell, count)

    def keep(self, promise: Promise) -> None:
        """Have callers told once the fleet has all that was noted before this was called."""
        with self._turn:
            promise.ticket = self._ticket
            is_kept = not self._is_answered(promise)
            if is_kept:
                self._promises.append(promise)
                self._waiting += promise.count
                if self._expected is not None and self._waiting >= self._expected:
                    self._turn.notify_all()
        if not is_kept:
            promise.is_told = True
            promise.tell()
            promise.let_go()

    def wait(self, timeout: float) -> None:
        """Return once the fleet has all that was noted before this was called.

        Raises FleetUnknownError after `timeout` seconds, FleetFencedError if it will never have it.
        """
        told = threading.Lock()
        told.acquire()
        promise = Promise(told.release)
        self.keep(promise)
        self.wait_for(promise, told, timeout)

    def wait_for(self, promise: Promise, told: threading.Lock, timeout: float) -> None:
        """Do the same for what was promised, `timeout` seconds after that; `told` is released by whoever tells."""
        left = promise.since + timeout - time.monotonic()
        try:
            if not promise.is_told and left > 0:
                told.acquire(timeout=left)
        finally:
            if not promise.is_told:
                self.leave(promise)
        self.require_sent(promise, timeout)

    def require_sent(self, promise: Promise, timeout: float) -> None:
        """Raise what `wait` raises unless what was promised is there; `timeout` is for the words alone."""
        if self._sent >= promise.ticket:  # it only grows: all who are told at once need not queue up for the lock
            return
        with self._turn:
            if self._sent >= promise.ticket:
                return
            if isinstance(self._trouble, FleetFencedError):
                raise FleetFencedError(f"{self._trouble}; the change is durable on this node") from self._trouble
            raise FleetUnknownError(
                "the change is durable on this node; that the fleet has it was not known"
                f" {'when the store was closed' if self._is_over else f'after {timeout:g} s'}"
                f" ({self._trouble or 'it is slow'})"
            )

    def leave(self, promise: Promise) -> None:
        """Have one caller less wait for a promise: while the fleet is away nothing is kept for who has gone."""
        with self._turn:
            if promise in self._promises:
                promise.count -= 1
                self._waiting -= 1
                if promise.count == 0:
                    self._promises.remove(promise)
                    promise.let_go()

    def _is_answered(self, promise: Promise) -> bool:
        return self._sent >= promise.ticket or self._is_over or isinstance(self._trouble, FleetFencedError)

    def _tell_waiters(self) -> None:
        """Tell those whose changes are there, or all if nothing more will be. May be repeated after a failure."""
        while True:
            with self._turn:
                if not self._promises or not self._is_answered(self._promises[0]):
                    return
                promise = self._promises[0]
                promise.is_told = True
            promise.tell()
            with self._turn:
                if promise in self._promises:
                    self._promises.remove(promise)
                    self._waiting -= promise.count
            promise.let_go()

    def close(self) -> None:
        """Send what there is, for a few seconds at most, and stop. May be repeated."""
        self._closing.set()
        with self._turn:
            self._turn.notify_all()
        if self._thread.is_alive():  # it may never have been started; amid its beginning it ends at once
            self._thread.join(_CLOSE_SECONDS)
        with self._turn:
            self._is_over = True
        self._tell_waiters()
        self._extractor.close()

    def abandon(self) -> None:
        """In a fork: leave everything to the parent."""
        self._extractor.abandon()

    def _run(self) -> None:
        """Send until it is over. Nothing else ends this thread, be there no memory even to tell what is wrong."""
        failure: BaseException | None = None
        while True:
            try:
                if failure is not None:
                    time.sleep(_FIRST_PAUSE)
                    told, failure = failure, None
                    _log.error("node %s: sending to the fleet failed", self._node, exc_info=told)
                self._send()
                return
            except BaseException as error:  # noqa: BLE001  # logged, once that can be done
                failure = error

    def _send(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            began, sent = time.monotonic(), self._sent
            try:
                with self._address.connect() as connection:
                    self._serve(connection)
                return
            except LimpetError as error:
                is_final = isinstance(error, FleetFencedError)
                self._tell(error)
            except Exception as error:  # noqa: BLE001  # told, and tried again: this thread has nobody to raise it to
                _log.exception("node %s: sending to the fleet failed", self._node)
                is_final = False
                self._tell(FleetError(f"sending to the fleet failed: {error!r}"))
            if is_final:
                return
            is_new = self._sent > sent or time.monotonic() - began > _LONGEST_PAUSE
            pause = _FIRST_PAUSE if is_new else min(2 * pause, _LONGEST_PAUSE)
            if self._closing.wait(pause):
                return

    def _tell(self, error: LimpetError) -> None:
        with self._turn:
            is_new = str(self._trouble) != str(error)
            self._trouble = error
        self._tell_waiters()
        if is_new and not self._is_over:
            _log.warning("node %s: %s", self._node, error)

    def _serve(self, connection: Connection) -> None:
        """Send what there is and what comes, until the store is closed."""
        require_schema(self._address, connection)
        batch.introduce(connection, self._node)
        held = self._hold(connection)
        while True:
            began = time.monotonic()
            if self._is_whole:
                self._send_changes(connection)
            else:
                self._send_whole(connection)
            took = time.monotonic() - began
            linger = 0.0
            with self._turn:
                if not self._turn.wait_for(lambda: self._closing.is_set() or self._has_news, batch.LEASE_SECONDS / 3):
                    is_idle = True
                elif self._has_news:
                    is_idle = False
                else:
                    return
                if self._is_awaited and not is_idle:
                    self._expect_callers(_PART * took)
                elif not is_idle:
                    linger = min(max(_LINGER_SECONDS, _REST * took), _LONGEST_LINGER)
            if is_idle:
                self._tell_doubts(partial(batch.beat, connection, held))
            elif linger:
                self._closing.wait(linger)

    def _hold(self, connection: Connection) -> Claim:
        """Claim the node, or tell the fleet that who has it is there again.

        A fleet that was restored from a backup, or whose standby had not everything, lacks what it had confirmed.
        """
        doubts = self._doubts()
        if self._held is not None and batch.is_lost(connection, self._held, self._directory[0]):
            self._held = None
        if self._held is None or batch.load_revision(connection, self._node) < self._cursor:
            self._is_whole = False
        if self._held is None:
            self._require_same_history(connection)
            self._held = batch.claim(connection, self._node, *self._directory, doubts)
        else:
            batch.beat(connection, self._held, doubts)
        self._told = doubts
        return self._held

    def _require_same_history(self, connection: Connection) -> None:
        """Raise FleetFencedError if the fleet has what this node has never written, or does not know any more.

        Its disk was put back to an earlier state, or its database is new: what the fleet has may be all there is.
        """
        newest = batch.load_newest_event(connection, self._node, self._directory[0])
        if newest is None:
            return
        ours = self._extractor.extract([newest.revision], lambda _: {})
        if ours.pruned < newest.revision and not ours.damaged and newest not in ours.events:
            raise FleetFencedError(
                f"the fleet has changes of node {quote(self._node)} that this state directory has not, the newest"
                f" with revision {newest.revision}: its database is new, or was put back from a backup; nothing is"
                " sent. To have them, restore the node from the fleet into a new directory"
            )

    def _expect_callers(self, seconds: float) -> None:
        """Wait until as many wait as last; with the lock held.

        They come back at about the same time. The first of them would else have a transaction to itself, which all the
        others then wait for.
        """
        self._expected = self._callers
        try:
            self._turn.wait_for(lambda: self._closing.is_set() or self._waiting >= self._callers, seconds)
        finally:
            self._expected = None

    @property
    def _has_news(self) -> bool:
        return self._sent < self._ticket

    def _take(self) -> tuple[int, dict[str, set[Key]], Recent]:
        """Return the newest ticket, and the rows that were written until then: by their keys, and as far as known."""
        with self._turn:
            taken, self._rows = self._rows, {table: set() for table in self._rows}
            recent, self._recent = self._recent, self._recent.follow()
            return self._ticket, taken, recent

    def _give_back(self, rows: Mapping[str, set[Key]]) -> None:
        with self._turn:
            self._recent.spoil()
            for table, keys in rows.items():
                self._rows[table] |= keys

    def _confirm(self, ticket: int, cursor: int) -> None:
        """Believe that all is sent that there was when `ticket` was the newest."""
        with self._turn:
            self._cursor = cursor
            self._newest = max(self._newest, cursor)
            self._sent = ticket
            self._trouble = None
            self._waiting_since = None if self._sent == self._ticket else time.monotonic()
            self._callers = self._waiting
        self._tell_waiters()

    def _send_changes(self, connection: Connection) -> None:
        """Send all events there are, and with each page the present rows of what it tells of."""
        ticket, rows, recent = self._take()
        try:
            while True:
                found = recent.extract(self._cursor, self._before)
                if found is None or found.newest - self._read_until > MOST:
                    found = self._extractor.extract((self._cursor, PAGE), partial(_choose, rows))
                    self._read_until = found.newest
                if found.pruned > self._cursor:
                    self._is_whole = False
                    break
                self._write(connection, found, revision=found.reached, gone=self._find_gone(connection, found))
                rows = {table: set() for table in rows}
                with self._turn:
                    self._cursor = found.reached
                if found.reached == found.newest:
                    self._confirm(ticket, found.reached)
                    return
        except BaseException:
            self._give_back(rows)
            raise
        self._give_back(rows)
        self._send_whole(connection)

    def _find_gone(self, connection: Connection, found: Extract) -> list[int]:
        """Return the events that are to leave the fleet, too, now and then."""
        if found.pruned - self._pruned < _PRUNED_AT_ONCE:
            return []
        self._pruned = found.pruned
        query = "SELECT revision FROM event WHERE node = %s AND revision <= %s"
        theirs = {row[0] for row in connection.execute(query, (self._node, found.pruned)).fetchall()}
        return sorted(theirs - self._extractor.load_kept_events(found.pruned))

    def _send_whole(self, connection: Connection) -> None:
        """Compare all rows by their checksums, and send those that differ. Several transactions: the last says so."""
        ticket, rows, _ = self._take()
        try:
            ours, theirs = self._extractor.extract_keys(), batch.load_keys(connection, self._node)
            gone = {table: {key for key in theirs.rows[table] if key not in ours.rows[table]} for table in ROWS}
            stale = sorted(_find_differing(theirs.events, ours.events))
            self._write(connection, self._load_rows(_complete(gone)), gone=stale)
            for tables in _TOGETHER:
                differing = (_find_differing(ours.rows[table], theirs.rows[table]) for table in tables)
                for part in _parts(sorted(set().union(*differing))):
                    self._write(connection, self._load_rows(dict.fromkeys(tables, part)))
            missing = sorted(_find_differing(ours.events, theirs.events))
            for revisions in _parts(missing):
                self._write(connection, self._extractor.extract(revisions, lambda _: {}))
            self._write(connection, self._load_rows({}), revision=ours.newest, is_whole=True)
        except BaseException:
            self._give_back(rows)
            raise
        self._pruned = ours.pruned
        self._is_whole = True
        self._confirm(ticket, ours.newest)

    def _load_rows(self, keys: Mapping[str, Collection[Key]]) -> Extract:
        return self._extractor.extract(frozenset(), lambda _: keys)

    def _write(
        self,
        connection: Connection,
        found: Extract,
        *,
        revision: int | None = None,
        is_whole: bool = False,
        gone: Sequence[int] = (),
    ) -> None:
        assert self._held is not None
        for damage in found.damaged:
            _log.warning("node %s: %s is damaged and was not sent", self._node, damage)
        write = partial(
            batch.write_batch,
            connection,
            self._held,
            found,
            revision=revision,
            is_whole=is_whole,
            gone_events=list(gone),
        )
        self._before = None
        if not self._tell_doubts(write):
            self._held, self._is_whole = None, False
            raise FleetError(f"node {self._node}: the fleet has newer rows than this node; all are compared anew")
        self._before = found

    def _tell_doubts(self, write: Callable[..., _Any]) -> _Any:
        """Return what `write` returns, which is given the doubts unless the fleet has them."""
        doubts = self._doubts()
        # There may be as many as containers, and comparing them takes milliseconds; mostly it is the same object.
        written = write(doubts=None if doubts is self._told or doubts == self._told else doubts)
        self._told = doubts
        return written


def _choose(rows: Mapping[str, set[Key]], events: Sequence[EventRow]) -> Mapping[str, Collection[Key]]:
    """Return the keys of the rows to send with these events, and with the rows that were noted."""
    wanted: dict[str, set[Key]] = {table: set(rows.get(table, ())) for table in ROWS}
    # Rows may be ahead of a page of events that are behind: then an id may be another's by now, so all of it is sent.
    is_behind = len(events) >= PAGE
    for row in events:
        if row.kind in OF_ITEMS:
            wanted["item"].add((row.name, row.id))
        elif row.kind in OF_SANDBOXES:
            wanted["sandbox_status"].add((row.id,))
            if is_behind or row.kind != EventKind.SANDBOX_CHANGED:
                wanted["sandbox"].add((row.id,))
        else:
            wanted[_STATUS].add((row.id,))
            if is_behind or row.kind in {EventKind.ADDED, EventKind.DELETED}:
                wanted["container"].add((row.id,))
    return _complete(wanted) if is_behind else wanted


def _complete(keys: Mapping[str, Collection[Key]]) -> Mapping[str, Collection[Key]]:
    """Return these keys for all tables that belong together: since they were chosen, any may have come, or gone."""
    return {table: set().union(*(keys[each] for each in tables)) for tables in _TOGETHER for table in tables}


def _find_differing(these: Mapping[_Any, int], others: Mapping[_Any, int]) -> set[_Any]:
    """Return the keys of those that the others lack, or have with another checksum."""
    return {key for key, checksum in these.items() if others.get(key) != checksum}


def _parts(keys: Iterable[_Any]) -> Iterator[list[_Any]]:
    """Yield lists of at most a page of what there is."""
    rest = iter(keys)
    while part := list(islice(rest, PAGE)):
        yield part
