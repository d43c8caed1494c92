"""Reading the logs of containers: in CRI's format, across rotation, while they are written. Writes nothing.

Read `entries` (what a line says) and then `reader` (the files).
"""

from limpet.engine.logs.entries import Entry
from limpet.engine.logs.reader import read_log

__all__ = ["Entry", "read_log"]
