"""The long run, for hours, seed after seed: `python -m tests.campaigns.long_run`. The next call goes on.

Each part has a file in docs/long-run with what its seeds have tried and found so far. A file is of one state of the
sources that the promises rest on: of other sources nothing is added to it, and nothing taken from it.
"""

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Final, NamedTuple

import msgspec

from limpet.engine.drill.controls import HastyLife
from limpet.engine.drill.damage import damage_states
from limpet.engine.drill.engine_life import EngineLife
from limpet.engine.drill.modes import MODE_TRIALS, Mode, Trial
from limpet.engine.drill.store_life import FailingDiskLife, StoreLife
from limpet.engine.state.durable import write_file
from limpet.testing import Report, call_faults, fault_points, kill_points, power_cuts, true_kills
from tests.campaigns.interrupts import Order, campaign
from tests.campaigns.refused_life import (
    FAILURES,
    ROLES,
    STOPS,
    RefusedLife,
    RefusedLifeBefore615,
    RefusedLifeOfHastyKeepers,
    RefusedLifeOfTakers,
    StoppedLife,
)
from tests.campaigns.sizes import CAMPAIGNS
from tests.crash.read_life import RECOVERED_EVERY, ReadLife, UnflushedReadLife
from tests.fleet.trials import TOOLS, count_noticed_controls, try_seed

ROOT: Final = Path(__file__).parents[2]
RESULTS: Final = ROOT / "docs" / "long-run"
_NOT_PROMISED: Final = frozenset({"cli", "drill", "package"})
"""Parts of the engine's package that a container's state does not go through."""
_NOT_TRIED: Final = 3
_CHECKPOINTS: Final = 120
_CHECKPOINTS_OF_CUTS: Final = 12
_SAMPLES: Final = 12
_TRUE_KILLS_EVERY: Final = 40
_DAMAGED: Final = 500
_REFUSED: Final = 8
"""Of the calls of one name and role, in one seed."""
_INTERRUPTED: Final = (
    ("store", "interrupt", 40),
    ("tasks", "interrupt", 20),
    ("engine", "interrupt", 60),
    ("store", "memory", 2_000),
    ("tasks", "memory", 2_000),
    ("engine", "memory", 2_000),
    ("served", "interrupt", 60),
    ("served", "memory", 2_000),
    ("crew", "interrupt", 20),
)
"""Of each life, every so many-th place or allocation, in one seed."""


class Tried(NamedTuple):
    """What one seed has tried and found."""

    trials: int
    acknowledged: int
    findings: tuple[str, ...]
    kinds: Mapping[str, int] = MappingProxyType({})
    """How many of each kind, where there are several."""


class NotTriedError(Exception):
    """A part cannot go on here, and the message says why."""


class Part(NamedTuple):
    """One kind of trial: what it counts, how many there are to be, how one seed is tried, and its control."""

    counts: str
    goal: int
    run: Callable[[Trial], Tried]
    broken: str = ""
    """What the control is: something that is broken on purpose, tried in the same way."""
    run_control: Callable[[Trial], int] | None = None
    """Tries it, and returns how often that was noticed."""
    find_obstacle: Callable[[], str | None] = lambda: None
    """Says why this cannot be tried here, if so."""


class Result(msgspec.Struct, kw_only=True):
    """What a part has done so far, as it is kept."""

    sources: str
    """A digest of the sources that were tried."""
    seeds: int = 0
    """Seeds 1 to this one are done."""
    count: int = 0
    acknowledged: int = 0
    kinds: dict[str, int] | msgspec.UnsetType = msgspec.UNSET
    """Of those, how many of each kind, where there are several."""
    findings: list[str] = msgspec.field(default_factory=list)
    control: int = 0
    """How often the control was noticed."""
    seconds: float = 0.0


def _tried(report: Report, name: str) -> Tried:
    return Tried(getattr(report, name), report.acknowledged, tuple(map(str, report.findings)))


def _snapshot(trial: Trial) -> Tried:
    return _tried(
        kill_points(StoreLife(_CHECKPOINTS, seed=trial.seed), workers=trial.workers, progress=trial.progress), "points"
    )


def _cut(life: ReadLife, trial: Trial, samples: int = _SAMPLES) -> Tried:
    return _tried(
        power_cuts(life, seed=trial.seed, samples=samples, workers=trial.workers, progress=trial.progress), "images"
    )


def _kill(trial: Trial) -> Tried:
    lives = StoreLife(_CHECKPOINTS, seed=trial.seed), EngineLife(trial.seed)
    store, engine = (
        true_kills(life, every=_TRUE_KILLS_EVERY, workers=trial.workers, progress=trial.progress) for life in lives
    )
    return _tried(store + engine, "points")


def _fail(trial: Trial) -> Tried:
    life = FailingDiskLife(1, seed=trial.seed)
    return _tried(fault_points(life, seed=trial.seed, cuts=0, workers=trial.workers, progress=trial.progress), "faults")


def _mode(mode: Mode, counts: str, goal: int, name: str) -> Part:
    return _with_control_of(mode, counts, goal, lambda trial: _tried(MODE_TRIALS[mode].run(trial), name))


