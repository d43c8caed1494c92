"""A population: stores and files of many containers, a few of them running, shared by several cells.

A separate process creates it and holds its live processes, which read from a pipe that only this process can write
to: they end when it does, however it ends.
"""

import os
import sys
from contextlib import ExitStack
from typing import IO

import msgspec
from msgspec.structs import replace

from limpet.benchmarks.contenders import ENDED, RUNNING, container_id, fill_store, make_status_file
from limpet.benchmarks.lists import make_lists
from limpet.engine.store import Store
from limpet.recovery.host import identify, open_pidfd
from limpet.schema.decoders import make_decoder
from limpet.schema.identity import ProcessIdentity
from limpet.schema.status import Status

_identities = make_decoder(list[ProcessIdentity])
MAX_RUNNING = 1000
MAX_FILES = 100_000
READY = b"ready\n"


class Population(msgspec.Struct, frozen=True, kw_only=True):
    """What to create in `directory`."""

    directory: str
    sizes: list[int]
    file_sizes: list[int]
    """The sizes to create also as a file per container."""
    list_sizes: list[int] = []
    """The sizes to create for lists, with more sandboxes and labels."""


def count_running(size: int) -> int:
    """Return how many containers of a population are running."""
    return min(MAX_RUNNING, size // 10)


def limpet_path(stage: str, size: int) -> str:
    """Return the state directory of the store with `size` containers."""
    return f"{stage}/limpet-{size}"


def files_path(stage: str, size: int) -> str:
    """Return the directory with a file for each of `size` containers."""
    return f"{stage}/files-{size}"


def read_identities(stage: str) -> list[ProcessIdentity]:
    """Return the identities of the live processes."""
    with open(f"{stage}/identities.json", "rb") as file:
        return _identities.decode(file.read())


def hold(population: Population, control: IO[bytes]) -> None:
    """Create the population, report that on stdout, and hold it until `control` ends."""
    with ExitStack() as stack:
        identities = _start_processes(max(map(count_running, population.sizes), default=0), stack)
        with open(f"{population.directory}/identities.json", "wb") as file:
            file.write(msgspec.json.encode(identities))
        for size in population.sizes:
            _make_store(limpet_path(population.directory, size), size, identities)
        for size in population.file_sizes:
            _make_files(files_path(population.directory, size), size, identities)
        for size in population.list_sizes:
            make_lists(f"{population.directory}/lists-{size}", size)
        os.sync()
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()
        control.read()


def _start_processes(count: int, stack: ExitStack) -> list[ProcessIdentity]:
    """Start processes that wait until `stack` is closed."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    stack.callback(os.close, write_end)
    actions = [
        (os.POSIX_SPAWN_DUP2, read_end, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    pids = [os.posix_spawn("/bin/cat", ["cat"], {}, file_actions=actions) for _ in range(count)]
    os.close(read_end)
    return [_identify(pid) for pid in pids]


def _identify(pid: int) -> ProcessIdentity:
    with open_pidfd(pid) as pidfd:
        return identify(pid, pidfd)


def _status_of(number: int, identities: list[ProcessIdentity], size: int) -> Status:
    if number >= count_running(size):
        return ENDED
    return replace(RUNNING, pid=identities[number].pid, identity=identities[number])


def _make_store(path: str, size: int, identities: list[ProcessIdentity]) -> None:
    with Store.open(path) as store:
        fill_store(store, size, ENDED)
        with store.transaction() as draft:
            for number in range(count_running(size)):
                draft.replace(container_id(number), _status_of(number, identities, size))


def _make_files(path: str, size: int, identities: list[ProcessIdentity]) -> None:
    os.mkdir(path)
    for number in range(size):
        make_status_file(path, container_id(number), _status_of(number, identities, size))
