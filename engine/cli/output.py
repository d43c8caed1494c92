"""Printing: tables that fit the terminal, JSON documents, times. Data goes to stdout, everything else to stderr."""

import os
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import click
import msgspec

from limpet.schema.any_text import encode_any

SCHEMA_VERSION = 1
"""The version of the JSON documents. Increase it when a key is renamed, removed, or changes meaning."""
STATE_COLOURS = {"CREATED": "cyan", "RUNNING": "green", "EXITED": "", "UNKNOWN": "yellow"}
_SHORT_ID = 12
_GAP = "  "
_NARROWEST = 8
_UNITS = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


class Column(NamedTuple):
    """A column of a table."""

    title: str
    flexible: bool = False
    """Shortened on a narrow terminal."""
    optional: bool = False
    """Left out on a narrow terminal."""


class Cell(NamedTuple):
    """A table cell with a colour."""

    text: str
    colour: str


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


def render_line(row: Row, widths: Sequence[int]) -> str:
    """Return a line of a table that has no end yet: a cell that is wider than its column pushes the others on."""
    parts = []
    for cell, width in zip(row, widths, strict=True):
        text, colour = _split(cell)
        parts.append(paint(text, colour) + " " * (width - measure(text)))
    return _GAP.join(parts).rstrip()


def render_table(columns: Sequence[Column], rows: Sequence[Row], width: int | None) -> list[str]:
    """Return the lines of a table, header first, no wider than `width` if possible."""
    header = [(column.title, "bold") for column in columns]
    cells = [header, *([_split(cell) for cell in row] for row in rows)]
    widths = [max(measure(row[index][0]) for row in cells) for index in range(len(columns))]
    shown = _fit(columns, widths, width)
    return [_join([row[index] for index in shown], [widths[index] for index in shown]) for row in cells]


def _split(cell: str | Cell) -> tuple[str, str]:
    return (printable(cell), "") if isinstance(cell, str) else (printable(cell.text), cell.colour)


def _fit(columns: Sequence[Column], widths: list[int], width: int | None) -> list[int]:
    """Return the indexes of the columns to show, and narrow `widths` so that these fit into `width`."""
    shown = list(range(len(columns)))
    while width is not None and sum(widths[index] + len(_GAP) for index in shown) - len(_GAP) > width:
        optional = [index for index in shown if columns[index].optional]
        flexible = [index for index in shown if columns[index].flexible and widths[index] > _NARROWEST]
        if optional:
            shown.remove(optional[-1])
        elif flexible:
            widths[max(flexible, key=lambda index: widths[index])] -= 1
        else:
            break
    return shown


def _join(cells: Sequence[tuple[str, str]], widths: Sequence[int]) -> str:
    parts = []
    for (text, colour), width in zip(cells, widths, strict=True):
        fitting = cut(text, width)
        # The padding has no colour, so that it can be stripped at the end of the line.
        parts.append(paint(fitting, colour) + " " * (width - measure(fitting)))
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
        return [margin + printable(text)]
    return textwrap.wrap(
        printable(text), max(width, 40), initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
    )


def printable(text: str) -> str:
    """Return `text` with unprintable characters escaped, such as those that control the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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


def short_id(record_id: str, *, no_trunc: bool = False) -> str:
    """Return an id shortened for tables."""
    return record_id if no_trunc else record_id[:_SHORT_ID]


def state_cell(state: str) -> Cell:
    """Return a state's name as a coloured cell."""
    return Cell(state, STATE_COLOURS.get(state, ""))


def note(text: str) -> None:
    """Print a note to stderr."""
    click.echo(printable(text), err=True)


def terminal_width() -> int | None:
    """Return the width of the terminal in columns, None if stdout is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def has_colour() -> bool:
    """Return whether stdout may have colour (see https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def rfc3339(nanoseconds: int) -> str | None:
    """Return a time in RFC 3339 format, in UTC with nanoseconds; None for 0, which means "not yet"."""
    if not nanoseconds:
        return None
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:09d}Z"


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
