"""The control socket: private, bounded, harmless to the engine behind it, and replaced after a kill."""

import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from limpet.engine import Engine
from limpet.engine.control import ControlServer, NoEngineError, ask_live, open_live, perform
from limpet.engine.control.messages import LONGEST_REQUEST
from limpet.engine.control.requests import (
    MADE_BY,
    Attach,
    CreateAndStart,
    Done,
    Info,
    Load,
    Recover,
    Remove,
    Stop,
    Wait,
)
from limpet.recovery.report import Report
from limpet.schema import errors
from limpet.schema.status import ContainerState
from limpet.testing import FakeStarter
from tests.conftest import EngineProcess, count_sockets, in_thread, wait_until
from tests.failures import Failing
from tests.stops import stop_by_signal

LIVE = """
engine = Engine.open(state_dir)
sandbox = engine.create_sandbox({"metadata": {"name": "jobs"}})
config = {"metadata": {"name": "one"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
engine.create_container(config, sandbox.id, id="c1").start()
say("ready")
time.sleep(1000)
"""


@pytest.fixture
def live(engine_process: Callable[[str], EngineProcess]) -> EngineProcess:
    """An engine in another process, with the running container "one"."""
    process = engine_process(LIVE)
    process.read()
    return process


@contextmanager
def connected(state_dir: str) -> Iterator[socket.socket]:
    """A plain connection to the engine's socket."""
    with socket.socket(socket.AF_UNIX) as link:
        directory = os.open(os.path.join(state_dir, "control"), os.O_PATH)
        try:
            link.connect(f"/proc/self/fd/{directory}/engine.sock")
        finally:
            os.close(directory)
        link.settimeout(30)
        yield link


def read_all(link: socket.socket) -> bytes:
    """Return what comes until the engine leaves."""
    data = b""
    while block := link.recv(1 << 16):
        data += block
    return data


def test_a_directory_in_the_place_of_the_socket_is_named(state_dir: str) -> None:
    """With its whole path, and what to do: nobody but who made it knows what it is for."""
    Engine.open(state_dir).close()
    path = os.path.join(state_dir, "control", "engine.sock")
    os.mkdir(path)
    with pytest.raises(errors.StateDirectoryError, match=f"'{path}': it is a directory; move it away and try again"):
        Engine.open(state_dir)
    os.rmdir(path)
    Engine.open(state_dir).close()


def test_the_socket_is_private_and_goes_with_the_engine(state_dir: str) -> None:
    """Nobody else may reach it; a close takes it away, and nothing but a directory stays."""
    with Engine.open(state_dir):
        directory, name = Path(state_dir, "control"), "engine.sock"
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600
        assert ask_live(state_dir, Info()).pid == os.getpid()
    assert os.listdir(directory) == []
    with pytest.raises(NoEngineError):
        ask_live(state_dir, Info())


def test_everything_can_be_asked_of_an_engine_in_another_process(state_dir: str, live: EngineProcess) -> None:
    """Create, start, stop, wait, remove and recover are done by the live engine, and errors come as what they are."""
    assert ask_live(state_dir, Info()).pid == live.pid
    config = {"metadata": {"name": "two"}, "image": {"image": "host"}, "command": ["sh", "-c", "exit 3"]}
    began = ask_live(
        state_dir,
        CreateAndStart(id="c2", config=config, sandbox_id="s2", sandbox_config={"metadata": {"name": "two"}}),
    )
    assert began.sandbox_id == "s2"
    assert ask_live(state_dir, Wait(id="two")).status.exit_code == 3
    (stopped,) = ask_live(state_dir, Stop(id="one", timeout=5))
    assert (stopped.id, stopped.status.exit_code) == ("c1", 128 + signal.SIGTERM)
    assert isinstance(ask_live(state_dir, Recover()), Report)
    assert [one.kind for one in ask_live(state_dir, Remove(id="two"))] == ["container"]
    for request, kind in (
        (Stop(id="nope"), errors.NotFoundError),
        (Wait(id="nope"), errors.NotFoundError),
        (Remove(id="jobs"), errors.InvalidStateError),
        (Load(path="relative"), errors.InvalidInputError),
        (Load(path="/nowhere.tar"), errors.InvalidInputError),
    ):
        with pytest.raises(kind):
            ask_live(state_dir, request)
    with pytest.raises(errors.InvalidInputError, match="'local'"):
        ask_live(state_dir, Info(), node="other")


