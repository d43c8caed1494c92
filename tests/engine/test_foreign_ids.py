"""Ids of other runtimes: taken as they are, and never a path."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from limpet.engine import Engine
from limpet.schema import ContainerState
from tests.conftest import EngineProcess, read_output

IDS = ["ns/pod", "unit@x.service", "docker://4f5e/../../..", "..", "%41", "\u732b" * 256]


@pytest.mark.parametrize("foreign", IDS)
def test_a_whole_life_after_a_kill(
    foreign: str, state_dir: str, engine_process: Callable[[str], EngineProcess]
) -> None:
    """It runs, its engine is killed, the next one finds it, and what is released leaves no file behind."""
    life = engine_process(f"""
foreign = {foreign!r}
engine = Engine.open(state_dir)
engine.create_sandbox({{"metadata": {{"name": "pod"}}}}, id=foreign)
linux = {{"resources": {{"memory_limit_in_bytes": 1 << 28}}}}
config = {{"metadata": {{"name": "one"}}, "image": {{"image": "host"}}, "linux": linux, "log_path": "one.log"}}
config["command"] = ["sh", "-c", "echo here; sleep 1000"]
engine.create_container(config, foreign, id=foreign).start()
say("ready")
sys.stdin.read()
""")
    assert life.read() == ["ready"]
    life.kill()
    outside = set(os.listdir(Path(state_dir).parent))
    with Engine.open(state_dir) as engine:
        (container,) = engine.list()
        assert (container.id, container.state) == (foreign, ContainerState.RUNNING)
        assert engine.recovery.orphans == ()
        assert read_output(container, 1) == ["here"]
        assert os.listdir(f"{state_dir}/containers") == [os.path.basename(container.metadata.root_dir)]
        container.stop(0)
        container.release()
        assert os.listdir(f"{state_dir}/containers") == []
        container.delete()
        engine.get_sandbox(foreign).delete()
        assert engine.recover().orphans == ()
        assert os.listdir(f"{state_dir}/sandboxes") == []
    assert set(os.listdir(Path(state_dir).parent)) == outside
