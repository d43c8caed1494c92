"""`limpet drill --mode`: run the modes and show their findings."""

from collections.abc import Iterator, Sequence

import click
import msgspec

from limpet.engine.cli.output import Cell, Column, Row, fill, paint, print_json, print_lines, render_table
from limpet.engine.cli.progress import progress_bar
from limpet.engine.drill.modes import Mode, ModesReport, repeat_point, run_modes
from limpet.testing import Report

UNSUPPORTED = 3
"""The exit status if nothing was wrong, but this machine does not support a mode."""
_SHOWN = 10
_TRIED = (
    ("points", "kill points, some within a write"),
    ("images", "distinct disk states that a power cut can leave"),
    ("faults", "disk operations made to fail"),
    ("damaged", "states with flipped bits, lost or swapped parts"),
    ("cases", "containers with real processes, checked after recovery"),
    ("acknowledged", "acknowledged calls that were checked"),
)
_FOUND = (
    ("lost", "acknowledged changes missing afterwards"),
    ("torn", "atomic changes found half done"),
    ("false_verdicts", "false statements about a container"),
    ("other", "other failures"),
)


def run(
    modes: Sequence[str],
    rounds: int | None,
    seed: int,
    workers: int,
    point: str | None,
    *,
    as_json: bool,
    fleet: str = "",
) -> int:
    """Run the modes, or one point of one mode; show the findings, and return the exit status."""
    if point is not None:
        if len(modes) != 1:
            raise click.UsageError("--point needs exactly one --mode")
        return _repeat(Mode(modes[0]), seed, point, as_json=as_json)
    with progress_bar(auto_refresh=False) as progress:  # the harness forks
        report = run_modes(
            [Mode(mode) for mode in modes], seed=seed, rounds=rounds, workers=workers, progress=progress, fleet=fleet
        )
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


def _describe(report: ModesReport) -> Iterator[str]:
    rows: list[Row] = [
        (name.replace("_", " "), f"{getattr(report, name):,}", words) for name, words in _TRIED if getattr(report, name)
    ]
    rows += [
        (name.replace("_", " "), Cell(f"{count:,}", "red" if count else "green"), words)
        for name, words in _FOUND
        for count in [getattr(report, name)]
    ]
    yield from render_table((Column("DRILL"), Column("COUNT"), Column("MEANING")), rows, None)
    yield ""
    for mode, control in report.control.items():
        told = f"detected {control.violations:,} times" if control.violations else paint("NOT DETECTED", "red")
        yield f"Control for {mode}: {control.broken}: {told}."
    for mode, why in report.unsupported.items():
        yield f"{paint('NOT RUN', 'yellow')}: {mode}:"
        yield from fill(why, 2)
    if report.is_clean:
        words = "PASSED the supported modes" if report.unsupported else "PASSED"
        yield f"{paint(words, 'green')} in {report.seconds:.0f} s (seed {report.seed})."
        return
    yield paint("FAILED", "red") + ":"
    for finding in report.findings[:_SHOWN]:
        yield from fill(f"{finding.mode}, {finding.kind}: {finding.message}", 2)
        yield f"    {finding.repeat}"
    if len(report.findings) > _SHOWN:
        yield f"  and {len(report.findings) - _SHOWN} more; see -o json"
    yield "Repeat the drill with:"
    yield f"  {report.repeat}"
