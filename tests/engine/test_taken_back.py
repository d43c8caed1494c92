"""What could not be made is taken back, and its error says why it was not made; no directory is without a record."""

import os
import resource
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import pytest

from limpet.engine import Engine, errors
from limpet.engine.starters import Launch
from limpet.engine.starters.abilities import Holdings
from limpet.engine.starters.process import ProcessStarter
from limpet.schema.metadata import SandboxMetadata
from limpet.schema.sandbox_status import SandboxState
from limpet.schema.status import ContainerState
from limpet.testing import FakeStarter

CONFIG = {"metadata": {"name": "a"}, "image": {"image": "host"}, "command": ["true"]}
POD = {"metadata": {"name": "pod"}}
Mount = Callable[[str], None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mounts something on a new directory in a directory; that is unmounted in the end."""
    places: list[str] = []

    def mount(directory: str) -> None:
        place = os.path.join(directory, "mounted")
        os.mkdir(place)
        places.append(place)
        subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)

    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode != 0:
        pytest.skip("nothing can be mounted here")
    yield mount
    for place in filter(os.path.ismount, places):
        subprocess.run(["umount", place], check=True)


class RefusingContainers(ProcessStarter):
    """Makes no config, once it has done something else."""

    def __init__(self, first: Callable[[str], object]) -> None:
        super().__init__()
        self.first = first
        self.refuses = True

    def make_config(self, launch: Launch) -> bytes:
        self.first(launch.bundle_path)
        if self.refuses:
            raise errors.InvalidInputError("this config is refused")
        return super().make_config(launch)


class RefusingSandboxes(FakeStarter):
    """Makes nothing that a sandbox holds, once it has done something else."""

    def __init__(self, first: Callable[[str], object]) -> None:
        super().__init__()
        self.first = first

    def furnish(self, sandbox: SandboxMetadata, given: Mapping[str, str]) -> Holdings:
        self.first(sandbox.root_dir)
        raise errors.ResourcesError("this sandbox is refused")

    def is_furnished(self, sandbox: SandboxMetadata, namespaces: Mapping[str, str]) -> bool:
        return True

    def holds(self, sandbox_id: str, namespaces: Mapping[str, str]) -> bool:
        return True

    def vacate(self, sandbox_id: str) -> None:
        pass

    def vacate_others(self, find_ids: Callable[[], Collection[str]]) -> None:
        pass


def test_a_container_whose_bundle_has_to_stay_keeps_its_record(state_dir: str, mount: Mount) -> None:
    """The error says why it was refused, not what kept its bundle, which a recovery removes once it can."""
    starter = RefusingContainers(mount)
    with Engine.open(state_dir, starter=starter) as engine:
        bundles = engine.store.directory.join("containers")
        engine.create_sandbox(POD, id="pod")
        with pytest.raises(errors.InvalidInputError, match="this config is refused"):
            engine.create_container(CONFIG, "pod", id="a")
        assert [(one.id, one.state) for one in engine.list()] == [("a", ContainerState.UNKNOWN)]
        engine.recover()
        assert os.listdir(bundles) == ["a"]
        subprocess.run(["umount", os.path.join(bundles, "a", "mounted")], check=True)
        engine.recover()
        assert os.listdir(bundles) == []
        starter.first, starter.refuses = os.path.exists, False
        assert engine.get("a").create().state is ContainerState.CREATED
        assert engine.get("a").remove()


def test_a_container_that_cannot_be_written_down_leaves_no_bundle(
    state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when it is made, and is not any more when it is taken back: record and bundle are gone."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(_: str) -> None:
        wal = os.path.getsize(engine.store.directory.join("store.db-wal"))
        assert wal > 20_000  # there is room for the config
        resource.setrlimit(resource.RLIMIT_FSIZE, (wal, hard))

    def free() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    starter = RefusingContainers(fill)
    starter.refuses = False
    with Engine.open(state_dir, starter=starter) as engine:
        engine.create_sandbox(POD, id="pod")
        delete = engine.store.delete
        monkeypatch.setattr(engine.store, "delete", lambda key: (free(), delete(key))[1])
        try:
            with pytest.raises(errors.StoreError):
                engine.create_container(CONFIG, "pod", id="a")
        finally:
            free()
        assert engine.list() == []
        assert os.listdir(engine.store.directory.join("containers")) == []


def test_a_sandbox_whose_directory_has_to_stay_keeps_its_record(state_dir: str, mount: Mount) -> None:
    """It is NOTREADY and tells why; once nothing is in the way it is deleted as any other."""
    starter = RefusingSandboxes(mount)
    with Engine.open(state_dir, starter=starter) as engine:
        sandboxes = Path(engine.store.directory.join("sandboxes"))
        with pytest.raises(errors.ResourcesError, match="cannot create sandbox pod: this sandbox is refused"):
            engine.create_sandbox(POD, id="pod")
        (pod,) = engine.list_sandboxes()
        assert (pod.id, pod.state) == ("pod", SandboxState.NOTREADY)
        assert "mounted" in pod.status.message
        subprocess.run(["umount", sandboxes / "pod/mounted"], check=True)
        assert pod.delete()
        assert os.listdir(sandboxes) == []


def test_a_sandbox_that_cannot_be_taken_back_tells_why_it_was_not_made(
    state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the store refuses then, too, the error is still that of the making."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    starter = RefusingSandboxes(lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard)))
    with Engine.open(state_dir, starter=starter) as engine:
        try:
            with pytest.raises(errors.ResourcesError, match="this sandbox is refused"):
                engine.create_sandbox(POD, id="pod")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        (pod,) = engine.list_sandboxes()
        assert pod.delete()
