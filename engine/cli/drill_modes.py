"""`limpet drill --mode`: what is tried and found, for people and as JSON."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click
import msgspec

from limpet.engine.cli.output import Cell, Column, Row, fill, paint, print_json, print_lines, render_table
from limpet.engine.drill.modes import Mode, ModesReport, repeat_point, run_modes
from limpet.testing import Report

UNSUPPORTED = 3
"""The exit status if nothing false was found, but not all could be tried."""
_SHOWN = 10
_TRIED = (
    ("points", "moments at which a life was killed, also amid a write"),
    ("images", "different disks that a power cut may leave"),
    ("faults", "operations of the disk that were made to fail"),
    ("damaged", "states with flipped bits, lost or swapped parts"),
    ("cases", "containers judged after a recovery amid real processes"),
    ("acknowledged", "acknowledgements that were compared"),
)
_FOUND = (
    ("lost", "acknowledged, but gone or older afterwards"),
    ("torn", "changed together, but found half done"),
    ("false_verdicts", "said of a container what is not true"),
    ("other", "failed in any other way"),
)


def run(modes: Sequence[str], rounds: int | None, seed: int, workers: int, point: str | None, *, as_json: bool) -> int:
    """Run the modes, or one point of one mode; show what was found, and return the exit status."""
    if point is not None:
        if len(modes) != 1:
            raise click.UsageError("--point is of one --mode")
        return _repeat(Mode(modes[0]), seed, point, as_json=as_json)
    with _progress() as progress:
        report = run_modes([Mode(mode) for mode in modes], seed=seed, rounds=rounds, workers=workers, progress=progress)
    if as_json:
        print_json(**msgspec.to_builtins(report))
    else:
        print_lines(_describe(report))
    if not report.is_clean:
        return 1
    return UNSUPPORTED if report.unsupported else 0


def _repeat(mode: Mode, seed: int, point: str, *, as_json: bool) -> int:
    report: Report = repeat_point(mode, seed, point)
    if as_json:
        print_json(**msgspec.to_builtins(report))
        return 1 if report.violations else 0
    for finding in report.findings:
        print_lines(fill(f"{finding.kind}: {finding.message}", 2))
    print_lines([paint("FAILED", "red") if report.violations else paint("PASSED", "green")])
    return 1 if report.violations else 0


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar on a terminal, and nothing elsewhere. It has no thread: the harness forks."""
    if not sys.stderr.isatty():
        yield lambda _words, _done, _total: None
        return
    from rich.console import Console  # noqa: PLC0415  # only a terminal needs it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=None)

        def show(words: str, done: int, total: int) -> None:
            bar.update(task, description=words, completed=done, total=total, refresh=True)

        yield show


def _describe(report: ModesReport) -> Iterator[str]:
    rows: list[Row] = [
        (name.replace("_", " "), f"{getattr(report, name):,}", words) for name, words in _TRIED if getattr(report, name)
    ]
    rows += [
        (name.replace("_", " "), Cell(f"{count:,}", "red" if count else "green"), words)
        for name, words in _FOUND
        for count in [getattr(report, name)]
    ]
    yield from render_table((Column("DRILL"), Column("COUNT"), Column("IN PLAIN WORDS")), rows, None)
    yield ""
    for mode, control in report.control.items():
        told = f"noticed {control.violations:,} times" if control.violations else paint("NOT NOTICED", "red")
        yield f"Control of {mode}: {control.broken}: {told}."
    for mode, why in report.unsupported.items():
        yield f"{paint('NOT TRIED', 'yellow')}: {mode}:"
        yield from fill(why, 2)
    if report.is_clean:
        words = "PASSED what could be tried" if report.unsupported else "PASSED"
        yield f"{paint(words, 'green')} in {report.seconds:.0f} s (seed {report.seed})."
        return
    yield paint("FAILED", "red") + ":"
    for finding in report.findings[:_SHOWN]:
        yield from fill(f"{finding.mode}, {finding.kind}: {finding.message}", 2)
        yield f"    {finding.repeat}"
    if len(report.findings) > _SHOWN:
        yield f"  and {len(report.findings) - _SHOWN} more; see -o json"
    yield "Repeat all of it with:"
    yield f"  {report.repeat}"
