"""The modes of the drill: what each tries, in rounds with a different seed each, and the control it must catch."""

import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from operator import attrgetter
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import msgspec

from limpet.engine.drill import inside
from limpet.engine.drill.controls import DeafLife, HastyLife, UnflushedLife
from limpet.engine.drill.damage import damage_states, replay_damage
from limpet.engine.drill.engine_life import EngineLife
from limpet.engine.drill.rehearsal import ENGINE
from limpet.engine.drill.report import DrillReport
from limpet.engine.drill.script import Scenario
from limpet.engine.drill.store_life import FailingDiskLife, StoreLife
from limpet.schema.errors import InvalidInputError, LimpetError
from limpet.testing import (
    Finding,
    Kind,
    Report,
    Workload,
    fault_points,
    kill_points,
    power_cuts,
    recovery_cuts,
    replay,
    supported,
    true_kills,
)

Progress = Callable[[str, int, int], None]
"""Called with what is being tried, how many steps are done, and how many there are."""


class Mode(StrEnum):
    """What a mode of the drill does to the store."""

    KILL = "kill"
    POWER = "power"
    DISK = "disk"
    REUSE = "reuse"
    REBOOT = "reboot"
    KEEPER = "keeper"
    FLEET = "fleet"


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """What the same trial found in a store or engine that is deliberately broken."""

    broken: str
    """What is broken."""
    violations: int
    """How often that was detected; 0 means that the drill proves nothing."""


class Repeatable(msgspec.Struct, frozen=True, kw_only=True):
    """A broken promise, and the command that repeats it."""

    mode: Mode
    point: str
    kind: Kind
    message: str
    repeat: str


class ModesReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of the chosen modes."""

    modes: tuple[Mode, ...]
    seed: int
    rounds: dict[Mode, int]
    points: int
    """Points at which a life was killed."""
    images: int
    """Distinct disk states that a power cut can leave."""
    faults: int
    """Operations made to fail."""
    damaged: int
    """States with damaged files."""
    cases: int
    """Containers whose state after a recovery was compared with the truth."""
    acknowledged: int
    """Acknowledgements that were compared."""
    lost: int
    torn: int
    false_verdicts: int
    other: int
    findings: tuple[Repeatable, ...]
    control: dict[Mode, Control]
    unsupported: dict[Mode, str]
    """What could not be tried here, and why."""
    seconds: float
    repeat: str
    """The command that repeats the whole drill."""

    @property
    def is_clean(self) -> bool:
        """True if no promise was broken, and each control was caught."""
        return not self.findings and all(control.violations for control in self.control.values())


class Trial(NamedTuple):
    """One round of a mode."""

    seed: int
    workers: int
    directory: str
    progress: Callable[[int, int], None]
    fleet: str = ""
    """The URL of a PostgreSQL, for the mode that needs one."""


class _ModeTrial(NamedTuple):
    find_obstacle: Callable[[], str | None]
    rounds: int
    """The default number of rounds."""
    run: Callable[[Trial], Report]
    broken: str
    run_control: Callable[[Trial], Report]
    shows: Callable[[Report], int]
    """What the control breaks: other findings do not show that the trial can detect it."""

    def count_noticed(self, trial: Trial) -> int:
        """Run the control; return how often it was detected."""
        return self.shows(_try(self.run_control, trial))


_CHECKPOINTS: Final = {Mode.KILL: 120, Mode.POWER: 12, Mode.DISK: 1}
_TRUE_KILLS_EVERY: Final = 40
_SAMPLES: Final = 4
_CUTS_EVERY: Final = 16
"""For points in the life of an engine."""
_RECOVERIES: Final = 8
_FAULTS_EVERY: Final = 16
_DAMAGED: Final = 2000
_CONTAINERS: Final = 12
_ENGINE: Final = "engine/"
"""The prefix of the names of points in the life of an engine."""
_DAMAGE: Final = "damage:"
_PREFIXES: Final = {
    Mode.KILL: ("snapshot:", "kill:"),
    Mode.POWER: tuple("-0123456789"),
    Mode.DISK: ("fault:", _DAMAGE),
}
"""The prefix of the names of a mode's points, in any life."""
_URL: Final = " --fleet URL"
"""It may have a password, which nothing shows."""
_WHOLE: Final = "-"
"""The point of a finding that cannot be repeated as a single point."""
_LOST, _FALSE = attrgetter("lost"), attrgetter("false_verdicts")


