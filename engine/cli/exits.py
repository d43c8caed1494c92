"""The exit statuses: what each means, and which error leads to which."""

import click

from limpet.schema.errors import (
    AlreadyExistsError,
    InvalidInputError,
    InvalidStateError,
    LimpetError,
    NotFoundError,
    StateDirectoryLockedError,
    StoreDamagedError,
    StoreFencedError,
    StoreReplacedError,
    StoreTooNewError,
)

FAILED = 1
DAMAGED = 6
UNRESOLVED = 7
INTERRUPTED = 130

EXITS: tuple[tuple[int, str, tuple[type[BaseException], ...]], ...] = (
    (0, "all is well", ()),
    (FAILED, "it could not be done", (LimpetError, OSError)),
    (2, "wrong usage", (click.UsageError, InvalidInputError)),
    (3, "not found: a container, a sandbox, or any state at all", (NotFoundError,)),
    (4, "in conflict with what is there", (AlreadyExistsError, InvalidStateError)),
    (5, "the state directory is in use by another process", (StateDirectoryLockedError,)),
    (
        DAMAGED,
        "the store is damaged, or of another version",
        (StoreDamagedError, StoreTooNewError, StoreReplacedError, StoreFencedError),
    ),
    (UNRESOLVED, "recover or check has left something unresolved", ()),
    (INTERRUPTED, "interrupted by Ctrl-C", (KeyboardInterrupt, click.Abort)),
)

_STATUSES = {kind: status for status, _, kinds in EXITS for kind in kinds}


def exit_status(error: BaseException) -> int:
    """Return the exit status for `error`: that of the nearest of its classes in the table."""
    return next(_STATUSES[kind] for kind in type(error).__mro__ if kind in _STATUSES)
