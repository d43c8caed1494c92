"""Items: what a runtime keeps beside containers and sandboxes, of kinds of its own (execs, volumes, leases)."""

from typing import Any

import msgspec

from limpet.schema.any_text import plain
from limpet.schema.errors import InvalidInputError, quote

MAX_ITEM_NAME_LENGTH = 256


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One value of the runtime's own, by kind and key."""

    kind: str
    key: str
    value: Any
    """Any JSON value, at most 64 KiB of it."""
    version: int
    """Grows by one with each value that is put. The first one is the revision at which the item was put: one that is
    deleted and put again never has a version that it had before."""
    updated_at: int
    """When this value was put, in nanoseconds since the epoch."""


def require_item_name(what: str, text: object) -> str:
    """Return `text` if it is a valid kind or key. Raises InvalidInputError otherwise."""
    if isinstance(text, str) and 1 <= len(text) <= MAX_ITEM_NAME_LENGTH and text.isprintable():
        return plain(text)
    raise InvalidInputError(f"item's {what} {quote(text)}: use 1 to {MAX_ITEM_NAME_LENGTH} printable characters")
