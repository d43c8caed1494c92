"""Each process of the keeper may be stopped by a signal at any instant: starts, ends and logs are as ever."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from limpet import Engine
from limpet.engine.starters.contract import Prepared
from limpet.engine.starters.process import ProcessStarter
from limpet.engine.starters.process.keeper.kernel import read_children
from limpet.recovery.host import open_pidfd, wait_for_end
from limpet.schema import ContainerState, Reason
from tests.campaigns.refused_life import IMPATIENT_KEEPER
from tests.conftest import is_running, wait_until
from tests.starters.host import make
from tests.starters.keepers import KEEPER, find_keepers, kill, leave_one
from tests.starters.test_spare import wait_for_spare
from tests.stops import has_taken_stop, read_state, stop_by_signal

CLIENT = "limpet.engine.starters.process.client"
STOPS = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from keeper import main

real = {name}

def stop(*args):
    os.kill(os.getpid(), signal.SIGSTOP)
    return real(*args)

{name} = stop
main.main()
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("main.give_up_other_ids", id="before it has the lock"),
        pytest.param("main.listen", id="with the lock"),
        pytest.param("os.execv", id="a child that tries the kernel out"),
        pytest.param("main.become_subreaper", id="the anchor, and the keeper, before they are any"),
        pytest.param("main.copier.run", id="the copier"),
    ],
)
def test_a_keeper_is_stopped_while_it_begins(engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The start that has it begin has it go on."""
    program = STOPS.format(name=name).replace("import main\n", "import copier, main\n").replace("main.copier", "copier")
    monkeypatch.setattr(f"{CLIENT}._PROGRAM", program)
    monkeypatch.setattr(f"{CLIENT}._PATIENCE_SECONDS", 0.1)
    container = make(engine, "one", "sh", "-c", "echo heard; exit 4", log_path="one.log")
    begun = time.monotonic()
    container.start()
    assert container.wait(20).exit_code == 4
    assert container.release().released
    assert [entry.text for entry in container.read_log()] == [b"heard\n"]
    assert time.monotonic() - begun < 5


LOOKS_ALL_THE_TIME = IMPATIENT_KEEPER.replace("main.main()", "keeper._LOOK_SECONDS = 0\nmain.main()")


