"""A queue: what is put comes out once, everybody who waits is woken, and who waits for so long waits no longer."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count

import pytest

from limpet.recovery.queues import Empty, Queue
from tests.conftest import in_thread

_GETS = 30_000
_THREADS, _ITEMS = 8, 2_000


def test_a_wait_ends_though_its_time_is_over_as_it_begins() -> None:
    """That of SimpleQueue did not, one time in some thousand."""

    def wait_often() -> None:
        for _ in range(_GETS):
            with suppress(Empty):
                Queue[int]().get(timeout=1e-6)

    thread, outcome = in_thread(wait_often)
    thread.join(100)
    assert outcome == [None]


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_each_item_is_taken_once_by_somebody(timeout: float | None) -> None:
    """From many threads, to many: nobody sleeps while something is there."""
    queue = Queue[int]()
    taken: list[list[int]] = [[] for _ in range(_THREADS)]

    def take(mine: list[int]) -> None:
        while (item := queue.get(timeout)) >= 0:
            mine.append(item)

    def put(first: int) -> None:
        for number in range(_ITEMS):
            queue.put(first + number)

    takers = [in_thread(lambda mine=mine: take(mine)) for mine in taken]  # type: ignore[misc]
    for thread, _ in [in_thread(lambda first=first: put(first * _ITEMS)) for first in range(_THREADS)]:  # type: ignore[misc]
        thread.join(60)
    for _ in takers:
        queue.put(-1)
    for thread, outcome in takers:
        thread.join(60)
        assert outcome == [None]
    assert sorted(item for mine in taken for item in mine) == list(range(_THREADS * _ITEMS))
    assert queue.empty()
    assert queue.qsize() == 0


@contextmanager
def called_by_signals(handler: Callable[..., object]) -> Iterator[None]:
    """Have a signal handler called all the time, also amid itself."""
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_a_signal_handler_may_put_amid_a_get() -> None:
    """It is the thread that waits that runs it."""
    queue, numbers = Queue[int](), count()
    with called_by_signals(lambda *_: queue.put(next(numbers))):
        got = [queue.get(timeout=20) for _ in range(_ITEMS)]
    while not queue.empty():
        got.append(queue.get_nowait())
    assert sorted(got) == list(range(next(numbers)))


def test_none_is_waited_for_where_there_is_time() -> None:
    """Empty is not raised before its time, nor for an item that comes in it."""
    queue = Queue[str]()
    began = time.monotonic()
    with pytest.raises(Empty):
        queue.get(timeout=0.05)
    assert time.monotonic() - began >= 0.05
    with pytest.raises(Empty):
        queue.get_nowait()
    with pytest.raises(Empty):
        queue.get(timeout=0)
    timer = threading.Timer(0.05, queue.put, ("late",))
    timer.start()
    assert queue.get(timeout=float("inf")) == "late"
    timer.join()
