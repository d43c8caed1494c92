"""`limpet bench`: measure durable checkpoints and recovery on this machine, beside other ways to keep state."""

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from limpet.engine.cli.options import output_option
from limpet.engine.cli.output import Column, Row, print_json, print_lines, render_table

if TYPE_CHECKING:
    from limpet.engine.bench import BenchReport


@click.command("bench")
@click.option("--quick", is_flag=True, help="One short turn, to see that it works; the figures say little.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(exists=True, file_okay=False, writable=True),
    default=".",
    show_default=True,
    help="Where to measure: a directory on the disk in question.",
)
@output_option
def command(*, quick: bool, directory: str, as_json: bool) -> None:
    """Measure how many checkpoints a second become durable, and how long opening and recovering takes.

    Each figure is the median of five turns of a second, each in a process of its own and in shuffled order. Ratios
    compare what ran in the same run: machines and disks differ, and so do their hours.
    """
    from limpet.engine.bench import run_bench  # noqa: PLC0415  # `limpet bench --help` must not wait for it

    with _progress() as advance:
        report = run_bench(directory=os.path.abspath(directory), quick=quick, on_cell=advance)
    if as_json:
        import msgspec  # noqa: PLC0415  # only what is asked for is loaded

        print_json(**msgspec.to_builtins(report))
    else:
        print_lines(describe(report))


@contextmanager
def _progress() -> Iterator[Callable[[int, int], object]]:
    """Show a progress bar on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console  # noqa: PLC0415  # only a terminal needs it
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def describe(report: "BenchReport") -> Iterator[str]:
    """Yield the lines of the tables."""
    machine = report.machine
    yield f"{machine['cpu']}, {machine['cores']} cores, {machine['file system']}, Linux {machine['kernel']}"
    yield f"Python {machine['python']}, SQLite {machine['sqlite']}, limpet {machine['limpet']}, {machine['when']}"
    if machine["file system"] == "tmpfs":
        yield "THIS IS NOT A DISK: nothing here was durable. Give --dir on one."
    yield ""
    columns = [
        Column(title) for title in ("DURABLE CHECKPOINTS", "CALLERS", "PER SECOND", "P50", "P99", "CPU", "LIMPET IS")
    ]
    yield from render_table(columns, list(_checkpoint_rows(report)), None)
    yield ""
    columns = [
        Column(title) for title in ("OPEN AND RECOVER", "RUNNING", "TOOK", "BARE SELECT", "RATIO", "MEMORY EACH")
    ]
    yield from render_table(columns, list(_opening_rows(report)), None)


def _checkpoint_rows(report: "BenchReport") -> Iterator[Row]:
    for name, callers in dict.fromkeys(sorted(((cell.name, cell.callers) for cell in report.cells), key=_order)):
        rate = report.median(name, callers, "per_second") or 0.0
        p50, p99, cpu = (report.median(name, callers, field) or 0.0 for field in ("p50_us", "p99_us", "cpu_us"))
        ours = report.median("limpet", callers, "per_second")
        ratio = f"{ours / rate:.1f} times as fast" if ours and not name.startswith("limpet") else ""
        yield (name, str(callers), f"{rate:,.0f}", f"{p50:,.0f} us", f"{p99:,.0f} us", f"{cpu:,.0f} us", ratio)


def _order(cell: tuple[str, int]) -> tuple[bool, int, bool, str]:
    name, callers = cell
    return "asyncio" in name, callers, name != "limpet", name


def _opening_rows(report: "BenchReport") -> Iterator[Row]:
    for size in dict.fromkeys(opening.containers for opening in report.openings):
        openings = [opening for opening in report.openings if opening.containers == size]
        took = statistics.median(one.open_ms + one.recover_ms for one in openings)
        select = statistics.median(one.select_ms for one in openings)
        memory = max(one.bytes_each for one in openings)  # later openings reuse what earlier ones have freed
        yield (
            f"{size:,} containers",
            str(openings[0].running),
            f"{took:,.1f} ms",
            f"{select:,.1f} ms",
            f"{took / select:.2f}",
            f"{memory:,.0f} bytes",
        )
