"""The sweep: directories that no container or sandbox owns are judged, and removed, moved aside or left."""

import errno
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress

from msgspec.structs import replace

from limpet.engine.state.directory import StateDirectory
from limpet.engine.state.durable import make_directory, remove_tree, sync_directory
from limpet.engine.state.names import QUARANTINE
from limpet.engine.state.presence import is_there
from limpet.recovery.orphans import QUARANTINE_MOST, Disposal, Orphan, judge_orphan
from limpet.recovery.report import Report
from limpet.recovery.users import find_users
from limpet.schema.file_name import find_owners

Exclusive = Callable[[str], AbstractContextManager[None]]


def judge_orphans(owned: Mapping[str, Callable[[], Collection[str]]], node: str) -> Sequence[Orphan]:
    """Look at each entry of a directory that no id owns, and say what is to be done with it.

    Touches nothing. Raises OSError if a directory or /proc cannot be listed.
    """
    now = time.time()
    # What is listed first and has no row after that has none: a row is there before its directory.
    listed = {directory: sorted(os.listdir(directory)) for directory in owned}
    paths = []
    for directory, find_ids in owned.items():
        owners = find_owners(listed[directory], find_ids())
        paths += [os.path.join(directory, name) for name in listed[directory] if name not in owners]
    users, found = find_users(paths), []
    for path in paths:
        with suppress(FileNotFoundError):  # removed in the meantime
            found.append(judge_orphan(path, node=node, users=users, now=now))
    return found


def dispose(directory: StateDirectory, report: Report, exclusive: Exclusive) -> Report:
    """Do what was said of each orphan; what cannot be done is noted with it. May be repeated after a kill.

    `exclusive(name)` keeps out other steps that make or remove a directory of that name.
    """
    disposed = []
    for orphan in report.orphans:
        with exclusive(os.path.basename(orphan.path)):
            disposed.append(_dispose(directory, orphan))
    return replace(report, orphans=tuple(disposed))


def _dispose(directory: StateDirectory, orphan: Orphan) -> Orphan:
    try:
        if not is_there(orphan.path):
            return orphan
        if orphan.disposal is Disposal.REMOVE:
            remove_tree(orphan.path)
        elif orphan.disposal is Disposal.QUARANTINE:
            _move_aside(orphan.path, directory.join(QUARANTINE))
    except OSError as error:
        return replace(orphan, error=f"{error.filename or orphan.path}: {error.strerror}")
    return orphan


def _move_aside(path: str, quarantine: str) -> None:
    make_directory(quarantine)
    if len(os.listdir(quarantine)) >= QUARANTINE_MOST:
        problem = f"it holds {QUARANTINE_MOST} entries, the most it may: look through them, and recover again"
        raise OSError(errno.ENOSPC, problem, quarantine)
    # The time keeps the names apart; rename(2) moves a link itself, never what it points to.
    ending = f".{time.time_ns()}"
    name = _shorten(os.path.basename(path), os.pathconf(quarantine, "PC_NAME_MAX") - len(ending))
    os.rename(path, os.path.join(quarantine, name + ending))
    sync_directory(quarantine)
    sync_directory(os.path.dirname(path))


def _shorten(name: str, most_bytes: int) -> str:
    """Return the beginning of a name that takes at most so many bytes, with no character cut in two."""
    while len(os.fsencode(name)) > most_bytes:
        name = name[:-1]
    return name
