"""`limpet events`: the log of changes, and what is added to it."""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click
import msgspec

from limpet.engine.cli.documents import status_document
from limpet.engine.cli.options import Place, no_trunc_option, output_option, parse_labels, place_option
from limpet.engine.cli.output import (
    SCHEMA_VERSION,
    Cell,
    Column,
    Ids,
    fit_widths,
    moment,
    print_line,
    print_table,
    recorded_state,
    render_fitting,
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
    Column("WHAT", flexible=True),
    Column("ID", keeps_end=True),
    Column("NAME", keeps_end=True),
    Column("STATE"),
    Column("REASON", flexible=True),
)
_NARROW_COLUMNS = (*_COLUMNS[:-2], Column("STATE", flexible=True))
"""The reason is shown behind the state there."""
_NARROW = 72
_LIKE_ID = Cell("0" * 12, "", 8)
_LIKE_NAME = "x" * 20
_AGO = re.compile(r"(\d{1,6})([smhd])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST = 18
_TICK_SECONDS = 3600.0


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
                _print_on(events, snapshot, no_trunc=no_trunc)
            else:
                _print_all(list(events), snapshot, no_trunc=no_trunc)


def _print_all(events: Sequence[Event], snapshot: Snapshot, *, no_trunc: bool) -> None:
    width = None if no_trunc else terminal_width()
    known = {*snapshot.ids, *snapshot.sandbox_ids, *(event.id for event in events if event.kind not in OF_ITEMS)}
    ids = None if width is None else Ids(known, {*snapshot.names, *snapshot.sandbox_names})
    rows = [_make_row(event, width, _id_cell(event, ids, no_trunc=no_trunc)) for event in events]
    print_table(_columns(width), rows, no_trunc=no_trunc)


def _print_on(events: Iterable[Event], snapshot: Snapshot, *, no_trunc: bool) -> None:
    """Print each event as it comes. No column depends on what is still to come."""
    width = None if no_trunc else terminal_width()
    columns = _columns(width)
    last = ["x" * 15] if columns is _NARROW_COLUMNS else ["NOTREADY", ""]
    begin: list[str | Cell] = [f"{snapshot.revision}000", moment(1, width), "sandbox-changed", _LIKE_ID, _LIKE_NAME]
    widths = fit_widths(columns, [*begin, *last], width)
    print_line(render_line([Cell(column.title, "bold") for column in columns], widths))
    for event in events:
        row = _make_row(event, width, _id_cell(event, None, no_trunc=no_trunc))
        print_line(render_line(row, widths) if width is None else render_fitting(columns, row, widths))


def _columns(width: int | None) -> Sequence[Column]:
    return _COLUMNS if width is None or width >= _NARROW else _NARROW_COLUMNS


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


def _id_cell(event: Event, ids: Ids | None, *, no_trunc: bool) -> str | Cell:
    """Return what an event is of; without `ids`, an id that limpet has made is short, and all others are whole."""
    if no_trunc or event.kind in OF_ITEMS:
        return event.id
    if ids is not None:
        return ids.cell(event.id)
    shown = short_id(event.id)
    return Cell(shown, "", _LIKE_ID.needed) if shown != event.id else shown


def _make_row(event: Event, width: int | None, what: str | Cell) -> list[str | Cell]:
    ended = event.state is ContainerState.EXITED
    failed = "red" if ended and event.exit_code else ""
    reason = _describe(event) + (f" ({event.exit_code})" if ended else "")
    state = state_cell("" if event.state is None else recorded_state(event.state))
    both = state._replace(text=f"{state.text} {reason}".rstrip(), colour=failed or state.colour)
    told = [both] if _columns(width) is _NARROW_COLUMNS else [state, Cell(reason, failed)]
    return [str(event.revision), moment(event.at, width), event.kind.value, what, event.name, *told]


def _describe(event: Event) -> str:
    """Return the reason that an event gives, or what its kind leaves open."""
    status = event.status
    if status is None or event.reason:
        return event.reason
    if event.kind is EventKind.PAUSED:
        return "paused" if status.paused else "resumed"
    if event.kind is EventKind.INTENT:
        until = f"expires {moment(status.expires_at)}" if status.expires_at else ""
        return "stop requested" if status.stop_requested_at else until
    return ""
