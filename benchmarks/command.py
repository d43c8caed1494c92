"""`limpet bench`: compare durable checkpoints and recovery with other ways to store state, on this machine."""

import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from limpet.engine.cli.exits import FAILED
from limpet.engine.cli.options import output_option
from limpet.engine.cli.output import note, print_json, print_lines
from limpet.engine.cli.progress import progress_bar

if TYPE_CHECKING:
    from limpet.benchmarks import BenchReport
    from limpet.benchmarks.experiments import Extent

EXPERIMENTS = (
    "threads",
    "tasks",
    "bytes",
    "growth",
    "changes",
    "lists",
    "wal",
    "opening",
    "memory",
    "liveness",
    "waiting",
    "life",
    "command",
    "fleet",
    "fleet-sending",
    "fleet-joining",
    "fleet-looking",
)
"""The names of the table of experiments, which is too slow to load for `--help`."""


@click.command("bench")
@click.option(
    "--quick", "extent", flag_value="quick", help="Run once, with small sizes, to see that it works; figures are rough."
)
@click.option(
    "--full", "extent", flag_value="full", help="Up to 1,000,000 containers. Takes much longer, and gigabytes of disk."
)
@click.option("--only", type=click.Choice(EXPERIMENTS), multiple=True, help="Run only this experiment; repeatable.")
@click.option(
    "--fleet",
    metavar="URL",
    help="A PostgreSQL, for what `--only fleet` measures. It works in a schema of its own, which it removes again.",
)
@click.option("--repeat", type=click.IntRange(1, 1000), help="Number of turns.  [default: 5; with --quick 1]")
@click.option("--seed", type=int, help="Repeat the order of an earlier run.  [default: random]")
@click.option(
    "--dir",
    "directory",
    type=click.Path(exists=True, file_okay=False, writable=True),
    default=".",
    show_default=True,
    help="A directory on the disk to measure.",
)
@click.option("--save", type=click.Path(dir_okay=False), metavar="FILE", help="Also write the JSON document to FILE.")
@click.option(
    "--compare",
    "earlier",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Show what got better or worse since FILE was saved.",
)
@click.option("--plots", type=click.Path(file_okay=False), metavar="DIR", help="Draw SVG and PNG plots in DIR.")
@output_option
def command(
    *,
    extent: "Extent | None",
    only: tuple[str, ...],
    fleet: str | None,
    repeat: int | None,
    seed: int | None,
    directory: str,
    save: str | None,
    earlier: str | None,
    plots: str | None,
    as_json: bool,
) -> NoReturn:
    """Measure how fast this machine makes state durable and recovers it, compared with other ways to store it.

    Each figure is the median of several turns. A turn measures every contender once, in random order, each in a
    separate process. Ratios are computed within a turn, because disk speed drifts during a run. Contenders that are
    not durable are marked.

    The exit status is 0 even if a goal was not reached; 1 if something failed. Temporary files are always removed.
    """
    from limpet.benchmarks import Settings, run_bench  # noqa: PLC0415  # `limpet bench --help` must not wait for it
    from limpet.benchmarks.saved import load_report, save_report  # noqa: PLC0415

    if not fleet and any(name.startswith("fleet") for name in only):
        raise click.UsageError("--only fleet needs --fleet URL")
    before = load_report(earlier) if earlier else None
    _require_writable(save)
    settings = Settings(
        directory=directory,
        extent=extent or "normal",
        only=only,
        fleet=fleet or "",
        repeat=repeat or 0,
        seed=secrets.randbelow(1 << 32) if seed is None else seed,
    )
    with _exit_on_signals(), progress_bar() as show:
        report = run_bench(settings, lambda now: show(now.doing, now.done, now.total))
    if save:
        save_report(report, save)
    if plots:
        _draw(report, plots)
    _show(report, before, as_json=as_json)
    sys.exit(FAILED if report.failures else 0)


def _show(report: "BenchReport", before: "BenchReport | None", *, as_json: bool) -> None:
    from limpet.benchmarks.compare import compare, find_differences  # noqa: PLC0415
    from limpet.benchmarks.experiments import METRICS  # noqa: PLC0415
    from limpet.benchmarks.tables import describe, describe_comparison  # noqa: PLC0415

    comparisons = list(compare(before, report, METRICS)) if before else []
    if as_json:
        import msgspec  # noqa: PLC0415  # loaded only if needed

        print_json(
            **msgspec.to_builtins(report), comparison=[msgspec.to_builtins(one._asdict()) for one in comparisons]
        )
        return
    print_lines(describe(report))
    if before:
        print_lines(describe_comparison(comparisons, find_differences(before, report)))


def _draw(report: "BenchReport", directory: str) -> None:
    try:
        from limpet.benchmarks.plots import draw_plots  # noqa: PLC0415  # it takes a second to load

        for path in draw_plots(report, directory):
            note(f"limpet: drew {path}")
    except ImportError as error:
        note(f"limpet: no plots drawn: {error.name} is not installed; pip install 'limpet[plots]'")


def _require_writable(path: str | None) -> None:
    """Check before the run, not after it, that the report can be saved."""
    if path and not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
        raise click.BadParameter(f"{path}: its directory does not exist or is not writable", param_hint="--save")


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the run as Ctrl-C does, with temporary files removed."""

    def exit_on(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, exit_on) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
