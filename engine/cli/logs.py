"""`limpet logs`: a container's output."""

import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime

import click

from limpet.engine.cli.entries import await_output_of, print_entries
from limpet.engine.cli.options import Place, complete_id, place_option
from limpet.engine.inspection.snapshot import Snapshot
from limpet.engine.logs import read_log
from limpet.engine.state.homes import bring_home, log_directory
from limpet.schema.errors import NotFoundError, StoreDamagedError
from limpet.schema.metadata import Metadata
from limpet.schema.status import ContainerState

_SPAN = re.compile(r"(?:[0-9]{1,18}[dhms])+")
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def _parse_since(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> int:
    """Return nanoseconds since 1970 of a time, or of a span before now."""
    if text is None:
        return 0
    if _SPAN.fullmatch(text):
        seconds = sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"([0-9]+)([dhms])", text))
        return time.time_ns() - seconds * 10**9
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(
            f"{text!r}: expected a time such as 2026-01-31T12:00:00Z, or a span such as 1h30m"
        ) from None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return int(when.timestamp() * 10**6) * 1000


@click.command("logs")
@click.argument("id", shell_complete=complete_id)
@click.option("-f", "--follow", is_flag=True, help="Go on until the container has ended.")
@click.option("-n", "--tail", metavar="N", type=click.IntRange(0), help="Only the last N lines.")
@click.option(
    "--since",
    "since_ns",
    metavar="TIME",
    callback=_parse_since,
    help="Only lines from TIME on (2026-01-31T12:00:00Z; UTC if it does not say), or from so long ago (1h30m).",
)
@click.option("-t", "--timestamps", is_flag=True, help="Print when each line was written.")
@click.option("--stream", type=click.Choice(["stdout", "stderr"]), help="Only what was written to this stream.")
@place_option
def command(
    place: Place,
    id: str,
    *,
    follow: bool,
    tail: int | None,
    since_ns: int,
    timestamps: bool,
    stream: str | None,
) -> None:
    """Print what container ID has written, oldest first: its stdout to stdout, its stderr to stderr.

    Rotated files are read too, as far as they are kept. A log without streams and times is printed as it is.
    """
    with Snapshot.open(place.state_dir, node=place.node) as snapshot:
        found = snapshot.get(id)
        metadata = bring_home(snapshot.metadata(found.id), snapshot.path)
        top = _find_top(snapshot, metadata)
    if not metadata.log_path:
        raise NotFoundError(f"container {metadata.id} keeps no log: its config has no log_path")
    is_over = _make_is_over(place, metadata.id) if follow else None
    if not follow and found.status.state is ContainerState.EXITED:
        await_output_of(place.state_dir, metadata.id)
    entries = read_log(top, metadata.log_path, since_ns=since_ns, tail=tail, stream=stream or "", is_over=is_over)
    print_entries(entries, timestamps=timestamps, at_once=follow)


def _find_top(snapshot: Snapshot, metadata: Metadata) -> str:
    """Return the directory that the log must be in."""
    try:
        sandbox = snapshot.sandbox(metadata.sandbox_id)
    except (NotFoundError, StoreDamagedError):
        return os.path.dirname(metadata.log_path)
    return log_directory(sandbox, snapshot.path)


def _make_is_over(place: Place, container_id: str) -> Callable[[], bool]:
    def is_over() -> bool:
        try:
            with Snapshot.open(place.state_dir, node=place.node) as snapshot:
                status = snapshot.get(container_id).status
        except NotFoundError:  # deleted
            return True
        if not (status.unknown or status.state is ContainerState.EXITED or status.released):
            return False
        await_output_of(place.state_dir, container_id)
        return True

    return is_over
