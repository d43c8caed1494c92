"""limpet's errors: one small family, raised by every layer, with one base class.

A message says what was wrong, with which value, and what to do about it. The class gives the kind of error, so
that a caller can act on it; the command line gives each kind its own exit status.
"""

from collections.abc import Collection

_MAX_PATH = 4096


def quote(text: object) -> str:
    """Return an outside value for a message: quoted, escaped and shortened."""
    return _quote(text, 80)


def quote_path(path: object) -> str:
    """Return a path for a message: in full, unless it is longer than a path can be."""
    return _quote(path, _MAX_PATH)


def escape(text: str) -> str:
    r"""Return an outside text that tells no terminal anything: with \x1b for an escape, say."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def name_some(ids: Collection[str]) -> str:
    """Return ids for a message: the first, and how many others there are."""
    others = len(ids) - 1
    return f"{min(ids)} and {others} more" if others else min(ids)


def _quote(text: object, longest: int) -> str:
    if isinstance(text, str) and len(text) > longest:
        return f"{text[:60]!r}... ({len(text)} characters)"
    try:
        shown = repr(text)
    except Exception:  # noqa: BLE001  # it is the caller's code, or a number of more digits than Python writes
        return f"({type(text).__name__})"
    return shown if isinstance(text, str) or len(shown) <= _MAX_PATH else f"{shown[:60]}... ({type(text).__name__})"


class LimpetError(Exception):
    """Anything that limpet refuses or fails to do."""


class InvalidInputError(LimpetError, ValueError):
    """A value from outside (config, id, path, image, argument, environment) is invalid; nothing changed."""


class NotFoundError(LimpetError, LookupError):
    """No container, sandbox or image has this id or name, or an id that begins so."""


class AmbiguousError(LimpetError, LookupError):
    """A name, or the beginning of an id, means several. `candidates` are the ids of a few of them."""

    def __init__(self, message: str, candidates: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.candidates = candidates


class AlreadyExistsError(LimpetError):
    """The id or the name is taken by another container or sandbox."""


class VersionConflictError(LimpetError):
    """A value was to be replaced that somebody has changed since: read it again, and decide anew."""


class CursorTooOldError(LimpetError):
    """The events after this revision are not kept any more. List anew, then watch from the list's revision."""

    def __init__(self, message: str, oldest: int = 0) -> None:
        super().__init__(message)
        self.oldest = oldest
        """The revision of the oldest event that is left."""


class InvalidStateError(LimpetError):
    """The container's state does not allow this, such as starting a container that is not CREATED."""


class StartError(LimpetError):
    """The container's program could not be started. The container is EXITED with code 128, reason StartError."""


class KeeperError(LimpetError):
    """The keeper, which starts the containers of a state directory and sees how they end, cannot begin or answer."""


class WaitTimeoutError(LimpetError, TimeoutError):
    """The container had not ended when the time to wait was over; nothing changed."""


class UnsupportedError(LimpetError):
    """This kernel, file system, database or installation cannot do this, and doing less would break a promise."""


class ResourcesError(LimpetError):
    """The host has no descriptors, threads, processes or memory left for this. Free some, or raise the limit."""


class ClosedError(LimpetError):
    """The engine or store was closed, or this process is a fork of the one that opened it."""


class EngineGoneError(LimpetError):
    """A live engine ended before it said whether it did what a command asked; with `may_live` it only fell silent."""

    def __init__(self, message: str, *, may_live: bool = False) -> None:
        super().__init__(message)
        self.may_live = may_live


class StateDirectoryError(LimpetError):
    """The state directory cannot be used: not a directory, not ours, not private, not writable."""


class StateDirectoryLockedError(StateDirectoryError):
    """Another process has the state directory open. `holder_pid` is its pid, None if unknown."""

    def __init__(self, message: str, holder_pid: int | None = None) -> None:
        super().__init__(message)
        self.holder_pid = holder_pid


class StoreError(LimpetError):
    """The database failed. Nothing was written, unless a subclass says otherwise."""


class DiskFullError(StoreError):
    """The disk is full (or over quota). Nothing was written; free some space and call again."""


class OutcomeUnknownError(StoreError):
    """The commit failed, and may or may not be on disk; reopen the store to find out."""


class StoreDamagedError(StoreError):
    """The database, its WAL or a record is damaged; the message says which. Nothing is guessed."""


class StoreReplacedError(StoreError):
    """The database or its WAL was unlinked, renamed or replaced while it was open. Nothing was acknowledged."""


class StoreFencedError(StoreError):
    """Another engine has opened this state since; this one can no longer write to it."""


class StoreTooNewError(StoreError):
    """The database was created by a newer limpet. It was left untouched; use that version, or a backup."""


class FleetError(LimpetError):
    """The fleet's database cannot be reached, or refuses. The node's own state is not affected."""


class FleetUnknownError(FleetError):
    """The change is durable on this node; whether the fleet has it was not known in time. It is still being sent."""


class FleetFencedError(FleetError):
    """Another engine stands for this node in the fleet now, or the fleet has what this one has lost; the message says.

    Nothing more is sent.
    """


class FleetTooNewError(FleetError, StoreTooNewError):
    """The fleet's tables were made by a newer limpet. They were left untouched."""
