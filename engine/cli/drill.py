"""`limpet drill`: cause crashes on this machine, and check that every recovery reports the truth."""

import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from limpet.engine.cli.options import output_option
from limpet.engine.cli.output import Cell, Column, Row, fill, note, paint, print_json, print_lines, render_table
from limpet.engine.cli.plot import Plot, plot_option
from limpet.engine.cli.progress import progress_bar
from limpet.engine.state.entries import require_utf8

if TYPE_CHECKING:
    from limpet.engine.drill import DrillReport, Failure, Happening

MODES = ("kill", "power", "disk", "reuse", "reboot", "keeper", "fleet")
_ROUNDS, _CONTAINERS = 15, 20
_MOST_ROUNDS_IN_A_PLOT = 60
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FACTS = (
    ("kills", "SIGKILLs of the engine, some during its recovery"),
    ("containers", "containers created; each started one is a real process"),
    ("acknowledged", "calls that returned; none of them may be lost"),
    ("unknown", "containers reported as UNKNOWN"),
    ("keeper_kills", "SIGKILLs of the keeper, its anchor or its copier"),
    ("unseen", "ends that nobody saw: all keepers were killed"),
    ("stranded", "ended, with processes left: all keepers were killed"),
)
_FACTS_OF_RUNTIMES = {
    "keeper_kills": ("monitor_kills", "SIGKILLs of conmons, and of runtimes amid what they do"),
    "unseen": ("unseen", "ends that nobody saw: their conmon was killed"),
    "stranded": ("stranded", "ended, with processes left: their conmon was killed"),
}
"""What is said in place of these where an OCI runtime is tried: its containers have no keeper."""
_FAULTS = (
    ("lost", "acknowledged changes missing after a kill"),
    ("torn", "atomic changes found half done"),
    ("false_running", "reported RUNNING, but the process had ended"),
    ("false_exited", "reported EXITED, but the process was alive"),
    ("wrong_exit_code", "reported with a wrong exit code"),
    ("leaked", "live processes that the engine does not report"),
    ("harmed", "processes or files of others that were changed"),
    ("broken", "errors of the engine itself"),
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
    help="The kind of failure to test; repeatable.  [default: random kills]",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 99_999),
    help="Number of kills; with --mode, number of scripts per mode.  [default: 15; with --mode 1 or 2]",
)
@click.option(
    "--containers",
    type=click.IntRange(1, 999),
    help="Number of containers per round.  [default: 20]",
)
@click.option(
    "--runtime",
    type=click.Choice(["runc", "crun"]),
    help="Run the containers by this OCI runtime, as root; conmons and runtimes are killed, too.",
)
@click.option("--seed", type=int, help="Repeat the plan of an earlier drill.  [default: random]")
@click.option("--workers", type=click.IntRange(1, 256), help="Worker processes for --mode.  [default: one per core]")
@click.option("--point", metavar="POINT", help="Run only this point of --mode and --seed, as printed with a finding.")
@click.option(
    "--fleet",
    metavar="URL",
    envvar="LIMPET_FLEET",
    show_envvar=True,
    help="The PostgreSQL for --mode fleet. The drill makes a schema of its own there, and removes it again.",
)
@click.option("--keep", is_flag=True, help="Keep the drill's directory and print its path.")
@plot_option("Draw what happened as a timeline, an SVG or PNG file.")
@output_option
def command(
    *,
    modes: tuple[str, ...],
    rounds: int | None,
    containers: int | None,
    runtime: str | None,
    seed: int | None,
    workers: int | None,
    point: str | None,
    fleet: str | None,
    keep: bool,
    plot: Plot | None,
    as_json: bool,
) -> NoReturn:
    """Kill an engine repeatedly, and compare what it reports after each recovery with the truth.

    In each round an engine runs real containers (small shell programs) until it is killed at a random moment. While it
    is down, the drill kills some containers and removes or damages some bundles. Then a new engine recovers. The drill
    itself records the truth: which calls returned, which processes are alive, and the exit codes of the others. It
    works in a temporary directory and does not need root.

    A seed repeats the plan: the same rounds and containers. How far each round gets before its kill depends on timing.

    --mode runs a scripted store life against one kind of failure. Each mode also runs against a deliberately broken
    store, and must detect it.

    \b
      kill    kill it at each system call that changes a file
      power   try every disk state that a power cut can leave
      disk    make each disk operation fail; damage files
      reuse   give the pids of containers to other processes
      reboot  change the boot id
      keeper  kill the keeper's processes, with and without the engine
      fleet   cut a node's connections to PostgreSQL, and kill the node amid sending; needs --fleet
      all     run every mode; that of a fleet only with --fleet

    The exit status is 0 if every report was true and nothing was lost, torn, leaked or harmed, otherwise 1; 3 if this
    machine does not support a mode; 128 + N if signal N ended the drill. The drill always cleans up after itself.
    """  # noqa: D301  # \b tells click not to rewrap the lines
    chosen = secrets.randbelow(1 << 32) if seed is None else seed
    if modes:
        if containers or keep or plot or runtime:
            raise click.UsageError("--containers, --runtime, --keep and --plot cannot be used with --mode")
        if point and seed is None:
            raise click.UsageError("--point needs --seed: use the command printed with the finding")
        _run_modes(modes, rounds, chosen, workers, point, as_json=as_json, fleet=fleet or "")
    if workers or point:
        raise click.UsageError("--workers and --point need --mode")
    if plot and (rounds or 0) > _MOST_ROUNDS_IN_A_PLOT:
        raise click.UsageError(f"--plot can show {_MOST_ROUNDS_IN_A_PLOT} rounds at most; use fewer --rounds")
    happenings: list[Happening] | None = [] if plot else None
    directory = os.path.join(tempfile.gettempdir(), f"limpet-drill-{secrets.token_hex(6)}")
    require_utf8(os.path.realpath(directory))  # no engine takes it otherwise, which is no fault that a drill finds
    try:
        with _raise_on_signals():
            try:
                report = _run(
                    rounds or _ROUNDS, containers or _CONTAINERS, chosen, directory, happenings, runtime or ""
                )
            finally:
                _ignore_signals()  # the cleanup is short and must not be interrupted
                if keep:
                    note(f"limpet: kept {directory}")
                else:
                    shutil.rmtree(directory, ignore_errors=True)
    except _Interrupted as interrupted:
        note("limpet: drill interrupted; cleaned up" + (", except its directory" if keep else ""))
        sys.exit(interrupted.exit_status)
    if as_json:
        import msgspec  # noqa: PLC0415  # loaded only if needed

        print_json(**msgspec.to_builtins(report))
    else:
        print_lines(_describe(report, runtime or ""))
    if plot and happenings:
        from limpet.engine.cli.drill_timeline import make_drill_timeline  # noqa: PLC0415

        plot.save(make_drill_timeline(happenings, report))
    sys.exit(0 if report.passed else 1)


