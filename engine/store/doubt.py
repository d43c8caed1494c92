"""Doubts: why a container is Unknown. They are kept in memory only, and say nothing of what is on disk."""

from msgspec.structs import replace

from limpet.engine.store.rows import Kept
from limpet.schema.codec import row_to_status
from limpet.schema.errors import InvalidInputError, quote
from limpet.schema.status import Reason, Status

Doubt = tuple[str, str]
"""Why a container is Unknown: a word and a sentence."""
DAMAGED: Doubt = (
    Reason.DAMAGED,
    "its status on disk is missing, or does not match its checksum",
)
NOT_VERIFIED: Doubt = (Reason.UNVERIFIED, "not looked at since the store was opened; recover() will")


def require_doubt(container_id: str, doubt: object) -> None:
    """Raise InvalidInputError unless it is a Doubt: each look at the container would fail."""
    if not (isinstance(doubt, tuple) and len(doubt) == 2 and all(isinstance(part, str) for part in doubt)):
        raise InvalidInputError(f"container {quote(container_id)}: give a doubt as a word and a sentence")


def status_with_doubt(row: Kept, doubt: Doubt | None) -> Status:
    """Return the Status in `row`, flagged Unknown with reason and message if there is a doubt.

    An empty row stands for a container whose status on disk is damaged: all that is known is the doubt.
    """
    if not row:
        status, doubt = Status(), doubt or DAMAGED
    else:
        status = row_to_status(row)
    if doubt is None:
        return status
    return replace(status, reason=doubt[0], message=doubt[1], unknown=True)
