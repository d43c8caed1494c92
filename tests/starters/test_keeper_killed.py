"""Whoever of the keeper's processes is killed: every end is witnessed, and nothing false is said."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from limpet import Engine, Snapshot, errors
from limpet.engine.starters.process import ProcessStarter, find_facts
from limpet.engine.starters.process.client import Connection, KeeperClient
from limpet.recovery import Process, host
from limpet.schema import ContainerState, Reason
from tests.conftest import is_running, wait_until
from tests.starters.host import make
from tests.starters.keepers import ALL, KEEPER, Start, find_keepers, kill, leave_one

MANY = """
engine = Engine.open(state_dir)
engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
for n in range(20):
    engine.create_container({"metadata": {"name": f"c{n}"}, "image": {"image": "host"},
        "command": ["sh", "-c", f"while [ ! -e GO ]; do sleep 0.02; done; exit {n}".replace("GO", state_dir + ".go")]},
        "jobs", id=f"c{n}").start()
say("started"); time.sleep(999)
"""


@pytest.mark.parametrize("killed", [(), KEEPER, ("limpet-anchor",), ("limpet-copier",)])
def test_ends_are_witnessed_while_no_engine_lives(
    engine_process: Start, state_dir: str, killed: tuple[str, ...]
) -> None:
    """The engine is killed, and one of the keeper's processes too; all containers end: each code is known and right."""
    process = engine_process(MANY)
    process.read()
    process.kill()
    kill(state_dir, *killed)
    Path(state_dir + ".go").touch()
    time.sleep(0.3)  # they end while nobody asks; an engine that comes amid their ends must not matter
    with Engine.open(state_dir) as engine:
        codes = [engine.get(f"c{n}").wait(20).exit_code for n in range(20)]
        assert codes == list(range(20))
        assert all(engine.get(f"c{n}").status.finished_at for n in range(20))


def test_nothing_false_is_said_when_all_are_killed(engine_process: Start, state_dir: str) -> None:
    """Engine and keepers are killed: containers run on, are found, and an end that nobody saw is said to be unseen."""
    process = engine_process(MANY)
    process.read()
    process.kill()
    kill(state_dir, *ALL)
    with Engine.open(state_dir) as engine:
        assert {one.state for one in engine.list()} == {ContainerState.RUNNING}
        next_one = make(engine, "next", "sh", "-c", "exit 3")
        next_one.start()
        assert next_one.wait(20).exit_code == 3
        Path(state_dir + ".go").touch()
        for n in range(20):
            assert engine.get(f"c{n}").wait(20).exit_code in {n, 255}


class AsBefore69(ProcessStarter):
    """Works as where the kernel gives no proof of which process one is."""

    def __init__(self) -> None:
        super().__init__(compare=lambda *_: (Process.UNPROVEN, "pid and start time match, which is no proof"))


@pytest.mark.parametrize(("killed", "expected"), [((), "RUNNING"), (KEEPER, "RUNNING"), (ALL, "UNKNOWN")])
def test_only_a_parent_vouches_for_a_process(
    engine_process: Start, state_dir: str, killed: tuple[str, ...], expected: str
) -> None:
    """Without proof a keeper's word counts if it is the parent; one that begins anew knows but a number and a time."""
    process = engine_process(MANY)
    process.read()
    process.kill()
    kill(state_dir, *killed)
    for _ in range(2):
        with Engine.open(state_dir, starter=AsBefore69()) as engine:
            assert {one.state.name for one in engine.list()} == {expected}
    with Engine.open(state_dir) as engine:
        assert {one.state.name for one in engine.list()} == {"RUNNING"}
        for one in engine.list():
            one.stop(0)


