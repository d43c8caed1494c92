"""A backup that is a whole database or none: copy, flush, verify, rename, flush the directory."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress

from limpet.engine.database.sqlite.reader import Reader
from limpet.engine.state.durable import rename_new, sync_directory, sync_file, temporary_path
from limpet.schema.errors import (
    AlreadyExistsError,
    InvalidInputError,
    StoreDamagedError,
    StoreError,
    quote,
    quote_path,
)


def back_up(reader: Reader, target_path: str) -> None:
    """Copy the database, as it is now, to the new file `target_path`; durable and verified on return.

    A kill on the way leaves the target missing, and maybe a temporary file beside it. Raises
    AlreadyExistsError if the target is there, StoreDamagedError if the copy does not verify, StoreError.
    """

    def require_sound(copy: Reader) -> list[str]:
        damage = copy.find_damage() + copy.find_damaged_records()
        if damage:
            raise StoreDamagedError(f"the copy of the database does not verify: {damage[0]}; run limpet check")
        return damage

    _copy(reader, target_path, require_sound)


def copy(reader: Reader, target_path: str) -> Sequence[str]:
    """Copy a database of any revision, as it is, to the new file `target_path`, durably.

    Return what SQLite's checks find wrong with it. Raises AlreadyExistsError, StoreError also if the copy cannot be
    checked: a failing disk is no damage that was there before.
    """
    return _copy(reader, target_path, Reader.check_structure)


def _copy(reader: Reader, target_path: str, verify: Callable[[Reader], list[str]]) -> list[str]:
    if not isinstance(target_path, str | os.PathLike):
        raise InvalidInputError(f"backup to {quote(target_path)}: give a path")
    try:
        target_path = os.path.abspath(target_path)
    except FileNotFoundError as error:
        raise StoreError(f"backup to {quote_path(target_path)}: the working directory: {error.strerror}") from error
    directory = os.path.dirname(target_path)
    if os.path.lexists(target_path):
        raise AlreadyExistsError(f"{quote_path(target_path)} exists already; name a new file")
    temporary = temporary_path(directory)
    try:
        reader.copy_to(temporary)
        sync_file(temporary)
        made = Reader(temporary, reader.node)
        try:
            damage = verify(made)
        finally:
            made.close()
        rename_new(temporary, target_path)
        sync_directory(directory)
    except FileExistsError as error:  # made meanwhile
        raise AlreadyExistsError(f"{quote_path(target_path)} exists already; name a new file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or a lone surrogate
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"backup to {quote_path(target_path)}: {reason}") from error
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(temporary)
    return damage