def test_a_request_that_is_asked_again_does_nothing_twice(state_dir: str) -> None:
    """Who does not know whether a container was begun asks again, and gets the same one."""
    config = {"metadata": {"name": "x"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
    request = CreateAndStart(id="c", config=config, sandbox_id="s", sandbox_config={"metadata": {"name": "x"}})
    with Engine.open(state_dir) as engine:
        first, second = ask_live(state_dir, request), ask_live(state_dir, request)
        assert first.status.pid == second.status.pid
        assert len(engine.list()) == len(engine.list_sandboxes()) == 1
        engine.get("c").stop(0)


def test_what_several_remove_is_told_once(state_dir: str) -> None:
    """Each container and sandbox is told by the one request that removed it; the others fail at nothing."""
    with Engine.open(state_dir) as engine:
        for turn in range(8):
            key = f"s{turn}"
            own = {"metadata": {"name": key}, "annotations": {MADE_BY: "run"}}
            for number in range(3):
                config = {"metadata": {"name": f"c{number}"}, "image": {"image": "host"}, "command": ["true"]}
                made = f"{key}-c{number}"
                perform(engine, CreateAndStart(id=made, config=config, sandbox_id=key, sandbox_config=own))
                engine.get(made).wait(20)
            asked = [Remove(id=f"{key}-c{number}", force=True) for number in range(3)]
            with ThreadPoolExecutor(len(asked)) as threads:
                told = [each.id for removals in threads.map(partial(perform, engine), asked) for each in removals]
            assert sorted(told) == [key, *(request.id for request in asked)]


@pytest.mark.parametrize(
    "wrong", [{}, {"metadata": {}}, {"metadata": None}, {"metadata": []}, {"metadata": {"name": 5}}]
)
def test_a_sandbox_config_that_is_none_is_refused_by_its_field(state_dir: str, wrong: dict[str, Any]) -> None:
    """It is refused as a wrong value, before anything is made or removed."""
    config = {"metadata": {"name": "x"}, "image": {"image": "host"}, "command": ["true"]}
    with Engine.open(state_dir) as engine:
        with pytest.raises(errors.InvalidInputError, match="metadata"):
            ask_live(state_dir, CreateAndStart(id="c", config=config, sandbox_id="s", sandbox_config=wrong))
        assert len(engine.list()) == len(engine.list_sandboxes()) == 0


def test_what_a_killed_engine_left_is_replaced(state_dir: str, live: EngineProcess) -> None:
    """The stale socket refuses, the next engine answers, and who waits for the dead one is told."""
    before = count_sockets(live.pid)
    waiter, outcome = in_thread(lambda: ask_live(state_dir, Wait(id="one")))
    wait_until(lambda: count_sockets(live.pid) > before, "the waiting")
    live.kill()
    waiter.join(30)
    assert isinstance(outcome[0], errors.EngineGoneError)
    assert Path(state_dir, "control", "engine.sock").exists()
    with pytest.raises(NoEngineError):
        ask_live(state_dir, Info())
    with Engine.open(state_dir) as engine:
        assert ask_live(state_dir, Info()).pid == os.getpid()
        engine.get("one").stop(0)


@pytest.mark.parametrize(
    "data",
    [
        b"\n",
        b"{}\n",
        b"null\n",
        b"[" * 100_000 + b"\n",
        b'{"version":1,"node":"local","request":{"type":"nope"}}\n',
        b'{"version":1,"node":"local","request":{"type":"stop","id":5}}\n',
        b'{"version":2,"node":"local","request":{"type":"info"}}\n',
        b'{"version":1,"node":"local","request":{"type":"stop","id":"\xff"}}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * (LONGEST_REQUEST + 2),
    ],
    ids=lambda data: data[:20].decode(errors="replace"),
)
def test_what_is_no_request_is_refused(state_dir: str, data: bytes) -> None:
    """Each gets an error and no more, and the engine goes on."""
    with Engine.open(state_dir):
        with connected(state_dir) as link:
            try:
                link.sendall(data)
            except (BrokenPipeError, ConnectionResetError):
                assert len(data) > LONGEST_REQUEST
            answer = read_all(link)
            assert b'"error":"InvalidInputError"' in answer or b'"error":"UnsupportedError"' in answer
        assert ask_live(state_dir, Info()).pid == os.getpid()


def test_who_goes_away_or_says_nothing_harms_nobody(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a request, none, and a waiter that goes away: others are answered, and those are left after their time."""
    monkeypatch.setattr("limpet.engine.control.server.SILENCE_SECONDS", 0.5)
    config = {"metadata": {"name": "x"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
    with Engine.open(state_dir) as engine:
        container = engine.create_container(config, engine.create_sandbox({"metadata": {"name": "p"}}).id, id="c")
        container.start()
        with connected(state_dir) as silent, connected(state_dir) as half:
            half.sendall(b'{"version":1,')
            with connected(state_dir) as waiter:
                waiter.sendall(b'{"version":1,"node":"local","request":{"type":"wait","id":"c"}}\n')
                assert waiter.recv(1) == b"\n"
            with connected(state_dir) as reset:
                reset.sendall(b'{"version":1,"node":"local","request":{"type":"recover"}}\n')
            assert ask_live(state_dir, Info()).pid == os.getpid()
            assert read_all(silent) == read_all(half) == b""
        wait_until(lambda: not engine._control._callers, "everybody to be left")
        container.stop(0)


def test_more_than_it_takes_wait_for_their_turn(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all places taken, another is answered as soon as one is free."""
    monkeypatch.setattr("limpet.engine.control.server._MOST_CALLERS", 2)
    with Engine.open(state_dir), connected(state_dir), connected(state_dir) as second:
        asking, outcome = in_thread(lambda: ask_live(state_dir, Info()))
        asking.join(0.5)
        assert asking.is_alive()
        second.close()
        asking.join(30)
        assert outcome[0].pid == os.getpid()  # type: ignore[attr-defined]


def test_who_waits_keeps_nobody_out(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with many who wait a container can be stopped; those have a limit of their own."""
    monkeypatch.setattr("limpet.engine.control.server._MOST_CALLERS", 2)
    monkeypatch.setattr("limpet.engine.control.server._MOST_WAITING", 3)
    config = {"metadata": {"name": "x"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
    with Engine.open(state_dir) as engine:
        engine.create_container(config, engine.create_sandbox({"metadata": {"name": "p"}}).id, id="c").start()
        waiting = [in_thread(lambda: ask_live(state_dir, Wait(id="c"))) for _ in range(3)]
        wait_until(
            lambda: sum(each.waits_for is not None for each in list(engine._control._callers.values())) == 3,
            "all to wait",
        )
        with pytest.raises(errors.ResourcesError, match="3 commands wait"):
            ask_live(state_dir, Wait(id="c"))
        assert ask_live(state_dir, Stop(id="c", timeout=0), silence=10)[0].status.exit_code == 128 + signal.SIGKILL
        for thread, outcome in waiting:
            thread.join(30)
            assert isinstance(outcome[0], Done)


def test_stops_that_take_long_keep_no_other_waiting(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many give a container time to end, it can be killed meanwhile, which ends them all."""
    monkeypatch.setattr("limpet.engine.control.server._MOST_STEPS", 3)
    monkeypatch.setattr("limpet.engine.control.server._MOST_LONG_STEPS", 2)
    ready = Path(state_dir, "ready")
    script = f"trap '' TERM; : > {ready}; while :; do sleep 0.1; done"
    config = {"metadata": {"name": "x"}, "image": {"image": "host"}, "command": ["sh", "-c", script]}
    with Engine.open(state_dir) as engine:
        engine.create_container(config, engine.create_sandbox({"metadata": {"name": "p"}}).id, id="c").start()
        wait_until(ready.exists, "the program to ignore SIGTERM")
        stopping = [in_thread(lambda: ask_live(state_dir, Stop(id="c", timeout=600))) for _ in range(4)]
        wait_until(lambda: bool(engine._control._pending), "one to wait for its turn")
        for thread, outcome in (in_thread(lambda: ask_live(state_dir, Stop(id="c", timeout=0))), *stopping):
            thread.join(30)
            assert outcome[0][0].status.exit_code == 128 + signal.SIGKILL  # type: ignore[index]


def test_many_wait_on_one_thread(state_dir: str) -> None:
    """Who waits holds no thread of the engine's, and all are told of the end."""
    config = {"metadata": {"name": "x"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
    with Engine.open(state_dir) as engine:
        container = engine.create_container(config, engine.create_sandbox({"metadata": {"name": "p"}}).id, id="c")
        container.start()
        waiting = [in_thread(lambda: ask_live(state_dir, Wait(id="c"))) for _ in range(20)]
        wait_until(lambda: len(engine._control._callers) == 20, "all to wait")
        names = [thread.name for thread in threading.enumerate()]
        assert sum(name.startswith("limpet-control") for name in names) == 1
        container.stop(0)
        for thread, outcome in waiting:
            thread.join(30)
            assert isinstance(outcome[0], Done)
            assert outcome[0].status.exit_code == 128 + signal.SIGKILL


def test_a_close_tells_those_who_wait(state_dir: str) -> None:
    """They get ClosedError at once, and no thread of the control's is left."""
    ready = Path(state_dir).parent / "ready"
    stubborn = ["sh", "-c", "trap '' TERM; touch \"$0\"; sleep 1000", str(ready)]
    config = {"metadata": {"name": "x"}, "image": {"image": "host"}, "command": stubborn}
    engine = Engine.open(state_dir)
    engine.create_container(config, engine.create_sandbox({"metadata": {"name": "p"}}).id, id="c").start()
    wait_until(ready.exists, "the program to ignore SIGTERM")
    waiting, waited = in_thread(lambda: ask_live(state_dir, Wait(id="c")))
    stopping, stopped = in_thread(lambda: ask_live(state_dir, Stop(id="c", timeout=1000)))
    wait_until(lambda: len(engine._control._callers) == 2, "both to be there")
    begun = time.monotonic()
    engine.close()
    assert time.monotonic() - begun < 30
    for thread, outcome in ((waiting, waited), (stopping, stopped)):
        thread.join(30)
        assert isinstance(outcome[0], Done | tuple | errors.ClosedError | errors.EngineGoneError)
    assert isinstance(waited[0], errors.ClosedError | Done)
    wait_until(lambda: not any(t.name.startswith("limpet-control") for t in threading.enumerate()), "its threads")
    with Engine.open(state_dir) as again:
        again.get("c").stop(0)
        assert again.get("c").state is ContainerState.EXITED


def test_a_close_that_fails_tells_those_who_wait(state_dir: str) -> None:
    """On a disk that takes nothing more: the error is raised, nobody waits on, and nobody answers at the socket."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    starter = FakeStarter()
    engine = Engine.open(state_dir, starter=starter)
    sandbox = engine.create_sandbox({"metadata": {"name": "pod"}})
    container = engine.create_container({"metadata": {"name": "c"}, "image": {"image": "host"}}, sandbox)
    container.start()
    waiting = [in_thread(container.wait), in_thread(lambda: ask_live(state_dir, Wait(id=container.id)))]
    wait_until(lambda: len(engine._control._callers) == 1, "the request")
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(errors.StoreError):
            engine.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    for thread, outcome in waiting:
        thread.join(30)
        assert isinstance(outcome[0], errors.ClosedError)
    with pytest.raises(NoEngineError):
        ask_live(state_dir, Info())
    engine.close()
    with Engine.open(state_dir, starter=starter) as again:
        assert again.get("c").state is ContainerState.RUNNING


def test_a_fork_does_not_keep_the_engine_up(state_dir: str) -> None:
    """A fork of the engine's process lives on; the kill of the engine is seen all the same."""
    script = (
        "import os, sys, time\nfrom limpet.engine import Engine\n"
        f"engine = Engine.open({state_dir!r})\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(1000)\n"
        "print(child, flush=True)\ntime.sleep(1000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert ask_live(state_dir, Info()).pid == process.pid
        process.kill()
        process.wait(30)
        with pytest.raises(NoEngineError):
            ask_live(state_dir, Info())
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_an_engine_that_hangs_is_given_up(state_dir: str, live: EngineProcess) -> None:
    """Without a line for so long the command ends with an error that says what is not known."""
    stop_by_signal(live.pid)
    with pytest.raises(errors.EngineGoneError, match="may hang") as raised:
        ask_live(state_dir, Info(), silence=1.5)  # it holds the lock
    assert raised.value.may_live
    os.kill(live.pid, signal.SIGCONT)
    assert ask_live(state_dir, Info()).pid == live.pid


@pytest.mark.parametrize("is_fork", [False, True])
def test_who_listens_without_the_lock_is_no_engine(state_dir: str, *, is_fork: bool) -> None:
    """It never answers, and was taken for an engine that hangs, after 15 s; an engine that is opened replaces it."""
    Engine.open(state_dir).close()
    script = """if True:
        import os, socket, sys, time
        os.chdir(sys.argv[1])
        door = socket.socket(socket.AF_UNIX)
        door.bind("engine.sock")
        door.listen()
        if sys.argv[2:] and os.fork():
            os._exit(0)
        print(os.getpid(), flush=True)
        time.sleep(1000)
    """
    command = [sys.executable, "-c", script, f"{state_dir}/control", *(["fork"] if is_fork else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout is not None
        pid = int(stranger.stdout.readline())
        try:
            begun = time.monotonic()
            with pytest.raises(NoEngineError):
                ask_live(state_dir, Info())
            with pytest.raises(NoEngineError):
                open_live(state_dir, Attach(id="c"))
            assert time.monotonic() - begun < 10
            with Engine.open(state_dir):
                assert ask_live(state_dir, Info()).pid == os.getpid()
        finally:
            os.kill(pid, signal.SIGKILL)


def test_a_long_path_is_no_obstacle(tmp_path: Path) -> None:
    """A socket's address has 107 bytes; a state directory may be deeper."""
    state_dir = str(tmp_path / ("d" * 100) / ("e" * 100) / "state")
    with Engine.open(state_dir):
        assert ask_live(state_dir, Info()).pid == os.getpid()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_only_the_owner_and_root_are_served() -> None:
    """Another user is refused by the engine itself, also where the directory would let him in."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place, Engine.open(f"{place}/s"):
        state_dir = f"{place}/s"
        for path in (place, state_dir, f"{state_dir}/control", f"{state_dir}/control/engine.sock"):
            os.chmod(path, 0o777)
        script = (
            "import os, socket, sys\nos.setuid(12345)\n"
            "link = socket.socket(socket.AF_UNIX); link.connect(sys.argv[1])\n"
            "print(link.recv(4096).decode())"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, f"{state_dir}/control/engine.sock"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert "user 12345 may not ask" in done.stdout, done.stderr
        with pytest.raises(errors.StateDirectoryError, match="nothing was asked"):
            ask_live(state_dir, Info())


def test_it_is_quick_to_open(tmp_path: Path) -> None:
    """An engine's opening gets no millisecond slower by it: the best of many is far below."""
    took = []
    for _ in range(20):
        begun = time.perf_counter()
        server = ControlServer.listen(str(tmp_path))
        server.serve(None)  # type: ignore[arg-type]
        took.append(time.perf_counter() - begun)
        server.leave()
        server.close()
    assert min(took) < 0.001


def test_a_session_that_is_over_at_once_stops_nobody(state_dir: str) -> None:
    """Its thread may close the connection before the loop, however slow, has gone on by a line."""

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if threading.current_thread().name != "limpet-control" or not frame.f_code.co_filename.endswith("/server.py"):
            return None
        if event == "line":
            time.sleep(0.003)
        return trace

    threading.settrace(trace)
    try:
        with Engine.open(state_dir):
            for _ in range(2):
                with pytest.raises(errors.NotFoundError):
                    open_live(state_dir, Attach(id="nobody"))
            assert ask_live(state_dir, Info()) is not None
    finally:
        threading.settrace(None)


@pytest.mark.parametrize("part", ["_wait_for_events", "_look_at_changed", "_take_results", "_keep_time", "_attend"])
def test_a_failure_of_the_servers_own_ends_no_answering(
    state_dir: str, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """For want of memory, say: who waits for an answer is answered, or sees that nobody will; the next one is."""

    failing = Failing({1})
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        monkeypatch.setattr(ControlServer, part, failing(getattr(ControlServer, part)))
        for request in (Recover(), Remove(id="jobs"), Info()):
            try:
                ask_live(state_dir, request)
            except (errors.EngineGoneError, NoEngineError):
                assert failing.calls
        assert failing.calls
        assert ask_live(state_dir, Info()).pid == os.getpid()
        assert engine.list_sandboxes() == []


def test_who_asked_a_thread_that_cannot_tell_sees_the_end(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread has ended, without a word: as one does that there is no memory for."""

    def end(*_: Any) -> None:
        ended.append(None)
        monkeypatch.undo()

    ended: list[None] = []
    with Engine.open(state_dir):
        monkeypatch.setattr(ControlServer, "_step", end)
        with pytest.raises(errors.EngineGoneError, match="ended before it answered"):
            ask_live(state_dir, Recover())
        assert ended
        assert isinstance(ask_live(state_dir, Recover()), Report)


@pytest.mark.parametrize("times", [1, 2])
def test_who_asked_for_what_cannot_be_told_sees_the_end(
    state_dir: str, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """An answer that there is no memory for; nor for the error that stands for it. Asked again, it is told."""

    failing = Failing(range(1, times + 1))
    with Engine.open(state_dir):
        for name in ("encode_result", "encode_error"):
            path = f"limpet.engine.control.server.{name}"
            monkeypatch.setattr(path, failing(getattr(sys.modules["limpet.engine.control.server"], name)))
        with pytest.raises(errors.LimpetError, match="MemoryError" if times == 1 else "ended before it answered"):
            ask_live(state_dir, Recover())
        assert isinstance(ask_live(state_dir, Recover()), Report)
