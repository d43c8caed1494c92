"""The errors of limpet: one small family, raised by every layer and caught by one base class.

A message says what was wrong, with which value, and what to do about it. The class tells the kind, so that
a caller can act on it; the command line gives each kind its own exit status.
"""

_MAX_PATH = 4096


def quote(text: object) -> str:
    """Return a value from outside as a message shows it: quoted and escaped, and not all of a long one."""
    return _quote(text, 80)


def quote_path(path: object) -> str:
    """Return a path as a message shows it: whole, unless it is longer than any can be."""
    return _quote(path, _MAX_PATH)


def _quote(text: object, longest: int) -> str:
    if isinstance(text, str) and len(text) > longest:
        return f"{text[:60]!r}... ({len(text)} characters)"
    return repr(text)


class LimpetError(Exception):
    """Anything that limpet refuses or could not do."""


class InvalidInputError(LimpetError, ValueError):
    """A value from outside (config, id, path, image, argument, environment) is not acceptable; nothing changed."""


class NotFoundError(LimpetError, LookupError):
    """No container, sandbox or image has this id; or a prefix of an id matches none, or several."""


class AlreadyExistsError(LimpetError):
    """The id or the name is taken by another container or sandbox."""


class InvalidStateError(LimpetError):
    """The container's state does not allow this: for instance, starting what is not CREATED."""


class StartError(LimpetError):
    """The container's program could not be started. The container is EXITED with code 128, reason StartError."""


class UnsupportedError(LimpetError):
    """This kernel, file system or database cannot do what was asked, and doing less would break a promise."""


class ClosedError(LimpetError):
    """The engine or store was closed, or this process is a fork of the one that opened it."""


class StateDirectoryError(LimpetError):
    """The state directory cannot be used: not a directory, not ours, not private, not writable."""


class StateDirectoryLockedError(StateDirectoryError):
    """Another process has the state directory open. `holder_pid` is its pid, or None where it is not known."""

    def __init__(self, message: str, holder_pid: int | None = None) -> None:
        super().__init__(message)
        self.holder_pid = holder_pid


class StoreError(LimpetError):
    """The database could not do its work. Unless a subclass says otherwise nothing was written."""


class DiskFullError(StoreError):
    """The disk is full (or over quota). Nothing was written; free some space and call again."""


class OutcomeUnknownError(StoreError):
    """The commit failed in a way that leaves open whether it is on disk; reopen the store to learn the truth."""


class StoreDamagedError(StoreError):
    """The database, its WAL or one record is damaged, and the message says where. Nothing is guessed."""


class StoreReplacedError(StoreError):
    """The database or its WAL was unlinked, renamed or replaced while it was open. Nothing was acknowledged."""


class StoreFencedError(StoreError):
    """Another engine has opened this state since; this one may not write to it any more."""


class StoreTooNewError(StoreError):
    """The database was made by a newer limpet. It was left untouched; use that version, or a backup."""
