"""Draws a timeline with matplotlib, which limpet does not need otherwise."""

import io
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from limpet.engine.cli.output import rfc3339
from limpet.engine.cli.timeline import Line, Mark, Phase, Sign, Stroke, Timeline

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # that it cannot keep its cache is no news for a user of ours
# By name, so that types can be checked where matplotlib is not installed.
_matplotlib: Any = import_module("matplotlib")
_new_figure: Any = import_module("matplotlib.figure").Figure
_Patch: Any = import_module("matplotlib.patches").Patch
_Drawn: Any = import_module("matplotlib.lines").Line2D
Figure = Any

# Colours that people tell apart who see no red, no green or no blue (Okabe and Ito), on white, also on a dark page.
_BLUE, _SKY, _GREEN, _ORANGE, _RED, _INK, _PALE = (
    "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#111827", "#9ca3af",
)  # fmt: skip
_VIOLET, _GREY = "#aa3377", "#4b5563"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "hatch.linewidth": 0.9,
    "text.parse_math": False,  # a dollar sign in a message is a dollar sign
    "svg.fonttype": "none",  # text stays text: it can be searched, and the file is small
    "svg.hashsalt": "limpet",  # so that the same timeline gives the same file
}
_PNG_DPI = 130
_ROW_INCHES, _LANE_INCHES = 0.17, 0.21
_MOST_ROWS = 4
"""Rows of labels above the lanes."""
_LETTER_INCHES = 0.075
_TEXT_POINTS = 6.5
_FARTHEST_POINTS = 34
"""A text farther from its mark than this is left out: what it belongs to would not be seen."""
_UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (180, 60, "minutes"), (2, 1, "seconds"))


class _Bar(NamedTuple):
    height: float
    settings: dict[str, Any]


