"""A copy of a state directory leaves alone what is the original's; a directory that was moved goes on."""

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from limpet.engine import Container, Engine, Store, errors, recover
from limpet.engine.cli import limpet as group
from limpet.engine.inspection import Snapshot
from limpet.engine.state.homes import bring_home
from limpet.recovery import Boot, Observation, Process
from limpet.schema import ContainerState, Reason
from tests.conftest import is_running, wait_until
from tests.engine_lives import rule_of

SLEEP = {"image": {"image": "host"}, "command": ["sleep", "1000"]}


def copy(source: str, target: str) -> str:
    subprocess.run(["cp", "-a", source, target], check=True)
    return target


def start(engine: Engine, name: str = "one") -> int:
    sandbox = engine.create_sandbox({"metadata": {"name": "s"}})
    return engine.create_container({"metadata": {"name": name}, **SLEEP}, sandbox.id, id=name).start().pid


@pytest.fixture
def pid(state_dir: str) -> Iterator[int]:
    """The process of a container that an engine has left behind."""
    with Engine.open(state_dir) as engine:
        pid = start(engine)
    yield pid
    os.kill(pid, 9)


@pytest.fixture
def engine(state_dir: str) -> Iterator[Engine]:
    """An open engine. What it has running is killed at the end."""
    with Engine.open(state_dir) as engine:
        yield engine
        for container in engine.list():
            if container.status.pid:
                os.kill(container.status.pid, 9)


def test_a_copy_leaves_the_originals_container_alone(engine: Engine, state_dir: str) -> None:
    """Unknown, with whose it is; nothing signals it, at any opening; a person's word frees the copy of it."""
    pid = start(engine)
    copied = copy(state_dir, f"{state_dir}.before")
    with Snapshot.open(copied) as snapshot:
        (view,) = snapshot.list()
        assert (view.status.state, view.status.reason) == (ContainerState.UNKNOWN, Reason.COPIED)
    for _ in range(2):
        with Engine.open(copied) as other:
            status = other.get("one").status
            assert (rule_of(other), status.state, status.reason) == ("copied", ContainerState.UNKNOWN, Reason.COPIED)
            assert f"is a copy of {state_dir}" in status.message
            assert "limpet resolve" in status.message
            for step in (other.get("one").stop, other.get("one").release, other.get("one").delete):
                with pytest.raises(errors.InvalidStateError):
                    step()
    with Engine.open(copied) as other:
        assert other.declare_gone("one", "it runs in the original").reason == Reason.DECLARED_GONE
        other.get("one").release()
        other.get("one").delete()
        assert other.list() == []
    assert is_running(pid)
    assert engine.get("one").state is ContainerState.RUNNING
    assert os.path.exists(f"{state_dir}/containers/one/config.json")


