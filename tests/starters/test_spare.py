"""The spare gate: forked ahead of the next start, it is nobody's process until then, and never left behind."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from limpet import Engine
from limpet.engine.lifecycle.container import Container
from limpet.engine.starters.contract import Prepared
from limpet.engine.starters.process import ProcessStarter
from limpet.engine.starters.process.client import ANSWER_TIMEOUT_SECONDS, KeeperClient
from limpet.engine.starters.process.handed_on import read_handed_on
from limpet.engine.starters.process.keeper.gate import NOT_EXECUTED, become_container
from limpet.engine.starters.process.keeper.kernel import read_children
from limpet.engine.starters.process.keeper.spare import Spare
from limpet.engine.starters.process.plan import make_plan, write_plan
from limpet.recovery.host import open_pidfd, read_stat, wait_for_end
from limpet.schema.errors import StartError
from limpet.schema.runtime_spec import ProcessSpec, Root, Spec
from limpet.schema.status import Reason
from tests.conftest import is_running, wait_until
from tests.stops import stop_by_signal

_UNHURRIED = (
    "import sys; sys.path.insert(0, sys.argv[1]); from keeper import keeper, main;"
    " keeper._QUIET_SECONDS = keeper._OPENED_SECONDS = 60; main.main()"
)
"""The keeper's program, which looks at a start only when it is asked for something."""
_IMPATIENT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from keeper import keeper, main;"
    " keeper._IDLE_SECONDS = keeper._TICK_SECONDS = 0.05; main.main()"
)
"""The keeper's program, which does not stay as long when nothing is left for it."""

_CONTINUES_NO_GATE = (
    "import sys; sys.path.insert(0, sys.argv[1]); from keeper import main, spare;"
    " spare.go_on_at = lambda *_: None; main.main()"
)
"""The keeper's program, whose end continues no gate: as where one is stopped a moment after that."""
_REFUSED_ONCE = """
import errno, os, sys
sys.path.insert(0, sys.argv[1])
from keeper import main, starts

def write(descriptor, data, real=os.write):
    if data == b"g" and pending:
        raise OSError(errno.ENOBUFS, pending.pop())
    return real(descriptor, data)

def hold(pid, real=starts.hold_uts_namespace):
    if pending:
        raise MemoryError(pending.pop())
    return real(pid)

pending = ["no memory now"]
REFUSE
main.main()
"""
"""The keeper's program, to which the kernel refuses something once."""


