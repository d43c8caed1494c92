"""Containers with the same log: one of them has it at a time, so that no line is lost or told as another's."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from limpet import Engine, errors
from limpet.engine import Container
from limpet.engine.lifecycle import log_writers
from limpet.schema import ContainerState


def make(engine: Engine, name: str, log_path: str = "same.log", script: str = "sleep 1000") -> Container:
    asked = {"metadata": {"name": name}, "image": {"image": "host"}, "log_path": log_path}
    return engine.create_container({**asked, "command": ["/bin/sh", "-c", f"echo {name}; {script}"]}, "jobs")


def start_if_free(container: Container) -> bool:
    with suppress(errors.InvalidStateError):
        container.start()
        return True
    with pytest.raises(errors.InvalidStateError, match="which runs; stop that one"):
        container.start()
    return container.state is not ContainerState.CREATED


def test_one_at_a_time(state_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other is not started, also by the next engine and in another sandbox, until that one has ended."""
    monkeypatch.setattr(log_writers, "_MOST_ENDED", 0)  # which makes them be looked for each time
    (tmp_path / "logs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "logs")
    with Engine.open(state_dir) as engine:
        for name, directory in (("jobs", "logs"), ("others", "link")):
            engine.create_sandbox({"metadata": {"name": name}, "log_directory": str(tmp_path / directory)}, id=name)
        first, second, apart, silent = (
            make(engine, name, path)
            for name, path in (("first", "same.log"), ("second", "same.log"), ("apart", "apart.log"), ("silent", ""))
        )
        asked = {"metadata": {"name": "far"}, "image": {"image": "host"}, "log_path": "same.log", "command": ["true"]}
        far = engine.create_container(asked, "others")
        for each in (first, apart, silent):
            each.start()
        assert [start_if_free(each) for each in (second, far)] == [False, False]
    with Engine.open(state_dir) as engine:
        first, second, far = (engine.get(each.id) for each in (first, second, far))
        assert [start_if_free(each) for each in (second, far)] == [False, False]
        first.stop(0)
        assert [entry.text for entry in first.read_log()] == [b"first\n"]
        second.start()
        assert not start_if_free(far)
        for name in ("second", "apart", "silent"):
            engine.get(name).stop(0)
        assert start_if_free(far)
        far.wait(20)


def test_at_the_same_moment(state_dir: str) -> None:
    """Of many that are started at once one has the log; what cannot be started, or is gone, keeps nobody from it."""
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        asked = {"metadata": {"name": "lost"}, "image": {"image": "host"}, "log_path": "same.log"}
        with pytest.raises(errors.StartError):
            engine.create_container({**asked, "command": ["/no/such/program"]}, "jobs").start()
        several = [make(engine, f"c{number}") for number in range(6)]
        with ThreadPoolExecutor(6) as pool:
            assert sum(pool.map(start_if_free, several)) == 1
        (running,) = engine.list(state=ContainerState.RUNNING)
        running.stop(0)
        running.release()
        running.delete()
        assert start_if_free(next(each for each in several if each.id != running.id))
        for each in engine.list(state=ContainerState.RUNNING):
            each.stop(0)
