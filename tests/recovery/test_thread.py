"""A thread that has too little memory to begin is told, and does nothing later."""

import logging
import subprocess
import sys
import threading
import time

import pytest

from limpet.recovery import thread
from limpet.recovery.thread import Thread, go_on
from limpet.schema.telling import get_log


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


def test_a_thread_that_runs_when_it_is_to_be_given_up_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait has failed, but the thread came first: it is not refused, and nobody waits for its end."""
    monkeypatch.setattr(thread, "_BEGIN_SECONDS", 0.05)
    over, runs, may_end = threading.Event(), threading.Event(), threading.Event()

    class LastMoment(thread._Started):
        def set(self) -> None:
            assert over.wait(20)
            super().set()

        def wait(self, timeout: float | None = None) -> bool:
            try:
                return super().wait(timeout)
            except RuntimeError:
                over.set()
                assert runs.wait(20)
                raise

    def work() -> None:
        runs.set()
        may_end.wait(20)

    one = Thread(target=work, name="limpet-test")
    monkeypatch.setattr(one, "_started", LastMoment())
    starter = threading.Thread(target=one.start, daemon=True)
    starter.start()
    starter.join(10)
    assert over.is_set()
    assert not starter.is_alive()
    may_end.set()
    one.join(20)


def test_a_thread_that_has_begun_is_started_however_late_it_runs() -> None:
    """It has told that it is there, and then waits for a processor."""
    done: list[int] = []

    class Slow(Thread):
        def run(self) -> None:
            time.sleep(0.1)
            super().run()

    one = Slow(target=done.append, name="limpet-test", args=(1,))
    one.start()
    one.join(20)
    assert done == [1]


def test_no_program_waits_for_it() -> None:
    """As for a look at a disk that hangs."""
    program = "import time; from limpet.recovery.thread import Thread; Thread(time.sleep, 'one', (1000,)).start()"
    assert subprocess.run([sys.executable, "-c", program], timeout=20, check=False).returncode == 0


def test_nothing_ends_a_loop_but_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a turn raises, or the look at whether it is over, or the log of that: the next turn comes."""

    class Log(logging.LoggerAdapter[logging.Logger]):
        def error(self, *args: object, **more: object) -> None:
            told.append((args[1], type(more["exc_info"])))
            if len(told) == 1:
                raise MemoryError

    def turn() -> None:
        turns.append(None)
        if failures:
            raise failures.pop()

    def is_over() -> bool:
        looks.append(None)
        if len(looks) == 2:
            raise MemoryError
        return not failures and len(turns) > 3

    monkeypatch.setattr(thread, "_PAUSE_SECONDS", 0)
    failures: list[BaseException] = [KeyboardInterrupt(), SystemExit(3), ValueError("x")]
    turns, looks, told = list[None](), list[None](), list[tuple[object, type]]()
    begun: list[int] = []
    go_on(turn, lambda: begun.append(len(turns)), is_over, Log(logging.getLogger("test"), {}), "it")
    assert len(turns) == 4
    assert begun == [1, 2, 3]  # before each turn that comes after a failure
    kinds = [ValueError, MemoryError, SystemExit, KeyboardInterrupt]
    assert [kind for _, kind in told] == kinds
    assert {who for who, _ in told} == {"it"}


def test_a_loop_begins_anew_until_that_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """No turn comes before: it would rely on what the one that failed has half done."""

    def turn() -> None:
        done.append("turn")
        if len(done) == 1:
            raise MemoryError

    def begin_anew() -> None:
        done.append("anew")
        if done.count("anew") < 3:
            raise MemoryError

    monkeypatch.setattr(thread, "_PAUSE_SECONDS", 0)
    done: list[str] = []
    go_on(turn, begin_anew, lambda: done.count("turn") == 2, get_log("limpet.test"), "it")
    assert done == ["turn", "anew", "anew", "anew", "turn"]
