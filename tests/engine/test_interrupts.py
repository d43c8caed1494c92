"""Ctrl-C in the main thread while an engine does a step: once, and twice."""

from collections.abc import Callable

import pytest

from limpet.engine import Engine
from limpet.engine.state.turn import Attempt
from tests.conftest import EngineProcess

SLOW = """
import threading
from limpet.engine.starters.process import ProcessStarter

begun, may_go_on, interrupts = threading.Event(), threading.Event(), threading.Semaphore(0)

def wait():
    begun.set()
    assert may_go_on.wait(60)

class Slow(ProcessStarter):
    def prepare(self, launch):
        prepared = super().prepare(launch)
        wait()
        return prepared

class SlowToMake(ProcessStarter):
    def make_config(self, launch):
        wait()
        return super().make_config(launch)

class SlowToOpen(ProcessStarter):
    def open(self, directory):
        wait()
        super().open(directory)

def on_interrupt(*_):
    interrupts.release()
    raise KeyboardInterrupt

def sleeps():
    with open(f"/proc/self/task/{os.getpid()}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"

def interrupt(times):
    assert begun.wait(60)
    for _ in range(times):
        # Python loses sight of a signal that comes just before a thread begins to wait.
        looks = 0
        while looks < 5:
            looks = looks + 1 if sleeps() else 0
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.acquire(timeout=60)

def interrupt_then_go_on(times):
    interrupt(times)
    may_go_on.set()

signal.signal(signal.SIGINT, on_interrupt)
"""
START = """
engine = Engine.open(state_dir, starter=Slow())
sandbox = engine.create_sandbox({"metadata": {"name": "jobs"}})
config = {"metadata": {"name": "x"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
container = engine.create_container(config, sandbox.id, id="x")
"""


def test_one_interrupt_waits_for_the_step(engine_process: Callable[[str], EngineProcess]) -> None:
    """What was interrupted once is done when the interrupt arrives."""
    script = """
threading.Thread(target=interrupt_then_go_on, args=(1,)).start()
try:
    container.start()
except KeyboardInterrupt:
    say(may_go_on.is_set(), container.state.name)
engine.close()
"""
    assert engine_process(SLOW + START + script).read() == ["True", "RUNNING"]


def test_a_second_interrupt_does_not_wait(engine_process: Callable[[str], EngineProcess]) -> None:
    """The caller goes on at once; the step is done behind it, whole, and others of its container wait for it."""
    script = """
threading.Thread(target=interrupt, args=(2,)).start()
try:
    container.start()
except KeyboardInterrupt:
    say(may_go_on.is_set(), container.state.name)
may_go_on.set()
say(container.stop(0).state.name, bool(container.status.started_at))
engine.close()
"""
    process = engine_process(SLOW + START + script)
    assert process.read() == ["False", "CREATED"]
    assert process.read() == ["EXITED", "True"]


@pytest.mark.parametrize("times", [1, 2])
def test_what_nobody_was_told_of_is_not_made(engine_process: Callable[[str], EngineProcess], times: int) -> None:
    """A create that is interrupted leaves neither a container nor its name taken, also where nobody waits for that."""
    script = f"""
engine = Engine.open(state_dir, starter=SlowToMake())
sandbox = engine.create_sandbox({{"metadata": {{"name": "jobs"}}}})
config = {{"metadata": {{"name": "x"}}, "image": {{"image": "host"}}, "command": ["true"]}}
threading.Thread(target=interrupt_then_go_on, args=({times},)).start()
try:
    engine.create_container(config, sandbox.id)
except KeyboardInterrupt:
    say("interrupted")
deadline = time.monotonic() + 30
while engine.list() and time.monotonic() < deadline:
    time.sleep(0.02)
say(len(engine.list()), os.listdir(state_dir + "/containers"))
engine.create_container(config, sandbox.id, id="x").start()
say(engine.get("x").wait(30).exit_code)
engine.close()
"""
    process = engine_process(SLOW + script)
    assert process.read() == ["interrupted"]
    assert process.read() == ["0", "[]"]
    assert process.read() == ["0"]


