"""The engine is killed while restarts and expiries are under way: each attempt runs once, none is lost or doubled."""

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from limpet.engine import Engine
from limpet.schema import ContainerState
from tests.conftest import EngineProcess, is_running, wait_until
from tests.intent.test_restart import attempts, settle
from tests.recovery.test_crash_windows import DIE

Start = Callable[[str], EngineProcess]

QUICK = """
import logging
from limpet.schema import restart
restart.FIRST_DELAY_NS = restart.LONGEST_DELAY_NS = 5_000_000
"""
LIVE = """
def make(*command, **fields):
    sandbox = engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod")
    config = {"metadata": {"name": "job"}, "image": {"image": "host"}, "command": list(command)}
    return engine.create_container(config, "pod", **fields)
def tell():  # by the report: the attempt itself may be outdated and deleted by now
    say("opened", *(one.id for one in engine.recovery.findings if one.status["reason"] == "StartError"))
engine = Engine.open(state_dir)
"""
RUNS = 'echo "${PWD%/working}" | sed "s:.*/::" >> ../../../runs; exit 1'


def runs_of(state_dir: str) -> list[str]:
    path = Path(state_dir, "runs")
    return path.read_text().split() if path.exists() else []


@pytest.mark.long
def test_a_crash_loop_under_kills_loses_and_doubles_no_attempt(engine_process: Start, state_dir: str) -> None:
    """Each attempt ran once, or never for a kill at its gate: numbers of attempts and runs agree, without a gap."""
    chance = random.Random(7)  # any instants will do, the same each time
    process = engine_process(QUICK + LIVE + f"make('sh', '-c', {RUNS!r}, restart='always').start(); tell(); input()")
    never_ran = set(process.read()[1:])
    kills = 15
    for number in range(kills):
        wait_until(lambda number=number: len(runs_of(state_dir)) > number + 1, "the loop to go on")  # type: ignore[misc] # bound at once
        time.sleep(chance.uniform(0.0, 0.25))
        process.kill()
        process = engine_process(QUICK + LIVE + "tell(); input()")
        never_ran |= set(process.read()[1:])
    process.kill()
    with Engine.open(state_dir) as engine:
        never_ran |= {one.id for one in engine.recovery.findings if one.status["reason"] == "StartError"}
        newest = max(attempts(engine))
        last = attempts(engine)[newest]
        last.stop()
        newest = max(attempts(engine))
        settle(engine, 0.2)
        kept = attempts(engine)
        assert max(kept) == newest, "no policy undoes a stop"
        assert [one.metadata.restart_count for one in kept.values()] == list(kept)
        runs = runs_of(state_dir)
        doubled = [key for key, count in Counter(runs).items() if count > 1]
        assert not doubled
        assert not never_ran & set(runs), "what ran is not said to have never run"
        cut_off = [one for one in kept.values() if one.status.stop_requested_at and one.id not in {*runs, *never_ran}]
        assert [one.id for one in cut_off] in ([], [kept[newest].id]), "it was stopped before it could say anything"
        assert len(runs) + len(never_ran) + len(cut_off) == newest + 1
        assert len(kept) <= 3
        assert len(list(Path(state_dir, "containers").iterdir())) <= 3, "a crash loop does not fill the disk"


FOLLOW_UPS = "limpet.engine.lifecycle.follow_ups"
CONTAINER = "limpet.engine.lifecycle.container:Container"
STORE = "limpet.engine.store.store:Store"
WINDOWS = [
    (FOLLOW_UPS, "add_next", "before"),
    (FOLLOW_UPS, "add_next", "after"),
    (CONTAINER, "create", "before"),
    ("limpet.engine.lifecycle.bundle:ContainerBundle", "finish", "before"),
    (CONTAINER, "create", "after"),
    ("limpet.engine.starters.process.starter:ProcessStarter", "prepare", "after"),
    ("limpet.engine.starters.process.starter:ProcessStarter", "go", "after"),
    (CONTAINER, "release", "before"),
    (CONTAINER, "delete", "before"),
    (STORE, "delete", "after"),
]


