"""Many containers at once: each is signalled, its end told and released as one alone, and none keeps others from it."""

import os
import signal
from itertools import chain
from pathlib import Path

import pytest

from limpet import Engine
from limpet.engine.starters.abilities import Plural
from limpet.engine.starters.process.client import KeeperClient, portions
from limpet.engine.starters.process.keeper.journal import Journal
from limpet.engine.starters.process.keeper.messages import Message
from limpet.schema import ContainerState
from limpet.schema.metadata import MAX_ID_LENGTH
from tests.conftest import in_thread, is_running, wait_until
from tests.starters.host import make

COUNT = 12
FIRST_VERSION = """
import sys
sys.path.insert(0, sys.argv[1])
from keeper import keeper, main, starts

def divide(request):
    if "many" in request:
        raise KeyError("id")
    return [request]

keeper.VERSION = 1
keeper.divide = starts.divide = divide
main.main()
"""
"""A keeper that cannot be asked about many."""
WAIT = "sleep 1000 & wait"
DAEMON = f"trap 'touch told-NUMBER; exit' TERM; touch up-NUMBER; {WAIT}"
PROGRAM = f"""({"setsid" if os.geteuid() == 0 else ""} sh -c "{DAEMON}" &); trap 'exit NUMBER' TERM; {WAIT}"""
"""It leaves an orphan behind: where it may be told by its namespace, in a session of its own."""


def find_client(engine: Engine) -> KeeperClient:
    client: KeeperClient = engine.starter._keeper  # type: ignore[attr-defined]
    return client


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("version", [1, 3])
def test_a_stop_of_many_reaches_all_that_belongs_to_each(
    engine: Engine, tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orphans get the signal, too, and each code is its own; beside a keeper of the last version as well."""
    if version == 1:
        monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", FIRST_VERSION)
    script = PROGRAM.replace("up-", f"{tmp_path}/up-").replace("told-", f"{tmp_path}/told-")
    for number in range(COUNT):
        make(engine, f"c{number}", "sh", "-c", script.replace("NUMBER", str(number))).start()
    wait_until(lambda: len(list(tmp_path.glob("up-*"))) == COUNT, "all to be up")
    with find_client(engine).connection(begin=False) as connection:
        assert connection is not None
        assert connection.version == version
    sandbox = engine.get_sandbox("jobs")
    sandbox.stop(20)
    assert [engine.get(f"c{number}").exit_code for number in range(COUNT)] == list(range(COUNT))
    assert len(list(tmp_path.glob("told-*"))) == COUNT
    assert sandbox.remove()
    assert engine.list() == []


def test_one_that_is_busy_keeps_no_other_from_its_stop(engine: Engine) -> None:
    """Somebody is amid a step of one: the others are signalled, and it is once that step is over."""
    containers = [make(engine, f"c{number}", "sleep", "1000") for number in range(3)]
    for container in containers:
        container.start()
    busy, *others = containers
    with engine._runtime.exclusive(busy.id):
        thread, outcome = in_thread(lambda: engine.get_sandbox("jobs").stop(20))
        for other in others:
            assert other.wait(20).exit_code == 128 + signal.SIGTERM
        assert busy.state is ContainerState.RUNNING
    thread.join(20)
    assert outcome == [None]
    assert busy.exit_code == 128 + signal.SIGTERM


def test_an_answer_about_many_is_each_ones_own(engine: Engine) -> None:
    """One that runs, one whose id names another process, and as many unknown ones as need several messages."""
    one = make(engine, "one", "sleep", "1000").start().identity
    assert one is not None
    starter = engine.starter
    assert isinstance(starter, Plural)
    client = find_client(engine)
    unknown = ["\u00fc" * (MAX_ID_LENGTH - 4) + f"{number:04}" for number in range(300)]
    starter.forget_exits(unknown)
    named = {"id": "one", "pid": one.pid, "start": one.start_ticks}
    many: list[Message] = [named | {"start": one.start_ticks + 1}, *({"id": key} for key in unknown), named]
    answers = client.ask_for_many({"op": "signal", "number": signal.SIGKILL}, many)
    assert [sorted(each) for each in answers] == [["copying", "unknown"]] * 301 + [["left"]]
    wait_until(lambda: not is_running(one.pid), "it to be killed")
    assert engine.get("one").wait(20).exit_code == 128 + signal.SIGKILL
    assert list(chain.from_iterable(portions(unknown))) == unknown
    assert client.ask_for_many({"op": "no such"}, [named]) == []
    assert client.ask({"op": "end", "id": "none"}) == {"unknown": True, "copying": False}


def test_a_list_of_all_fits_into_its_messages(tmp_path: Path) -> None:
    """However long what is told of each: an engine that could not read it could not be opened."""
    directory = tmp_path / "keeper"
    directory.mkdir(mode=0o700)
    descriptor = os.open(directory, os.O_RDONLY)
    end = {"code": 127, "signal": False, "time": 1}
    keys = [f"c{number:03}" for number in range(150)]
    Journal(descriptor, "").append(*({"id": key, "executed": False, "why": "w" * 4000, "end": end} for key in keys))
    os.close(descriptor)
    client = KeeperClient(str(directory))
    with client.connection(begin=True):
        pass
    found = [""]
    while (answer := client.ask({"op": "list", "after": found[-1]}) or {})["more"]:
        found += [each["id"] for each in answer["containers"]]
    found += [each["id"] for each in answer["containers"]]
    assert found == ["", *keys]
    assert len(client.ask_for_many({"op": "end"}, [{"id": key} for key in keys])) == len(keys)
    client.close()


def test_many_ends_are_told_with_their_codes(engine: Engine, tmp_path: Path) -> None:
    """They come together, one of a program that never ran, and some leave an orphan, which is ended as well."""
    go = tmp_path / "go"
    script = f"(sleep 1000 & echo $! > {tmp_path}/orphan-NUMBER); until [ -e {go} ]; do sleep 0.01; done; exit NUMBER"
    for number in range(COUNT):
        make(engine, f"c{number}", "sh", "-c", script.replace("NUMBER", str(number))).start()
    go.touch()
    assert [engine.get(f"c{number}").wait(20).exit_code for number in range(COUNT)] == list(range(COUNT))
    orphans = [int((tmp_path / f"orphan-{number}").read_text()) for number in range(COUNT)]
    wait_until(lambda: not any(map(is_running, orphans)), "the orphans to end")
