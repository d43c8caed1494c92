"""`limpet drill`: rehearse crashes on this machine, and see that what is said after them is true."""

import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from limpet.engine.cli.options import output_option
from limpet.engine.cli.output import Cell, Column, Row, fill, note, paint, print_json, print_lines, render_table

if TYPE_CHECKING:
    from limpet.engine.drill import DrillReport, Failure

MODES = ("kill", "power", "disk", "reuse", "reboot")
_ROUNDS, _CONTAINERS = 15, 20
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FACTS = (
    ("kills", "engine killed with SIGKILL, also amid its recovery"),
    ("containers", "containers made; each one started is a real process"),
    ("acknowledged", "calls that had returned: none may be forgotten"),
    ("unknown", "containers it could not vouch for, and said so"),
)
_FAULTS = (
    ("lost", "acknowledged, but gone or older after the kill"),
    ("torn", "changed together, but found half done"),
    ("false_running", "said to be RUNNING, but the process had ended"),
    ("false_exited", "said to be EXITED, but the process was alive"),
    ("wrong_exit_code", "an exit code stated that was not the true one"),
    ("leaked", "a process alive that the engine does not account for"),
    ("harmed", "somebody else's process or file touched"),
    ("broken", "the engine failed by itself"),
)


class _Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_status = 128 + number


@click.command("drill")
@click.option(
    "--mode",
    "modes",
    multiple=True,
    type=click.Choice([*MODES, "all"]),
    help="What to rehearse; repeatable.  [default: kills at random]",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 99_999),
    help="How often to kill it, or how many lives of each mode.  [default: 15, or by mode 1 or 2]",
)
@click.option(
    "--containers",
    type=click.IntRange(1, 999),
    help="How many containers to make in each round.  [default: 20]",
)
@click.option("--seed", type=int, help="Repeat the plan of an earlier drill.  [default: a new one]")
@click.option("--workers", type=click.IntRange(1, 256), help="Processes of a mode.  [default: one for each core]")
@click.option("--point", metavar="POINT", help="Only this point of the mode and seed, as a finding names it.")
@click.option("--keep", is_flag=True, help="Leave the drill's directory for a look at it, and say where it is.")
@output_option
def command(
    *,
    modes: tuple[str, ...],
    rounds: int | None,
    containers: int | None,
    seed: int | None,
    workers: int | None,
    point: str | None,
    keep: bool,
    as_json: bool,
) -> NoReturn:
    """Kill an engine again and again, and compare what it says after each recovery with what is true.

    Without --mode, in a directory of its own, as root or not. In each round an engine runs real containers (small
    shell programs) until it is killed at a random instant. While it is down some of them are killed, and some of
    their bundles removed or damaged. Then a new engine recovers. The truth is kept outside: which calls had returned,
    which processes live, and with which codes the others ended.

    A seed repeats the plan, with the same rounds and containers. How far each life gets until its kill is a matter of
    timing, and may differ.

    With --mode, lives of a store that a seed draws are tried systematically: kill: killed at each system call that
    changes a file. power: every disk that a power cut may leave. disk: each operation fails; files are damaged.
    reuse: strangers get the pids of containers. reboot: another boot id. all: all of it. Each mode is also run on a
    store that is broken on purpose, and must catch it.

    Status 0 if all that was said is true, and nothing was lost, torn, leaked or harmed, else 1; 3 if something could
    not be tried on this machine; 128 + N if signal N ended the drill. No process and no directory of it is left then,
    either.
    """
    chosen = secrets.randbelow(1 << 32) if seed is None else seed
    if modes:
        if containers or keep:
            raise click.UsageError("--containers and --keep are for a drill without --mode")
        if point and seed is None:
            raise click.UsageError("--point is of one --seed: the command that a finding prints has both")
        _run_modes(modes, rounds, chosen, workers, point, as_json=as_json)
    if workers or point:
        raise click.UsageError("--workers and --point are for a --mode")
    directory = os.path.join(tempfile.gettempdir(), f"limpet-drill-{secrets.token_hex(6)}")
    try:
        with _raise_on_signals():
            try:
                report = _run(rounds or _ROUNDS, containers or _CONTAINERS, chosen, directory)
            finally:
                _ignore_signals()  # what is left to do is short, and must be whole
                if keep:
                    note(f"limpet: kept {directory}")
                else:
                    shutil.rmtree(directory, ignore_errors=True)
    except _Interrupted as interrupted:
        note("limpet: drill interrupted; nothing of it is left" + (" but its directory" if keep else ""))
        sys.exit(interrupted.exit_status)
    if as_json:
        import msgspec  # noqa: PLC0415  # only what is asked for is loaded

        print_json(**msgspec.to_builtins(report))
    else:
        print_lines(_describe(report))
    sys.exit(0 if report.passed else 1)


