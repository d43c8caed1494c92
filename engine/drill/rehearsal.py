"""The rounds of a drill: a life, its kill, what happens while the engine is down, the recovery, the comparison."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress

from limpet.engine.drill.diary import Diary, Happened, Happening
from limpet.engine.drill.disasters import Scene, disturb, find_harm, kill_keepers, prepare
from limpet.engine.drill.engine_process import EngineEndedError, EngineProcess
from limpet.engine.drill.judge import Discrepancy, Kind, find_leaks, is_unseen, judge
from limpet.engine.drill.messages import (
    AnyEvent,
    Begun,
    Close,
    Finished,
    Live,
    Opening,
    Recovered,
    Returned,
    Tell,
    Told,
)
from limpet.engine.drill.report import DrillReport, Failure, count_kinds, summarize_times
from limpet.engine.drill.runtimes import adapt, clean, factory_of, kill_helpers, name_helpers
from limpet.engine.drill.script import LANES, Disaster, KeeperKill, Moment, Round, Scenario, draw_rounds
from limpet.engine.drill.truth import Truth
from limpet.engine.drill.world import Subreaper, World
from limpet.engine.state.names import CONTAINERS, QUARANTINE
from limpet.schema.status import ContainerState

ENGINE = "limpet.engine.engine:Engine.open"
_SETTLE_SECONDS = 5.0
"""The time that an engine may take to notice an exit, and a killed process to disappear."""


def run_drill(
    *,
    rounds: int,
    containers: int,
    seed: int,
    directory: str,
    scenario: Scenario = Scenario.MIXED,
    engine_factory: str = ENGINE,
    runtime: str = "",
    on_round: Callable[[], object] = lambda: None,
    on_happening: Callable[[Happening], object] = lambda _: None,
) -> DrillReport:
    """Run a drill in `directory`, which must not exist; the caller removes it.

    No process is left when this returns or raises. Run it in a process without children, because all children are
    reaped and ended. Reused pids and reboots need private pid and mount namespaces (`inside`), and do not happen
    elsewhere. With `runtime`, runc or crun, containers are that runtime's. `engine_factory`, as `module:name`, opens
    the engine under test on a state directory; `on_round` is called after each round, `on_happening` with all that
    happens, in order.
    """
    subreaper = Subreaper()
    subreaper.start()
    try:
        os.makedirs(directory, 0o700)
        factory = factory_of(runtime) if runtime else engine_factory
        rehearsal = _Rehearsal(subreaper, os.path.realpath(directory), factory, runtime, Diary(on_happening))
        planned = draw_rounds(rounds, containers, seed, scenario)
        with suppress(EngineEndedError):  # the report has it, and nothing can follow it
            rehearsal.run(map(adapt, planned) if runtime else planned, on_round)
    finally:
        subreaper.end_all()
        if runtime:
            clean(os.path.join(os.path.realpath(directory), "state"), runtime)
    how = f" --runtime {runtime}" if runtime else ""
    return rehearsal.report(seed, f"limpet drill{how} --rounds {rounds} --containers {containers} --seed {seed}")


class _Rehearsal:
    def __init__(self, subreaper: Subreaper, directory: str, factory: str, runtime: str, diary: Diary) -> None:
        self._runtime = runtime
        self._subreaper = subreaper
        self._diary = diary
        self._factory = factory
        self._state_dir = os.path.join(directory, "state")
        self._log = os.path.join(directory, "engine.log")
        self._containers_dir = os.path.join(self._state_dir, CONTAINERS)
        self._truth = Truth()
        self._scene = Scene(
            containers_dir=self._containers_dir,
            quarantine_dir=os.path.join(self._state_dir, QUARANTINE),
            outside_dir=os.path.join(directory, "outside"),
            truth=self._truth,
            subreaper=subreaper,
            planted={},
            happened=Counter(),
        )
        self._round = 0
        self._kills = 0
        self._keeper_kills = 0
        self._excused = 0  # starts that may be refused in this life: a keeper was killed amid them
        self._unseen: set[str] = set()
        self._stranded: set[str] = set()
        self._judged = 0
        self._failures: dict[tuple[str, Kind], Failure] = {}
        self._unknown: set[str] = set()
        self._existed: set[str] = set()
        self._took_ns: list[int] = []

    def run(self, rounds: Iterable[Round], on_round: Callable[[], object]) -> None:
        """Run all rounds. Raises EngineEndedError, noted as a failure, if the engine is broken."""
        prepare(self._scene)
        try:
            engine = self._open()
            for planned in rounds:
                self._truth.expect(planned)
                engine.send(Live(planned))
                if planned.kill is None:
                    self._finish(engine)
                    break
                self._round = planned.number
                self._live(engine, planned)
                engine = self._recover(planned)
                on_round()
        except EngineEndedError as error:
            self._note([Discrepancy("-", Kind.BROKEN, "a working engine", str(error))])
            raise

    def report(self, seed: int, repeat: str) -> DrillReport:
        """Return the results."""
        failures = tuple(self._failures.values())
        return DrillReport(
            seed=seed,
            rounds=self._round,
            kills=self._kills,
            containers=len(self._existed),
            acknowledged=self._truth.acknowledged,
            unknown=len(self._unknown),
            unseen=len(self._unseen),
            stranded=len(self._stranded),
            keeper_kills=self._keeper_kills,
            judged=self._judged,
            reused=self._scene.happened[Disaster.REPLACE],
            reboots=self._scene.happened[Disaster.REBOOT],
            recovery_ms=summarize_times(self._took_ns),
            failures=failures,
            repeat=repeat,
            **count_kinds(failures),
        )

    def _live(self, engine: EngineProcess, planned: Round) -> None:
        """Let it do its steps until the planned moment, and kill it."""
        kill = planned.kill
        assert kill is not None
        awaited = Begun if kill.in_flight else Returned
        amid = sorted(
            (each for each in planned.keeper_kills if each.moment is Moment.AMID), key=lambda each: each.share
        )
        count = 0
        while count < kill.count:
            while amid and amid[0].share * kill.count <= count:
                self._kill_keepers(amid.pop(0))
                self._excused += LANES
            event = engine.read()
            self._note_event(event)
            count += isinstance(event, awaited)
            if isinstance(event, Finished):
                break
        time.sleep(kill.delay_seconds)
        if planned.reaped_late:
            self._subreaper.hold()
        together = [each for each in planned.keeper_kills if each.moment is Moment.WITH]
        for each in together:
            self._kill_keepers(each)
            self._excused += LANES
        for event in self._kill(engine, Happened.ENGINE_KILLED):
            self._note_event(event)

    def _kill_keepers(self, kill: KeeperKill) -> None:
        scene, runtime = self._scene, self._runtime
        if kill_helpers(scene, runtime, kill.victims) if runtime else kill_keepers(scene, kill.victims):
            self._keeper_kills += 1
            words = name_helpers(runtime, kill.victims) if runtime else kill.victims
            self._diary.note(Happened.KEEPERS_KILLED, words=words)

    def _kill(self, engine: EngineProcess, kind: Happened) -> list[AnyEvent]:
        self._kills += 1
        rest = engine.kill()
        self._diary.note(kind)
        return rest

    def _recover(self, planned: Round) -> EngineProcess:
        """Change what the dead engine left, recover (and kill the recovery, if planned), and compare."""
        for disaster, victim in disturb(self._scene, planned.disturbances):
            self._diary.note(Happened.DISTURBED, victim, disaster)
        for each in planned.keeper_kills:
            if each.moment is Moment.DOWN:
                self._kill_keepers(each)
        time.sleep(planned.down_seconds)
        for delay in planned.recovery_kills:
            before = self._subreaper.look()
            engine = self._spawn()
            engine.read_until(Opening)
            time.sleep(delay)
            for event in self._kill(engine, Happened.RECOVERY_KILLED):
                if isinstance(event, Recovered):
                    self._compare(event, before)
        return self._open()

    def _open(self) -> EngineProcess:
        before = self._subreaper.look()
        engine = self._spawn()
        engine.read_until(Opening)
        recovered = engine.read_until(Recovered)
        self._diary.note(Happened.RECOVERED)
        self._subreaper.resume()
        self._compare(recovered, before)
        self._settle(engine)
        return engine

    def _spawn(self) -> EngineProcess:
        self._excused = 0
        return EngineProcess(self._subreaper, self._state_dir, self._factory, self._log)

    def _compare(self, recovered: Recovered, before: World) -> None:
        """Compare a recovery's statements with the truth; from now on, they too are acknowledged."""
        self._took_ns.append(recovered.took_ns)
        told = recovered.told
        for key, said in told.containers.items():
            self._diary.hear(key, said)
        self._judged += len(told.containers)
        after = self._subreaper.look()
        self._note(judge(self._truth, told, self._containers_dir, before, after) + find_harm(self._scene, after))
        self._unknown |= {key for key, said in told.containers.items() if said.state is ContainerState.UNKNOWN}
        self._existed |= told.containers.keys()
        self._learn(told)

    def _settle(self, engine: EngineProcess) -> None:
        """Ask again until everything is true, including later exits; note what remains false."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            before = self._subreaper.look()
            engine.send(Tell())
            told = engine.read_until(Told)
            after = self._subreaper.look()
            found = judge(self._truth, told, self._containers_dir, before, after)
            found += [
                each for each in find_leaks(told, self._containers_dir, after) if not self._is_stranded(each, told)
            ]
            found = [each for each in found if (each.container, each.kind) not in self._failures]
            if not found or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for key, said in told.containers.items():
            self._diary.see(key, said)
        self._note(found)
        self._learn(told)

    def _is_stranded(self, found: Discrepancy, told: Told) -> bool:
        """Return whether a process is one that an ended container left when no keeper was there any more; count it."""
        known, said = self._truth.known.get(found.container), told.containers.get(found.container)
        stranded = known is not None and known.unwitnessed and (said is None or bool(said.finished_at))
        if stranded:
            self._stranded.add(found.container)
        return stranded

    def _learn(self, told: Told) -> None:
        self._unseen |= {key for key, said in told.containers.items() if is_unseen(said)}
        self._truth.learn(told)
        self._note_gone(self._truth.known)

    def _finish(self, engine: EngineProcess) -> None:
        """Let the last life clean up; then close the engine cleanly."""
        event: AnyEvent | None = None
        while not isinstance(event, Finished):
            event = engine.read()
            self._note_event(event)
        self._settle(engine)
        engine.send(Close())
        engine.await_end()
        self._diary.note(Happened.CLOSED)

    def _note_event(self, event: AnyEvent) -> None:
        if isinstance(event, Begun):
            self._truth.begin(event.step)
        elif isinstance(event, Returned):
            is_first_start = self._truth.is_first_start(event)
            key = self._truth.end(event)
            if is_first_start:
                self._judge_start(key, event)
            if event.status is not None:
                self._existed.add(key)
                self._diary.see(key, event.status)
            self._note_gone(self._truth.find_targets(event))
            if event.broken:
                self._note([Discrepancy(key, Kind.BROKEN, "a result, or one of limpet's errors", event.broken)])

    def _judge_start(self, key: str, returned: Returned) -> None:
        """Note a start that was refused without need, or that had to be."""
        starts = self._truth.known[key].program.starts
        if not starts and not returned.refused:
            self._note([Discrepancy(key, Kind.FALSE_RUNNING, "a StartError: its program does not exist", "it started")])
        elif starts and returned.refused and self._excused:
            self._excused -= 1
        elif starts and returned.refused:
            self._note([Discrepancy(key, Kind.BROKEN, "a container that is started", returned.refused)])

    def _note(self, found: list[Discrepancy]) -> None:
        """Record each failure once, in the round where it was first seen."""
        for container, kind, expected, said in found:
            failure = Failure(round=self._round, container=container, kind=kind, expected=expected, said=said)
            if self._failures.setdefault((container, kind), failure) is failure:
                self._diary.note(Happened.FAULT, container, kind)

    def _note_gone(self, keys: Iterable[str]) -> None:
        known = self._truth.known
        for key in keys:
            if key in known and known[key].deleted:
                self._diary.lose(key)
