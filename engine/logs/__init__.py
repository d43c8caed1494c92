"""Reading the logs of containers: in CRI's format, across rotation, while they are written. Writes nothing.

Read `entries` (what a line says), then `reader` (the files) and `arrival` (what is not in them yet).
"""

from limpet.engine.logs.arrival import await_output
from limpet.engine.logs.entries import Entry
from limpet.engine.logs.reader import read_log

__all__ = ["Entry", "await_output", "read_log"]
