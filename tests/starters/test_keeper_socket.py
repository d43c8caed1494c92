"""The keeper's socket: versions, strangers, and what may be in its place."""

import fcntl
import os
import signal
import socket
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from limpet import Engine, errors
from limpet.engine.starters.process.client import ANSWER_TIMEOUT_SECONDS, KeeperClient, KeeperGoneError
from limpet.schema import ContainerState
from tests.conftest import in_thread, wait_until
from tests.starters.host import make
from tests.starters.keepers import ALL, KEEPER, kill, leave_one


def test_a_keeper_answers_what_it_does_not_know(engine: Engine, state_dir: str) -> None:
    """An engine of a later version asks for more: unknown fields are ignored, an unknown request is an error."""
    container = make(engine, "one", "sleep", "1000")
    container.start()
    client = KeeperClient(os.path.join(state_dir, "keeper"))
    assert client.ask({"op": "end", "id": "one", "new": 1})["running"]  # type: ignore[index]
    with pytest.raises(errors.KeeperError, match="does not know 'later'"):
        client.ask({"op": "later", "id": "one"})
    client.close()
    assert container.stop(1).exit_code == 143


def test_a_connection_that_is_closed_amid_a_request_is_gone(engine: Engine, state_dir: str) -> None:
    """As by the close of its engine: who waits for the answer hears nothing of descriptors, and cannot ask anew."""
    make(engine, "one", "sleep", "1000").start()
    client = KeeperClient(os.path.join(state_dir, "keeper"))
    connection = client.take(begin=False)
    assert connection is not None
    connection.tell({"op": "hello"})
    client.close()
    with pytest.raises(KeeperGoneError, match="was closed"):
        connection.wait_for_answer({"op": "hello"})
    with pytest.raises(errors.KeeperError, match="this engine is closed"):
        client.ask({"op": "hello"})
    engine.get("one").stop(0)


def test_a_connection_that_was_left_behind_is_closed(engine: Engine, state_dir: str) -> None:
    """An interrupted call may leave one; a keeper would stay for it as long as this program lives."""
    make(engine, "one", "true").start()
    client = KeeperClient(os.path.join(state_dir, "keeper"))
    left = client.take(begin=False)
    assert left is not None
    client.close()
    with pytest.raises(errors.KeeperError):
        left.ask({"op": "end", "id": "one"})


@pytest.mark.parametrize("instead", ["nothing", "a file", "a link"])
def test_a_socket_that_is_cleared_away_is_made_again(state_dir: str, instead: str) -> None:
    """By the keeper, soon, and by the anchor that takes over from that: engines after this one find them.

    A backup that is put back may have an empty file in its place.
    """
    leave_one(state_dir)
    path = os.path.join(state_dir, "keeper", "socket")
    os.unlink(path)
    if instead == "a file":
        Path(path).touch()
    elif instead == "a link":
        os.symlink("/nowhere", path)
    wait_until(lambda: os.path.lexists(path) and stat.S_ISSOCK(os.lstat(path).st_mode), "the socket")
    for number, killed in enumerate(((), KEEPER)):
        kill(state_dir, *killed)
        with Engine.open(state_dir) as engine:
            assert engine.get("one").state is ContainerState.RUNNING
            container = make(engine, f"c{number}", "sh", "-c", "exit 3")
            container.start()
            assert container.wait(20).exit_code == 3
    with Engine.open(state_dir) as engine:
        engine.get("one").stop(0)


