"""The thread that sees ends: whatever fails in it, each end is written down and told, and who is to be killed is."""

import pytest

from limpet import Engine
from limpet.engine.lifecycle.watcher import Watcher
from limpet.schema import ContainerState
from tests.failures import Failing
from tests.starters.host import make

PARTS = ("_notice", "_ask", "_attend", "_record", "_end_rest", "_finish", "_kill", "_is_still_of", "_leave_monitor")
MOST = 14
"""So many calls of these there are, at least, until a container has ended and another was killed."""


def test_a_failure_of_its_own_loses_no_end_and_no_kill(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of memory, say, before or after anything that it does: that is done then, once more if it was done."""

    engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
    monkeypatch.setattr("limpet.recovery.thread._PAUSE_SECONDS", 0)
    for number in range(2 * MOST):
        at = number // 2 + 1
        failing = Failing({at}, is_after=bool(number % 2))
        brief = make(engine, f"brief{number}", "sh", "-c", "exit 3")
        stubborn = make(engine, f"stubborn{number}", "sh", "-c", "trap '' TERM; while :; do sleep 0.01; done")
        stubborn.start()
        with monkeypatch.context() as patched:
            for part in PARTS:
                patched.setattr(Watcher, part, failing(getattr(Watcher, part)))
            brief.start()
            assert brief.wait(20).exit_code == 3
            assert stubborn.stop(0.05).state is ContainerState.EXITED
        assert failing.calls >= at
        for one in (brief, stubborn):
            one.remove()
