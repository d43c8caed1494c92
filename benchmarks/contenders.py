"""What makes a status durable: limpet, the least that the disk takes, and files. `databases` has the others.

Each contender keeps one small status for each of `count` containers in a directory of its own, replaces one with
each call, durably, from any number of threads, and says afterwards, from what is on disk, what it has kept.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import msgspec
from msgspec.structs import replace

from limpet.engine.state.durable import sync_directory, write_file
from limpet.engine.store import Store
from limpet.schema.cri import ContainerConfig, parse_container_config, parse_pod_sandbox_config
from limpet.schema.decoders import make_decoder
from limpet.schema.errors import LimpetError
from limpet.schema.image import ImageManifest, ImageName
from limpet.schema.metadata import Metadata, SandboxMetadata
from limpet.schema.status import Status

_status = make_decoder(Status)
RUNNING = Status(created_at=1795475261936558660, started_at=1795475261936558661, pid=4711)
ENDED = replace(RUNNING, pid=0, finished_at=1795475261936558662, reason="Completed")
BLOCK_BYTES = 512
_SANDBOX = "bench"
_ROWS_AT_ONCE = 5000
_STATUS_FILE = "status"


class UnavailableError(LimpetError):
    """This cannot be tried here; the message says why."""


class Contender(ABC):
    """One way to keep state. `turn` is a number that grows with each checkpoint of a container."""

    label: ClassVar[str]
    caveat: ClassVar[str] = ""
    """What it does not promise, though the others do."""
    package: ClassVar[str] = ""
    """What must be installed for it; limpet does not need it."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    @abstractmethod
    def open(self, count: int) -> None:
        """Keep `count` containers, and be ready."""

    @abstractmethod
    def checkpoint(self, number: int, turn: int) -> None:
        """Make a status of container `number` that names `turn` durable."""

    @abstractmethod
    def close(self) -> None:
        """Close what is open."""

    @abstractmethod
    def read_back(self, numbers: Iterable[int]) -> dict[int, int]:
        """After `close`: return the turn that is on disk for each of these containers."""


def container_id(number: int) -> str:
    """Return an id as long as real ones are, in no order that a tree would like."""
    return f"{(number * 0x9E3779B97F4A7C15) % (1 << 64):016x}{number:048x}"


def fill_store(store: Store, count: int, status: Status) -> None:
    """Add `count` containers with this status."""
    config = parse_pod_sandbox_config({"metadata": {"name": _SANDBOX, "uid": "0", "namespace": "bench"}})
    store.add_sandbox(SandboxMetadata(id=_SANDBOX, name=_SANDBOX, config=config, created_at=1))
    for start in range(0, count, _ROWS_AT_ONCE):
        with store.transaction() as draft:
            for number in range(start, min(start + _ROWS_AT_ONCE, count)):
                draft.add(_make_metadata(number), status)


def _make_metadata(number: int) -> Metadata:
    name = f"container-{number}"
    config: ContainerConfig = parse_container_config(
        {"metadata": {"name": name}, "image": {"image": "host"}, "command": ["sleep", "1000"], "labels": {"app": "x"}}
    )
    manifest = ImageManifest(name=ImageName("host"))
    return Metadata(id=container_id(number), name=name, sandbox_id=_SANDBOX, config=config, image_manifest=manifest)


class Limpet(Contender):
    """limpet's store through its public API, every guard on."""

    label = "limpet"

    @property
    def state_dir(self) -> str:
        """The store's state directory."""
        return f"{self.directory}/state"

    def open(self, count: int) -> None:
        """Make a store."""
        self.store = Store.open(self.state_dir)
        fill_store(self.store, count, RUNNING)

    def checkpoint(self, number: int, turn: int) -> None:
        """Call `Store.checkpoint`."""
        self.store.checkpoint(container_id(number), replace(RUNNING, pid=turn))

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def read_back(self, numbers: Iterable[int]) -> dict[int, int]:
        """Open the store again and ask it."""
        with Store.open(self.state_dir) as store:
            return {number: store.status(container_id(number)).pid for number in numbers}


