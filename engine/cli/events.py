"""`limpet events`: the log of changes, and what is added to it."""

import re
import time
from collections.abc import Iterator
from typing import Any

import click
import msgspec

from limpet.engine.cli.documents import status_document
from limpet.engine.cli.options import Place, no_trunc_option, output_option, parse_labels, place_option
from limpet.engine.cli.output import (
    SCHEMA_VERSION,
    Cell,
    Column,
    moment,
    print_line,
    print_table,
    recorded_state,
    render_line,
    rfc3339,
    short_id,
    state_cell,
    terminal_width,
)
from limpet.engine.inspection.snapshot import Snapshot
from limpet.engine.store import Watch
from limpet.schema.any_text import encode_any
from limpet.schema.events import OF_ITEMS, Event, EventKind
from limpet.schema.status import ContainerState

_COLUMNS = (
    Column("REV"),
    Column("WHEN"),
    Column("WHAT"),
    Column("ID"),
    Column("NAME", flexible=True),
    Column("STATE"),
    Column("REASON", flexible=True),
)
_WIDTHS = (6, 24, 15, 12, 16, 8, 0)
"""Of a table that has no end yet."""
_AGO = re.compile(r"(\d{1,6})([smhd])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST = 18
_TICK_SECONDS = 3600.0
_NARROW = 100
"""Columns of a terminal below which a time has neither its year, for the log goes back a week, nor milliseconds."""


def _parse_since(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, int] | None:
    """Return ("revision", a revision), or ("at", a time in nanoseconds since the epoch)."""
    ago = _AGO.fullmatch(value or "")
    if ago:
        return "at", time.time_ns() - int(ago[1]) * _SECONDS[ago[2]] * 10**9
    if value is not None and not (value.isdecimal() and value.isascii() and len(value) <= _LONGEST):
        raise click.BadParameter(f"{value!r}: expected a revision such as 120, or a time such as 90s, 10m, 2h, 7d")
    return None if value is None else ("revision", int(value))


@click.command("events")
@click.option(
    "--since",
    callback=_parse_since,
    metavar="REV|TIME",
    help="Begin after this revision, or so long ago (90s, 10m, 2h, 7d).  [default: the oldest that is kept; with"
    " --follow, now]",
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens, until interrupted.")
@click.option("--id", "id", metavar="ID", default="", help="Only of ids that begin with ID.")
@click.option("--name", default="", help="Only of containers and sandboxes with this name.")
@click.option("--sandbox", "sandbox_id", metavar="ID", default="", help="Only of this sandbox (id or prefix).")
@click.option(
    "--label",
    "labels",
    metavar="KEY=VALUE",
    multiple=True,
    callback=parse_labels,
    help="Only of what has this label. Repeat it to require several.",
)
@click.option(
    "--kind",
    "kinds",
    type=click.Choice([kind.value for kind in EventKind]),
    metavar="KIND",
    multiple=True,
    help=f"Only of this kind; repeat it for several: {', '.join(EventKind)}.",
)
@no_trunc_option
@output_option
@place_option
def command(
    place: Place,
    since: tuple[str, int] | None,
    *,
    follow: bool,
    id: str,
    name: str,
    sandbox_id: str,
    labels: dict[str, str],
    kinds: tuple[str, ...],
    no_trunc: bool,
    as_json: bool,
) -> None:
    """Show what has happened to containers and sandboxes, oldest first: the log of changes.

    Some 6,000 events of the last week are kept. With -o json each event is a JSON document on a line of its own; the
    events of one transaction have the same "commit", which is the revision of its last.
    """
    with Snapshot.open(place.state_dir, node=place.node) as snapshot:
        filters: dict[str, Any] = {
            "id": id,
            "name": name,
            "sandbox_id": sandbox_id,
            "labels": labels,
            "kinds": kinds,
        }
        unit, begin = since or ("revision", snapshot.revision if follow else snapshot.oldest_revision() - 1)
        if unit == "at":
            begin = _find_time(snapshot, begin)
        with snapshot.watch(begin, **filters) as watch:
            events = _follow(watch) if follow else iter(lambda: watch.next(0), None)
            if as_json:
                for event in events:
                    print_line(encode_any({"schema_version": SCHEMA_VERSION, **event_document(event)}).decode())
            elif follow:
                widths = [max(width, len(column.title)) for width, column in zip(_WIDTHS, _COLUMNS, strict=True)]
                print_line(render_line([Cell(column.title, "bold") for column in _COLUMNS], widths))
                for event in events:
                    print_line(render_line(_make_row(event, is_narrow=False, no_trunc=no_trunc), widths))
            else:
                is_narrow = not no_trunc and (terminal_width() or _NARROW) < _NARROW
                rows = [_make_row(event, is_narrow=is_narrow, no_trunc=no_trunc) for event in events]
                print_table(_COLUMNS, rows, no_trunc=no_trunc)


def _follow(watch: Watch) -> Iterator[Event]:
    while True:
        event = watch.next(_TICK_SECONDS)
        if event is not None:
            yield event


def _find_time(snapshot: Snapshot, at: int) -> int:
    """Return the revision before the first event that was written at this time or later."""
    revision = snapshot.oldest_revision() - 1
    with snapshot.watch(revision) as watch:
        for event in iter(lambda: watch.next(0), None):
            if event.at >= at:
                break
            revision = watch.revision
    return revision


def event_document(event: Event) -> dict[str, Any]:
    """Return an event as `events` shows it."""
    ended = event.state is ContainerState.EXITED
    return {
        "revision": event.revision,
        "commit": event.commit,
        "at": rfc3339(event.at),
        "kind": event.kind.value,
        "id": event.id,
        "sandbox_id": event.sandbox_id,
        "name": event.name,
        "labels": dict(event.labels),
        "version": event.seq,
        "state": None if event.state is None else event.state.name,
        "exit_code": event.exit_code if ended else None,
        "reason": event.reason,
        "message": event.message,
        "status": status_document(event.status) if event.status else None,
        "sandbox_status": msgspec.to_builtins(event.sandbox_status) if event.sandbox_status else None,
    }


def _make_row(event: Event, *, is_narrow: bool, no_trunc: bool) -> list[str | Cell]:
    ended = event.state is ContainerState.EXITED
    reason = event.reason + (f" ({event.exit_code})" if ended else "")
    at = moment(event.at)
    return [
        str(event.revision),
        at[5:19] + "Z" if is_narrow else at,
        event.kind.value,
        event.id if no_trunc or event.kind in OF_ITEMS else short_id(event.id),
        event.name,
        "" if event.state is None else state_cell(recorded_state(event.state)),
        Cell(reason, "red" if ended and event.exit_code else ""),
    ]
