"""SQLite: opening it safely, migrating it, writing batches to it, reading and copying it.

Read `opening` (the steps, in order), `connection` (the settings that make a commit durable), `writer` and `reader`.
"""

from limpet.engine.database.sqlite.backup import back_up
from limpet.engine.database.sqlite.connection import WRITER_PRAGMAS, Pragmas, sqlite_version
from limpet.engine.database.sqlite.opening import open_database
from limpet.engine.database.sqlite.plausibility import require_plausible_files, require_same_age
from limpet.engine.database.sqlite.reader import Reader
from limpet.engine.database.sqlite.source import Source
from limpet.engine.database.sqlite.wal import examine_wal

__all__ = [
    "WRITER_PRAGMAS",
    "Pragmas",
    "Reader",
    "Source",
    "back_up",
    "examine_wal",
    "open_database",
    "require_plausible_files",
    "require_same_age",
    "sqlite_version",
]
