"""Waiting for the lock of a state directory that another process, or another thread, has open."""

import gc
import math
import signal
import threading
import time
from collections.abc import Callable

import pytest

from limpet import Engine, Store, errors
from tests.conftest import EngineProcess, in_thread

OPENED: tuple[Callable[..., Store | Engine], ...] = (Store.open, Engine.open)


@pytest.mark.parametrize("open_it", OPENED)
def test_the_lock_is_waited_for(
    open_it: Callable[..., Store | Engine], state_dir: str, engine_process: Callable[[str], EngineProcess]
) -> None:
    """Who waits gets the directory as soon as the process that has it is killed; who does not is refused at once."""
    process = engine_process("engine = Engine.open(state_dir); say('open'); time.sleep(999)")
    process.read()
    began = time.monotonic()
    for wait in (0, 0.3):
        with pytest.raises(errors.StateDirectoryLockedError) as raised:
            open_it(state_dir, wait=wait)
        assert raised.value.holder_pid == process.pid
    assert 0.3 <= time.monotonic() - began < 10
    thread, outcome = in_thread(lambda: open_it(state_dir, wait=60))
    time.sleep(0.5)
    assert not outcome
    process.kill()
    thread.join(20)
    (opened,) = outcome
    assert isinstance(opened, Store | Engine)
    opened.close()


@pytest.mark.parametrize("open_it", OPENED)
def test_a_thread_hands_over_to_another(open_it: Callable[..., Store | Engine], state_dir: str) -> None:
    """Within a process, too; and waiting costs next to no processor time."""
    collections: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            collections.append(threading.get_ident())

    with open_it(state_dir):
        thread, outcome = in_thread(lambda: open_it(state_dir, wait=math.inf))
        gc.callbacks.append(note)
        began = time.process_time()
        time.sleep(2)
        took = time.process_time() - began
        gc.callbacks.remove(note)
    thread.join(20)
    (opened,) = outcome
    assert isinstance(opened, Store | Engine)
    opened.close()
    assert took < 1  # what runs beside it in this process takes some, too
    assert collections.count(thread.ident or 0) <= 2  # each takes as long as the whole process has objects


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # what the interrupt comes upon closes itself
@pytest.mark.parametrize("open_it", OPENED)
def test_an_interrupt_ends_the_wait(open_it: Callable[..., Store | Engine], state_dir: str) -> None:
    """Ctrl-C is not held back by a long wait, and leaves the directory to whoever has it."""
    with Store.open(state_dir):
        began = time.monotonic()
        # Late: an interrupt amid the garbage collection of the first try would be lost in a destructor.
        timer = threading.Timer(1.5, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            open_it(state_dir, wait=60)
        timer.join()
        assert time.monotonic() - began < 10
    open_it(state_dir).close()


@pytest.mark.parametrize("wait", [-1, math.nan])
def test_a_wait_that_is_none_is_refused(wait: float, state_dir: str) -> None:
    """What is no time to wait is refused before anything is made."""
    for open_it in OPENED:
        with pytest.raises(errors.InvalidInputError, match="wait"):
            open_it(state_dir, wait=wait)
