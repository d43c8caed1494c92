"""How a container was when it was deleted: the log of changes has its last status."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Protocol

from limpet.engine.store import Watch
from limpet.schema.errors import CursorTooOldError, NotFoundError, quote
from limpet.schema.events import EventKind
from limpet.schema.status import Status


class Watchable(Protocol):
    """A store, or a snapshot of one."""

    def watch(self, since: int | None = None, *, id: str = "", kinds: Iterable[str] = ()) -> Watch:
        """See `Store.watch`."""


def find_last_status(log: Watchable, container_id: str, seen: Status, since: int = 0) -> Status:
    """Return the last status of a container that was `seen`, and was deleted after the revision `since`.

    Raises NotFoundError if it was not, or if the log does not reach back so far.
    """
    with suppress(CursorTooOldError), _watch_deletions(log, container_id, since) as watch:
        while (event := watch.next(timeout=0)) is not None:
            last = event.status
            if last is not None and event.id == container_id and last.created_at == seen.created_at:
                return last
    raise NotFoundError(f"container {quote(container_id)} does not exist")


def _watch_deletions(log: Watchable, container_id: str, since: int) -> Watch:
    """Return those events that are kept of the deletion of containers with this id. Raises CursorTooOldError."""
    try:
        return log.watch(since, id=container_id, kinds=(EventKind.DELETED,))
    except CursorTooOldError as error:
        return log.watch(error.oldest - 1, id=container_id, kinds=(EventKind.DELETED,))
