"""The exit statuses: what each means, and which errors lead to it."""

import click

from limpet.schema.errors import (
    AlreadyExistsError,
    AmbiguousError,
    CursorTooOldError,
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
RUN_FAILED = 125
INTERRUPTED = 130

EXITS: tuple[tuple[int, str, tuple[type[BaseException], ...]], ...] = (
    (0, "success", ()),
    (FAILED, "the command failed", (LimpetError, OSError)),
    (2, "wrong usage", (click.UsageError, InvalidInputError)),
    (3, "the container, sandbox or state directory was not found", (NotFoundError,)),
    (
        4,
        "conflict with the current state, or several are meant",
        (AlreadyExistsError, AmbiguousError, CursorTooOldError, InvalidStateError),
    ),
    (5, "the state directory is in use by another process", (StateDirectoryLockedError,)),
    (
        DAMAGED,
        "the store is damaged, was replaced, or is of a newer version",
        (StoreDamagedError, StoreTooNewError, StoreReplacedError, StoreFencedError),
    ),
    (UNRESOLVED, "recover, check or prune left something unresolved", ()),
    (RUN_FAILED, "run, while it waits, and exec: limpet failed; any other status is the program's", ()),
    (INTERRUPTED, "interrupted by Ctrl-C", (KeyboardInterrupt, click.Abort)),
)

_STATUSES = {kind: status for status, _, kinds in EXITS for kind in kinds}


def exit_status(error: BaseException) -> int:
    """Return the exit status for `error`, that of its nearest base class in the table."""
    return next(_STATUSES[kind] for kind in type(error).__mro__ if kind in _STATUSES)
