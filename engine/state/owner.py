"""The record that the last owner of a state directory left there."""

import os

import msgspec
from msgspec.structs import replace

from limpet.engine.state.names import OWNER
from limpet.recovery.files import find_small_file
from limpet.schema.decoders import make_decoder

_OWNER_BYTES = 4096


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """The last engine's record beside the database, which shows whether the database has gone back in time."""

    pid: int
    epoch: int
    """The epoch of its opening: a database that knows only an older one is not the one it wrote to."""
    node: str = ""
    """The node whose epoch it is; empty in the record of an older limpet."""
    closed: bool
    """True once everything is in the database file; while False, acknowledged commits may be only in the WAL."""

    def as_closed(self) -> "Owner":
        """Return the record of an owner that has closed the database: all is in its file, and no WAL is missed."""
        return replace(self, pid=os.getpid(), closed=True)


_owner = make_decoder(Owner)


def load_owner(path: str) -> Owner | None:
    """Return the last owner's record in the state directory `path`, None if there is none, or no valid one.

    Raises OSError if it cannot be read now: without it nothing tells that the database or its WAL is another.
    """
    data = find_small_file(os.path.join(path, OWNER), _OWNER_BYTES)
    try:
        return None if data is None else _owner.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def read_owner(path: str) -> Owner | None:
    """Return the same for who only looks, and None also where it cannot be read now."""
    try:
        return load_owner(path)
    except OSError:
        return None