def _with_control_of(mode: Mode, counts: str, goal: int, run: Callable[[Trial], Tried]) -> Part:
    plan = MODE_TRIALS[mode]
    return Part(counts, goal, run, plan.broken, plan.count_noticed, plan.find_obstacle)


def _damage(trial: Trial) -> Tried:
    return _tried(
        damage_states(count=_DAMAGED, seed=trial.seed, workers=2 * trial.workers, progress=trial.progress), "damaged"
    )


def _refuse(trial: Trial) -> Tried:
    report = _kill_keepers(RefusedLifeBefore615(), trial)
    for life, failures in ((RefusedLife(), FAILURES), (StoppedLife(), STOPS)):
        report += call_faults(
            life,
            roles=ROLES,
            failures=failures,
            most=_REFUSED,
            seed=trial.seed,
            workers=trial.workers,
            progress=trial.progress,
        )
    return _tried(report, "faults")


def _kill_keepers(life: RefusedLifeBefore615, trial: Trial) -> Report:
    """Kill the keeper at each of its writes, where it alone knows how a process ended."""
    return call_faults(
        life,
        roles=ROLES,
        failures={"keeper/write": ["KILL"]},
        seed=trial.seed,
        workers=trial.workers,
        progress=trial.progress,
    )


def _count_noticed_refusals(trial: Trial) -> int:
    report = call_faults(
        RefusedLifeOfTakers(),
        roles=ROLES,
        failures={"gate/chdir": ["EIO"]},
        seed=trial.seed,
        workers=trial.workers,
        progress=trial.progress,
    )
    hasty = _kill_keepers(RefusedLifeOfHastyKeepers(), trial)
    return report.violations if hasty.violations else 0  # each is to be noticed


def _interrupt(trial: Trial) -> Tried:
    results = [campaign(Order(life, kind, every, seed=trial.seed)) for life, kind, every in _INTERRUPTED]
    findings = tuple(finding for result in results for finding in result.findings)
    return Tried(sum(result.trials for result in results), 0, findings)


def _count_noticed_interrupts(_: Trial) -> int:
    closing = campaign(Order("store", every=3, within="Store.close", control="close-once"))
    steps = campaign(Order("engine", every=25, within="Engine.add_container", control="cut-steps"))
    return len(closing.findings) + len(steps.findings) if closing.findings and steps.findings else 0


def _try_fleet(trial: Trial) -> Tried:
    told = try_seed(trial.seed, trial.workers)
    findings = tuple(finding for one in told for finding in one["findings"])
    kinds = sum((Counter(one["kinds"]) for one in told), Counter[str]())
    return Tried(sum(kinds.values()), sum(one["acknowledged"] for one in told), findings, kinds)


