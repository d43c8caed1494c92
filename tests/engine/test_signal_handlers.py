"""A signal handler of the host program, or a finalizer, may call limpet itself, whatever call it has interrupted."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from msgspec.structs import replace

from limpet import AsyncEngine, Engine, Snapshot
from limpet.schema.errors import InvalidInputError, InvalidStateError
from tests.conftest import EngineProcess, in_thread

CONFIG = {"metadata": {"name": "c"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
LIFE = """
import faulthandler
from limpet.schema.errors import LimpetError
from msgspec.structs import replace

def config(name, *command):
    return {"metadata": {"name": name}, "image": {"image": "host"}, "command": command}

faulthandler.dump_traceback_later(50, exit=True)  # one that hangs is told, not waited for
engine = Engine.open(state_dir)
store = engine.store
engine.create_sandbox({"metadata": {"name": "a"}}, id="sb")
ids = [engine.create_container(config(name, "sleep", "1000"), "sb", id=name).id for name in "abc"]
engine.get("a").start()
handled = 0

def call():
    # Anything that a handler may ask for, in turn.
    match handled % 6:
        case 0: assert store.status("a").started_at and engine.list()
        case 1: store.update("b", lambda old: replace(old, message=str(handled)))
        case 2: engine.create_container(config(f"h{handled}", "true"), "sb", id=f"h{handled}").start()
        case 3: engine.get("c").stop(0)
        case 4: engine.get("a").stop(0)
        case 5:
            for one in engine.list():
                if one.id.startswith("h"):
                    one.remove(force=True)

def handle(*_):
    global handled
    call()
    handled += 1
    signal.setitimer(signal.ITIMER_REAL, 0.0017)  # not before: handlers of handlers have no end

signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.001)
"""

FINALIZERS = """
import sys

signal.setitimer(signal.ITIMER_REAL, 0)
signal.signal(signal.SIGALRM, signal.SIG_DFL)
written = 0

def is_amid_a_query(frame):
    return frame.f_code.co_name in {"fetch_all", "_load_revision"}

def is_amid_a_look(frame):
    return "/store/" in frame.f_code.co_filename and store._memory.view._is_held_here()

def finalizer(what, is_amid):
    # What garbage collection would do amid a read, at the first call of that kind there.
    def finalize(frame, event, _):
        global written
        if event == what and is_amid(frame):
            sys.setprofile(None)
            write(written)
            written += 1

    return finalize
"""


def test_whatever_a_handler_asks_for_it_gets(engine_process: Callable[[str], EngineProcess]) -> None:
    """A call that is interrupted goes on after the handler: whatever it holds then is not needed by the handler."""
    script = """
    turn = 0
    while handled < 60:
        turn += 1
        store.status("b"), store.get("c"), store.get_sandbox("sb"), engine.list(), store.history("a")
        store.update("c", lambda old: replace(old, message=str(turn)))
        store.put("kind", "key", turn)
        one = engine.create_container(config(f"m{turn}", "true"), "sb", id=f"m{turn}")
        one.start()
        one.wait(60)
        one.remove()
    signal.setitimer(signal.ITIMER_REAL, 0)
    say(store.status("a").state, store.status("c").message == str(turn), store.find("kind", "key").value == turn)
    """
    process = engine_process(LIFE + dedent(script))
    assert process.read() == ["EXITED", "True", "True"]


def test_an_engine_is_closed_by_a_handler(engine_process: Callable[[str], EngineProcess]) -> None:
    """The call that was interrupted says that it is closed."""
    script = """
    signal.signal(signal.SIGALRM, lambda *_: (engine.close(), say("closed")))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        while True:
            store.update("b", lambda old: replace(old, message="more"))
    except LimpetError as error:
        say(type(error).__name__)
    """
    process = engine_process(LIFE + dedent(script))
    assert process.read() == ["closed"]
    assert process.read() == ["ClosedError"]


def test_an_engine_asked_within_a_transaction_says_that_it_would_wait_for_itself(engine: Engine) -> None:
    """The main thread holds the store, and waits for the step that needs it."""
    engine.create_sandbox({"metadata": {"name": "a"}}, id="sb")
    container = engine.create_container(CONFIG, "sb", id="c")
    with pytest.raises(InvalidStateError, match="within a transaction"), engine.store.transaction():
        container.start()
    with pytest.raises(InvalidStateError, match="within a transaction"):
        engine.store.update("c", lambda old: replace(old, message=container.start().message))
    with engine.store.transaction() as draft:
        draft.update("c", lambda old: replace(old, message="sound"))
    assert container.start().message == ""


def test_a_task_that_asks_the_engine_within_a_transaction_is_told_so(tmp_path: Path) -> None:
    """The worker thread that does it waits for the task's own turn."""

    async def ask() -> str:
        async with AsyncEngine.open(str(tmp_path / "state")) as engine:
            await engine.create_sandbox({"metadata": {"name": "a"}}, id="sb")
            with pytest.raises(InvalidStateError, match="within a transaction"):
                async with engine.store.transaction():
                    await asyncio.wait_for(engine.create_container(CONFIG, "sb", id="c"), 30)
            return (await engine.create_container(CONFIG, "sb", id="c")).id

    assert asyncio.run(ask()) == "c"