@pytest.mark.parametrize(("where", "name", "when"), WINDOWS, ids=[f"{when}-{name}" for _, name, when in WINDOWS])
def test_killed_in_the_middle_of_a_restart(
    engine_process: Start, state_dir: str, where: str, name: str, when: str
) -> None:
    """Whatever the instant, the next engine makes up for what is due: all attempts, once each."""
    program = RUNS.replace("exit 1", "sleep 0.1; exit 1")
    process = engine_process(
        DIE
        + QUICK
        + LIVE
        + f"c = make('sh', '-c', {program!r}, restart='on-failure:3'); c.create\n"
        + f"c.start(); die({where!r}, {name!r}, {when!r}); time.sleep(60)"
    )
    assert process.wait() == -9
    with Engine.open(state_dir) as engine:
        wait_until(lambda: list(attempts(engine)) == [2, 3], "the attempts before the last two to be gone")
        last = attempts(engine)[3]
        wait_until(lambda: last.state is ContainerState.EXITED, "the last attempt to end")
        settle(engine)
        assert list(attempts(engine)) == [2, 3]
        runs = runs_of(state_dir)
        assert len(runs) == len(set(runs)) == 4
        assert runs[-1] == last.id


def test_what_was_stopped_stays_so_when_the_stop_is_cut_short(engine_process: Start, state_dir: str) -> None:
    """Killed between the stop's record and its signal: the next engine ends it, and restarts nothing."""
    starter = "limpet.engine.starters.process.starter:ProcessStarter"
    process = engine_process(
        DIE + QUICK + LIVE + f"c = make('sleep', '1000', restart='always'); c.start(); die({starter!r}, 'signal', "
        "'before'); c.stop()"
    )
    assert process.wait() == -9
    with Engine.open(state_dir) as engine:
        only = attempts(engine)[0]
        assert only.wait(20).exit_code == 143
        settle(engine)
        assert list(attempts(engine)) == [0]


def test_an_end_while_no_engine_was_there_is_made_up_for(engine_process: Start, state_dir: str) -> None:
    """It ends while nobody looks; the next engine adds the attempt that is due."""
    process = engine_process(QUICK + LIVE + "c = make('sleep', '0.3', restart='always'); c.start(); say(c.status.pid)")
    pid = int(process.read()[0])
    process.kill()
    wait_until(lambda: not is_running(pid), "the container to end")
    with Engine.open(state_dir) as engine:
        wait_until(lambda: 1 in attempts(engine) and attempts(engine)[1].state is ContainerState.RUNNING, "the restart")
        attempts(engine)[1].stop(0)


EXPIRE = "c = make('sleep', '1000', {}); c.start(); c.renew(time.time_ns() + 5 * 10**8); "


@pytest.mark.parametrize(
    ("where", "name", "when"),
    [
        (FOLLOW_UPS, "expire", "before"),
        ("limpet.engine.starters.process.starter:ProcessStarter", "signal", "before"),
        (FOLLOW_UPS, "release_expired", "before"),
        ("limpet.engine.lifecycle.bundle:ContainerBundle", "remove", "before"),
    ],
)
@pytest.mark.parametrize("policy", ["", "restart='always'"])
def test_killed_in_the_middle_of_an_expiry(
    engine_process: Start, state_dir: str, where: str, name: str, when: str, policy: str
) -> None:
    """The next engine goes on where the kill came: stopped, released, and not restarted."""
    process = engine_process(DIE + LIVE + EXPIRE.format(policy) + f"die({where!r}, {name!r}, {when!r}); time.sleep(60)")
    assert process.wait() == -9
    with Engine.open(state_dir) as engine:
        (only,) = engine.list()
        wait_until(lambda: only.status.released, "it to be released")
        assert only.status.reason == "Expired"
        wait_until(lambda: not Path(state_dir, "containers", only.id).exists(), "its bundle to be gone")
        settle(engine)
        assert len(engine.list()) == 1