def _find_obstacle_of_fleet() -> str | None:
    missing = [name for name in TOOLS if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else MODE_TRIALS[Mode.KILL].find_obstacle()


PARTS: Final[Mapping[str, Part]] = {
    "kill": _with_control_of(
        Mode.KILL, "kill points, as what a kill there leaves", CAMPAIGNS["kill"].long_run, _snapshot
    ),
    "sigkill": Part(
        "SIGKILLs at such points, also of an engine",
        CAMPAIGNS["sigkill"].long_run,
        _kill,
        MODE_TRIALS[Mode.KILL].broken,
        lambda trial: true_kills(HastyLife(2, seed=trial.seed), workers=trial.workers, progress=trial.progress).lost,
        MODE_TRIALS[Mode.KILL].find_obstacle,
    ),
    "power": Part(
        f"power-cut images, read, and one of {RECOVERED_EVERY} recovered",
        CAMPAIGNS["power"].long_run,
        lambda trial: _cut(ReadLife(_CHECKPOINTS_OF_CUTS, seed=trial.seed), trial),
        MODE_TRIALS[Mode.POWER].broken,
        lambda trial: len(_cut(UnflushedReadLife(1, seed=trial.seed), trial, samples=1).findings),
        MODE_TRIALS[Mode.POWER].find_obstacle,
    ),
    "recovery": _mode(
        Mode.POWER,
        "power-cut images, all recovered, also of a recovery and an engine",
        CAMPAIGNS["recovery"].long_run,
        "images",
    ),
    "errors": _with_control_of(
        Mode.DISK, "failed operations, each with the disks after it", CAMPAIGNS["errors"].long_run, _fail
    ),
    "refusals": Part(
        "system calls of an engine and its keeper that are refused",
        CAMPAIGNS["refusals"].long_run,
        _refuse,
        "an engine that takes a dead gate for a start",
        _count_noticed_refusals,
        MODE_TRIALS[Mode.KILL].find_obstacle,
    ),
    "interrupts": Part(
        "interrupts and failing allocations in a store's and an engine's life",
        CAMPAIGNS["interrupts"].long_run,
        _interrupt,
        "a store that is closed once only, an engine whose steps are cut in two",
        _count_noticed_interrupts,
    ),
    "fleet": Part(
        "kills, cuts and crashes while a node sends to a fleet",
        CAMPAIGNS["fleet"].long_run,
        _try_fleet,
        "nodes that acknowledge early, ignore who has taken over, write over newer rows, wait for no disk or standby",
        lambda trial: count_noticed_controls(trial.seed),
        _find_obstacle_of_fleet,
    ),
    "damage": Part("damaged states", CAMPAIGNS["damage"].long_run, _damage),
    "reuse": _mode(Mode.REUSE, "verdicts after pids were reused", CAMPAIGNS["reuse"].long_run, "cases"),
    "reboot": _mode(Mode.REBOOT, "verdicts after reboots", CAMPAIGNS["reboot"].long_run, "cases"),
    "keeper": _mode(Mode.KEEPER, "verdicts after kills of the keeper", CAMPAIGNS["keeper"].long_run, "cases"),
}


def digest_sources() -> str:
    """Return a digest of the modules that a container's state goes through."""
    digest = hashlib.sha256()
    for path in sorted(path for package in ("engine", "recovery", "schema") for path in (ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT)
        if name.parts[1] not in _NOT_PROMISED:
            digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def read_result(directory: Path, name: str) -> Result | None:
    """Return what a part has done so far, None if it was not begun."""
    try:
        return msgspec.json.decode((directory / f"{name}.json").read_bytes(), type=Result)
    except FileNotFoundError:
        return None


def go_on(name: str, directory: Path, until: float, workers: int) -> Result:
    """Try seed after seed until the part's goal is reached, or the clock (monotonic seconds) is past `until`.

    Each seed's result is on disk before the next one begins. Raises NotTriedError.
    """
    part, sources = PARTS[name], digest_sources()
    result = read_result(directory, name) or Result(sources=sources)
    if result.sources != sources:
        raise NotTriedError(f"{directory / name}.json is of other sources, {result.sources}: remove it to begin anew")
    if (obstacle := part.find_obstacle()) is not None:
        raise NotTriedError(f"{name} cannot be tried here: {obstacle}")
    while result.count < part.goal:
        began = time.monotonic()
        with TemporaryDirectory(prefix="limpet-long-run-") as scratch:
            trial = Trial(result.seeds + 1, workers, scratch, partial(_show, name, result))
            if part.run_control and not result.control:
                result.control = part.run_control(trial)
            tried = part.run(trial)
        result.seeds += 1
        result.count += tried.trials
        result.acknowledged += tried.acknowledged
        if tried.kinds:
            result.kinds = dict((Counter(result.kinds or {}) + Counter(tried.kinds)).most_common())
        result.findings += [f"seed {result.seeds}: {finding}" for finding in tried.findings]
        result.seconds = round(result.seconds + time.monotonic() - began, 1)
        directory.mkdir(parents=True, exist_ok=True)
        write_file(str(directory / f"{name}.json"), msgspec.json.format(msgspec.json.encode(result)) + b"\n", 0o644)
        _show(name, result)
        if time.monotonic() > until:
            break
    return result


def _show(name: str, result: Result, done: int = 0, total: int = 0) -> None:
    """Say how far a part has come: on a terminal in a line that is written over, elsewhere once a seed."""
    part = PARTS[name]
    line = f"{name}: {result.count:,} of {part.goal:,}, seeds 1-{result.seeds}, found {len(result.findings)}"
    if sys.stderr.isatty():
        line += f"; seed {result.seeds + 1}: {100 * done // total} %" if total else ""
        print(f"\r{line:100}", end="", file=sys.stderr)
    elif not total:
        print(line, file=sys.stderr)


def render(directory: Path) -> str:
    """Return the table of all that is kept, as Markdown."""
    lines = [
        "| part | what | goal | tried | seeds | found | its control |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, part in PARTS.items():
        result = read_result(directory, name)
        if result is not None:
            control = f"{part.broken}: {result.control:,}" if part.run_control else ""
            cells = (part.counts, f"{part.goal:,}", f"{result.count:,}", f"1-{result.seeds}", str(len(result.findings)))
            lines.append(f"| `{name}` | {' | '.join(cells)} | {control} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Go on with the parts, and print what they come to.

    Status 1 if one found anything or missed its control, else 3 if one could not be tried.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.long_run", description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; repeatable")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of each part, after which no seed begins")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the directory of what is done")
    options = parser.parse_args()
    results: dict[str, Result] = {}
    not_tried: list[str] = []
    for name in options.part or PARTS:
        until = time.monotonic() + options.minutes * 60
        try:
            results[name] = go_on(name, options.results, until, options.workers)
        except NotTriedError as error:
            not_tried.append(str(error))
    print(f"\n{render(options.results)}" if sys.stderr.isatty() else render(options.results), end="")
    for why in not_tried:
        print(f"NOT TRIED: {why}", file=sys.stderr)
    unnoticed = [name for name, result in results.items() if PARTS[name].broken and not result.control]
    if unnoticed:
        print(f"The control was not noticed: {', '.join(unnoticed)}. What was tried proves nothing.", file=sys.stderr)
    if unnoticed or any(result.findings for result in results.values()):
        return 1
    return _NOT_TRIED if not_tried else 0


if __name__ == "__main__":
    sys.exit(main())