_BARS = {
    Phase.CREATED: _Bar(0.26, {"facecolor": _SKY, "alpha": 0.75}),
    Phase.RAN: _Bar(0.66, {"facecolor": _BLUE}),
    Phase.RECORDED: _Bar(0.1, {"facecolor": _PALE}),
    Phase.UNKNOWN: _Bar(0.66, {"facecolor": "#fdf0d0", "edgecolor": _ORANGE, "hatch": "//////", "linewidth": 0.8}),
}
_OUTAGE = {"facecolor": "#e5e7eb", "linewidth": 0}
_TEXTS = {
    Sign.COMPLETED: "#00664b",
    Sign.FAILED: "#a84500",
    Sign.UNSEEN: "#8a5a00",
    Sign.DISTURBED: _VIOLET,
    Sign.FAULT: "#a84500",
}
_CHIP = {"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.6}
"""Behind a text."""
_SIGNS: dict[Sign, dict[str, Any]] = {
    Sign.COMPLETED: {"marker": "|", "markersize": 9, "color": _GREEN, "markeredgewidth": 2.4},
    Sign.FAILED: {"marker": "|", "markersize": 9, "color": _RED, "markeredgewidth": 2.4},
    Sign.UNSEEN: {"marker": "|", "markersize": 9, "color": _ORANGE, "markeredgewidth": 2.4},
    Sign.SAID_NEW: {"marker": "D", "markersize": 4, "color": _INK, "markerfacecolor": "white"},
    Sign.SAID_CREATED: {"marker": "o", "markersize": 4.5, "color": _INK, "markerfacecolor": "white"},
    Sign.SAID_RUNNING: {"marker": ">", "markersize": 5.5, "color": _INK, "markerfacecolor": "white"},
    Sign.SAID_EXITED: {"marker": "s", "markersize": 3.8, "color": _INK, "markerfacecolor": _INK},
    Sign.SAID_UNKNOWN: {"marker": "D", "markersize": 5, "color": _INK, "markerfacecolor": _ORANGE},
    Sign.UNKNOWN_NOW: {"marker": "D", "markersize": 5, "color": _INK, "markerfacecolor": _ORANGE},
    Sign.DISTURBED: {"marker": "x", "markersize": 5.5, "color": _VIOLET, "markeredgewidth": 1.6},
    Sign.FAULT: {"marker": "X", "markersize": 11, "color": "white", "markerfacecolor": _RED},
}
_STROKES: dict[Stroke, dict[str, Any]] = {
    Stroke.ENGINE: {"color": _INK, "linewidth": 1.1},
    Stroke.KEEPER: {"color": _VIOLET, "linewidth": 1.1, "linestyle": (0, (4, 2))},
    Stroke.CHANGE: {"color": _PALE, "linewidth": 0.9},
    Stroke.FAULT: {"color": _RED, "linewidth": 2, "linestyle": ":"},
}


def render(timeline: Timeline, kind: str) -> bytes:
    """Return the file of a timeline: `kind` is "svg" or "png"."""
    file = io.BytesIO()
    with _matplotlib.rc_context(_STYLE):
        metadata = {"Date": None, "Title": timeline.title} if kind == "svg" else None
        draw(timeline).savefig(file, format=kind, dpi=_PNG_DPI, metadata=metadata, facecolor="white")
    return file.getvalue()


def draw(timeline: Timeline) -> Figure:
    """Return the figure of a timeline."""
    unit, unit_name = _choose_unit((timeline.end - timeline.start) / 1e9)

    def scale(at: int) -> float:
        return min(max(at, timeline.start) - timeline.start, timeline.end - timeline.start) / 1e9 / unit

    labelled = [line for line in timeline.lines if line.label]
    width = min(max(10.0, 0.55 * len(labelled)), 30.0)
    span = scale(timeline.end) or 1.0
    point = span / (width - 1.6) / 72
    rows = list(stack(((scale(line.at), line.label) for line in labelled), _LETTER_INCHES * 72 * point))
    count = 1 + max((row for row in rows if row is not None), default=0)
    lanes = len(timeline.lanes)
    legend = list(_make_legend(timeline))
    columns = min(5, int(width // 2.6))
    legend_rows = math.ceil(len(legend) / columns)
    height = _LANE_INCHES * max(lanes, 2) + _ROW_INCHES * (count + legend_rows) + 1.2
    figure = _new_figure(figsize=(width, height), layout="constrained")
    panel = figure.subplots()
    panel.set(xlim=(-0.01 * span, 1.025 * span), ylim=(lanes - 0.4, -0.6))
    for start, end in timeline.outages:
        panel.axvspan(scale(start), scale(end), zorder=0, **_OUTAGE)
    for line in timeline.lines:
        panel.axvline(scale(line.at), zorder=1, **_STROKES[line.stroke])
    for line, row in zip(labelled, rows, strict=True):
        if row is not None:
            _write_label(panel, line, scale(line.at), row)
    for place, lane in enumerate(timeline.lanes):
        for each in lane.spans:
            left, right = scale(each.start), scale(each.end)
            bar = _BARS[each.phase]
            panel.barh(place, right - left, left=left, height=bar.height, zorder=2, **bar.settings)
        _draw_marks(panel, place, [(scale(mark.at), mark) for mark in lane.marks], point)
    panel.set_yticks(range(lanes), [lane.name for lane in timeline.lanes], fontfamily="monospace", fontsize=7.5)
    panel.tick_params(axis="y", length=0)
    panel.set_title(timeline.title, loc="left", fontsize=10, pad=6 + count * _ROW_INCHES * 72, wrap=True)
    unlabelled = sum(row is None for row in rows)
    notes = [f"{unit_name} since {_format_time(timeline.start)}", timeline.note]
    notes += [f"{unlabelled} labels left out, for want of room"] if unlabelled else []
    panel.set_xlabel("\n".join(filter(None, notes)), fontsize=8)
    figure.legend(handles=legend, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return figure


def stack(labels: Iterable[tuple[float, str]], letter: float) -> Iterator[int | None]:
    """Yield for each label, as place and text, the row in which it overlaps no other; None if there is no such row.

    `letter` is the width of a letter, in the places' unit. The labels need not be in order.
    """
    taken: list[list[tuple[float, float]]] = [[] for _ in range(_MOST_ROWS)]
    for place, text in labels:
        mine = (place, place + letter * (len(text) + 2))
        row = next(
            (row for row, others in enumerate(taken) if all(mine[1] <= low or high <= mine[0] for low, high in others)),
            None,
        )
        if row is not None:
            taken[row].append(mine)
        yield row


def _write_label(panel: Any, line: Line, place: float, row: int) -> None:
    panel.annotate(
        line.label,
        (place, 1.0),
        (2, 3 + row * _ROW_INCHES * 72),
        xycoords=panel.get_xaxis_transform(),
        textcoords="offset points",
        fontsize=8,
        color=_GREY if line.stroke is Stroke.CHANGE else _STROKES[line.stroke]["color"],
        annotation_clip=False,
    )


def _draw_marks(panel: Any, place: int, marks: Sequence[tuple[float, Mark]], point: float) -> None:
    """Draw the marks of a lane, and their texts where they cover none; `point` is the width of a typographic point."""
    taken = [(at - 4 * point, at + 4 * point) for at, _ in marks]
    for at, mark in sorted(marks, key=lambda each: (each[1].sign is not Sign.FAULT, each[0])):
        settings = _SIGNS[mark.sign]
        panel.plot([at], [place], linestyle="none", zorder=4, clip_on=False, **settings)
        if not mark.text:
            continue
        width = (len(mark.text) + 0.5) * 0.62 * _TEXT_POINTS * point
        left = find_room(at + 4 * point, width, taken)
        if left - at > _FARTHEST_POINTS * point:
            continue
        taken.append((left, left + width))
        panel.annotate(
            mark.text,
            (at, place),
            ((left - at) / point, 1.5),
            textcoords="offset points",
            fontsize=_TEXT_POINTS,
            color=_TEXTS.get(mark.sign, _INK),
            bbox=_CHIP,
            zorder=3,
        )


def find_room(left: float, width: float, taken: Sequence[tuple[float, float]]) -> float:
    """Return the first place from `left` on where `width` overlaps nothing that is taken."""
    for low, high in sorted(taken):
        if low < left + width and left < high:
            left = high
    return left


def _make_legend(timeline: Timeline) -> Iterator[Any]:
    """Yield a handle for each thing that is in the picture."""
    spans = {span.phase for lane in timeline.lanes for span in lane.spans}
    signs = {mark.sign for lane in timeline.lanes for mark in lane.marks}
    strokes = {line.stroke for line in timeline.lines}
    for phase, bar in _BARS.items():
        if phase in spans:
            yield _Patch(label=phase.value, **bar.settings)
    for stroke, settings in _STROKES.items():
        if stroke in strokes:
            yield _Drawn([], [], label=stroke.value, **settings)
    if timeline.outages:
        yield _Patch(label="no engine, until the next has recovered", **_OUTAGE)
    for sign, settings in _SIGNS.items():
        if sign in signs:
            yield _Drawn([], [], linestyle="none", label=sign.value, **settings)


def _choose_unit(seconds: float) -> tuple[float, str]:
    return next(((unit, name) for least, unit, name in _UNITS if seconds >= least), (1e-3, "milliseconds"))


def _format_time(nanoseconds: int) -> str:
    return (rfc3339(nanoseconds) or "")[:19] + "Z"