@pytest.mark.parametrize("module", ["identity", "owner"])
def test_a_record_that_cannot_be_read_now_is_not_missing(
    engine: Engine, state_dir: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without descriptors, say, a copy was taken for the original, and a database for the one that was last open."""
    pid = start(engine)
    copied = copy(state_dir, f"{state_dir}.copy")

    def refuse(path: str, _limit: int) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    with monkeypatch.context() as patched:
        patched.setattr(f"limpet.engine.state.{module}.find_small_file", refuse)
        with pytest.raises(errors.LimpetError, match=r"Too many open files|no file descriptor"):
            Engine.open(copied)
    with Engine.open(copied) as other:
        assert other.get("one").status.reason == Reason.COPIED

    assert is_running(pid)


def test_a_copy_says_how_the_originals_container_ended_once_it_has(engine: Engine, state_dir: str) -> None:
    """What is Unknown in the copy only because it lives elsewhere is EXITED once it is gone."""
    pid = start(engine)
    copied = copy(state_dir, f"{state_dir}.copy")
    with Engine.open(copied) as other:
        assert other.get("one").state is ContainerState.UNKNOWN
        os.kill(pid, 9)
        engine.get("one").wait(20)
        wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the process to be reaped")
        other.recover()
        assert other.get("one").status.exit_code == 255


@pytest.mark.parametrize("how", ["declared gone", "ended there"])
def test_what_runs_in_the_original_is_restarted_by_no_copy(engine: Engine, state_dir: str, how: str) -> None:
    """A policy is the original's to carry out, whoever says in the copy that the container has ended."""
    sandbox = engine.create_sandbox({"metadata": {"name": "s"}})
    engine.create_container({"metadata": {"name": "one"}, **SLEEP}, sandbox.id, id="one", restart="always").start()
    copied = copy(state_dir, f"{state_dir}.copy")
    with Engine.open(copied) as other:
        if how == "declared gone":
            other.declare_gone("one", "it runs in the original")
        else:
            pid = engine.get("one").status.pid
            os.kill(pid, 9)
            wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the process to be reaped")
            wait_until(lambda: any(found.id != "one" for found in engine.list(state="running")), "the next attempt")
            other.recover()
        assert other.get("one").state is ContainerState.EXITED
        assert other.get("one").status.stop_requested_at
    with Engine.open(copied) as other:
        time.sleep(0.3)  # a restart would be due after a tenth of a second
        assert [container.id for container in other.list()] == ["one"]
    assert len(engine.list(state="running")) == 1


def test_a_directory_that_was_moved_goes_on(pid: int, state_dir: str) -> None:
    """Renamed, then carried to another file system: its containers are its own."""
    renamed = f"{state_dir}.renamed"
    os.rename(state_dir, renamed)
    with Engine.open(renamed) as other:
        assert (rule_of(other), other.get("one").status.pid) == ("survivor", pid)
    away = f"/dev/shm/limpet-moved-{os.getpid()}"
    try:
        subprocess.run(["mv", renamed, away], check=True)
        with Engine.open(away) as other:
            assert (rule_of(other), other.get("one").status.pid) == ("survivor", pid)
    finally:
        shutil.rmtree(away, ignore_errors=True)


def test_the_original_is_found_under_another_name(pid: int, state_dir: str) -> None:
    """Renamed beside the copy, with the copy in its place, it is still the original."""
    copied = copy(state_dir, f"{state_dir}.copy")
    os.rename(state_dir, f"{state_dir}.old")
    os.rename(copied, state_dir)
    with Engine.open(state_dir) as other:
        assert rule_of(other) == "copied"
    with Engine.open(f"{state_dir}.old") as original:
        assert (rule_of(original), original.get("one").status.pid) == ("survivor", pid)


def test_the_original_is_found_by_what_it_runs(pid: int, state_dir: str, tmp_path: Path) -> None:
    """Its parent renamed and copied back, as before an upgrade: no path leads to it, but its keeper lives there."""
    above = tmp_path / "above"
    above.mkdir()
    os.rename(state_dir, above / "state")
    with Engine.open(above / "state") as engine:  # which writes down where it is
        assert engine.get("one").status.pid == pid
    os.rename(above, f"{above}.before")
    copied = copy(f"{above}.before", str(above)) + "/state"
    with Snapshot.open(copied) as snapshot:
        assert snapshot.list()[0].status.reason == Reason.COPIED
    with Engine.open(copied) as other:
        assert rule_of(other) == "copied"
        assert f"{above}.before/state, which looks after it" in other.get("one").status.message
        with pytest.raises(errors.InvalidStateError, match="is a copy"):
            other.get("one").stop(0)
    assert is_running(pid)


@pytest.mark.usefixtures("namespaces")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_the_same_directory_under_two_names_is_no_copy(pid: int, state_dir: str, tmp_path: Path) -> None:
    """Bind-mounted elsewhere it is locked like before, and its containers are its own; a copy of it is a copy."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", "--bind", state_dir, mounted], check=True)
    try:
        with Engine.open(state_dir), pytest.raises(errors.StateDirectoryLockedError):
            Engine.open(mounted)
        with Engine.open(mounted) as other:
            assert (rule_of(other), other.get("one").status.pid) == ("survivor", pid)
        with Engine.open(copy(str(mounted), f"{state_dir}.copy")) as other:
            assert rule_of(other) == "copied"
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_a_kill_before_the_copy_has_an_identity_changes_nothing(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marks are durable first; until the copy is one of its own, each opening finds again that it is a copy."""
    start(engine)
    copied = copy(state_dir, f"{state_dir}.copy")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("limpet.engine.state.directory.settle_identity", fail)
        with pytest.raises(KeyboardInterrupt):
            Store.open(copied)
    shutil.rmtree(f"{copied}/keeper", ignore_errors=True)
    with Engine.open(copied) as other:
        assert rule_of(other) == "copied"


def test_a_runtime_with_processes_of_its_own_is_warned_too(engine: Engine, state_dir: str) -> None:
    """Whatever its probe sees alive, the store of a copy does not call it RUNNING."""
    start(engine)

    class Sees:
        def observe(self, _: object) -> Observation:
            return Observation(boot=Boot.SAME, process=Process.ALIVE)

    with Store.open(copy(state_dir, f"{state_dir}.copy")) as store:
        (finding,) = recover(store, probe=Sees()).findings
        assert (finding.rule, store.status("one").state) == ("copied", ContainerState.UNKNOWN)


def test_what_was_copied_before_it_was_started_runs_in_the_copy(engine: Engine, state_dir: str) -> None:
    """Its working directory is the copy's; the original's bundle stays as it is, and can be started too."""
    config = {"metadata": {"name": "c"}, "image": {"image": "host"}, "command": ["sh", "-c", "pwd > where"]}
    sandbox = engine.create_sandbox({"metadata": {"name": "s"}})
    engine.create_container(config, sandbox.id, id="one")
    copied = copy(state_dir, f"{state_dir}.copy")
    with Engine.open(copied) as other:
        other.get("one").start()
        assert other.get("one").wait(20).exit_code == 0
    assert Path(copied, "containers/one/working/where").read_text().strip() == f"{copied}/containers/one/working"
    assert os.listdir(f"{state_dir}/containers/one/working") == []


def test_a_copy_never_writes_the_originals_logs(engine: Engine, state_dir: str, tmp_path: Path) -> None:
    """A log within the state directory is the copy's own there; one outside is the original's, and is refused."""
    config = {"metadata": {"name": "c"}, "log_path": "c.log", "image": {"image": "host"}, "command": ["echo", "hello"]}
    inside = engine.create_sandbox({"metadata": {"name": "in"}})
    outside = engine.create_sandbox({"metadata": {"name": "out"}, "log_directory": str(tmp_path / "logs")})
    for sandbox in (inside, outside):
        engine.create_container(config, sandbox.id, id=sandbox.metadata.name)
    metadata = engine.get("in").metadata
    home = bring_home(metadata, f"{state_dir}.copy")
    assert home.log_path == f"{state_dir}.copy/sandboxes/{inside.id}/logs/c.log"
    assert home.root_dir == f"{state_dir}.copy/containers/in"
    assert bring_home(engine.get("out").metadata, f"{state_dir}.copy").log_path == f"{tmp_path}/logs/c.log"
    with Engine.open(copy(state_dir, f"{state_dir}.copy")) as other:
        other.get("in").start()
        other.get("in").wait(20)
        with pytest.raises(errors.InvalidStateError, match="create another container"):
            other.get("out").start()
        assert other.get("out").state is ContainerState.CREATED
    assert not os.path.exists(metadata.log_path)
    assert not os.path.exists(engine.get("out").metadata.log_path)


@pytest.mark.parametrize("log_directory", ["", "logs of my own"])
@pytest.mark.parametrize("how", ["moved", "copied"])
def test_logs_are_read_and_written_where_the_directory_is_now(state_dir: str, how: str, log_directory: str) -> None:
    """By the engine and by the commands, with a log directory of the sandbox's own in the state directory, too."""

    def create(engine: Engine, name: str) -> Container:
        hello = {"image": {"image": "host"}, "command": ["echo", "hello"], "log_path": f"{name}.log"}
        return engine.create_container({"metadata": {"name": name}, **hello}, sandbox, id=name)

    with Engine.open(state_dir) as engine:
        own = {"log_directory": f"{state_dir}/{log_directory}"} if log_directory else {}
        sandbox = engine.create_sandbox({"metadata": {"name": "s"}, **own}).id
        for name in ("ended", "created"):
            create(engine, name)
        engine.get("ended").start()
        engine.get("ended").wait(20)
        assert [entry.text for entry in engine.get("ended").read_log()] == [b"hello\n"]
    there = f"{state_dir}.there"
    if how == "moved":
        os.rename(state_dir, there)
    else:
        copy(state_dir, there)
        for name in ("containers", "sandboxes", log_directory or "images"):
            shutil.rmtree(f"{state_dir}/{name}")
    with Engine.open(there) as engine:
        create(engine, "new")
        for name in ("created", "new"):
            engine.get(name).start()
            engine.get(name).wait(20)
        for name in ("ended", "created", "new"):
            assert [entry.text for entry in engine.get(name).read_log()] == [b"hello\n"]
            assert engine.get(name).cri_status().log_path.startswith(f"{there}/")
            said = CliRunner().invoke(group, ["-s", there, "logs", name])
            assert (said.exit_code, said.output) == (0, "hello\n")
            assert state_dir not in CliRunner().invoke(group, ["-s", there, "inspect", name]).output.replace(there, "")
    assert not os.path.exists(f"{state_dir}/{log_directory or 'sandboxes'}")


def test_another_nodes_bundles_are_left_alone(pid: int, state_dir: str) -> None:
    """Opened under another node's name, a state directory keeps what the first node made in it."""
    with Engine.open(state_dir) as engine:
        engine.create_container({"metadata": {"name": "two"}, **SLEEP}, engine.list_sandboxes()[0].id, id="two")
    for path in Path(state_dir, "containers").iterdir():
        os.utime(path, (1, 1))
    with Engine.open(state_dir, node="other") as other:
        assert {orphan.rule for orphan in other.recovery.orphans} <= {"orphan-other-node", "orphan-in-use"}
        assert other.list() == []
    with Engine.open(state_dir) as again:
        states = {each.id: each.state for each in again.list()}
        assert states == {"one": ContainerState.RUNNING, "two": ContainerState.CREATED}
        assert again.get("one").status.pid == pid