def _run_modes(
    modes: tuple[str, ...],
    rounds: int | None,
    seed: int,
    workers: int | None,
    point: str | None,
    *,
    as_json: bool,
    fleet: str,
) -> NoReturn:
    from limpet.engine.cli.drill_modes import run  # noqa: PLC0415  # `limpet drill --help` must not wait for it

    if "fleet" in modes and not fleet:
        raise click.UsageError("--mode fleet needs --fleet URL")
    everything = tuple(mode for mode in MODES if mode != "fleet" or fleet)
    chosen = everything if "all" in modes else tuple(mode for mode in MODES if mode in modes)
    try:
        with _raise_on_signals():
            status = run(chosen, rounds, seed, workers or os.cpu_count() or 1, point, as_json=as_json, fleet=fleet)
            _ignore_signals()
    except _Interrupted as interrupted:
        note("limpet: drill interrupted; cleaned up")
        sys.exit(interrupted.exit_status)
    sys.exit(status)


def _run(
    rounds: int, containers: int, seed: int, directory: str, happenings: "list[Happening] | None", runtime: str
) -> "DrillReport":
    from limpet.engine.drill import run_drill  # noqa: PLC0415  # `limpet drill --help` must not wait for it
    from limpet.engine.drill.runtimes import require_runtime  # noqa: PLC0415

    if runtime:
        require_runtime(runtime)

    with progress_bar() as show:
        finished = count()

        def on_round() -> None:
            show(f"drill {seed}: kill, recover, compare", next(finished), rounds)

        on_round()
        return run_drill(
            rounds=rounds,
            containers=containers,
            seed=seed,
            directory=directory,
            runtime=runtime,
            on_round=on_round,
            on_happening=(lambda _: None) if happenings is None else happenings.append,
        )


def _describe(report: "DrillReport", runtime: str) -> Iterator[str]:
    rows: list[Row] = []
    for field, words in _FACTS:
        label, meaning = _FACTS_OF_RUNTIMES.get(field, (field, words)) if runtime else (field, words)
        rows.append((_label(label), str(getattr(report, field)), meaning))
    rows += [(_label(field), _fault_cell(getattr(report, field)), words) for field, words in _FAULTS]
    yield from render_table((Column("DRILL"), Column("COUNT"), Column("MEANING")), rows, None)
    yield ""
    took = report.recovery_ms
    yield f"Recovery time: median {took.p50} ms, maximum {took.max} ms."
    if report.passed:
        words = f": {report.rounds} rounds, and every report was true (seed {report.seed})."
        yield paint("PASSED", "green") + words
        return
    yield paint("FAILED", "red") + ":"
    for failure in report.failures:
        yield from fill(_describe_failure(failure), 2)
    yield "Repeat it with:"
    yield f"  {report.repeat}"


def _describe_failure(failure: "Failure") -> str:
    where = f"round {failure.round}, {failure.container}: {_label(failure.kind)}"
    return f"{where}: expected {failure.expected}; the engine reported: {failure.said}"


def _label(field: str) -> str:
    return field.replace("_", " ")


def _fault_cell(count: int) -> Cell:
    return Cell(str(count), "red" if count else "green")


@contextmanager
def _raise_on_signals() -> Iterator[None]:
    """Raise _Interrupted at the first signal; ignore later ones."""

    def raise_interrupted(number: int, _: FrameType | None) -> None:
        _ignore_signals()
        raise _Interrupted(number)

    before = {number: signal.signal(number, raise_interrupted) for number in _SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
