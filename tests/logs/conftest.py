"""What the tests of logs share: a keeper played by the test, with a log copier in a process of its own."""

import array
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from limpet.engine.starters import process
from tests.conftest import DEADLINE_SECONDS, wait_until

RUN = (
    "import socket, sys\n"
    f"sys.path.insert(0, {os.path.dirname(process.__file__)!r})\n"
    "from keeper.copier import run\n"
    "run(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))\n"
)
ROTATED = re.compile(r"\.[0-9]{8}-[0-9]{6}(\.[0-9]{6})?")


class Keeper:
    """Holds the FIFOs' read ends, and gives them to one copier after another."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "fifo").mkdir(parents=True)
        self.logs = directory / "logs"
        self.logs.mkdir()
        self.done: set[str] = set()
        self.trouble: dict[str, str] = {}
        self._kept: dict[str, tuple[dict[str, Any], list[int]]] = {}
        self._folder = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        self.start()

    def start(self, *prefix: str, descriptors: int = 0) -> None:
        """Start a copier, and give it what is kept. `descriptors` limits how many it may have."""
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors},) * 2)\n"
        program = (limit if descriptors else "") + RUN
        self.copier = subprocess.Popen(
            [*prefix, sys.executable, "-I", "-S", "-c", program, str(theirs.fileno()), str(self._folder)],
            pass_fds=(theirs.fileno(), self._folder),
        )
        theirs.close()
        for message, descriptors_kept in self._kept.values():
            self._send(message, descriptors_kept)

    def kill(self) -> None:
        """SIGKILL the copier; a `done` that it sent is still read."""
        self.copier.kill()
        self.copier.wait()
        self.listen()
        self.link.close()

    def make(self, id: str, *, name: str = "", max_bytes: int = 0, max_files: int = 5) -> list[int]:
        """Make a container's FIFOs, give them to the copier, and return its own ends for stdout and stderr."""
        ends, ours = [], [os.open(self.logs, os.O_RDONLY | os.O_DIRECTORY)]
        for kind in ("out", "err"):
            path = self.directory / "fifo" / f"{id}.{kind}"
            os.mkfifo(path)
            ends.append(os.open(path, os.O_RDWR))
            ours.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        message = {"op": "copy", "id": id, "name": name or f"{id}.log", "max_bytes": max_bytes, "max_files": max_files}
        self._kept[id] = (message, ours)
        self._send(message, ours)
        return ends

    def send(self, op: str, id: str) -> None:
        """Send a message without descriptors."""
        self._send({"op": op, "id": id}, ())

    def copy_again(self, id: str) -> None:
        """Give the copier what it has already."""
        self._send(*self._kept[id])

    def _send(self, message: dict[str, Any], descriptors: Sequence[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.link.sendmsg([json.dumps(message).encode()], rights)

    def listen(self) -> None:
        """Take what the copier has said so far."""
        while select.select([self.link], [], [], 0)[0]:
            try:
                data = self.link.recv(65536)
            except ConnectionResetError:
                return
            if not data:
                return
            message = json.loads(data)
            if message["op"] == "done":
                self.done.add(message["id"])
                for descriptor in self._kept.pop(message["id"], ({}, []))[1]:
                    os.close(descriptor)
            else:
                self.trouble[message["id"]] = message["why"]

    def is_done(self, *ids: str) -> bool:
        """Say whether the copier has said so of all."""
        self.listen()
        return self.done.issuperset(ids)

    def wait_done(self, *ids: str) -> None:
        """Wait until all of these are done."""
        wait_until(lambda: self.is_done(*ids), f"the logs of {ids}")

    def files(self, id: str) -> list[Path]:
        """Return a container's log files, oldest first."""
        names = [path for path in self.logs.iterdir() if ROTATED.fullmatch(path.name.removeprefix(f"{id}.log"))]
        return [*sorted(names), self.logs / f"{id}.log"]

    def output(self, id: str, stream: str = "stdout") -> bytes:
        """Return what the logs say that a container wrote, byte for byte."""
        found = []
        for file in self.files(id):
            for line in file.read_bytes().split(b"\n")[:-1]:
                when, name, tag, text = line.split(b" ", 3)
                assert re.fullmatch(rb"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{9}Z", when), line[
                    :80
                ]
                assert len(text) <= 16384
                if name.decode() == stream:
                    found.append(text + b"\n" if tag == b"F" else text)
        return b"".join(found)

    def close(self) -> None:
        """Kill the copier and close everything."""
        self.copier.send_signal(signal.SIGCONT)
        self.copier.kill()
        self.copier.wait(DEADLINE_SECONDS)
        self.link.close()
        os.close(self._folder)
        for _, descriptors in self._kept.values():
            for descriptor in descriptors:
                os.close(descriptor)


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    """A keeper with a copier."""
    playing = Keeper(tmp_path)
    yield playing
    playing.close()


def write_numbers(end: int, last: int, *, first: int = 1) -> "subprocess.Popen[bytes]":
    """Start a process that writes a number a line, as fast as it can, and takes over `end`."""
    try:
        return subprocess.Popen(["seq", str(first), str(last)], stdout=end)
    finally:
        os.close(end)


def numbers(last: int, *, first: int = 1) -> bytes:
    """Return what such a process writes."""
    return b"".join(b"%d\n" % number for number in range(first, last + 1))


def put(end: int, data: bytes) -> None:
    """Write all of it, and close."""
    with open(end, "wb", 0) as file:
        while data:
            data = data[file.write(data) :]