def test_a_gate_is_stopped(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right before it is opened: the keeper has it go on. A program that stops itself stays stopped."""
    monkeypatch.setattr(f"{CLIENT}._PROGRAM", LOOKS_ALL_THE_TIME)
    of_its_own = make(engine, "one", "sh", "-c", "kill -STOP $$; exit 4")
    of_its_own.start()
    pid = of_its_own.status.pid or 0
    wait_until(lambda: read_state(pid) == "T", "the program to stop")
    real = ProcessStarter.go

    def go(self: ProcessStarter, prepared: Prepared) -> None:
        os.kill(prepared.identity.pid, signal.SIGSTOP)
        real(self, prepared)

    monkeypatch.setattr(ProcessStarter, "go", go)
    other = make(engine, "two", "sh", "-c", "exit 5")
    other.start()
    assert other.wait(20).exit_code == 5
    assert read_state(pid) == "T"
    os.kill(pid, signal.SIGCONT)
    assert of_its_own.wait(20).exit_code == 4


def read_name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_a_keeper_goes_on_while_no_engine_lives(state_dir: str) -> None:
    """Its anchor has it go on: when a container ended is seen then, and not by the next engine."""
    end = leave_one(state_dir)
    stop_by_signal(find_keepers(state_dir)["limpet-keeper"])
    end.touch()
    wait_until(lambda: b'"end"' in Path(state_dir, "keeper", "journal").read_bytes(), "the end")
    with Engine.open(state_dir) as engine:
        assert engine.get("one").wait(20).exit_code == 3


def test_a_spare_that_was_stopped_does_not_outlive_its_keeper(engine: Engine, state_dir: str) -> None:
    """The keeper is killed before it could have it go on: the next one does."""
    make(engine, "one", "sleep", "1000").start()
    spare = wait_for_spare(state_dir)
    keeper = find_keepers(state_dir)["limpet-keeper"]
    os.kill(spare, signal.SIGSTOP)
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{spare}"), "its end")
    assert engine.get("one").stop(5).exit_code == 128 + signal.SIGTERM


ENDS_LATE = """
from contextlib import suppress
from keeper import keeper
end_ours = keeper.Keeper._end_ours

def stop_and_end_ours(self):
    for pid in list(self._find_ours()):
        with suppress(ProcessLookupError):  # what held a memory has just ended
            os.kill(pid, signal.SIGSTOP)
    end_ours(self)

keeper.Keeper._end_ours = stop_and_end_ours
main.main()
"""


def test_nothing_is_left_that_was_stopped_as_the_keeper_ended(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copier, say, would not see that its keeper has ended."""
    program = IMPATIENT_KEEPER.replace("import sys", "import os, signal, sys").replace("main.main()\n", ENDS_LATE)
    monkeypatch.setattr(f"{CLIENT}._PROGRAM", program)
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        container = make(engine, "one", "true")
        container.start()
        container.wait(20)
        keepers = find_keepers(state_dir)
        assert set(keepers) >= {"limpet-anchor", "limpet-keeper", "limpet-copier"}
        container.release()
        container.delete()
    wait_until(lambda: not any(map(is_running, keepers.values())), "all to end")


@pytest.mark.parametrize("last", ["limpet-keeper", "limpet-anchor"])
def test_nothing_is_left_that_was_stopped_when_anchor_and_keeper_are_killed(
    state_dir: str, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """Nobody is left who would continue it; the kernel does. Stopped are a copier, a spare gate, and its memory."""
    monkeypatch.setattr(f"{CLIENT}._PROGRAM", LOOKS_NEVER)
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        container = make(engine, "one", "sleep", "1000")
        pid = container.start().pid or 0
        wait_for_spare(state_dir)
        keepers = find_keepers(state_dir)
        parents = keepers["limpet-anchor"], keepers["limpet-keeper"]
        left = {each for parent in parents for each in read_children(parent)} - {pid, *parents}
        assert sorted(map(read_name, left)) == ["limpet-copier", "limpet-memory", "limpet-spare"]
        stop_by_signal(*parents)  # so that the one does not begin anew what it loses with the other
        for each in sorted(parents, key=lambda each: each == keepers[last]):
            if is_running(keepers["limpet-keeper"]):  # else they are about to end
                stop_by_signal(*left)
            with open_pidfd(each) as pidfd:
                os.kill(each, signal.SIGKILL)
                assert wait_for_end(pidfd, 20)
        wait_until(lambda: not any(map(is_running, left)), "all to end")
        assert container.stop(0).exit_code == 128 + signal.SIGKILL


LOOKS_NEVER = """
import sys
sys.path.insert(0, sys.argv[1])
from keeper import keeper, main

main._have_go_on = lambda *pids: None
keeper.Keeper._let_ours_go_on = lambda self: None
main.main()
"""


def test_a_flush_that_was_stopped_ends_when_its_keeper_is_killed(
    state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would stay for ever, with the keeper's directory open."""
    program = LOOKS_NEVER.replace("main.main()\n", STOPS_AS_IT_FLUSHES)
    monkeypatch.setattr(f"{CLIENT}._PROGRAM", program)
    end = leave_one(state_dir)
    keepers = find_keepers(state_dir)
    end.touch()

    def find() -> list[int]:
        children = read_children(keepers["limpet-keeper"])
        return [each for each in children if read_name(each) == "limpet-keeper" and read_state(each) == "T"]

    wait_until(lambda: len(find()) == 1, "it to stop")
    (flush,) = find()
    for name in ("limpet-keeper", "limpet-anchor"):
        os.kill(keepers[name], signal.SIGKILL)
    wait_until(lambda: not is_running(flush), "its end")


STOPS_AS_IT_FLUSHES = """
import os, signal
os.fdatasync = lambda file: os.kill(os.getpid(), signal.SIGSTOP)
main.main()
"""


SEES_LATE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from keeper import gate, main, starts

become_user, read_stat = gate.become_user, starts.read_stat

def become_late(*args):
    time.sleep(0.05)
    become_user(*args)

def read_slowly(pid):
    stat = read_stat(pid)
    if stat is not None and not stat.has_executed:
        time.sleep(0.3)
    return stat

gate.become_user, starts.read_stat = become_late, read_slowly
main.main()
"""


def test_a_program_that_runs_and_ends_while_the_keeper_looks_has_run(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper is stopped, or waits for a processor, right after it saw that the gate is still a gate."""
    monkeypatch.setattr(f"{CLIENT}._PROGRAM", SEES_LATE)
    container = make(engine, "one", "sh", "-c", "exit 4")
    container.start()
    status = container.wait(20)
    assert (status.state, status.exit_code, status.reason) == (ContainerState.EXITED, 4, Reason.ERROR)


def test_a_keeper_that_was_stopped_goes_on_once_it_is_needed(engine: Engine, state_dir: str) -> None:
    """A container of root's can send SIGSTOP to its parent: it is stopped in its time, and others are started."""
    container = make(engine, "one", "sh", "-c", "kill -STOP $PPID; exec sleep 1000")
    container.start()
    comm = Path(f"/proc/{container.status.pid}/comm")
    wait_until(lambda: comm.read_text() == "sleep\n", "the signal to be sent")
    wait_until(lambda: has_taken_stop(find_keepers(state_dir)["limpet-keeper"]), "it to stop")
    assert container.stop(5).exit_code == 128 + signal.SIGTERM
    assert make(engine, "two", "sh", "-c", "exit 4").start().state is not ContainerState.UNKNOWN
    assert engine.get("two").wait(20).exit_code == 4


def test_a_release_asks_nobody_where_all_is_known_to_be_gone(engine: Engine, state_dir: str) -> None:
    """The end tells that nothing is left; where there is more than processes, such as a log, the keeper is asked."""
    make(engine, "plain", "true").start()
    make(engine, "logged", "echo", "said", log_path="out.log").start()
    for key in ("plain", "logged"):
        engine.get(key).wait(20)
    keepers = find_keepers(state_dir)
    keeper = keepers["limpet-keeper"]
    stop_by_signal(keepers["limpet-anchor"], keeper)  # the anchor, too, or it would have the keeper go on
    engine.get("plain").remove()
    assert read_state(keeper) == "T"  # it would have been sent SIGCONT
    engine.get("logged").release()
    assert read_state(keeper) != "T"
    assert [each.text for each in engine.get("logged").read_log()] == [b"said\n"]


@pytest.mark.parametrize(
    "names", [("limpet-copier",), ("limpet-keeper",), ("limpet-spare",), ("limpet-anchor", "limpet-keeper")]
)
def test_whichever_of_the_keepers_processes_is_stopped_the_next_life_is_whole(
    engine: Engine, state_dir: str, names: tuple[str, ...]
) -> None:
    """A container of root's, or a person, can stop each; right after it starts, ends and output are as ever."""
    first = make(engine, "one", "sleep", "1000")
    first.start()
    keeper = find_keepers(state_dir)["limpet-keeper"]

    def find() -> dict[str, int]:
        found = find_keepers(state_dir)
        for pid in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split():
            with suppress(OSError):  # it was reaped meanwhile
                found.setdefault(Path(f"/proc/{pid}/comm").read_text().strip(), int(pid))
        return found

    wait_until(lambda: set(names) <= set(find()), "a gate that is forked ahead")
    stop_by_signal(*(find()[name] for name in names))
    next_one = make(engine, "two", "sh", "-c", "echo heard; exit 4", log_path="two.log")
    begun = time.monotonic()
    next_one.start()
    assert next_one.wait(20).exit_code == 4
    assert next_one.release().released
    assert time.monotonic() - begun < 9
    assert [entry.text for entry in next_one.read_log()] == [b"heard\n"]
    assert first.stop(5).exit_code == 128 + signal.SIGTERM


BEGINS_LATE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from keeper import main

become_subreaper = main.become_subreaper

def become_late():
    time.sleep(0.2)
    become_subreaper()

main.become_subreaper = become_late
main.main()
"""


def test_one_that_began_late_goes_on_when_it_is_stopped(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has connected before it was there, as on a busy machine: its peer is the process that was spawned."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", BEGINS_LATE)
    make(engine, "one", "true").start()
    engine.get("one").wait(20)
    keeper = find_keepers(state_dir)["limpet-keeper"]
    stop_by_signal(keeper)
    begun = time.monotonic()
    next_one = make(engine, "two", "sh", "-c", "exit 4")
    next_one.start()
    assert next_one.wait(20).exit_code == 4
    assert time.monotonic() - begun < 9
    assert find_keepers(state_dir)["limpet-keeper"] == keeper


def test_an_anchor_that_was_stopped_takes_over(state_dir: str) -> None:
    """It is stopped, and then the keeper is killed: the next engine has it go on, and knows what ended meanwhile."""
    end = leave_one(state_dir)
    stop_by_signal(find_keepers(state_dir)["limpet-anchor"])
    kill(state_dir, *KEEPER)
    end.touch()
    with Engine.open(state_dir) as engine:
        assert engine.get("one").wait(20).exit_code == 3
        assert make(engine, "two", "true").start().state is not ContainerState.UNKNOWN
