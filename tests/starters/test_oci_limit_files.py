"""A change of an OCI container's limits that fails half way: those from before are in force, or what is, is named."""

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from limpet import Engine, errors
from limpet.engine import Container
from limpet.engine.starters.oci import OciStarter, limit_files
from limpet.engine.starters.oci.cgroups import list_directories
from limpet.engine.starters.oci.limit_files import forget_limits, keep_limits, put_back
from limpet.engine.starters.oci.run_directory import RunDirectory, list_runs
from limpet.engine.starters.oci.tools import Tools
from limpet.schema.cri import LinuxContainerResources
from tests.conftest import EngineProcess, wait_until
from tests.starters.oci import RUNTIMES, config, end_everything, load_busybox, processes_of

FILLS = "busybox dd if=/dev/zero of=/dev/shm/x bs=1M count=32; echo done; exec sleep 1000"
ASKED = LinuxContainerResources(
    cpu_shares=99, cpu_quota=50_000, cpu_period=50_000, cpuset_cpus="0", memory_limit_in_bytes=4 << 20
)
"""The kernel refuses the last of these: there is more in use."""
NAMES = {
    *("cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cpuset.cpus", "memory.limit_in_bytes"),
    *("cpu.weight", "cpu.max", "memory.max"),
}


def read_limits(state_dir: str, container: Container) -> dict[str, str]:
    """What the container's cgroups say of its limits, by path."""
    processes = processes_of(state_dir, container.id)
    found: dict[str, str] = {}
    for _, directory in list_directories(processes.cgroups, Path(processes.cgroup).name):
        found |= {str(path): path.read_text() for path in Path(directory).iterdir() if path.name in NAMES}
    return found


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_the_kernel_refuses_changes_nothing(shared: Engine, runtime: str) -> None:
    """Nor one of the limits that the runtime sets before it; runc leaves what nobody had ever set."""
    state_dir = shared.store.directory.path
    container = shared.create_container(config(f"full-{runtime}", FILLS), runtime)
    container.start()
    wait_until(lambda: any(entry.text == b"done\n" for entry in container.read_log()), "the memory to be used")
    before = read_limits(state_dir, container)
    assert len(before) >= 3
    with pytest.raises(errors.InvalidInputError, match=r"cannot be changed: .*; those from before are in force$"):
        container.change_limits(ASKED)
    assert read_limits(state_dir, container) == before
    assert container.status.resources is None
    container.change_limits(LinuxContainerResources(cpu_shares=99, memory_limit_in_bytes=64 << 20))
    assert read_limits(state_dir, container) != before
    (run,) = list_runs(os.path.join(state_dir, "containers", container.id))
    assert not run.has("limits-before.json")
    container.stop(0)


SETS_ONE = """for word; do [ "$word" = update ] && what=update; last=$word; done
if [ "$what" = update ] && [ -e {directory}/does ]; then
    for file in /sys/fs/cgroup/cpu/limpet/*-$last/cpu.shares /sys/fs/cgroup/limpet/*-$last/cpu.weight; do
        [ ! -e $file ] || echo 77 > $file
    done
    touch {directory}/begun
    . {directory}/does
fi
exec {runc} "$@"
"""
"""A runtime whose `update` sets one limit, and then does what a file says."""


@pytest.fixture
def half(tmp_path: Path, state_dir: str) -> "Sequence[Path]":
    """Such a runtime, and the file."""
    script = tmp_path / "runc"
    script.write_text("#!/bin/sh\n" + SETS_ONE.format(directory=tmp_path, runc=Tools().find("runc").path))
    script.chmod(0o755)
    return script, tmp_path / "does"


