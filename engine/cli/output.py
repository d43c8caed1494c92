"""Printing: tables that fit the terminal, JSON documents, times. Data goes to stdout, everything else to stderr."""

import os
import re
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import NamedTuple, TextIO

import click
import msgspec

from limpet.schema.any_text import encode_any
from limpet.schema.errors import escape
from limpet.schema.sandbox_status import SandboxState
from limpet.schema.status import ContainerState

SCHEMA_VERSION = 1
"""The version of the JSON documents. Increase it when a key is renamed, removed, or changes meaning."""
STATE_COLOURS = {"CREATED": "cyan", "RUNNING": "green", "EXITED": "", "UNKNOWN": "yellow"}
_GENERATED_ID = re.compile(r"[0-9a-f]{64}")
_SHORT_ID = 12
_GAP = "  "
_SHORTEST_ID = 6
_NARROWEST = 8
_READABLE = 20
"""So much of a text is kept before ids and names are shortened."""
_WIDE, _MIDDLING = 100, 72
"""Columns of a terminal that a table's times are as long as they can be for: the log of changes goes back a week."""
_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")
_UNITS = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


class Column(NamedTuple):
    """A column of a table. On a terminal that is too narrow for all of it, the columns give way in this order."""

    title: str
    optional: bool = False
    """Shown only where all of it fits; the last one goes first."""
    flexible: bool = False
    """Shortened, with an ellipsis at the end."""
    keeps_end: bool = False
    """Shortened last, with the ellipsis in the middle: names are often told apart by their ends."""


class Cell(NamedTuple):
    """A table cell with a colour."""

    text: str
    colour: str
    needed: int = 0
    """So many characters of an id tell it from all others: it may be shortened to them, without an ellipsis."""


Row = Sequence[str | Cell]


def print_json(**fields: object) -> None:
    """Print one JSON document, indented on a terminal, otherwise on one line."""
    data = encode_any({"schema_version": SCHEMA_VERSION, **fields})
    click.echo(msgspec.json.format(data, indent=2) if sys.stdout.isatty() else data)


def print_table(columns: Sequence[Column], rows: Iterable[Row], *, no_trunc: bool = False) -> None:
    """Print a table; on a terminal, fit it to the width."""
    print_lines(render_table(columns, list(rows), None if no_trunc else terminal_width()))


def print_lines(lines: Iterable[str]) -> None:
    """Print lines, in colour if stdout may have colour."""
    text = "\n".join(lines)  # one write: ten thousand would take longer than collecting the lines
    if text:
        click.echo(text, color=has_colour())


def print_line(text: str) -> None:
    """Print a line, which is seen at once."""
    click.echo(text, color=has_colour())
    sys.stdout.flush()


def drop(stream: TextIO) -> None:
    """Discard what a standard stream could not take: Python would try again at exit, and exit with 120."""
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def render_line(row: Row, widths: Sequence[int]) -> str:
    """Return a line of a table that has no end yet: a cell that is wider than its column pushes the others on."""
    parts = []
    for cell, width in zip(row, widths, strict=True):
        shown = _to_cell(cell)
        parts.append(paint(shown.text, shown.colour) + " " * (width - measure(shown.text)))
    return _GAP.join(parts).rstrip()


def render_fitting(columns: Sequence[Column], row: Row, widths: Sequence[int]) -> str:
    """Return a line of a table that has no end yet, on a terminal: what is wider than its column is shortened."""
    return _join([_to_cell(cell) for cell in row], widths, columns)


def render_table(columns: Sequence[Column], rows: Sequence[Row], width: int | None) -> list[str]:
    """Return the lines of a table, header first, no wider than `width` if possible."""
    header = [Cell(column.title, "bold") for column in columns]
    cells = [header, *([_to_cell(cell) for cell in row] for row in rows)]
    widths = [max(measure(row[index].text) for row in cells) for index in range(len(columns))]
    floors = [_find_floor(column, [row[index] for row in cells]) for index, column in enumerate(columns)]
    shown = _fit(columns, widths, floors, width)
    return [
        _join([row[index] for index in shown], [widths[index] for index in shown], [columns[index] for index in shown])
        for row in cells
    ]


