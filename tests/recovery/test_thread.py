"""A thread that has too little memory to begin is told, and does nothing later."""

import threading
import time

import pytest

from limpet.recovery import thread
from limpet.recovery.thread import Thread


def test_a_thread_that_does_not_begin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python's own waits for without an end is a RuntimeError; one that begins late, after all, does nothing."""
    monkeypatch.setattr(thread, "_BEGIN_SECONDS", 0.05)
    begin = threading.Thread._bootstrap  # type: ignore[attr-defined]
    late = threading.Event()
    over = threading.Event()

    def bootstrap(self: threading.Thread) -> None:
        late.wait(20)
        begin(self)
        over.set()

    monkeypatch.setattr(threading.Thread, "_bootstrap", bootstrap)
    done: list[int] = []
    with pytest.raises(RuntimeError, match="does not begin"):
        Thread(target=done.append, name="limpet-test", args=(1,)).start()
    late.set()
    assert over.wait(20)
    assert done == []
    one = Thread(target=done.append, name="limpet-test", args=(2,))
    one.start()
    one.join(20)
    assert done == [2]
    assert not one.is_alive()


def test_a_thread_that_begins_at_the_last_moment_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes first decides, so that it never both runs and is refused."""
    monkeypatch.setattr(thread, "_BEGIN_SECONDS", 0.0)
    done: list[int] = []
    refused = 0
    for number in range(200):
        one = Thread(target=done.append, name="limpet-test", args=(number,))
        try:
            one.start()
        except RuntimeError:
            refused += 1
    deadline = time.monotonic() + 20
    while any(each.name == "limpet-test" for each in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(done) + refused == 200
    assert len(set(done)) == len(done)
