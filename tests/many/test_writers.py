"""Many who would write: of those who race one opens; who was stopped is overtaken for good; forks change nothing."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.engine import Store
from limpet.schema.errors import LimpetError, StateDirectoryLockedError, StoreError
from tests.conftest import DEADLINE_SECONDS, wait_until
from tests.records import RUNNING, metadata, sandbox

ROOT = Path(__file__).parents[2]
PRELUDE = """
import os, signal, sys, threading, time
from msgspec.structs import replace
from limpet.engine import Engine, Store
from limpet.schema.errors import *
from tests.records import RUNNING
state_dir = sys.argv[1]
def say(*words): os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one piece, whoever else writes
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(state_dir: str) -> Iterator["Start"]:
    """Starts a program on the state directory, which is filled with containers a, b, c and d that run."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        for name in "abcd":
            store.add(metadata(name), RUNNING)
    started: list[subprocess.Popen[str]] = []

    def run(script: str, stdout: int = subprocess.PIPE) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", PRELUDE + script, state_dir]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=stdout, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


CONTENDER = """
import random
while True:
    try:
        store = Store.open(state_dir)
        break
    except StateDirectoryLockedError as error:
        say("refused", error.holder_pid)
        time.sleep(random.random() / 50)
say("opened", os.getpid())
while True:
    said = store.update("a", lambda old: replace(old, exit_code=old.exit_code + 1))
    say("counted", os.getpid(), said.exit_code)
"""


def test_of_many_that_race_one_opens(start: "Start", state_dir: str) -> None:
    """Each time the holder is killed, one of all who wait gets in; what they count together is counted once."""
    read, write = os.pipe()
    contenders = {process.pid: process for process in [start(CONTENDER, stdout=write) for _ in range(10)]}
    os.close(write)
    pids = set(contenders)
    holders: list[int] = []
    counts: list[int] = []
    with os.fdopen(read) as lines:
        for line in lines:  # it ends when the last contender has been killed
            verb, pid, *rest = line.split()
            if verb == "refused":
                assert pid == "None" or int(pid) in pids, line
            elif verb == "opened":
                assert not contenders.keys() & set(holders), f"{pid} opened it while {holders[-1]} had it open"
                holders.append(int(pid))
            else:
                assert int(pid) == holders[-1], f"{pid} counted while {holders[-1]} had it open"
                counts.append(int(rest[0]))
                if int(pid) in contenders and len(counts) % 20 == 0:
                    contenders.pop(int(pid)).kill()
    assert sorted(holders) == sorted(pids)
    assert all(earlier < later for earlier, later in itertools.pairwise(counts)), counts
    with Store.open(state_dir) as store:
        (found,) = (one.record.status.exit_code for one in store.unsettled() if one.record.id == "a")
    # A kill may hit between a commit and its line, once for each of them.
    assert counts[-1] <= found <= counts[-1] + 1
    assert len(counts) >= found - len(pids)


LOADED = """
store = Store.open(state_dir)
def count(name):
    for number in range(1_000_000):
        try:
            store.update(name, lambda old: replace(old, exit_code=old.exit_code + 1))
        except StoreError as error:
            say("refused", name, type(error).__name__)
            return
        say("counted", name, number + 1)
for name in "abc": threading.Thread(target=count, args=name).start()
"""


@pytest.mark.parametrize("turn", range(6))
def test_who_was_stopped_is_overtaken_for_good(
    start: "Start", state_dir: str, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine is stopped amid its commits and its lock file removed: once another has opened, it writes no more."""
    monkeypatch.setattr("limpet.engine.database.sqlite.connection.BUSY_TIMEOUT_SECONDS", 0.1)
    old = start(LOADED)
    counted = dict.fromkeys("abc", 0)

    def listen() -> str:
        verb, name, rest = old.stdout.readline().split()  # type: ignore[union-attr]
        if verb == "counted":
            counted[name] = int(rest)
        return rest

    while min(counted.values()) < 10 + 7 * turn:
        listen()
    old.send_signal(signal.SIGSTOP)
    _wait_until_stopped(old.pid)
    os.unlink(f"{state_dir}/lock")
    store = _overtake(state_dir, old, listen)
    with store:
        found = {name: store.status(name).exit_code for name in "abc"}
        store.checkpoint("d", replace(RUNNING, pid=8))
        old.send_signal(signal.SIGCONT)
        refusals = []  # type: ignore[var-annotated]
        while len(refusals) < 3:
            said = listen()
            if not said.isdigit():
                refusals.append(said)
        assert refusals == ["StoreFencedError"] * 3
        assert old.wait(DEADLINE_SECONDS) == 0
        for name, count in counted.items():
            assert found[name] == count, f"{name}: {count} acknowledged, {found[name]} found when it was overtaken"
        store.checkpoint("d", replace(RUNNING, pid=9))
    with Store.open(state_dir) as again:
        statuses = {one.record.id: one.record.status for one in again.unsettled()}
        assert {name: statuses[name].exit_code for name in "abc"} == found
        assert statuses["d"].pid == 9