def fit_widths(columns: Sequence[Column], like: Row, width: int | None) -> list[int]:
    """Return how wide the columns of a table are that has no end yet, and whose rows will be `like` this one.

    On a terminal, `width` columns wide, the last column has what the others leave.
    """
    cells = [_to_cell(cell) for cell in like]
    widths = [max(measure(cell.text), len(column.title)) for cell, column in zip(cells, columns, strict=True)]
    if width is not None:
        _fit(columns, widths, [_find_floor(column, [cell]) for column, cell in zip(columns, cells, strict=True)], width)
        widths[-1] = max(width - sum(widths[:-1]) - len(_GAP) * (len(widths) - 1), _NARROWEST)
    return widths


def _to_cell(cell: str | Cell) -> Cell:
    return Cell(escape(cell), "") if isinstance(cell, str) else cell._replace(text=escape(cell.text))


def _find_floor(column: Column, cells: Sequence[Cell]) -> int:
    """Return how narrow the column may become."""
    needed = max(cell.needed for cell in cells)
    title = measure(column.title)
    if needed:
        return max(needed, title)
    return max(_NARROWEST, title) if column.flexible or column.keeps_end else max(measure(cell.text) for cell in cells)


def _fit(columns: Sequence[Column], widths: list[int], floors: Sequence[int], width: int | None) -> list[int]:
    """Return the indexes of the columns to show, and narrow `widths` so that these fit into `width`."""
    shown = list(range(len(columns)))
    if width is None:
        return shown

    def find_excess() -> int:
        return sum(widths[index] + len(_GAP) for index in shown) - len(_GAP) - width

    for index in [index for index in reversed(shown) if columns[index].optional]:
        if find_excess() > 0:
            shown.remove(index)
    texts = [index for index in shown if columns[index].flexible]
    names = [index for index in shown if columns[index].keeps_end]
    ids = [index for index in shown if index not in texts and index not in names]
    for which, least in ((texts, _READABLE), (ids, 0), (names, 0), (texts, 0)):
        while find_excess() > 0 and (able := [i for i in which if widths[i] > max(floors[i], least)]):
            widths[max(able, key=lambda index: widths[index])] -= 1
    return shown


def _join(cells: Sequence[Cell], widths: Sequence[int], columns: Sequence[Column]) -> str:
    parts = []
    for cell, width, column in zip(cells, widths, columns, strict=True):
        if cell.needed:
            fitting = cell.text[:width]
        else:
            fitting = cut_middle(cell.text, width) if column.keeps_end else cut(cell.text, width)
        # The padding has no colour, so that it can be stripped at the end of the line.
        parts.append(paint(fitting, cell.colour) + " " * (width - measure(fitting)))
    return _GAP.join(parts).rstrip()


def paint(text: str, colour: str) -> str:
    """Return `text` in a colour, "bold" or "dim"; "" leaves it unchanged."""
    if not colour:
        return text
    if colour in {"bold", "dim"}:
        return click.style(text, bold=colour == "bold" or None, dim=colour == "dim" or None)
    return click.style(text, fg=colour)


def fill(text: str, indent: int) -> list[str]:
    """Return a paragraph's lines, indented and wrapped to the terminal's width."""
    width = terminal_width()
    margin = " " * indent
    if width is None:
        return [margin + escape(text)]
    return textwrap.wrap(
        escape(text), max(width, 40), initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
    )


