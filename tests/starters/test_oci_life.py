"""A container's whole life under runc and crun: made, held, let go, seen to end, and nothing left of it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet import Engine
from limpet.schema import ContainerState, Reason
from tests.conftest import is_running, read_output
from tests.starters.oci import config, end_everything, load_busybox, open_engine, processes_of, runtime_entries

RUNTIMES = ("runc", "crun")


@pytest.fixture
def engine(state_dir: str, tmp_path: Path) -> Iterator[Engine]:
    with open_engine(state_dir) as opened:
        load_busybox(opened, tmp_path / "image")
        for name in RUNTIMES:
            opened.create_sandbox({"metadata": {"name": name}}, id=name, runtime_handler=name)
        yield opened
        for container in opened.list():
            if container.status.pid:
                container.stop(0)
            container.release()
    end_everything(state_dir)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_whole_life(engine: Engine, state_dir: str, runtime: str) -> None:
    """created, running, exited with its code and output, released: then neither process, entry nor bundle is left."""
    container = engine.create_container(config("one", "echo hello; echo oops >&2; sleep 0.2; exit 7"), runtime)
    assert container.metadata.starter == runtime
    before = time.time_ns()
    status = container.start()
    assert status.state is ContainerState.RUNNING
    processes = processes_of(state_dir, container.id)
    assert processes.init == status.identity
    assert is_running(processes.monitor.pid)
    status = container.wait(20)
    assert (status.exit_code, status.reason) == (7, Reason.ERROR)
    assert before < status.finished_at <= time.time_ns()
    assert sorted(read_output(container, 2)) == ["hello", "oops"]
    container.release()
    container.delete()
    assert runtime_entries(state_dir, runtime) == []
    assert not is_running(processes.monitor.pid)
    assert os.listdir(f"{state_dir}/containers") == []