def test_a_directory_in_the_place_of_the_socket_is_told(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper removes none, which somebody has made: what is to be moved away is named, and then all goes on."""
    leave_one(state_dir)
    path = os.path.join(state_dir, "keeper", "socket")
    os.unlink(path)
    os.mkdir(path)
    monkeypatch.setattr("limpet.engine.starters.process.client._BEGIN_TIMEOUT_SECONDS", 1.0)
    with Engine.open(state_dir) as engine:
        with pytest.raises(errors.StartError, match=f"{path}' is no socket; move it away and try again"):
            make(engine, "two", "true").start()
        os.rmdir(path)
        wait_until(lambda: os.path.exists(path), "the socket")
        engine.recover()
        engine.get("one").stop(0)


SILENT, CLOSED_TO_MORE = b"", b"-"


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        pytest.param(socket.SOCK_SEQPACKET, SILENT, id="that answers nothing"),
        pytest.param(socket.SOCK_SEQPACKET, CLOSED_TO_MORE, id="that has no room for more"),
        pytest.param(socket.SOCK_SEQPACKET, b"HTTP/1.1 400 Bad Request\r\n", id="of another protocol"),
        pytest.param(socket.SOCK_SEQPACKET, b'{"hello": 1}', id="whose answer is no keeper's"),
        pytest.param(socket.SOCK_SEQPACKET, b"[1]", id="whose answer is no object"),
        pytest.param(socket.SOCK_STREAM, SILENT, id="of another type"),
    ],
)
def test_a_stranger_at_the_keepers_socket(
    state_dir: str, monkeypatch: pytest.MonkeyPatch, kind: socket.SocketKind, answer: bytes
) -> None:
    """It is told from a keeper that hangs by the lock, which nobody holds: soon, and with what to do."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PATIENCE_SECONDS", 0.1)
    leave_one(state_dir)
    kill(state_dir, *ALL)
    path = os.path.join(state_dir, "keeper", "socket")
    os.unlink(path)
    with socket.socket(socket.AF_UNIX, kind) as stranger, socket.socket(socket.AF_UNIX, kind) as other:
        stranger.bind(path)
        stranger.listen(0 if answer == CLOSED_TO_MORE else 8)
        if answer == CLOSED_TO_MORE:
            other.connect(path)
        is_talking = answer not in {SILENT, CLOSED_TO_MORE}
        answering, _ = in_thread(lambda: answer_all(stranger, answer) if is_talking else None)
        try:
            begun = time.monotonic()
            with Engine.open(state_dir) as engine:
                assert engine.get("one").state is ContainerState.UNKNOWN  # its end may be in the journal, say
                with pytest.raises(errors.StartError, match=r"what listens there.* is no keeper.* move that file away"):
                    make(engine, "two", "true").start()
                assert time.monotonic() - begun < ANSWER_TIMEOUT_SECONDS
                assert os.path.exists(path)
                stranger.shutdown(socket.SHUT_RDWR)
                stranger.close()  # as was advised: its file stays
                make(engine, "three", "sh", "-c", "exit 3").start()
                assert engine.get("three").wait(20).exit_code == 3
                engine.recover()
                assert engine.get("one").stop(0).exit_code == 128 + signal.SIGKILL
        finally:
            with suppress(OSError):
                stranger.shutdown(socket.SHUT_RDWR)
            answering.join()


def test_a_keeper_that_was_killed_may_hold_its_lock_for_a_moment(state_dir: str) -> None:
    """Its processes take time to end: what has taken its socket meanwhile is a stranger's soon after."""
    leave_one(state_dir)
    kill(state_dir, *ALL)
    path = os.path.join(state_dir, "keeper", "socket")
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as stranger, open(os.path.join(state_dir, "keeper", "lock")) as lock:
        stranger.bind(path)
        stranger.listen()
        wait_until(lambda: try_lock(lock), "the keeper's end")
        ending = threading.Timer(0.2, fcntl.flock, (lock, fcntl.LOCK_UN))
        ending.start()
        with Engine.open(state_dir) as engine:
            assert engine.get("one").state is ContainerState.UNKNOWN
            ending.join()
            stranger.close()
            assert engine.recover() is not None
            assert engine.get("one").stop(0).exit_code == 128 + signal.SIGKILL


def try_lock(file: IO[str]) -> bool:
    """Lock a file; return False if another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def answer_all(stranger: socket.socket, answer: bytes) -> None:
    """Answer whoever connects, until the socket is shut down."""
    with suppress(OSError):
        while True:
            link, _ = stranger.accept()
            with link:
                link.recv(1000)
                link.sendall(answer)
                link.recv(1000)