def test_what_cannot_be_shown_to_be_the_one_has_not_ended(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptors were closed behind the engine's back, and nobody is left who could vouch for it: it runs on."""
    monkeypatch.setattr("limpet.engine.lifecycle.watcher._EXIT_SECONDS", 0.1)
    with Engine.open(state_dir, starter=AsBefore69()) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        container = make(engine, "one", "sleep", "1000")
        container.start()
        kill(state_dir, *ALL)
        watcher = engine._runtime.watcher
        for descriptor in (watcher._epoll.fileno(), *(each.pidfd for each in watcher._watches.values())):
            os.close(descriptor)
        watcher._wake()
        with pytest.raises(errors.WaitTimeoutError):
            container.wait(1)
        assert is_running(container.status.pid)
        os.kill(container.status.pid, signal.SIGKILL)
        assert container.wait(20).finished_at


def test_who_looks_on_asks_the_keeper_where_the_kernel_gives_no_proof(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Linux 6.9 what runs is said to run beside its engine, as long as a keeper is its parent; and no more."""
    monkeypatch.setattr(host, "ask_for_pidfs", lambda: False)
    container = make(engine, "one", "sleep", "1000")
    container.start()

    def look() -> str:
        with Snapshot.open(state_dir) as snapshot:
            return snapshot.get(container.id).status.state.name

    assert look() == "RUNNING"
    kill(state_dir, *KEEPER)
    assert look() == "RUNNING"
    kill(state_dir, *ALL)
    assert look() == "UNKNOWN"
    os.kill(container.status.pid, signal.SIGKILL)
    assert container.wait(20).finished_at


def test_the_keeper_is_killed_again_and_again(engine: Engine, state_dir: str) -> None:
    """Starts and ends go on; each code that is told is right, and no container ends with its keeper."""
    lasting = make(engine, "lasting", "sleep", "1000")
    lasting.start()
    pid = lasting.status.pid
    for n in range(12):
        container = make(engine, f"c{n}", "sh", "-c", f"sleep 0.0{n % 7}; exit {n}")
        threading.Timer(random.random() / 20, kill, (state_dir, *KEEPER)).start()
        try:
            container.start()
        except errors.StartError:
            assert container.status.reason == Reason.START_ERROR  # it never ran, and that is said
            continue
        assert container.wait(20).exit_code in ({n} if n % 2 else {n, 255})
        if n % 2:
            kill(state_dir, *ALL)  # from nothing: an anchor has no other behind it
    assert (lasting.state, lasting.status.pid) == (ContainerState.RUNNING, pid)
    assert is_running(pid)
    assert lasting.stop(1).finished_at


def test_the_keeper_that_is_shown_is_the_one_that_lives(engine: Engine, state_dir: str) -> None:
    """It is the containers' parent: the first, and the one that takes its place."""
    assert find_facts(state_dir).keeper_pid == 0
    container = make(engine, "one", "sleep", "1000")
    container.start()

    def is_shown() -> bool:
        parent = int(Path(f"/proc/{container.status.pid}/stat").read_text().rpartition(")")[2].split()[1])
        return find_facts(state_dir).keeper_pid == parent == find_keepers(state_dir).get("limpet-keeper")

    wait_until(is_shown, "the first to be shown")  # a fork of it has its name for a moment
    first = find_facts(state_dir).keeper_pid
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not is_running(first), "the keeper to end")
    wait_until(is_shown, "the next one to be shown")
    container.stop(0)


def test_a_keeper_that_dies_as_it_is_greeted_is_not_taken_for_none(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The anchor takes over, and knows what has left its container's group: a stop reaches all of it."""
    one = make(engine, "one", "sh", "-c", "setsid sleep 1000 & echo $! > left; exec sleep 1000")
    one.start()
    left = Path(one.metadata.root_dir, "working", "left")
    wait_until(lambda: left.exists() and left.read_text(), "the first to have another")
    greet = KeeperClient._greet
    killed: list[int] = []

    def kill_amid_greeting(self: KeeperClient, connection: Connection) -> Connection:
        if not killed:
            killed.append(connection.ask({"op": "hello"})[0]["pid"])
            os.kill(killed[0], signal.SIGKILL)
            wait_until(lambda: not is_running(killed[0]), "the keeper to end")
        return greet(self, connection)

    starter = engine.starter
    assert isinstance(starter, ProcessStarter)
    starter._keeper.forget_connections()
    monkeypatch.setattr(KeeperClient, "_greet", kill_amid_greeting)
    identity = one.status.identity
    assert identity is not None
    assert starter.signal("one", identity, 0) == 2
    assert killed
    one.stop(0)


def test_a_keeper_that_is_killed_as_an_engine_opens_has_told_its_journal(
    state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has begun and taken over, and is killed before it is asked: the next one tells the same."""
    end = leave_one(state_dir)
    end.touch()
    wait_until(lambda: b'"end"' in Path(state_dir, "keeper", "journal").read_bytes(), "its end to be noted")
    real = ProcessStarter.open

    def open_and_kill(self: ProcessStarter, state_dir: str) -> None:
        real(self, state_dir)
        kill(state_dir, *ALL)

    monkeypatch.setattr(ProcessStarter, "open", open_and_kill)
    with Engine.open(state_dir) as engine:
        assert engine.get("one").exit_code == 3


DIES_AS_IT_BEGINS = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from keeper import main
with open(COUNT, "a") as file:
    file.write("x")
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if os.stat(COUNT).st_size <= DEATHS:
    main.WHERE = die
main.main()
"""


@pytest.mark.parametrize("deaths", [2, 3])
@pytest.mark.parametrize("where", ["_take_lock", "become_subreaper"])
def test_a_keeper_that_is_killed_as_it_begins_is_begun_again(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, deaths: int
) -> None:
    """Whether the process that was spawned is killed or its anchor; of one that always is, that is told."""
    program = DIES_AS_IT_BEGINS.replace("COUNT", repr(str(tmp_path / "count"))).replace("DEATHS", str(deaths))
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", program.replace("WHERE", where))
    container = make(engine, "one", "true")
    if deaths == 2:
        container.start()
        assert container.wait(20).exit_code == 0
    else:
        with pytest.raises(errors.StartError, match="the keeper cannot begin: it was killed as it began"):
            container.start()


CANNOT_LOOK = """
import sys
sys.path.insert(0, sys.argv[1])
from keeper import journal, keeper, main

def find_again(container, anonymous):
    raise OSError("no descriptor left")

keeper.find_again, journal._WORTH_REWRITING = find_again, 0
main.main()
"""


def test_what_could_not_be_looked_at_yet_stays_in_the_journal(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A keeper that takes over and rewrites the journal is killed, too: the next one knows of every container."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", CANNOT_LOOK)
    make(engine, "one", "sleep", "1000").start()
    kill(state_dir, *KEEPER)
    for number in range(8):
        make(engine, f"c{number}", "true").start()
        engine.get(f"c{number}").wait(20)
    assert b'"id":"one"' in Path(state_dir, "keeper", "journal").read_bytes()
    monkeypatch.undo()
    kill(state_dir, *ALL)
    assert engine.get("one").stop(0).exit_code == 137


SLOW_TO_FLUSH = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from keeper import journal, main

def fdatasync(file, real=os.fdatasync):
    real(file)
    time.sleep(1)
    with open("NOTE", "a") as note:
        print(os.fstat(file).st_ino, file=note)

os.fdatasync, journal._WORTH_REWRITING = fdatasync, 2000
main.main()
"""
"""The keeper's program, on a slow disk, and with a journal that has soon grown enough to be rewritten."""


def test_a_journal_that_is_being_flushed_is_not_replaced(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is reaped after a flush is in the file that was flushed, though others' ends are taken meanwhile."""
    note = Path(state_dir + ".flushed")
    program = SLOW_TO_FLUSH.replace("NOTE", str(note))
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", program)
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        take = engine.starter.forget_exits
        monkeypatch.setattr(engine.starter, "forget_exits", lambda ids: take([each for each in ids if each != "slow"]))
        slow = make(engine, "slow", "true")
        slow.start()
        for number in range(100):
            other = make(engine, f"c{number}", "true")
            other.start()
            other.wait(20)
            if note.exists():
                break
        identity = slow.status.identity
        assert identity is not None
        wait_until(lambda: not os.path.exists(f"/proc/{identity.pid}"), "the keeper to reap it")
        assert str(os.stat(f"{state_dir}/keeper/journal").st_ino) in note.read_text().split()
