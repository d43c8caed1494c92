"""A disk that is full, or read-only: each step says so, with what to do, and nothing is lost once that is over."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from limpet.engine import Engine, errors
from limpet.engine.inspection.snapshot import Snapshot
from limpet.schema.status import ContainerState

HOST = {"image": {"image": "host"}, "command": ["sleep", "1000"]}


def config(name: str) -> dict[str, object]:
    return {"metadata": {"name": name}, **HOST}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with few inodes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m,nr_inodes=200", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("nothing can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)  # its keeper ends a moment later


def take_inodes(disk: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        for number in range(1000):
            (disk / f"taken-{number}").touch()


def take_space(disk: Path) -> None:
    with (disk / "taken-all").open("wb") as file, pytest.raises(OSError, match="No space"):
        while True:
            os.write(file.fileno(), bytes(4096))


def free(disk: Path) -> None:
    for path in disk.glob("taken-*"):
        path.unlink()


@pytest.mark.parametrize("take", [take_inodes, take_space])
def test_each_step_tells_that_the_disk_is_full(disk: Path, take: Callable[[Path], None]) -> None:
    """What is to be made is refused with the reason and a cure, and leaves no directory; what runs goes on."""
    state = str(disk / "state")
    with Engine.open(state) as engine:
        pod = engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod")
        runs = engine.create_container(config("runs"), pod, id="runs")
        runs.start()
        made = engine.create_container(config("made"), pod, id="made")
        take(disk)
        try:
            for make in (
                lambda: engine.create_sandbox({"metadata": {"name": "two"}}),
                lambda: engine.create_container(config("more"), pod),
            ):
                with pytest.raises(errors.DiskFullError, match=r"free some space.*, then call again$"):
                    make()
            with pytest.raises(errors.DiskFullError, match="free some space"):
                Engine.open(str(disk / "other"))
            assert (runs.state, made.state) == (ContainerState.RUNNING, ContainerState.CREATED)
        finally:
            free(disk)
        assert pod in engine.list_sandboxes()
        assert {"runs", "made"} <= {one.id for one in engine.list()}  # one that could not be taken back is there, too
        assert sorted(os.listdir(f"{state}/containers")) == ["made", "runs"]
        for each in engine.list_sandboxes():
            assert each.remove(force=True, timeout=0)
    with Engine.open(state) as engine:
        assert (engine.list(), engine.list_sandboxes(), engine.recovery.orphans) == ([], [], ())


def test_many_that_fail_alike_are_told_once(disk: Path) -> None:
    """What the store refuses for each of many containers is not repeated for each."""
    with Engine.open(str(disk / "state")) as engine:
        pod = engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod")
        for number in range(20):
            engine.create_container(config(f"c{number}"), pod)
        pod.stop(0)
        take_space(disk)
        with pytest.raises(errors.InvalidStateError, match="20 of its containers were not removed") as raised:
            while True:  # until the WAL is full, too
                pod.remove(force=True, timeout=0)
        assert str(raised.value).count("free some space") == 1
        free(disk)
        assert pod.remove(force=True, timeout=0)


def test_a_read_only_disk_is_told_as_one(disk: Path) -> None:
    """It is no matter of rights: what was made is read, and an opening says that the file system is read-only."""
    state = str(disk / "state")
    with Engine.open(state) as engine:
        engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod")
    subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
    for path in (state, str(disk / "other")):
        with pytest.raises(errors.StateDirectoryError, match=r"the file system is read-only: .* mount it writable$"):
            Engine.open(path)
    with Snapshot.open(state) as snapshot:
        assert list(snapshot.sandbox_ids) == ["pod"]
    subprocess.run(["mount", "-o", "remount,bind,rw", disk], check=True)
    with Engine.open(state) as engine:
        assert [one.id for one in engine.list_sandboxes()] == ["pod"]
