"""Whether the files of a database can be those that its last owner left: nothing missing, and none older."""

import os
from collections.abc import Mapping

from limpet.engine.state.names import CONTAINERS, DATABASE, OWNER
from limpet.engine.state.owner import Owner
from limpet.engine.state.presence import is_directory, is_there
from limpet.schema.errors import StoreDamagedError


def require_plausible_files(path: str, owner: Owner | None) -> None:
    """Raise StoreDamagedError if a file is missing from the state directory `path` that its last owner left there.

    Raises OSError if they cannot be looked at.
    """
    database, owner_file = os.path.join(path, DATABASE), os.path.join(path, OWNER)
    if not is_there(database):
        containers = os.path.join(path, CONTAINERS)
        if owner is not None or is_there(database + "-wal") or is_directory(containers):
            remove = "" if owner is None else f" and move {owner_file} away"
            raise StoreDamagedError(
                f"{database} is missing, but its state directory has been in use; put a backup there{remove},"
                " or use another directory"
            )
    elif os.path.getsize(database) == 0:
        # SQLite treats it as a new database, even read-only, and removes the WAL next to it.
        raise StoreDamagedError(f"{database} is empty: it was truncated or replaced. Restore a backup")
    elif owner is not None and not owner.closed and not is_there(database + "-wal"):
        raise StoreDamagedError(
            f"{database}-wal is missing, and whoever had the database open last did not close it: acknowledged changes"
            " may have been in it. If another program (such as sqlite3) has moved them into the database since, or if"
            f" you accept the loss, remove {owner_file} and open it again"
        )


def require_same_age(path: str, owner: Owner | None, epochs: Mapping[str, int]) -> None:
    """Raise StoreDamagedError if the database knows an older epoch than its last owner did.

    `epochs` are those of all nodes. The owner's record names its node, unless an older limpet wrote it.
    """
    if owner is None:
        return
    epoch = epochs.get(owner.node, 0) if owner.node else max(epochs.values(), default=0)
    if epoch < owner.epoch:
        raise StoreDamagedError(
            f"{os.path.join(path, DATABASE)} is older than when it was last opened here (epoch {epoch}, not"
            f" {owner.epoch}); if you restored a backup, remove {os.path.join(path, OWNER)} and open it again"
        )