def test_a_runtime_that_hangs_or_fails_half_way(state_dir: str, tmp_path: Path, half: Sequence[Path]) -> None:
    """It is killed at its deadline, and what it has set is put back; so it is where the engine does not outlive it."""
    script, does = half
    runtimes = {"runc": OciStarter(str(script), timeout=2)}
    name = f"half{os.getpid()}"
    try:
        with Engine.open(state_dir, runtimes=runtimes) as engine:
            load_busybox(engine, tmp_path / "image")
            engine.create_sandbox({"metadata": {"name": "a"}}, id="a", runtime_handler="runc")
            one = engine.create_container(config(name, command=["/bin/sleep", "1000"]), "a", id=name)
            one.start()
            before = read_limits(state_dir, one)
            for what in ("sleep 1000", "exit 3", "kill -KILL $$"):
                does.write_text(what)
                with pytest.raises(errors.InvalidInputError, match=r"those from before are in force$"):
                    one.change_limits(LinuxContainerResources(cpu_shares=99))
                assert (read_limits(state_dir, one), one.status.resources) == (before, None)
        does.write_text("sleep 1000")
        (tmp_path / "begun").unlink()
        process = EngineProcess(
            state_dir,
            f"""
from limpet.engine.starters.oci import OciStarter
from limpet.schema.cri import LinuxContainerResources
engine = Engine.open(state_dir, runtimes={{"runc": OciStarter({str(script)!r})}})
say("open")
engine.get({name!r}).change_limits(LinuxContainerResources(cpu_shares=99))
""",
        )
        assert process.read() == ["open"]
        wait_until((tmp_path / "begun").exists, "the runtime to have set a limit")
        process.kill()
        does.write_text("exit 3")
        with Engine.open(state_dir, runtimes=runtimes) as engine:
            one = engine.get(name)
            wait_until(lambda: read_limits(state_dir, one) == before, "the limits from before")
            assert one.status.resources is None
            one.stop(0)
            one.release()
    finally:
        end_everything(state_dir)


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup of version 2 as files."""
    directory = tmp_path / "cgroup"
    directory.mkdir()
    texts = {"cpu.max": "max 100000\n", "cpuset.cpus": "\n", "pids.max": "max\n", "cgroup.procs": "1\n"}
    for name, text in texts.items():
        (directory / name).write_text(text)
    monkeypatch.setattr(limit_files, "list_directories", lambda *_: [("", str(directory))])
    return directory


def test_what_is_kept_is_put_back(tmp_path: Path, cgroup: Path) -> None:
    """Limits alone, with those that are asked for by their files' names; of an older change first."""
    run = RunDirectory(str(tmp_path))
    kept = keep_limits(run, (), "", ["pids.max"])
    assert kept == {str(cgroup / name): (cgroup / name).read_text() for name in ("cpu.max", "cpuset.cpus", "pids.max")}
    for name in ("cpu.max", "cpuset.cpus", "pids.max", "cgroup.procs"):
        (cgroup / name).write_text("7\n")
    assert keep_limits(run, (), "", ["pids.max"]) == kept
    assert put_back(kept) == {}
    assert [(cgroup / name).read_text() for name in ("cpu.max", "cpuset.cpus", "pids.max", "cgroup.procs")] == [
        *("max 100000\n", "\n", "max\n", "7\n"),
    ]
    (cgroup / "cpu.max").unlink()  # the container has ended
    assert put_back(kept) == {}
    forget_limits(run)
    forget_limits(run)
    assert keep_limits(run, (), "", []) == {str(cgroup / "cpuset.cpus"): "\n"}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', "\udcff"])
def test_a_damaged_file_is_none(tmp_path: Path, cgroup: Path, text: str) -> None:
    """As after a power cut: what is in force now is kept."""
    run = RunDirectory(str(tmp_path))
    Path(run.join("limits-before.json")).write_bytes(text.encode(errors="surrogateescape"))
    assert keep_limits(run, (), "", ["pids.max"])[str(cgroup / "pids.max")] == "max\n"


def test_nothing_else_is_written_in(tmp_path: Path, cgroup: Path) -> None:
    """Whatever the file says: who can write in the state directory writes nowhere else by it."""
    run, other = RunDirectory(str(tmp_path)), tmp_path / "other"
    other.write_text("mine")
    limits = {str(other): "yours", str(cgroup / "cgroup.procs"): "2", str(cgroup / "cpu.max"): "5 5\n"}
    Path(run.join("limits-before.json")).write_text(json.dumps(limits))
    assert keep_limits(run, (), "", []) == {str(cgroup / "cpu.max"): "5 5\n"}


def test_what_cannot_be_put_back_is_named(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is in force instead, as where more memory is in use by now than there was room for."""
    kept = {str(cgroup / "cpu.max"): "9 9\n", str(cgroup / "pids.max"): "5\n"}
    real = open

    def refuse(path: str, mode: str = "r", **options: str) -> object:
        if mode == "w" and path.endswith("cpu.max"):
            raise OSError(errno.EBUSY, "busy")
        return real(path, mode, **options)  # type: ignore[call-overload]

    monkeypatch.setattr("builtins.open", refuse)
    assert put_back(kept) == {str(cgroup / "cpu.max"): "max 100000\n"}
    assert (cgroup / "pids.max").read_text() == "5\n"