def test_what_is_no_text_is_told_by_its_type(engine: Engine) -> None:
    """Its repr is somebody else's code, and may ask the very store that it is to be looked up in."""
    engine.create_sandbox({"metadata": {"name": "a"}}, id="sb")
    container = engine.create_container(CONFIG, "sb", id="c")

    def ask() -> None:
        wrong: Any
        snapshot = Snapshot.open(engine.store.directory.path)
        finds = (engine.get, engine.get_sandbox, snapshot.get, snapshot.sandbox)
        for wrong in (container, engine, None, 5, b"c", ["c"], {"c": 1}):
            for look in (*finds, engine.store.status, engine.store.metadata, engine.history):
                with pytest.raises(InvalidInputError, match="as text, not "):
                    look(wrong)
            for change in (engine.store.delete, engine.store.delete_sandbox):
                with pytest.raises(InvalidInputError, match="as text, not "):
                    change(wrong)
        snapshot.close()

    thread, outcome = in_thread(ask)
    thread.join(30)
    assert outcome == [None]


def test_what_a_finalizer_asks_for_amid_a_read_it_gets(engine_process: Callable[[str], EngineProcess]) -> None:
    """Python collects garbage amid anything: here, at the first call that is made while the database is read."""
    script = """
    import threading

    def write(number):
        is_amid.set()
        is_held.wait()
        store.update("b", lambda old: replace(old, message=str(number)))
        store.put("kind", "key", number)
        assert store.history("a") and store._records.load_events(0, 100).rows
        one = engine.create_container(config(f"f{number}", "true"), "sb", id=f"f{number}")
        one.start()
        one.wait(60)

    def read_in_a_transaction():
        # What the finalizer waits for, and reads itself.
        with store.transaction() as draft:
            is_held.set()
            is_amid.wait()
            draft.update("c", lambda old: replace(old, message=str(len(store.history("c")))))

    is_amid, is_held = threading.Event(), threading.Event()
    finalize = finalizer("c_call", is_amid_a_query)
    looks = [
        lambda: store.history("a"), lambda: store.list_items("kind"), lambda: store.last_report(),
        lambda: store._records.load_events(0, 100),
    ]
    for look in looks:
        is_amid.clear(), is_held.clear()
        threading.Thread(target=read_in_a_transaction).start()
        before = written
        sys.setprofile(finalize)
        look()
        sys.setprofile(None)
        say(written > before)
    say(all(engine.get(f"f{number}").wait(60).finished_at for number in range(written)))
    """
    process = engine_process(LIFE + FINALIZERS + dedent(script))
    assert [process.read() for _ in range(5)] == [["True"]] * 5