def _kill(trial: Trial) -> Report:
    life = StoreLife(_CHECKPOINTS[Mode.KILL], seed=trial.seed)
    snapshots = kill_points(life, workers=trial.workers, progress=trial.progress)
    kills = true_kills(life, every=_TRUE_KILLS_EVERY, workers=trial.workers, progress=trial.progress)
    engine = true_kills(EngineLife(trial.seed), every=_TRUE_KILLS_EVERY, workers=trial.workers, progress=trial.progress)
    return snapshots + kills + _named(_ENGINE, engine)


def _cut_power(trial: Trial) -> Report:
    life = StoreLife(_CHECKPOINTS[Mode.POWER], seed=trial.seed)
    cuts = power_cuts(life, seed=trial.seed, samples=_SAMPLES, workers=trial.workers, progress=trial.progress)
    again = recovery_cuts(life, crashes=_RECOVERIES, seed=trial.seed, workers=trial.workers, progress=trial.progress)
    engine = power_cuts(
        EngineLife(trial.seed, processes=False),
        seed=trial.seed,
        samples=1,
        every=_CUTS_EVERY,
        workers=trial.workers,
        progress=trial.progress,
    )
    return cuts + again + _named(_ENGINE, engine)


def _fail(trial: Trial, life: Workload | None = None) -> Report:
    return fault_points(
        life or FailingDiskLife(_CHECKPOINTS[Mode.DISK], seed=trial.seed),
        seed=trial.seed,
        cuts=0,
        every=_FAULTS_EVERY,
        workers=trial.workers,
        progress=trial.progress,
    )


def _fail_and_damage(trial: Trial) -> Report:
    return _fail(trial) + damage_states(count=_DAMAGED, seed=trial.seed, workers=trial.workers, progress=trial.progress)


def _rehearse(trial: Trial, scenario: Scenario, factory: str = ENGINE) -> Report:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        trial.progress(done, _REHEARSED_ROUNDS)

    return as_report(
        inside.run_inside(
            rounds=_REHEARSED_ROUNDS,
            containers=_CONTAINERS,
            seed=trial.seed,
            directory=os.path.join(trial.directory, f"{scenario}-{trial.seed}-{factory.rpartition(':')[2]}"),
            scenario=scenario,
            engine_factory=factory,
            on_round=advance,
        )
    )


def _rehearse_until_noticed(trial: Trial, scenario: Scenario, factory: str) -> Report:
    """Rehearse with one seed after the other: whether what is broken shows is a matter of chance and of timing."""
    total = Report()
    for seed in range(trial.seed, trial.seed + _MOST_SEEDS):
        total += _rehearse(trial._replace(seed=seed), scenario, factory)
        if total.false_verdicts:
            break
    return total


def _try_fleet(trial: Trial) -> Report:
    # Imported here: its driver is an extra.
    from limpet.engine.drill.fleet_kills import run_kills  # noqa: PLC0415
    from limpet.engine.drill.fleet_trial import run_trials  # noqa: PLC0415

    total = run_trials(trial.fleet, trial.directory, points=_FLEET_POINTS, seed=trial.seed, progress=trial.progress)
    if supported() is None:
        total += run_kills(trial.fleet, every=_FLEET_KILLS_EVERY, seed=trial.seed, progress=trial.progress)
    return total


def _break_fleet(trial: Trial) -> Report:
    from limpet.engine.drill.fleet_controls import CONTROLS  # noqa: PLC0415
    from limpet.engine.drill.fleet_trial import count_noticed  # noqa: PLC0415

    noticed = [count_noticed(trial.fleet, trial.directory, each, seed=trial.seed) for each in CONTROLS]
    return Report(lost=sum(noticed) if all(noticed) else 0)


