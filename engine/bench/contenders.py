"""What is compared: limpet's store, the floor that the disk sets, and ways that people keep state without it.

Each makes one container's status durable with each call, in its own directory, from any number of threads.
"""

import os
import sqlite3
import threading
from typing import Protocol

import msgspec
from msgspec.structs import replace

from limpet.engine.durable import write_file
from limpet.engine.store import Store
from limpet.schema.cri import parse_container_config, parse_pod_sandbox_config
from limpet.schema.image import ImageManifest, ImageName
from limpet.schema.metadata import Metadata, SandboxMetadata
from limpet.schema.status import Status

RUNNING = Status(created_at=1795475261936558660, started_at=1795475261936558661, pid=4711)
ENDED = replace(RUNNING, pid=0, finished_at=1795475261936558662, reason="Completed")
_IMAGE = ImageManifest(name=ImageName("host"))
_BLOCK = 512
_BLOCKS = 2048


class Contender(Protocol):
    """One way to keep the status of `size` containers."""

    name: str

    def open(self, directory: str, size: int) -> None:
        """Make everything ready in an empty directory."""
        ...

    def checkpoint(self, number: int, pid: int) -> None:
        """Make a status of container `number` durable."""
        ...

    def read(self, number: int) -> int:
        """Return the pid that was kept last, to see that it was kept."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


def container_id(number: int) -> str:
    """Return an id as long as real ones are."""
    return f"{number:064x}"


def fill_store(store: Store, size: int, status: Status) -> None:
    """Add `size` containers with this status."""
    store.add_sandbox(
        SandboxMetadata(
            id="bench",
            name="bench",
            config=parse_pod_sandbox_config({"metadata": {"name": "bench", "uid": "0", "namespace": "bench"}}),
            created_at=1,
        )
    )
    for start in range(0, size, 5000):
        with store.transaction() as draft:
            for number in range(start, min(start + 5000, size)):
                name = f"container-{number}"
                config = parse_container_config({"metadata": {"name": name}, "image": {"image": "host"}})
                draft.add(
                    Metadata(
                        id=container_id(number), name=name, sandbox_id="bench", config=config, image_manifest=_IMAGE
                    ),
                    status,
                )


class Limpet:
    """limpet's store through its public API, every guard on."""

    name = "limpet"

    def open(self, directory: str, size: int) -> None:
        """Make a store with `size` running containers."""
        self._store = Store.open(f"{directory}/state")
        fill_store(self._store, size, RUNNING)

    def checkpoint(self, number: int, pid: int) -> None:
        """Call `Store.checkpoint`."""
        self._store.checkpoint(container_id(number), replace(RUNNING, pid=pid))

    def read(self, number: int) -> int:
        """Return the pid in the store."""
        return self._store.status(container_id(number)).pid

    def close(self) -> None:
        """Close the store."""
        self._store.close()


class Floor:
    """What the disk takes for the least that is durable: 512 bytes into a file that is there, and a flush."""

    name = "floor: write + fdatasync"

    def open(self, directory: str, size: int) -> None:  # noqa: ARG002  # it keeps no containers
        """Make a file that is filled already, so that nothing but data is flushed."""
        self._file = os.open(f"{directory}/floor", os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(self._file, bytes(_BLOCK * _BLOCKS), 0)
        os.fsync(self._file)

    def checkpoint(self, number: int, pid: int) -> None:
        """Write a block and flush it."""
        os.pwrite(self._file, pid.to_bytes(8, "little").ljust(_BLOCK, b"x"), number % _BLOCKS * _BLOCK)
        os.fdatasync(self._file)

    def read(self, number: int) -> int:
        """Return the pid in the block."""
        return int.from_bytes(os.pread(self._file, 8, number % _BLOCKS * _BLOCK), "little")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class FilePerContainer:
    """A JSON file for each container: temporary file, flush, rename, flush of the directory."""

    name = "file per container"

    def open(self, directory: str, size: int) -> None:
        """Make the files."""
        self._directory = directory
        for number in range(size):
            with open(self._path(number), "wb") as file:
                file.write(msgspec.json.encode(RUNNING))

    def checkpoint(self, number: int, pid: int) -> None:
        """Replace one file durably."""
        write_file(self._path(number), msgspec.json.encode(replace(RUNNING, pid=pid)))

    def read(self, number: int) -> int:
        """Return the pid in the file."""
        with open(self._path(number), "rb") as file:
            return msgspec.json.decode(file.read(), type=Status).pid

    def close(self) -> None:
        """Nothing is open."""

    def _path(self, number: int) -> str:
        return f"{self._directory}/{container_id(number)}.json"


class RawSqlite:
    """sqlite3 by hand: WAL, synchronous FULL, one UPDATE for each call, one connection behind a lock."""

    name = "sqlite3 by hand"

    def open(self, directory: str, size: int) -> None:
        """Make a table with the columns that limpet's has."""
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(f"{directory}/raw.db", isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode = wal", "synchronous = full"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute(
            "CREATE TABLE status (id TEXT PRIMARY KEY, seq INT, transitions INT, pid INT, created_at INT,"
            " started_at INT, finished_at INT, exit_code INT, reason TEXT, message TEXT, released INT) WITHOUT ROWID"
        )
        row = (0, 0, 0, RUNNING.created_at, RUNNING.started_at, 0, 0, "", "", 0)
        self._connection.execute("BEGIN")
        self._connection.executemany(
            f"INSERT INTO status VALUES ({', '.join('?' * 11)})",  # noqa: S608  # question marks
            [(container_id(number), *row) for number in range(size)],
        )
        self._connection.execute("COMMIT")

    def checkpoint(self, number: int, pid: int) -> None:
        """Update one row."""
        values = (1, 1, pid, RUNNING.created_at, RUNNING.started_at, 0, 0, "", "", 0, container_id(number))
        with self._lock:
            self._connection.execute(
                "UPDATE status SET seq = ?, transitions = ?, pid = ?, created_at = ?, started_at = ?, finished_at = ?,"
                " exit_code = ?, reason = ?, message = ?, released = ? WHERE id = ?",
                values,
            )

    def read(self, number: int) -> int:
        """Return the pid in the row."""
        row = self._connection.execute("SELECT pid FROM status WHERE id = ?", (container_id(number),)).fetchone()
        return int(row[0])

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


CONTENDERS: tuple[type[Contender], ...] = (Limpet, Floor, FilePerContainer, RawSqlite)
