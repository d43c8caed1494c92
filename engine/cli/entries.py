"""Prints the entries of a log: what was written to stdout to stdout, what was written to stderr to stderr."""

import sys
from collections.abc import Iterable

from limpet.engine.cli.output import rfc3339
from limpet.engine.logs import Entry, await_output
from limpet.engine.starters.process import output_seen


def await_output_of(state_dir: str, container_id: str) -> None:
    """Return once all that a container which has ended has written is in its log, if that can be known and is soon."""
    with output_seen(state_dir, container_id) as is_copying:
        await_output(is_copying)


def print_entries(entries: Iterable[Entry], *, timestamps: bool = False, at_once: bool = False) -> None:
    """Print them, with the time before each line if asked for; `at_once` holds nothing back. Raises OSError."""
    places = {"stderr": sys.stderr.buffer}
    last = sys.stdout.buffer
    for entry in entries:
        place = places.get(entry.stream, sys.stdout.buffer)
        if place is not last:
            last.flush()
            last = place
        if timestamps and entry.time_ns and not entry.goes_on:
            place.write(f"{rfc3339(entry.time_ns)} ".encode())
        place.write(entry.text)
        if at_once:
            place.flush()
    last.flush()