def _wait_until_stopped(pid: int) -> None:
    wait_until(lambda: re.search(r"\) T ", Path(f"/proc/{pid}/stat").read_text()), f"{pid} to stop")


def _overtake(state_dir: str, old: "subprocess.Popen[str]", go_on: Callable[[], object]) -> Store:
    """Open the store; that is refused while the stopped one is amid a commit, and it must go on to its end."""
    deadline = time.monotonic() + 3 * DEADLINE_SECONDS  # SQLite itself waits ten seconds for some locks
    while True:
        try:
            return Store.open(state_dir)
        except StoreError:
            assert time.monotonic() < deadline
            old.send_signal(signal.SIGCONT)
            go_on()
            old.send_signal(signal.SIGSTOP)
            _wait_until_stopped(old.pid)


FORKING = """
engine = Engine.open(state_dir)
store = engine.store
def count(name):
    while True:
        said = store.update(name, lambda old: replace(old, exit_code=old.exit_code + 1))
        say("counted", name, said.exit_code)
for name in "abc": threading.Thread(target=count, args=name, daemon=True).start()
config = {"metadata": {"name": "x"}, "image": {"image": "host"}, "command": ["true"]}
calls = [
    lambda: store.get("a"), store.list, lambda: store.checkpoint("a", RUNNING), lambda: store.delete("a"),
    lambda: store.transaction().__enter__(), lambda: store.back_up(state_dir + ".db"), store.list_sandboxes,
    engine.list, engine.recover, lambda: engine.get("a"), lambda: engine.create_container(config, "s"),
]
def live_as_child(turn):
    for number, call in enumerate(calls):
        try:
            call()
        except ClosedError:
            continue
        except BaseException as error:
            say("wrong", number, type(error).__name__)
        else:
            say("wrong", number, "worked")
    if turn % 2: engine.close()
    if turn % 3: os._exit(0)
    sys.exit(0)  # with all that Python does at its end
for turn in range(40):
    child = os.fork()
    if not child:
        live_as_child(turn)
    _, status = os.waitpid(child, 0)
    say("forked", turn, status)
stays = os.fork()
if not stays:
    time.sleep(600)
say("stays", stays, 0)
time.sleep(600)
"""


@pytest.mark.long
def test_forks_amid_commits(start: "Start", state_dir: str) -> None:
    """A fork of an engine under load refuses each call, ends however it likes, and keeps nobody from opening later."""
    process = start(FORKING)
    counted = dict.fromkeys("abc", 0)
    forks = stays = 0
    while not stays:
        verb, what, value = process.stdout.readline().split()  # type: ignore[union-attr]
        assert verb != "wrong", (what, value)
        if verb == "counted":
            counted[what] = int(value)
        elif verb == "forked":
            assert value == "0", f"fork {what} ended with wait status {value}"
            forks += 1
        else:
            stays = int(what)
    try:
        process.kill()
        process.wait()
        wait_until(lambda: _can_be_opened(state_dir), "the newest fork to give up the lock")
        with Store.open(state_dir) as store:
            found = {one.record.id: one.record.status.exit_code for one in store.unsettled()}
    finally:
        os.kill(stays, signal.SIGKILL)
    assert forks == 40
    assert all(counted[name] <= found[name] for name in "abc"), (counted, found)


def _can_be_opened(state_dir: str) -> bool:
    """Say whether the lock is free: a fork gives it up when it first runs, which may be after its parent was killed."""
    try:
        Store.open(state_dir).close()
    except StateDirectoryLockedError:
        return False
    return True


def test_a_fork_may_open_what_its_parent_closed(state_dir: str) -> None:
    """A program that daemonizes: closed before the fork, opened after it, and its parent may not have it meanwhile."""
    Store.open(state_dir).close()
    said, say = os.pipe()
    end, ends = os.pipe()
    child = os.fork()
    if not child:
        os.close(ends)
        with Store.open(state_dir):
            os.write(say, b"open")
            os.read(end, 1)
        os._exit(0)
    os.close(end)
    assert os.read(said, 4) == b"open"
    with pytest.raises(LimpetError, match=str(child)):
        Store.open(state_dir)
    os.close(ends)
    assert os.waitpid(child, 0)[1] == 0
    Store.open(state_dir).close()
    os.close(said)
    os.close(say)