class LimpetPopulation(Limpet):
    """limpet's store with a population that is there already: of ended containers, behind the few that run."""

    def __init__(self, state_dir: str, running: int) -> None:
        super().__init__(state_dir)
        self._running = running

    @property
    def state_dir(self) -> str:
        """The population's."""
        return self.directory

    def open(self, count: int) -> None:
        """Open the store; it has `count` containers."""
        self.store = Store.open(self.state_dir)
        assert len(self.store) == count, f"{len(self.store)} containers, not {count}"

    def checkpoint(self, number: int, turn: int) -> None:
        """Change how a container ended: it must stay one that has."""
        self.store.checkpoint(container_id(self._running + number), replace(ENDED, exit_code=turn))

    def read_back(self, numbers: Iterable[int]) -> dict[int, int]:
        """Open the store again and ask it."""
        with Store.open(self.state_dir) as store:
            return {number: store.status(container_id(self._running + number)).exit_code for number in numbers}


class OneFlush(Contender):
    """The least that is durable: a block written into an existing file, and a flush, by one writer."""

    label = "512 bytes + fdatasync"

    def open(self, count: int) -> None:
        """Make a file that is filled already, so that nothing but data is flushed."""
        self._file = os.open(f"{self.directory}/blocks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.pwrite(self._file, bytes(BLOCK_BYTES * count), 0)
        os.fsync(self._file)
        sync_directory(self.directory)

    def checkpoint(self, number: int, turn: int) -> None:
        """Write a block and flush it."""
        os.pwrite(self._file, turn.to_bytes(8, "little").ljust(BLOCK_BYTES, b"x"), number * BLOCK_BYTES)
        os.fdatasync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def read_back(self, numbers: Iterable[int]) -> dict[int, int]:
        """Read the blocks."""
        with open(f"{self.directory}/blocks", "rb") as file:
            blocks = file.read()
        return {
            number: int.from_bytes(blocks[number * BLOCK_BYTES : number * BLOCK_BYTES + 8], "little")
            for number in numbers
        }


class FilePerContainer(Contender):
    """A directory for each container with its status in it, as containerd has them.

    A status is replaced by a temporary file, flush, rename, flush of the directory.
    """

    label = "file per container"

    def open(self, count: int) -> None:
        """Make the files."""
        for number in range(count):
            make_status_file(self.directory, container_id(number), RUNNING)
        os.sync()

    def checkpoint(self, number: int, turn: int) -> None:
        """Replace one file."""
        write_file(self._path(number), msgspec.json.encode(replace(RUNNING, pid=turn)))

    def close(self) -> None:
        """Nothing is open."""

    def read_back(self, numbers: Iterable[int]) -> dict[int, int]:
        """Read the files."""
        return {number: read_status(self._path(number)).pid for number in numbers}

    def _path(self, number: int) -> str:
        return f"{self.directory}/{container_id(number)}/{_STATUS_FILE}"


class FileWithoutDirectoryFlush(FilePerContainer):
    """The same, as most write it: the rename is atomic, but a power cut may undo it."""

    label = "file per container, directory not flushed"
    caveat = "not durable: a power cut may undo the last updates"

    def checkpoint(self, number: int, turn: int) -> None:
        """Replace one file, without flushing the directory."""
        path = self._path(number)
        temporary = f"{path}.{turn}"
        with open(temporary, "wb") as file:
            file.write(msgspec.json.encode(replace(RUNNING, pid=turn)))
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)


def make_status_file(directory: str, id: str, status: Status) -> None:
    """Make the directory of one container, with its status in it."""
    os.mkdir(f"{directory}/{id}")
    with open(f"{directory}/{id}/{_STATUS_FILE}", "wb") as file:
        file.write(msgspec.json.encode(status))


def read_status_files(directory: str) -> dict[str, Status]:
    """Return the status of every container, by its id."""
    return {name: read_status(f"{directory}/{name}/{_STATUS_FILE}") for name in os.listdir(directory)}


def read_status(path: str) -> Status:
    """Return the status in a JSON file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _status.decode(os.read(descriptor, 1 << 16))
    finally:
        os.close(descriptor)
