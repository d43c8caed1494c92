"""When a container or a sandbox is over."""

from msgspec.structs import replace

from limpet.engine.lifecycle.life import Life
from limpet.engine.state.clock import LATEST
from limpet.engine.store import Draft
from limpet.schema.errors import InvalidInputError, StoreDamagedError, quote
from limpet.schema.status import Status

_EARLIEST = 10**17
"""Of an expiry: less are seconds, milliseconds or microseconds, and would end at once what is to last for hours."""


def require_expiry(expires_at: object) -> None:
    """Raise InvalidInputError for what is no time of an expiry, in nanoseconds since the epoch, or 0."""
    if type(expires_at) is not int or (expires_at and not _EARLIEST <= expires_at <= LATEST):
        raise InvalidInputError(
            f"expires_at {quote(expires_at)}: nanoseconds since the epoch are needed, as of time.time_ns(), or 0 for"
            " never"
        )


def renew(life: Life, expires_at: int) -> Status:
    """Set when it is over, and return the status. Raises as `Container.renew` does."""
    with life.exclusive():
        life.runtime.begin_timetable()
        with life.runtime.store.transaction() as draft:
            _renew(life, draft, expires_at)
    life.runtime.note_container(life.id)
    return life.status


def _renew(life: Life, draft: Draft, expires_at: int) -> None:
    status = draft.checkpoint(life.id)
    if status is None:
        raise StoreDamagedError(f"container {life.id}: {draft.status(life.id).message}")
    if status.released or status.stop_requested_at:
        raise life.refuse("renew", "it was stopped or released, or its time was over")
    draft.replace(life.id, replace(draft.status(life.id), expires_at=expires_at))
