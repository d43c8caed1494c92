"""The log of changes of a state directory, read and waited for beside a live engine, or while there is none.

An event is given only if a power cut cannot take it away any more. A commit that a live owner has made is flushed
before anybody can see it. One that was written when its writer was killed may be seen and be unflushed, so the WAL is
flushed first, unless whoever owns the database now has done so: it did with its first commit.
"""

import os
from collections.abc import Mapping

from limpet.engine.database import EventPage
from limpet.engine.database.sqlite import Source
from limpet.engine.state.bell import Bell
from limpet.engine.state.lock import find_holder
from limpet.engine.state.names import DATABASE
from limpet.engine.state.owner import read_owner
from limpet.engine.state.steps import whole
from limpet.schema.errors import ClosedError, StoreError, StoreReplacedError


class SnapshotFeed:
    """The log of one node. Each read is a short transaction, so that it never holds the WAL back."""

    def __init__(self, path: str, node: str) -> None:
        self.node = node
        self._path = path
        self._database = os.path.join(path, DATABASE)
        self._file = _identify(self._database)
        self._bell = Bell(path)  # before the first read, so that nothing is missed in between
        self._source = Source(self._database, node)
        self._flushed = 0
        """The revision up to which all is known to be flushed."""
        self._sandboxes: Mapping[str, str] = {}
        self._sandboxes_at = -1
        """At which revision they were looked at."""

    @whole
    def read(self, after: int, limit: int) -> EventPage:
        """Return up to `limit` events that follow the revision `after`. Raises ClosedError, StoreError."""
        if self._bell.is_closed:
            raise _closed()
        page = self._source.ask(lambda reader: reader.load_events(after, limit))
        if _identify(self._database) != self._file or page.newest < self._flushed:
            raise StoreReplacedError(
                f"{self._database} was removed or replaced while it was watched; list anew, then watch from the list's"
                " revision"
            )
        if page.newest > self._flushed:
            self._flush(page.epoch)
            self._flushed = page.newest
        return page

    @whole
    def name_sandboxes(self) -> Mapping[str, str]:
        """Return the name of each sandbox that is there now by its id."""
        if self._sandboxes_at != self._flushed:
            rows = self._source.ask(lambda reader: reader.load_sandboxes())
            self._sandboxes, self._sandboxes_at = {row.id: row.name for row in rows}, self._flushed
        return self._sandboxes

    def wait(self, after: int, timeout: float | None) -> None:  # noqa: ARG002  # what is new is seen by reading
        """Return at the owner's ring, or after a while, which is at most `timeout` seconds. Raises ClosedError."""
        self._bell.wait(timeout)
        if self._bell.is_closed:
            raise _closed()

    def close(self) -> None:
        """Let whoever waits get ClosedError. May be repeated."""
        self._bell.close()

    def __del__(self) -> None:
        if hasattr(self, "_source"):
            self._source.close()

    def _flush(self, epoch: int) -> None:
        """See to it that what was read is on disk: the last writer may have been killed before it had flushed it."""
        owner = read_owner(self._path)
        if owner is not None and not owner.closed and owner.epoch == epoch and find_holder(self._path) == owner.pid:
            return
        try:
            wal = os.open(f"{self._database}-wal", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # all is in the database, and was flushed there before the WAL was removed
        except OSError as error:
            raise StoreError(f"{self._database}-wal: {error.strerror}; what it holds may not be on disk") from error
        try:
            os.fsync(wal)
        except OSError as error:
            raise StoreError(f"{self._database}-wal: {error.strerror}; what it holds may not be on disk") from error
        finally:
            os.close(wal)


def _closed() -> ClosedError:
    return ClosedError("the watch was closed; begin another with the revision of the last event")


def _identify(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