_FLEET_POINTS: Final = 100
_FLEET_KILLS_EVERY: Final = 30
_MOST_SEEDS: Final = 8
_REHEARSED_ROUNDS: Final = 4
_CONTROLS: Final = "limpet.engine.drill.controls"

MODE_TRIALS: Final[Mapping[Mode, _ModeTrial]] = {
    Mode.KILL: _ModeTrial(
        supported,
        2,
        _kill,
        "a store that acknowledges before it writes",
        lambda trial: kill_points(HastyLife(2, seed=trial.seed), workers=trial.workers, progress=trial.progress),
        _LOST,
    ),
    Mode.POWER: _ModeTrial(
        supported,
        1,
        _cut_power,
        "a store that does not flush its commits",
        lambda trial: power_cuts(
            UnflushedLife(1, seed=trial.seed), samples=1, every=4, workers=trial.workers, progress=trial.progress
        ),
        _LOST,
    ),
    Mode.DISK: _ModeTrial(
        supported,
        1,
        _fail_and_damage,
        "a store that acknowledges failed steps",
        lambda trial: _fail(trial, DeafLife(1, seed=trial.seed)),
        _LOST,
    ),
    Mode.REUSE: _ModeTrial(
        inside.find_obstacle,
        1,
        lambda trial: _rehearse(trial, Scenario.REUSE),
        "an engine that identifies a process by its pid alone",
        lambda trial: _rehearse_until_noticed(trial, Scenario.REUSE, f"{_CONTROLS}:open_trusting_pids"),
        _FALSE,
    ),
    Mode.KEEPER: _ModeTrial(
        inside.find_obstacle,
        1,
        lambda trial: _rehearse(trial, Scenario.KEEPER),
        "a keeper that reaps a process before it has written down its end",
        lambda trial: _rehearse_until_noticed(trial, Scenario.KEEPER, f"{_CONTROLS}:open_with_a_hasty_keeper"),
        _FALSE,
    ),
    Mode.FLEET: _ModeTrial(
        lambda: None,
        1,
        _try_fleet,
        "a node that acknowledges early, one that goes on when taken over from, and late rows over newer ones",
        _break_fleet,
        _LOST,
    ),
    Mode.REBOOT: _ModeTrial(
        inside.find_obstacle,
        1,
        lambda trial: _rehearse(trial, Scenario.REBOOT),
        "an engine that ignores the boot id",
        lambda trial: _rehearse_until_noticed(trial, Scenario.REBOOT, f"{_CONTROLS}:open_blind_to_boots"),
        _FALSE,
    ),
}
"""What each mode needs, tries, and must be able to find."""


def run_modes(
    modes: Sequence[Mode], *, seed: int, rounds: int | None, workers: int, progress: Progress, fleet: str = ""
) -> ModesReport:
    """Run the drill of each mode, in a process with one thread and no children. `fleet` is for the mode of that name.

    `rounds` is per mode, None for each mode's default; round N has the seed `seed + N`.
    """
    began = time.monotonic()
    total, findings = Report(), list[Repeatable]()
    control: dict[Mode, Control] = {}
    unsupported: dict[Mode, str] = {}
    done: dict[Mode, int] = {}
    with TemporaryDirectory(prefix="limpet-drill-") as directory:
        for mode in modes:
            plan = MODE_TRIALS[mode]
            obstacle = plan.find_obstacle()
            if obstacle is not None:
                unsupported[mode] = obstacle
                continue
            done[mode] = rounds or plan.rounds
            for number in range(done[mode]):
                words = f"{mode}, round {number + 1} of {done[mode]}"
                trial = Trial(seed + number, workers, directory, _Announced(progress, words), fleet)
                report = _try(plan.run, trial)
                findings += [_repeatable(mode, trial.seed, finding) for finding in report.findings]
                total += report
            trial = Trial(seed, workers, directory, _Announced(progress, f"{mode}, control"), fleet)
            control[mode] = Control(broken=plan.broken, violations=plan.count_noticed(trial))
    return ModesReport(
        modes=tuple(modes),
        seed=seed,
        rounds=done,
        points=total.points,
        images=total.images,
        faults=total.faults,
        damaged=total.damaged,
        cases=total.cases,
        acknowledged=total.acknowledged,
        lost=total.lost,
        torn=total.torn,
        false_verdicts=total.false_verdicts,
        other=total.other,
        findings=tuple(findings),
        control=control,
        unsupported=unsupported,
        seconds=round(time.monotonic() - began, 1),
        repeat=" ".join(
            ["limpet drill", *(f"--mode {mode}" for mode in modes), f"--seed {seed}"]
            + (["--fleet URL"] if fleet else [])
            + ([f"--rounds {rounds}"] if rounds else [])
        ),
    )


