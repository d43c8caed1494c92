"""The stop signal: everybody gets it once and has the grace, and a stop that was decided is finished."""

import signal
import sys
import time
from pathlib import Path

from limpet import Engine
from limpet.schema import ContainerState, Reason
from tests.conftest import in_thread, wait_until
from tests.output import read_output
from tests.starters.host import make
from tests.starters.keepers import Start


def test_stop_gives_all_processes_the_grace(engine: Engine, tmp_path: Path) -> None:
    """A shell before a server: both get the signal, the server has its time, and what is left is killed after it."""
    script = f"(trap 'sleep 0.3; touch {tmp_path}/done; exit' TERM; echo up; while :; do sleep 0.05; done) & wait"
    container = make(engine, "one", "sh", "-c", script, log_path="one.log")
    container.start()
    read_output(container.metadata.log_path, "up\n")
    began = time.monotonic()
    assert container.stop(10).exit_code == 128 + signal.SIGTERM
    assert (tmp_path / "done").exists()
    assert time.monotonic() - began < 8


COUNTS = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN + 3})
print("up", flush=True)
signal.sigwait({signal.SIGRTMIN + 3})
more = 0
while signal.sigtimedwait({signal.SIGRTMIN + 3}, 0.3):
    more += 1
os._exit(1 + more)
"""
"""Tells how often it was signalled: signals of this kind are queued, and none swallows another."""


def test_the_stop_signal_comes_once(engine: Engine) -> None:
    """A second one may mean something else to a program: to end at once, and not in good order."""
    container = make(engine, "one", sys.executable, "-S", "-c", COUNTS, log_path="one.log", stop_signal="SIGRTMINPLUS3")
    container.start()
    read_output(container.metadata.log_path, "up\n")
    assert container.stop(10).exit_code == 1


HOPS = """
import os, time
for _ in range(8):
    if not os.fork():
        while True:
            time.sleep(0.0005)
            if os.fork():
                os._exit(0)
open("up", "x").close()
time.sleep(1000)
"""
"""Eight processes, each of which goes on as its own child, again and again."""


def test_the_stop_signal_misses_nobody_who_forks_and_ends(engine: Engine) -> None:
    """The signal goes to the group at once: none passes it by as a child that has just been forked."""
    container = make(engine, "hops", sys.executable, "-S", "-c", HOPS)
    container.start()
    wait_until(Path(container.metadata.root_dir, "working", "up").exists, "them to go")
    begun = time.monotonic()
    assert container.stop(30).exit_code == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 15


def test_a_second_stop_hurries_the_first(engine: Engine) -> None:
    """stop(0) beside stop(60): the container is killed at once, and both return."""
    container = make(engine, "one", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done", log_path="one.log")
    container.start()
    read_output(container.metadata.log_path, "up\n")
    thread, outcome = in_thread(lambda: container.stop(60))
    wait_until(lambda: container.status.stop_requested_at, "the first stop")
    assert container.stop(0).exit_code == 128 + signal.SIGKILL
    thread.join(20)
    assert not thread.is_alive()
    assert outcome[0] == container.status


def test_a_stop_is_finished_by_the_next_engine(engine_process: Start, state_dir: str) -> None:
    """It is written before the first signal; the engine is killed in its grace: the next one kills when it is over."""
    process = engine_process(
        "engine = Engine.open(state_dir); s = engine.create_sandbox({'metadata': {'name': 'p'}})\n"
        "c = engine.create_container({'metadata': {'name': 'n'}, 'image': {'image': 'host'},\n"
        "  'command': ['sh', '-c', \"trap '' TERM; touch up; while :; do sleep 1; done\"]}, s.id, id='one')\n"
        "c.start()\nwhile not os.path.exists(c.metadata.root_dir + '/working/up'): time.sleep(0.01)\n"
        "import threading; threading.Thread(target=c.stop, args=(1.5,)).start()\n"
        "while not c.status.stop_requested_at: time.sleep(0.01)\n"
        "say('stopping'); time.sleep(99)"
    )
    process.read()
    process.kill()
    with Engine.open(state_dir) as engine:
        container = engine.get("one")
        assert (container.state, container.status.reason) == (ContainerState.RUNNING, Reason.STOPPING)
        assert container.wait(20).exit_code == 128 + signal.SIGKILL
