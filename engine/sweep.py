"""The sweep: directories that no container or sandbox owns are judged, and removed, moved aside or left."""

import os
import time
from collections.abc import Sequence

from msgspec.structs import replace

from limpet.engine.directory import QUARANTINE, StateDirectory
from limpet.engine.durable import make_directory, remove_tree, sync_directory
from limpet.engine.store import Store
from limpet.recovery.orphans import Disposal, Orphan, judge_orphan
from limpet.recovery.report import Report


def judge_orphans(store: Store, containers_dir: str, sandboxes_dir: str) -> Sequence[Orphan]:
    """Look at each entry of the two directories that has no row, and say what is to be done. Touches nothing."""
    sandboxes = {metadata.id for metadata in store.list_sandboxes()}
    now = time.time()
    return [
        judge_orphan(os.path.join(directory, name), now=now)
        for directory, owned in ((containers_dir, store), (sandboxes_dir, sandboxes))
        for name in sorted(os.listdir(directory))
        if name not in owned
    ]


def dispose(directory: StateDirectory, report: Report) -> Report:
    """Do what was said of each orphan; what cannot be done is noted with it. May be repeated after a kill."""
    return replace(report, orphans=tuple(_dispose(directory, orphan) for orphan in report.orphans))


def _dispose(directory: StateDirectory, orphan: Orphan) -> Orphan:
    try:
        if orphan.disposal is Disposal.REMOVE:
            remove_tree(orphan.path)
        elif orphan.disposal is Disposal.QUARANTINE:
            _move_aside(orphan.path, directory.join(QUARANTINE))
    except OSError as error:
        return replace(orphan, error=f"{error.filename or orphan.path}: {error.strerror}")
    return orphan


def _move_aside(path: str, quarantine: str) -> None:
    make_directory(quarantine)
    # The time keeps the names apart; rename(2) moves a link itself, never what it points to.
    os.rename(path, os.path.join(quarantine, f"{os.path.basename(path)}.{time.time_ns()}"))
    sync_directory(quarantine)
    sync_directory(os.path.dirname(path))