def test_what_was_made_when_its_caller_was_interrupted_is_unmade(
    engine_process: Callable[[str], EngineProcess],
) -> None:
    """Sandbox or container: what is cut short is the wait for the fleet, when all is done."""
    script = """
import threading

def wait():
    if threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt

engine = Engine.open(state_dir)
config = {"metadata": {"name": "x"}, "image": {"image": "host"}, "command": ["true"]}
kept = engine.create_sandbox({"metadata": {"name": "kept"}}, id="kept")
for call in (
    lambda: engine.create_sandbox({"metadata": {"name": "jobs"}}),
    lambda: engine.create_container(config, kept),
):
    engine.store.fleet.wait = wait
    try:
        call()
    except KeyboardInterrupt:
        say("interrupted")
say([one.id for one in engine.list_sandboxes()], len(engine.list()))
engine.close()
"""
    process = engine_process(script)
    assert process.read() == ["interrupted"]
    assert process.read() == ["interrupted"]
    assert process.read() == ["['kept']", "0"]


@pytest.mark.parametrize("end", ["os._exit(3)", "engine.close(); os._exit(3)"])
def test_a_program_that_ends_cuts_the_step(
    engine_process: Callable[[str], EngineProcess], state_dir: str, end: str
) -> None:
    """One that closes its engine, or ends, after a second interrupt has not started what nobody wrote down."""
    script = f"""
threading.Thread(target=interrupt, args=(2,)).start()
try:
    container.start()
except KeyboardInterrupt:
    {end}
"""
    assert engine_process(SLOW + START + script).wait() == 3
    with Engine.open(state_dir) as engine:
        assert engine.get("x").state.name == "CREATED"
        assert engine.get("x").start().state.name == "RUNNING"
        engine.get("x").stop(0)


@pytest.mark.parametrize("times", [1, 2])
def test_an_engine_that_nobody_has_is_closed(engine_process: Callable[[str], EngineProcess], times: int) -> None:
    """Interrupted while it opens, once or twice, an engine does not keep its directory locked: the next one waits."""
    script = f"""
threading.Thread(target=interrupt_then_go_on, args=({times},)).start()
try:
    Engine.open(state_dir, starter=SlowToOpen())
except KeyboardInterrupt:
    say("interrupted")
Engine.open(state_dir).close()
say("opened")
"""
    process = engine_process(SLOW + script)
    assert process.read() == ["interrupted"]
    assert process.read() == ["opened"]


@pytest.mark.long
def test_an_engine_whose_descriptors_were_closed_says_nothing_false(
    engine_process: Callable[[str], EngineProcess], state_dir: str
) -> None:
    """As by a host that closes all that it does not know. The next engine knows the end, and the directory is free."""
    script = (
        START.replace("starter=Slow()", "")
        + """
pid = container.start().pid
os.closerange(3, 1000)
os.kill(pid, signal.SIGTERM)
deadline = time.monotonic() + 60
while container.state.name == "RUNNING" and time.monotonic() < deadline:
    time.sleep(0.01)
say(container.state.name)
os._exit(0)
"""
    )
    process = engine_process(script)
    assert process.read() == ["UNKNOWN"]
    assert process.wait() == 0
    with Engine.open(state_dir) as engine:
        assert engine.get("x").wait(60).exit_code == 128 + 15


def test_an_opening_that_is_interrupted_twice_leaves_nothing_open(
    state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time just as what was opened is to be closed: the next opening in the same process finds no lock."""
    discard, calls = Attempt.discard, list[Attempt[Engine]]()

    def interrupt_first(attempt: "Attempt[Engine]") -> None:
        calls.append(attempt)
        if len(calls) == 1:
            raise KeyboardInterrupt
        discard(attempt)

    def open_and_interrupt(attempt: Callable[[float], None], _: float) -> None:
        attempt(0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "discard", interrupt_first)
        patch.setattr("limpet.engine.engine.open_in_parts", open_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            Engine.open(state_dir)
    assert len(calls) == 2
    assert calls[0].opened
    Engine.open(state_dir).close()