def _run_modes(
    modes: tuple[str, ...], rounds: int | None, seed: int, workers: int | None, point: str | None, *, as_json: bool
) -> NoReturn:
    from limpet.engine.cli.drill_modes import run  # noqa: PLC0415  # `limpet drill --help` must not wait for it

    chosen = MODES if "all" in modes else tuple(mode for mode in MODES if mode in modes)
    try:
        with _raise_on_signals():
            status = run(chosen, rounds, seed, workers or os.cpu_count() or 1, point, as_json=as_json)
            _ignore_signals()
    except _Interrupted as interrupted:
        note("limpet: drill interrupted; nothing of it is left")
        sys.exit(interrupted.exit_status)
    sys.exit(status)


def _run(rounds: int, containers: int, seed: int, directory: str) -> "DrillReport":
    from limpet.engine.drill import run_drill  # noqa: PLC0415  # `limpet drill --help` must not wait for it

    with _progress(rounds, seed) as advance:
        return run_drill(rounds=rounds, containers=containers, seed=seed, directory=directory, on_round=advance)


@contextmanager
def _progress(rounds: int, seed: int) -> Iterator[Callable[[], object]]:
    """Show a progress bar on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console  # noqa: PLC0415  # only a terminal needs it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"drill {seed}: kill, recover, compare", total=rounds)
        yield lambda: progress.advance(task)


def _describe(report: "DrillReport") -> Iterator[str]:
    rows: list[Row] = [(_label(field), str(getattr(report, field)), words) for field, words in _FACTS]
    rows += [(_label(field), _fault_cell(getattr(report, field)), words) for field, words in _FAULTS]
    yield from render_table((Column("DRILL"), Column("COUNT"), Column("IN PLAIN WORDS")), rows, None)
    yield ""
    took = report.recovery_ms
    yield f"A recovery took {took.p50} ms as a rule (the median), {took.max} ms at most."
    if report.passed:
        words = f": {report.rounds} rounds, and all that was said after each is true (seed {report.seed})."
        yield paint("PASSED", "green") + words
        return
    yield paint("FAILED", "red") + ":"
    for failure in report.failures:
        yield from fill(_describe_failure(failure), 2)
    yield "Repeat it with:"
    yield f"  {report.repeat}"


def _describe_failure(failure: "Failure") -> str:
    where = f"round {failure.round}, {failure.container}: {_label(failure.kind)}"
    return f"{where}: expected {failure.expected}; it said: {failure.said}"


def _label(field: str) -> str:
    return field.replace("_", " ")


def _fault_cell(count: int) -> Cell:
    return Cell(str(count), "red" if count else "green")


@contextmanager
def _raise_on_signals() -> Iterator[None]:
    """Let the first signal end the block, by an exception; after one, and on the way out, more are ignored."""

    def raise_interrupted(number: int, _: FrameType | None) -> None:
        _ignore_signals()  # one is enough
        raise _Interrupted(number)

    before = {number: signal.signal(number, raise_interrupted) for number in _SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
