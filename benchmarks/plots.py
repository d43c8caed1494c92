"""The plots: SVG and PNG files of a report, drawn with matplotlib, which limpet does not need otherwise.

`python -m limpet.benchmarks.plots REPORT DIRECTORY` draws those of a saved report.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

from limpet.benchmarks.experiments import EXPERIMENTS
from limpet.benchmarks.figures import BenchReport, Case, Series
from limpet.benchmarks.run import LIMPET, ONE_FLUSH
from limpet.benchmarks.saved import load_report

# By name, so that types can be checked where matplotlib is not installed.
_matplotlib: Any = import_module("matplotlib")
_new_figure: Any = import_module("matplotlib.figure").Figure
Figure = Any

_COLOURS = {
    LIMPET: "#c2410c",
    "limpet-cold": "#fb923c",
    ONE_FLUSH: "#111827",
    "files": "#2563eb",
    "files-cold": "#93c5fd",
    "files-unflushed": "#60a5fa",
    "sqlite3": "#059669",
    "select": "#059669",
    "limpet-sync": "#fb923c",
    "limpet-sync-tasks": "#b45309",
    "limpet-alone": "#fdba74",
    "direct": "#2563eb",
    "batched": "#93c5fd",
    "lmdb": "#7c3aed",
    "diskcache": "#a16207",
    "sqlalchemy-core": "#6b7280",
    "sqlalchemy-orm": "#9ca3af",
}
_OTHER = "#4b5563"
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "svg.hashsalt": "limpet",  # so that the same figures give the same file
}
_PNG_DPI = 160
_BESIDE = 10
"""The number of running containers beside which a single life is drawn."""
_CALLED = {"tasks": "\n(limpet: AsyncStore; others: asyncio.to_thread)"}
"""How the contenders of an experiment are called, below its axis."""


def draw_plots(report: BenchReport, directory: str) -> Iterator[str]:
    """Draw what was measured into `directory`, and yield the path of each file. Raises OSError."""
    os.makedirs(directory, exist_ok=True)
    with _matplotlib.rc_context(_STYLE):
        for name, draw in _PLOTS.items():
            figure = draw(report)
            if figure is None:
                continue
            figure.suptitle(_describe_place(report), fontsize=7, color=_OTHER)
            for kind in ("svg", "png"):
                path = os.path.join(directory, f"{name}.{kind}")
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(path, dpi=_PNG_DPI, metadata=metadata, facecolor="white")
                yield path


def _describe_place(report: BenchReport) -> str:
    machine = report.machine
    durable = "" if machine["durable"] else ", NOT A DISK: nothing was durable"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['file_system']}{durable};"
        f" Python {report.versions['python']}, SQLite {report.versions['sqlite']};"
        f" median and range of {report.settings['turns']} turns, {report.at[:10]}"
    )


def _draw_throughput(report: BenchReport) -> Figure | None:
    names = [name for name in ("threads", "tasks") if report.of(name)]
    if not names:
        return None
    figure = _new_figure(figsize=(5.2 * len(names), 5.8), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    one_flush = report.find(Case("threads", ONE_FLUSH, 1))
    for panel, name in zip(panels, names, strict=True):
        _draw_lines(panel, [series for series in report.of(name) if series.contender != ONE_FLUSH], "per_second", "log")
        if one_flush is not None and one_flush.spreads:
            median = one_flush.spreads["per_second"].median
            panel.axhline(median, color=_COLOURS[ONE_FLUSH], linestyle="--", label=ONE_FLUSH)
        panel.set(title=EXPERIMENTS[name].title, xlabel=EXPERIMENTS[name].size_title + _CALLED.get(name, ""))
    panels[0].set_ylabel("per second (log)")
    _add_legend(figure, panels, [series for name in names for series in report.of(name)])
    return figure


def _draw_latency(report: BenchReport) -> Figure | None:
    found = sorted(
        (series for series in report.of("threads") if series.size == 1 and series.spreads),
        key=lambda series: -series.spreads["p50_us"].median,
    )
    if not found:
        return None
    figure = _new_figure(figsize=(8.6, 0.42 * len(found) + 1.5), layout="constrained")
    panel = figure.subplots()
    for place, series in enumerate(found):
        p50, p99 = series.spreads["p50_us"], series.spreads["p99_us"]
        hatch = "///" if series.caveat else ""
        panel.barh(place, p50.median, color=_colour(series), height=0.6, hatch=hatch, edgecolor="white", zorder=2)
        panel.plot([p50.median, p99.median], [place, place], color=_colour(series), linewidth=1.2, marker="|", zorder=3)
        panel.annotate(f"{p50.median:,.0f} us", (p99.median, place), (6, 0), textcoords="offset points", va="center")
    panel.set_yticks(range(len(found)), [_name(series) for series in found])
    panel.grid(visible=False, axis="y")
    panel.margins(x=0.12)
    panel.set(title="one checkpoint, one writer: p50, line to p99", xlabel="microseconds", xlim=(0, None))
    return figure


def _draw_life(report: BenchReport) -> Figure | None:
    found = sorted(
        (series for series in report.of("life") if series.size == _BESIDE and series.spreads),
        key=lambda series: -series.spreads["life_ms"].median,
    )
    if not found:
        return None
    figure = _new_figure(figsize=(8.6, 0.42 * len(found) + 1.5), layout="constrained")
    panel = figure.subplots()
    for place, series in enumerate(found):
        took = series.spreads["life_ms"]
        panel.barh(place, took.median, color=_colour(series), height=0.6, edgecolor="white", zorder=2)
        panel.plot([took.low, took.high], [place, place], color=_OTHER, linewidth=1.2, marker="|", zorder=3)
        panel.annotate(f"{took.median:,.1f} ms", (took.high, place), (6, 0), textcoords="offset points", va="center")
    panel.set_yticks(range(len(found)), [f"{series.label}, {series.caveat}".rstrip(", ") for series in found])
    panel.grid(visible=False, axis="y")
    panel.margins(x=0.12)
    panel.set(title="/bin/true, create to delete", xlabel="milliseconds", xlim=(0, None))
    return figure


def _draw_opening(report: BenchReport) -> Figure | None:
    return _draw_sizes(report, "opening", "total_ms", "milliseconds (log)", "log")


def _draw_fleet(report: BenchReport) -> Figure | None:
    return _draw_sizes(report, "fleet", "per_second", "per second (log)", "log")


def _draw_growth(report: BenchReport) -> Figure | None:
    return _draw_sizes(report, "growth", "p50_us", "p50, microseconds", "linear")


def _draw_sizes(report: BenchReport, name: str, metric: str, label: str, scale: str) -> Figure | None:
    if not report.of(name):
        return None
    figure = _new_figure(figsize=(7.2, 5.4), layout="constrained")
    panel = figure.subplots()
    _draw_lines(panel, report.of(name), metric, scale)
    experiment = EXPERIMENTS[name]
    panel.set(title=experiment.title, xlabel=experiment.size_title, ylabel=label)
    if scale == "linear":
        panel.set_ylim(bottom=0)
    _add_legend(figure, [panel], report.of(name))
    return figure


def _draw_lines(panel: Any, found: Iterable[Series], metric: str, scale: str) -> None:
    """Draw a line for each contender over the sizes, with the range of its turns."""
    lines: dict[str, list[Series]] = {}
    for series in found:
        if metric in series.spreads:
            lines.setdefault(series.contender, []).append(series)
    sizes = sorted({series.size for line in lines.values() for series in line})
    for contender, line in lines.items():
        spreads = [series.spreads[metric] for series in line]
        panel.errorbar(
            [series.size for series in line],
            [spread.median for spread in spreads],
            yerr=[
                [spread.median - spread.low for spread in spreads],
                [spread.high - spread.median for spread in spreads],
            ],
            label=contender,
            color=_colour(line[0]),
            linestyle=":" if line[0].caveat.startswith("not durable") else "-",
            linewidth=2.6 if contender == LIMPET else 1.4,
            marker="o",
            markersize=6 if contender == LIMPET else 4,
            capsize=2,
            zorder=3 if contender == LIMPET else 2,
        )
    panel.set(xscale="log", yscale=scale)
    panel.yaxis.set_major_formatter("{x:,g}")
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
    panel.minorticks_off()
    panel.margins(x=0.06)


def _add_legend(figure: Figure, panels: Iterable[Any], found: Iterable[Series]) -> None:
    """Put one legend below all panels, with each contender once, under the first name that it has in `found`."""
    names: dict[str, str] = {}
    for series in found:
        one_writer = ", one writer" if series.contender == ONE_FLUSH else ""
        names.setdefault(series.contender, _name(series) + one_writer)
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, contender in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(contender, handle)
    labels = [names[contender] for contender in handles]
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def _name(series: Series) -> str:
    return f"{series.label} (not durable)" if series.caveat.startswith("not durable") else series.label


def _colour(series: Series) -> str:
    return _COLOURS.get(series.contender, _OTHER)


_PLOTS: dict[str, Callable[[BenchReport], Figure | None]] = {
    "throughput": _draw_throughput,
    "latency": _draw_latency,
    "opening": _draw_opening,
    "growth": _draw_growth,
    "life": _draw_life,
    "fleet": _draw_fleet,
}


if __name__ == "__main__":
    for drawn in draw_plots(load_report(sys.argv[1]), sys.argv[2]):
        sys.stdout.write(f"{drawn}\n")
