"""A signal handler that raises, at every place where Python runs one: nobody waits for ever, nothing is left taken."""

import queue
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from types import FrameType, ModuleType

import pytest

from limpet.engine import Engine, errors
from limpet.engine.lifecycle import runtime
from limpet.engine.store import commit
from limpet.engine.store.commit import Committer, Request
from tests.conftest import DEADLINE_SECONDS, in_thread, wait_until


class InterruptError(Exception):
    """What the signal handler raises."""


class InterruptAt:
    """A profile function that raises at the n-th place of these modules where Python would run a signal handler.

    Such a place is the beginning of a function, or the end of a call. `struck` says whether there were so many.
    """

    def __init__(self, number: int, *modules: ModuleType) -> None:
        self._left, self._files = number, {module.__file__ for module in modules}
        self.struck = False

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event in {"call", "c_return"} and frame.f_code.co_filename in self._files:
            self._left -= 1
            if self._left < 0:
                self.struck = True
                sys.setprofile(None)
                raise InterruptError


def interrupted(call: Callable[[], object], interrupt: InterruptAt) -> object:
    """Return what `call` does, or "interrupted"."""
    try:
        sys.setprofile(interrupt)
        return call()
    except InterruptError:
        return "interrupted"
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("first", ["leads", "follows"])
def test_of_a_commit(first: str) -> None:
    """Interrupted while it commits, or waits for who does: the other gets its outcome, and both may call again."""

    def try_at(number: int) -> bool:
        interrupt = InterruptAt(number, commit, threading, queue)
        committer = Committer(commit_at_once)
        begun = threading.Event()

        def lead() -> str:
            begun.set()
            wait_until(lambda: committer._queue or interrupt.struck, "the other caller")
            return "done"

        def follow(call: Callable[[], object]) -> object:
            wait_until(lambda: begun.is_set() or interrupt.struck, "the first caller")
            return call()

        def run(change: Callable[[], object]) -> object:
            return committer.run(Request(change))

        def run_interrupted(change: Callable[[], object]) -> object:
            outcome = interrupted(lambda: run(change), interrupt)
            assert run(lambda: "again") == "again"
            return outcome

        if first == "leads":
            callers = [in_thread(lambda: run_interrupted(lead)), in_thread(lambda: follow(lambda: run(lambda: "done")))]
        else:
            callers = [in_thread(lambda: follow(lambda: run_interrupted(lambda: "done"))), in_thread(lambda: run(lead))]
        for (thread, outcome), possible in zip(callers, ({"done", "interrupted"}, {"done"}), strict=True):
            thread.join(DEADLINE_SECONDS)
            assert not thread.is_alive(), f"interrupted at place {number}, it waits for ever"
            assert outcome[0] in possible
        committer.close()
        return interrupt.struck

    assert next(number for number in count() if not try_at(number)) > 10


def commit_at_once(requests: Sequence[Request]) -> None:
    for request in requests:
        request.result = request.apply()


def test_of_a_wait(engine: Engine) -> None:
    """Interrupted while it waits for a container: the next one that ends is noticed."""
    sandbox = engine.create_sandbox({"metadata": {"name": "pod"}}).id

    def start(name: str, *command: str) -> str:
        config = {"metadata": {"name": name}, "image": {"image": "host"}, "command": list(command)}
        container = engine.create_container(config, sandbox, id=name)
        container.start()
        return container.id

    lasting = start("lasting", "sleep", "1000")

    def try_at(number: int) -> bool:
        interrupt = InterruptAt(number, runtime, threading, queue)
        with suppress(errors.WaitTimeoutError):  # it was not struck
            interrupted(lambda: engine.get(lasting).wait(0.001), interrupt)
        thread, outcome = in_thread(
            lambda: engine.get(start(f"next-{number}", "true")).wait(DEADLINE_SECONDS).exit_code
        )
        thread.join(2 * DEADLINE_SECONDS)
        assert outcome == [0]
        return interrupt.struck

    assert next(number for number in count() if not try_at(number)) > 5