def measure(text: str) -> int:
    """Return how many terminal columns `text` takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in {"W", "F"}) for c in text)


def cut(text: str, width: int) -> str:
    """Return `text` in at most `width` columns, with an ellipsis if it was shortened."""
    if measure(text) <= width:
        return text
    kept = text[:width]
    while measure(kept) >= width:
        kept = kept[:-1]
    return kept + "…"


def cut_middle(text: str, width: int) -> str:
    """Return `text` in at most `width` columns, with an ellipsis in its middle if it was shortened."""
    if measure(text) <= width:
        return text
    begin, end = text[: width // 2], text[-((width - 1) // 2) :] if width > 2 else ""
    while end and measure(begin) + measure(end) >= width:
        begin, end = (begin[:-1], end) if measure(begin) > measure(end) else (begin, end[1:])
    return f"{begin}…{end}"


def short_id(record_id: str) -> str:
    """Return an id as short as tells it from all others: chosen ones may begin alike, and stay as they are."""
    return record_id[:_SHORT_ID] if _GENERATED_ID.fullmatch(record_id) else record_id


class Ids:
    """Ids for tables: as short as they stay unique among all of their kind, so that each can be typed in again."""

    def __init__(self, ids: Iterable[str], names: Iterable[str] = (), *, no_trunc: bool = False) -> None:
        self._needed: dict[str, int] = {}
        self._names = frozenset(names)
        self._no_trunc = no_trunc
        before = ""
        for key in sorted(ids):
            shared = _count_shared(before, key)
            if before:
                self._needed[before] = max(self._needed[before], shared + 1)
            self._needed[key] = shared + 1
            before = key

    def cell(self, key: str) -> Cell:
        """Return an id as a cell. One that would be taken for a name is shown in full."""
        needed = min(max(self._needed.get(key, len(key)), _SHORTEST_ID), len(key))
        shown = max(needed, _SHORT_ID)
        if self._no_trunc or any(key[:length] in self._names for length in range(needed, shown + 1)):
            return Cell(key, "", len(key))
        return Cell(key[:shown], "", needed)


def _count_shared(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def state_cell(state: str) -> Cell:
    """Return a state's name as a coloured cell."""
    return Cell(state, STATE_COLOURS.get(state, ""))


def recorded_state(state: ContainerState | SandboxState) -> str:
    """Return the name of a state that was written down: NEW before the bundle is made, for which the CRI has no state.

    Nothing on disk is Unknown in the sense of "not verified".
    """
    return "NEW" if state is ContainerState.UNKNOWN else state.name


def note(text: str) -> None:
    """Print a note to stderr. One that nobody can take keeps nothing from being done, and changes no exit status."""
    with suppress(OSError):
        click.echo(escape(text), err=True)


def terminal_width() -> int | None:
    """Return the width of the terminal in columns, None if stdout is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def has_colour() -> bool:
    """Return whether stdout may have colour (see https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def size(count: int) -> str:
    """Return a number of bytes in short form: 512 B, 1.4 MB, 37 GB."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_BYTES) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.1f} {_BYTES[unit]}" if unit and value < 9.95 else f"{value:.0f} {_BYTES[unit]}"


def rfc3339(nanoseconds: int) -> str | None:
    """Return a time in RFC 3339 format, in UTC with nanoseconds; None for 0, which means "not yet"."""
    if not nanoseconds:
        return None
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:09d}Z"


def moment(nanoseconds: int, width: int | None = None) -> str:
    """Return a time as a table shows it: as `rfc3339`, to the millisecond.

    On a terminal `width` columns wide, 100 at least are wanted for that; 72 for the month and no milliseconds, and on
    one that is narrower still only the day of the month is shown with the time.
    """
    whole = (rfc3339(nanoseconds) or "")[:23]
    if width is None or width >= _WIDE:
        return f"{whole}Z"
    return f"{whole[5 if width >= _MIDDLING else 8 : 19]}Z"


def age(nanoseconds: int) -> str:
    """Return how long ago a time was; "-" for 0, which means "not yet"."""
    return duration((time.time_ns() - nanoseconds) / 10**9) if nanoseconds else "-"


def duration(seconds: float) -> str:
    """Return a time span in short form: 48s, 3m20s, 25m, 5h, 12d. A negative one (the clock was set back) is 0s."""
    whole = max(int(seconds), 0)
    for (unit, name), (smaller, smaller_name) in pairwise(_UNITS):
        count, rest = divmod(whole, unit)
        if count >= 10 or (count and rest < smaller):
            return f"{count}{name}"
        if count:
            return f"{count}{name}{rest // smaller}{smaller_name}"
    return f"{whole}s"
