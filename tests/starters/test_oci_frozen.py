"""Containers that somebody else has frozen, by their own cgroup or one above it: what is said of them is true."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet import Engine, errors
from limpet.engine import Container, Sandbox
from limpet.schema.status import ContainerState
from tests.conftest import wait_until
from tests.starters.oci import RUNTIMES, config, processes_of

ROOT = Path("/sys/fs/cgroup")


def set_frozen(cgroup: str, is_wanted: bool) -> None:
    """Freeze a cgroup, or thaw it, as another program would, and wait until it is."""
    if (ROOT / "freezer").is_dir():
        state, word = ROOT / "freezer" / cgroup / "freezer.state", "FROZEN" if is_wanted else "THAWED"
        wait_until(lambda: state.write_text(word) and state.read_text().strip() == word, "the freezer")
        return
    (ROOT / cgroup / "cgroup.freeze").write_text("1" if is_wanted else "0")
    events = ROOT / cgroup / "cgroup.events"
    wait_until(lambda: f"frozen {int(is_wanted)}" in events.read_text(), "the cgroup to be as it was told")


@pytest.fixture(params=RUNTIMES)
def sandbox(shared: Engine, request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A sandbox with a cgroup of its own, which is thawed and removed afterwards."""
    name = f"frozen-{request.param}-{os.getpid()}"
    linux = {"cgroup_parent": f"/{name}"}
    made = shared.create_sandbox({"metadata": {"name": name}, "linux": linux}, runtime_handler=request.param, id=name)
    yield made
    set_frozen(name, False)
    for container in shared.list():
        if container.sandbox_id == name:
            if container.status.pid:
                container.stop(0)
            container.release()
            container.delete()
    made.remove()
    for directory in (*ROOT.glob(f"*/{name}"), *ROOT.glob(name)):
        directory.rmdir()


def start(engine: Engine, sandbox: Sandbox, name: str) -> Container:
    container = engine.create_container(config(name, command=["/bin/sleep", "1000"]), sandbox)
    container.start()
    return container


def test_a_cgroup_above_is_frozen(shared: Engine, sandbox: Sandbox) -> None:
    """It runs, and is not paused; nothing can begin in it, which is said at once, and by which cgroup."""
    container = start(shared, sandbox, "one")
    set_frozen(sandbox.id, True)
    assert (container.state, container.is_frozen()) == (ContainerState.RUNNING, False)
    for ask in (container.execute, container.open_command):
        with pytest.raises(errors.InvalidStateError, match=rf"by the cgroup .*/{sandbox.id}.; thaw that first"):
            ask(["true"])
    with pytest.raises(errors.StartError, match=rf"the cgroup '.*/{sandbox.id}' is frozen"):
        start(shared, sandbox, "two")
    container.begin_stop(0)
    set_frozen(sandbox.id, False)
    assert container.wait(20).exit_code == 137


def test_a_pause_outlives_what_is_above(shared: Engine, sandbox: Sandbox) -> None:
    """It holds when somebody thaws the cgroup above, and ends when it is resumed."""
    container = start(shared, sandbox, "one")
    set_frozen(sandbox.id, True)
    assert container.pause().paused
    set_frozen(sandbox.id, False)
    assert container.is_frozen()
    container.resume()
    assert container.execute(["true"]).code == 0


def test_its_own_cgroup_is_frozen(shared: Engine, sandbox: Sandbox) -> None:
    """By somebody else: it can be resumed."""
    container = start(shared, sandbox, "one")
    set_frozen(processes_of(shared.store.directory.path, container.id).cgroup.strip("/"), True)
    assert container.is_frozen()
    with pytest.raises(errors.InvalidStateError, match="resume it first"):
        container.execute(["true"])
    container.resume()
    assert container.execute(["true"]).code == 0