def _try(run: Callable[[Trial], Report], trial: Trial) -> Report:
    """Return what a trial found. If it could not finish, that is a finding too: other trials may have more."""
    try:
        return run(trial)
    except LimpetError as error:
        return Report.of([Finding(_WHOLE, "other", f"{type(error).__name__}: {error}")])


def repeat_point(mode: Mode, seed: int, point: str) -> Report:
    """Repeat a single point. Raises InvalidInputError if the mode has no such point."""
    for other, prefixes in _PREFIXES.items():
        if mode in _PREFIXES and mode is not other and point.removeprefix(_ENGINE).startswith(prefixes):
            raise InvalidInputError(f"{point!r} is a point of mode {other}, not of {mode}")
    with TemporaryDirectory(prefix="limpet-drill-") as directory:
        if point.startswith(_DAMAGE):
            return replay_damage(point)
        if mode not in _CHECKPOINTS:
            raise InvalidInputError(f"a drill of {mode} depends on timing: repeat the whole drill, by its seed")
        place = os.path.join(directory, "point")
        if point.startswith(_ENGINE):
            return replay(EngineLife(seed, processes=mode is Mode.KILL), point.removeprefix(_ENGINE), place)
        kind = FailingDiskLife if mode is Mode.DISK else StoreLife
        return replay(kind(_CHECKPOINTS[mode], seed=seed), point, place)


class _Announced:
    """The progress of one trial, with a description."""

    def __init__(self, progress: Progress, words: str) -> None:
        self._progress, self._words = progress, words

    def __call__(self, done: int, total: int) -> None:
        self._progress(self._words, done, total)


def _named(prefix: str, report: Report) -> Report:
    findings = tuple(Finding(f"{prefix}{finding.point}", finding.kind, finding.message) for finding in report.findings)
    return replace(report, findings=findings)


_KINDS: Final[Mapping[str, Kind]] = {
    "lost": "lost",
    "torn": "torn",
    "false_running": "false_verdict",
    "false_exited": "false_verdict",
    "wrong_exit_code": "false_verdict",
}


def as_report(drill: DrillReport) -> Report:
    """Return a rehearsal's findings in the form of the crash tests' findings."""
    findings = [
        Finding(
            f"round {failure.round}, {failure.container}",
            _KINDS.get(failure.kind, "other"),
            f"{failure.kind}: expected {failure.expected}; the engine reported: {failure.said}",
        )
        for failure in drill.failures
    ]
    if not (drill.reused or drill.reboots or drill.keeper_kills):
        words = "no pid was reused, no boot id changed, no keeper was killed: nothing was tried"
        findings.append(Finding(_WHOLE, "other", words))
    return Report.of(findings, points=drill.kills, cases=drill.judged, acknowledged=drill.acknowledged)


def _repeatable(mode: Mode, seed: int, finding: Finding) -> Repeatable:
    alone = f" --point {shlex.quote(finding.point)}" if mode in _CHECKPOINTS and finding.point != _WHOLE else ""
    return Repeatable(
        mode=mode,
        point=finding.point,
        kind=finding.kind,
        message=finding.message,
        repeat=f"limpet drill --mode {mode} --seed {seed} --rounds 1{alone}{_URL if mode is Mode.FLEET else ''}",
    )
