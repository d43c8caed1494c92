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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from limpet.engine.starters import process
from tests.conftest import DEADLINE_SECONDS, is_running, wait_until

FORK = f"""
import array, json, os, resource, signal, socket, sys
sys.path.insert(0, {os.path.dirname(process.__file__)!r})
from keeper import copier

def wrap(name, die):
    call = getattr(os, name)
    def wrapped(*args, **settings):
        die["calls"] -= 1
        if die["calls"] or die["when"] == "before":
            if not die["calls"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **settings)
        if name == "writev" and die["when"] == "amid":
            whole = b"".join(args[1])
            os.write(args[0], whole[: len(whole) * 2 // 3])
        else:
            call(*args, **settings)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(os, name, wrapped)

control = socket.socket(fileno=int(sys.argv[1]))
while data := control.recv(65536):
    order = json.loads(data)
    if "wait" in order:
        control.send(str(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])).encode())
        continue
    _, beside, _, _ = control.recvmsg(1, socket.CMSG_SPACE(8))
    link, directory = array.array("i", beside[0][2])
    pid = os.fork()
    if not pid:
        control.close()
        if order["nofile"]:
            resource.setrlimit(resource.RLIMIT_NOFILE, (order["nofile"],) * 2)
        if order["fsize"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["fsize"], resource.RLIM_INFINITY))
        for name in order["die"]["of"]:
            wrap(name, order["die"])
        copier.run(socket.socket(fileno=link), directory)
    os.close(link), os.close(directory)
    control.send(str(pid).encode())
"""
"""Forks a copier for each order, as the keeper does; it can be told at which call it is to be killed."""
TIME = re.compile(rb"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{9}Z")
NEVER: Mapping[str, Any] = {"calls": 0, "of": (), "when": ""}
ROTATED = re.compile(r"\.[0-9]{8}-[0-9]{6}(\.[0-9]{6})?")


class Forker:
    """A process of nothing but the standard library, whose forks are copiers."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", FORK, str(theirs.fileno())], pass_fds=(theirs.fileno(),)
        )
        theirs.close()

    def fork(self, link: int, folder: int, **order: Any) -> int:
        """Fork a copier; return its pid."""
        self._control.send(json.dumps(order).encode())
        socket.send_fds(self._control, [b"f"], [link, folder])
        return int(self._control.recv(64))

    def wait(self, pid: int) -> int:
        """Wait until a copier has ended; return how, as `subprocess` says it."""
        self._control.send(json.dumps({"wait": pid}).encode())
        return int(self._control.recv(64))

    def close(self) -> None:
        """End it."""
        self._control.close()
        self._process.wait(DEADLINE_SECONDS)


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    """What forks copiers."""
    process = Forker()
    yield process
    process.close()


class Keeper:
    """Holds the FIFOs' read ends, and gives them to one copier after another."""

    def __init__(self, directory: Path, forker: Forker) -> None:
        self.directory = directory
        self._forker = forker
        (directory / "fifo").mkdir(parents=True)
        self.logs = directory / "logs"
        self.logs.mkdir()
        self.done: set[str] = set()
        self.trouble: dict[str, str] = {}
        self._kept: dict[str, tuple[dict[str, Any], list[int]]] = {}
        self._folder = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        self.start()

    def start(self, *, nofile: int = 0, fsize: int = 0, die: Mapping[str, Any] = NEVER) -> None:
        """Start a copier, and give it what is kept.

        `nofile` and `fsize` limit its descriptors and the bytes of a file; `die` says at which call it is killed.
        """
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = self._forker.fork(theirs.fileno(), self._folder, nofile=nofile, fsize=fsize, die=dict(die))
        theirs.close()
        for key in self._kept:
            self.copy_again(key)

    def kill(self) -> int:
        """SIGKILL the copier, if it was not killed yet; a `done` that it sent is still read. Return how it ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        code = self._forker.wait(self.pid)
        self.listen()
        self.link.close()
        return code

    def wait(self) -> int:
        """Wait until the copier has ended by itself; return its exit status."""
        self.link.close()
        return self._forker.wait(self.pid)

    def is_alive(self) -> bool:
        """Say whether the copier is."""
        return is_running(self.pid)

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
        self.copy_again(id)
        return ends

    def send(self, op: str, id: str) -> None:
        """Send a message without descriptors."""
        self._send({"op": op, "id": id}, ())

    def copy_again(self, id: str) -> None:
        """Give the copier what is kept of a container, which it may have already."""
        message, (logs, *readers) = self._kept[id]
        note = os.open(self.directory / "fifo" / f"{id}.at", os.O_RDWR | os.O_CREAT, 0o600)
        self._send(message, (logs, note, *readers))
        os.close(note)

    def _send(self, message: dict[str, Any], descriptors: Sequence[int]) -> None:
        if self.link.fileno() < 0:
            return  # it was killed: the next one gets it
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        with suppress(BrokenPipeError, ConnectionResetError):  # the same
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
        log = self.logs / f"{id}.log"
        names = [path for path in self.logs.iterdir() if ROTATED.fullmatch(path.name.removeprefix(log.name))]
        return [*sorted(names), *([log] if log.exists() else [])]

    def output(self, id: str, stream: str = "stdout") -> bytes:
        """Return what the logs say that a container wrote, byte for byte."""
        found, times = [], set()
        for file in self.files(id):
            for line in file.read_bytes().split(b"\n")[:-1]:
                when, name, tag, text = line.split(b" ", 3)
                times.add(when)
                assert len(text) <= 16384
                if name == stream.encode():
                    found.append(text + b"\n" if tag == b"F" else text)
        assert all(TIME.fullmatch(time) for time in times)
        return b"".join(found)

    def close(self) -> None:
        """Kill the copier and close everything."""
        if self.link.fileno() >= 0:
            self.kill()
        os.close(self._folder)
        for _, descriptors in self._kept.values():
            for descriptor in descriptors:
                os.close(descriptor)


@pytest.fixture
def keeper(tmp_path: Path, forker: Forker) -> Iterator[Keeper]:
    """A keeper with a copier."""
    playing = Keeper(tmp_path, forker)
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
