"""Waits for an end: their time, the close of the engine, tasks, and Ctrl-C."""

import asyncio
import os
import signal
import threading
import time

import pytest

from limpet import Engine, errors
from limpet.schema import ContainerState
from tests.conftest import in_thread
from tests.starters.host import make
from tests.starters.keepers import Start


def test_wait_tells_that_its_time_is_over_and_that_the_engine_is_closed(engine: Engine) -> None:
    """WaitTimeoutError is a TimeoutError and a LimpetError; closing wakes who waits, with ClosedError."""
    container = make(engine, "one", "sleep", "1000")
    container.start()
    with pytest.raises(errors.WaitTimeoutError) as told:
        container.wait(0.05)
    assert isinstance(told.value, TimeoutError)
    threads = [in_thread(container.wait) for _ in range(3)]
    time.sleep(0.1)
    pid = container.status.pid
    engine.close()
    for thread, outcome in threads:
        thread.join(20)
        assert isinstance(outcome[0], errors.ClosedError)
    os.kill(pid, signal.SIGKILL)


def test_tasks_wait_without_a_thread(engine: Engine) -> None:
    """Fifty tasks wait for fifty containers in one thread; a wait that is too short, or cancelled, tells so."""
    containers = [make(engine, f"c{n}", "sh", "-c", f"sleep 0.2; exit {n}") for n in range(50)]
    for container in containers:
        container.start()

    async def wait_for_all() -> list[int]:
        threads = threading.active_count()
        with pytest.raises(errors.WaitTimeoutError):
            await containers[-1].wait_async(0)
        began = time.monotonic()
        ended = await asyncio.gather(*(container.wait_async(30) for container in containers))
        assert time.monotonic() - began < 20, "an end wakes who waits for it"
        assert threading.active_count() <= threads
        return [status.exit_code for status in ended]

    assert asyncio.run(wait_for_all()) == list(range(50))


def test_ctrl_c_cuts_no_step_in_two(engine_process: Start, state_dir: str) -> None:
    """SIGINT at random moments of start and stop: what is told is true, and the next start works."""
    process = engine_process(
        "import random, threading\n"
        "engine = Engine.open(state_dir); s = engine.create_sandbox({'metadata': {'name': 'p'}})\n"
        "config = {'image': {'image': 'host'}, 'command': ['sleep', '1000']}\n"
        "for name in 'ab':  # how long it takes here, with a keeper: or a busy machine cuts all off before the create\n"
        "  began = time.monotonic()\n"
        "  c = engine.create_container(config | {'metadata': {'name': name}}, s.id); c.start(); c.stop(1)\n"
        "took = time.monotonic() - began\n"
        "def strike(): time.sleep(random.random() * took); os.kill(os.getpid(), signal.SIGINT)\n"
        "fds = len(os.listdir('/proc/self/fd')); told = []\n"
        "for n in range(60):\n"
        "  t = threading.Thread(target=strike)\n"
        "  try:\n"
        "    t.start()\n"
        "    c = engine.create_container({'metadata': {'name': f'c{n}'}, 'image': {'image': 'host'},\n"
        "      'command': ['sleep', '1000']}, s.id, id=f'c{n}'); c.start(); c.stop(1)\n"
        "  except KeyboardInterrupt: pass\n"
        "  while t.is_alive():\n"
        "    try: t.join()\n"
        "    except KeyboardInterrupt: pass\n"
        "for c in engine.list():\n"
        "  if c.state.name == 'CREATED': c.start()\n"
        "  c.stop(5); told.append(c.status.exit_code)\n"
        "say(len(told), sorted(set(told)), len(os.listdir('/proc/self/fd')) - fds < 12)\n"
    )
    words = process.read()
    assert int(words[0]) > 2
    assert words[1:] in (["[137,", "143]", "True"], ["[143]", "True"])
    assert process.wait() == 0
    with Engine.open(state_dir) as engine:
        assert {one.state for one in engine.list()} <= {ContainerState.EXITED, ContainerState.UNKNOWN}
