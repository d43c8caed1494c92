"""Engines that start a container and are killed: what a recovery begins with."""

from collections.abc import Callable

from limpet.engine import Engine
from tests.conftest import EngineProcess

Start = Callable[[str], EngineProcess]

LIVE = """
engine = Engine.open(state_dir)
sandbox = engine.create_sandbox({"metadata": {"name": "jobs"}})
def make(name, *command):
    return engine.create_container(
        {"metadata": {"name": name}, "image": {"image": "host"}, "command": list(command)}, sandbox.id, id=name)
"""


def start_one(engine_process: Start, *command: str) -> int:
    """Start container "one" in an engine, kill the engine, and return the container's pid."""
    process = engine_process(LIVE + f"c = make('one', *{command!r}); c.start(); say(c.status.pid); time.sleep(999)")
    pid = int(process.read()[0])
    process.kill()
    return pid


def rule_of(engine: Engine, container_id: str = "one") -> str:
    """Return the rule by which the engine's opening judged a container."""
    return next(finding.rule for finding in engine.recovery.findings if finding.id == container_id)