@pytest.fixture
def engine(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", _IMPATIENT)
    with Engine.open(state_dir) as opened:
        opened.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        yield opened


def run(engine: Engine, key: str, *command: str) -> Container:
    config = {"metadata": {"name": key}, "image": {"image": "host"}, "command": command or ("sleep", "1000")}
    container = engine.create_container(config, "jobs", id=key)
    container.start()
    return container


def find_keeper(state_dir: str) -> int:
    """Return the keeper's pid, 0 if there is none."""
    client = KeeperClient(os.path.join(state_dir, "keeper"))
    with client.connection(begin=False):
        client.close()
    return client.keeper_pid


def find_children(state_dir: str, name: str) -> list[int]:
    """Return the pids of the keeper's children of this name, zombies included."""
    found = []
    for pid in read_children(find_keeper(state_dir)):
        with suppress(FileNotFoundError):  # reaped meanwhile
            if Path(f"/proc/{pid}/comm").read_text() == f"{name}\n":
                found.append(pid)
    return found


def find_spares(state_dir: str) -> list[int]:
    """Return the pids of the spare gates among the children of the keeper."""
    return find_children(state_dir, "limpet-spare")


def wait_for_spare(state_dir: str) -> int:
    wait_until(lambda: len(find_spares(state_dir)) == 1, "there is one spare")
    return find_spares(state_dir)[0]


def test_the_next_start_takes_the_spare(engine: Engine, state_dir: str) -> None:
    """It becomes the container's process; there is another one soon, and never two."""
    run(engine, "first")
    for key in ("second", "third"):
        spare = wait_for_spare(state_dir)
        container = run(engine, key)
        assert container.status.pid == spare
        assert Path(f"/proc/{spare}/comm").read_text() == "sleep\n"
    for container in engine.list():
        container.stop(0)


def test_starts_that_follow_at_once_are_forked_in_pairs() -> None:
    """The first has its gate alone; each second one after it finds a gate that waits."""
    spare = Spare()
    gates = []
    try:
        for is_waiting in (False, True, False, True, False):
            before = spare.pid
            gates.append(spare.take())
            assert before in {0, gates[-1].pid}
            assert bool(spare.pid) == is_waiting
    finally:
        for gate in gates:
            gate.end()
        spare.give_up()


def test_the_keeper_keeps_no_descriptor_of_a_life_that_is_over(engine: Engine, state_dir: str) -> None:
    """However many containers come and go: it has as many as with the first, and a spare."""
    run(engine, "stays")
    keeper = find_keeper(state_dir)

    def live(key: str) -> None:
        container = run(engine, key, "true")
        container.wait(20)
        container.release()
        wait_for_spare(state_dir)

    def count() -> int:
        return len(os.listdir(f"/proc/{keeper}/fd"))

    live("first")
    before = count()
    for number in range(6):
        live(str(number))
    wait_until(lambda: count() <= before, "it to have closed what it opened")
    engine.get("stays").stop(0)


def test_a_spare_keeps_no_keeper_that_nobody_needs(engine: Engine, state_dir: str, tmp_path: Path) -> None:
    """Nor what holds its memory: what has left a daemon, which has ended since, is known, and needs no keeper."""
    os.mkfifo(tmp_path / "go")
    container = run(engine, "first", "sh", "-c", f"setsid sleep 1 & read line < {tmp_path}/go; exit 3")
    wait_for_spare(state_dir)
    wait_until(lambda: len(find_children(state_dir, "limpet-memory")) == 1, "the spare's memory is held")
    keeper = find_keeper(state_dir)
    (tmp_path / "go").write_text("\n")
    assert container.wait(20).exit_code == 3
    engine.close()
    wait_until(lambda: not is_running(keeper), "the keeper to end")
    with Engine.open(state_dir) as again:
        assert again.get("first").exit_code == 3


def test_a_spare_that_was_killed_is_replaced(engine: Engine, state_dir: str) -> None:
    """The start that would have taken it forks another, and its zombie is reaped."""
    run(engine, "first")
    spare = wait_for_spare(state_dir)
    with open_pidfd(spare) as pidfd:
        os.kill(spare, signal.SIGKILL)
        assert wait_for_end(pidfd, 20)  # until then it is as good as alive, and a start that takes it fails
    second = run(engine, "second", "sh", "-c", "exit 7")
    assert second.wait(20).exit_code == 7
    assert second.status.pid != spare
    assert not os.path.exists(f"/proc/{spare}")
    engine.get("first").stop(0)


def test_a_spare_that_was_killed_is_reaped_though_nothing_is_started(engine: Engine, state_dir: str) -> None:
    """It stays no zombie until the next start, which may never come."""
    run(engine, "first")
    spare = wait_for_spare(state_dir)
    os.kill(spare, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{spare}"), "it to be reaped")
    engine.get("first").stop(0)


@pytest.mark.parametrize("number", [0, signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_what_holds_the_memory_of_a_spare_is_no_part_of_its_container(
    engine: Engine, state_dir: str, number: int
) -> None:
    """Nor anything that a container waits for, or that stays: also if it was stopped, or killed."""
    run(engine, "first")
    wait_for_spare(state_dir)
    (memory,) = find_children(state_dir, "limpet-memory")
    if number:
        os.kill(memory, number)
    second = run(engine, "second", "sleep", "1001")
    assert read_children(second.status.pid or 0) == []
    client = KeeperClient(os.path.join(state_dir, "keeper"))
    assert (client.ask({"op": "members", "id": "second"}) or {})["members"] == [second.status.pid]
    client.close()
    wait_until(lambda: not os.path.exists(f"/proc/{memory}"), "what held the memory is gone, and reaped")
    wait_until(lambda: len(find_children(state_dir, "limpet-memory")) == 1, "the next spare has one")
    keeper = find_keeper(state_dir)
    for container in engine.list():
        container.stop(0)
        container.release()
        container.delete()
    engine.close()
    wait_until(lambda: not os.path.exists(f"/proc/{keeper}"), "the keeper has ended")


def test_the_spare_ends_with_its_keeper(engine: Engine, state_dir: str) -> None:
    """Killed: the one that takes over reaps the spare and makes its own. With no container left: it is gone, too."""
    run(engine, "first")
    spare, keeper = wait_for_spare(state_dir), find_keeper(state_dir)
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{spare}"), "the spare is reaped")
    second = run(engine, "second", "sh", "-c", "exit 7")
    assert second.wait(20).exit_code == 7
    spare, keeper = wait_for_spare(state_dir), find_keeper(state_dir)
    for container in engine.list():
        container.stop(0)
        container.release()
        container.delete()
    wait_until(lambda: not os.path.exists(f"/proc/{spare}"), "the spare is reaped")
    engine.close()
    wait_until(lambda: not os.path.exists(f"/proc/{keeper}"), "the keeper has ended")


def test_a_gate_that_is_stopped_as_all_keepers_die_ends(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is left who would continue it, so it need not see for itself that its gate has closed."""

    def go(starter: ProcessStarter, prepared: Prepared) -> None:
        keeper = find_keeper(state_dir)
        stop_by_signal(prepared.identity.pid)
        for each in (int(read_stat(keeper)[1]), keeper):
            os.kill(each, signal.SIGKILL)
        ended.append(wait_for_end(prepared.pidfd, 5))
        monkeypatch.undo()
        starter.go(prepared)

    ended: list[bool] = []
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", _CONTINUES_NO_GATE)
    monkeypatch.setattr(ProcessStarter, "go", go)
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        with pytest.raises(StartError):
            run(engine, "first")
        assert ended == [True]
        assert engine.get("first").status.reason == Reason.START_ERROR
        assert run(engine, "second", "sh", "-c", "exit 7").wait(20).exit_code == 7


@pytest.mark.long
def test_starts_from_many_threads_do_not_disturb_each_other(engine: Engine) -> None:
    """Descriptors come and go in the keeper while others start: each program is executed, and ends as it should."""

    def live(number: int) -> int | None:
        container = run(engine, f"c{number}", "sh", "-c", f"exit {number % 100}")
        code = container.wait(60).exit_code
        container.release()
        container.delete()
        return code

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(live, range(1500))) == [number % 100 for number in range(1500)]


def test_a_gate_that_cannot_begin_writes_into_nothing_of_the_keepers(tmp_path: Path) -> None:
    """Until it has taken its descriptors their numbers are the keeper's: one may be its lock."""
    lock = tmp_path / "lock"
    lock.write_text("the anchor's pid\n")
    pid = os.fork()
    if not pid:
        try:
            os.dup2(os.open(lock, os.O_RDWR), 4)
            resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))  # none for the numbers that it begins with
            become_container(3, 3)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == NOT_EXECUTED
    assert lock.read_text() == "the anchor's pid\n"


def test_nobody_holds_a_gate_whose_engine_was_found_gone_by_another_start(
    state_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has asked for the gate and ended; that it is gone shows as the keeper tells it of the start before."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", _UNHURRIED)
    client = KeeperClient(str(tmp_path / "keeper"))
    spec = Spec(process=ProcessSpec(args=("sleep", "1000"), env=(), cwd="/"), root=Root(path=""))
    plan = write_plan(make_plan(spec, os.environb, (), {}, read_handed_on()))
    connection = client.take(begin=True)
    assert connection is not None
    keeper = client.keeper_pid
    answer, given = connection.ask({"op": "prepare", "id": "before", "report": True}, [plan])
    connection.tell({"op": "go", "id": "before"})
    wait_until(lambda: Path(f"/proc/{answer['pid']}/comm").read_text() == "sleep\n", "its program to be executed")
    stop_by_signal(keeper)
    connection.tell({"op": "prepare", "id": "next"}, [plan])
    connection.close()
    os.kill(keeper, signal.SIGCONT)
    with client.connection(begin=False) as later:
        assert later is not None
        later.ask({"op": "hello"})  # what came before is served
        gates = [pid for pid in read_children(keeper) if Path(f"/proc/{pid}/comm").read_text() == "limpet-gate\n"]
        wait_until(lambda: not any(map(is_running, gates)), "the gate to end")
        later.ask({"op": "release", "id": "before"})
    client.close()
    for each in (plan, *given):
        os.close(each)


@pytest.mark.parametrize("refused", ["os.write = write", "starts.hold_uts_namespace = hold"])
def test_a_gate_that_could_not_be_opened_is_opened_a_moment_later(
    state_dir: str, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """The keeper has no memory just as it opens a gate: nobody tells it to again, and the start is no other for it."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", _REFUSED_ONCE.replace("REFUSE", refused))
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        began = time.monotonic()
        assert run(engine, "a", "sh", "-c", "exit 3").wait(10).exit_code == 3
        assert time.monotonic() - began < ANSWER_TIMEOUT_SECONDS / 2
