"""What the keeper sees of a start does not depend on when it gets a processor, or is stopped."""

import pytest

from limpet.engine import Engine
from limpet.schema import ContainerState, Reason
from tests.starters.host import make

CLIENT = "limpet.engine.starters.process.client"
SEES_LATE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from keeper import gate, main, starts

become_user, read_stat = gate.become_user, starts.read_stat

def become_late(*args):
    time.sleep(0.05)
    become_user(*args)

def read_slowly(pid):
    stat = read_stat(pid)
    if stat is not None and not stat.has_executed:
        time.sleep(0.3)
    return stat

gate.become_user, starts.read_stat = become_late, read_slowly
main.main()
"""


def test_a_program_that_runs_and_ends_while_the_keeper_looks_has_run(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper is stopped, or waits for a processor, right after it saw that the gate is still a gate."""
    monkeypatch.setattr(f"{CLIENT}._PROGRAM", SEES_LATE)
    container = make(engine, "one", "sh", "-c", "exit 4")
    container.start()
    status = container.wait(20)
    assert (status.state, status.exit_code, status.reason) == (ContainerState.EXITED, 4, Reason.ERROR)