def test_a_finalizer_amid_a_look_at_memory_lets_others_write(engine_process: Callable[[str], EngineProcess]) -> None:
    """What it asks for comes after what others are writing, who need what the look holds; the look is made again."""
    script = """
    import threading

    def keep_writing():
        while not is_over:
            store.update("b", lambda old: replace(old, message="w"))

    def write(number):
        with store.transaction() as draft:
            draft.update("b", lambda old: replace(old, message=str(number)))
        one = engine.create_container(config(f"f{number}", "true"), "sb", id=f"f{number}")
        one.start()
        one.wait(60)

    finalize, is_over = finalizer("call", is_amid_a_look), False
    threads = [threading.Thread(target=keep_writing, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    looks = [
        lambda: store.list(), lambda: store.list(name="f1"), lambda: store.get("a"), lambda: store.list_sandboxes(),
        lambda: store.status("b").message, lambda: store.unsettled(), lambda: store.recent_events(1, 5),
    ]
    for look in looks * 3:
        before = written
        sys.setprofile(finalize)
        found = look()
        sys.setprofile(None)
        if look is looks[0] and written > before:
            assert f"f{before}" in [one.id for one in found], "it was part old, part new"
    is_over = True
    for thread in threads:
        thread.join()
    say(written > 10)
    say(all(engine.get(f"f{number}").status.finished_at for number in range(written)))
    """
    process = engine_process(LIFE + FINALIZERS + dedent(script))
    assert [process.read() for _ in range(2)] == [["True"]] * 2


TIMEOUTS = """
import faulthandler, os, random, signal, sys, time
from limpet import Engine, errors

faulthandler.dump_traceback_later(50, exit=True)
state_dir, left, got, told = sys.argv[1], 0, 0, []
may_raise = False

def handle(*_):
    global may_raise, left
    if may_raise:
        may_raise, left = False, left + 1
        raise TimeoutError("the caller's own")

signal.signal(signal.SIGALRM, handle)

def within(seconds, call):
    global may_raise, got
    before = left
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        may_raise = True
        try:
            return call()
        finally:
            may_raise = False
    except TimeoutError as error:
        got += str(error) == "the caller's own"
    except errors.LimpetError as error:
        if left > before:
            told.append(f"{type(error).__name__}: {error}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)

chance = random.Random(1)
Engine.open(state_dir).close()
for number in range(12):
    engine = within(chance.uniform(0.001, 0.03), lambda: Engine.open(state_dir)) or Engine.open(state_dir, wait=20)
    within(chance.uniform(0.001, 0.01), lambda: engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs"))
    config = {"metadata": {"name": "a"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
    within(chance.uniform(0.001, 0.01), lambda: engine.create_container(config, "jobs", id="a"))
    for container in engine.list():
        within(chance.uniform(0.001, 0.01), container.start)
        for _ in range(3):
            within(chance.uniform(0.0001, 0.005), lambda: container.stop(0))
    within(chance.uniform(0.0001, 0.01), lambda: engine.get("a").remove(force=True, timeout=0))
    within(chance.uniform(0.0001, 0.005), engine.close)
    engine.close()
print(left, got, told, flush=True)
"""


def test_what_a_handler_raises_comes_to_the_caller(tmp_path: Path) -> None:
    """A deadline by SIGALRM raises TimeoutError, an OSError: it is neither kept nor told as an error of the disk.

    But for one that comes amid what Python calls by itself, as a finalizer: that is lost with any exception.
    """
    command = [sys.executable, "-c", TIMEOUTS, str(tmp_path / "state")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    raised, got, told = done.stdout.split(maxsplit=2)
    assert told.strip() == "[]", done.stderr
    assert int(raised) > 10
    assert int(got) >= 0.8 * int(raised), done.stderr
