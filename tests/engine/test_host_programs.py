"""What programs around an engine do to it: each is served, or told at once what is in the way."""

import os
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from limpet import AsyncEngine, AsyncStore, Engine, errors
from limpet.engine.lifecycle.patience import Patience
from limpet.engine.starters.process import find_facts
from limpet.schema import ContainerState
from tests.conftest import wait_until

LIFE = """
import _thread, atexit, os, sys, threading
from limpet import Engine, Store, errors

engine, other = Engine.open(sys.argv[1]), sys.argv[1] + "-other"
pod = engine.create_sandbox({"metadata": {"name": "pod"}})

def begin(name, *command):
    config = {"metadata": {"name": name}, "image": {"image": "host"}, "command": command}
    container = engine.create_container(config, pod)
    container.start()
    return container

container = begin("one", "sleep", "600")
"""
FINALIZED = """
class Finalized:
    def __del__(self, act=eval(sys.argv[2]), write=os.write, LimpetError=errors.LimpetError):
        try:
            act()
            write(1, b"done")
        except LimpetError as error:
            write(1, type(error).__name__.encode())

sys.modules["finalized"] = Finalized()  # it is collected once threads do not run any more
"""
AT_EXIT = """
def stop():
    print(container.stop(0).exit_code, begin("two", "sh", "-c", "exit 3").wait(20).exit_code, len(engine.list()))
    pod.remove(force=True)
    engine.close()

def refused(*_):
    raise RuntimeError("can't create new thread at interpreter shutdown")

atexit.register(stop)
_thread.start_new_thread = threading._start_new_thread = refused  # as from Python 3.12 on, where it is so at exit
"""
AT_EXIT_IN_TASKS = """
import asyncio
from limpet import AsyncEngine

front = AsyncEngine(engine)

async def leave():
    try:
        await front.get(container.id)
    except errors.ResourcesError as error:
        print("the program ends" in str(error), front.engine.get(container.id).stop(0).exit_code)
    await front.close()
    print(front.store.is_closed)

def refused(*_):
    raise RuntimeError("can't create new thread at interpreter shutdown")

def stop():
    _thread.start_new_thread = threading._start_new_thread = refused  # as from Python 3.12 on, where it is so at exit
    asyncio.run(leave())

atexit.register(stop)
"""
BROKEN_LOG = """
import logging

class Broken(logging.Handler):
    def emit(self, record):
        if not said:
            said.append(print("told"))
        raise eval(sys.argv[2])

said = []
logging.getLogger("limpet").addHandler(Broken())
two = begin("two", "sh", "-c", "sleep 1; exit 3")
os.close(engine._runtime.watcher._epoll.fileno())  # as who closes what is not his; that is logged
engine._runtime.watcher._wake()
print(two.wait(20).exit_code, container.stop(0).exit_code)
pod.remove(force=True)
engine.close()
"""
CLOSED = """
threading.Event().wait(0.2)  # the engine's threads sleep
os.closerange(3, 4096)
theirs = [open(f"{other}.{number}", "w+b", 0) for number in range(64)]  # which have the engine's numbers from now on
for ask in (lambda: begin("two", "true"), engine.close, engine.close):
    try:
        ask()
        print("done")
    except errors.LimpetError:
        print("refused")
print(max(os.path.getsize(each.name) for each in theirs) <= 64)  # what wakes a thread, and no page of the database
sys.stdout.flush()
os._exit(0)
"""
REFUSE = """
import ctypes, struct, sys
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
program = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x20, 0, 0, 0),  # the number of the call
        (0x15, 0, 1, int(sys.argv[2])),
        (0x06, 0, 0, 0x00050000 | 1),  # SECCOMP_RET_ERRNO, EPERM
        (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
    )
)
buffer = ctypes.create_string_buffer(program, len(program))
filter = struct.pack("HxxxxxxP", 4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None)
assert not libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
assert not libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter, 0, 0)
"""
REPLACED = """
import _thread, os, select, sys

def replaced(*_):
    sys.exit("it was called")

replaced.__module__ = sys.argv[2]
if sys.argv[3] == "select":
    select.select = replaced
    del select.poll, select.epoll  # as either does
else:
    vars({"_thread": _thread, "os": os}[sys.argv[3]])[sys.argv[4]] = replaced
from limpet import Engine, Store, errors
for kind in (Engine, Store):
    try:
        kind.open(sys.argv[1])
    except errors.UnsupportedError as error:
        assert "=False" in str(error), error
    else:
        sys.exit(f"{kind} was opened")
"""


@pytest.mark.parametrize(
    "replaced",
    [
        ("gevent.thread", "_thread", "start_new_thread"),
        ("gevent.os", "os", "posix_spawn"),
        ("eventlet.green.select", "select", "select"),
    ],
    ids=lambda replaced: replaced[0],
)
def test_who_replaces_the_systems_calls_is_named(state_dir: str, replaced: tuple[str, ...]) -> None:
    """All can be imported where gevent or eventlet has patched everything, and opening says how to keep it off."""
    command = [sys.executable, "-c", REPLACED, state_dir, *replaced]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("container.wait", "ClosedError"),
        ("lambda: container.stop(0)", "ClosedError"),
        ("lambda: pod.remove(force=True)", "ClosedError"),
        ("engine.recover", "ClosedError"),
        ("engine.store.watch().next", "ClosedError"),
        ("lambda: Engine.open(other)", "ClosedError"),
        ("engine.close", "done"),
        ("engine.store.close", "done"),
        ("engine.list", "done"),
    ],
)
def test_a_finalizer_at_the_end_of_python_hangs_nowhere(state_dir: str, asked: str, told: str) -> None:
    """Other threads do not run then: what needs them is refused at once, and the container is there for the next."""
    command = [sys.executable, "-c", LIFE + FINALIZED, state_dir, asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, told, "")
    with Engine.open(state_dir) as engine:
        assert [one.state for one in engine.list()] == [ContainerState.RUNNING]
        engine.get_sandbox("pod").remove(force=True, timeout=0)


def test_an_engine_is_of_use_where_no_thread_can_be_started_any_more(state_dir: str) -> None:
    """As at the exit of a program: containers are started and stopped, and their ends written down."""
    command = [sys.executable, "-c", LIFE + AT_EXIT, state_dir]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "137 3 2\n", "")


def test_tasks_at_the_exit_of_a_program_are_told_and_can_close(state_dir: str) -> None:
    """Where no thread can be started, they are told to use the engine itself; what is to be closed is closed."""
    command = [sys.executable, "-c", LIFE + AT_EXIT_IN_TASKS, state_dir]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True 137\nTrue\n", "")
    with Engine.open(state_dir) as engine:
        engine.get_sandbox("pod").remove(force=True)


@pytest.fixture
def crowded() -> Iterator[Path]:
    """A cgroup in which there may be no more processes than are moved to it."""
    for parent in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")):
        made = parent / f"limpet-test-{os.getpid()}"
        if not (parent / "cgroup.procs").exists() or not os.access(parent, os.W_OK):
            continue
        made.mkdir()
        try:
            if (made / "pids.max").exists():
                (made / "pids.max").write_text("0")
                yield made
                return
        finally:
            wait_until(lambda made=made, parent=parent: is_removed(made, parent), "the cgroup to be empty")  # type: ignore[misc]
    pytest.skip("no cgroup can be made here that counts processes")


def is_removed(cgroup: Path, parent: Path) -> bool:
    """Move what is there to the parent, and remove it; say whether it is gone: the keeper forks meanwhile."""
    for pid in (cgroup / "cgroup.procs").read_text().split():
        with suppress(OSError):  # it has ended
            (parent / "cgroup.procs").write_text(pid)
    with suppress(OSError):
        cgroup.rmdir()
    return not cgroup.exists()


def test_a_keeper_that_may_fork_no_more_says_what_limits_it(engine: Engine, crowded: Path) -> None:
    """As in a container or a unit whose number of processes is limited; once there is room, the next start works."""
    pod = engine.create_sandbox({"metadata": {"name": "pod"}})
    config = {"metadata": {"name": "one"}, "image": {"image": "host"}, "command": ["sh", "-c", "exit 3"]}
    held = engine.create_container({**config, "metadata": {"name": "held"}, "command": ["sleep", "600"]}, pod)
    held.start()
    keeper = find_facts(engine.store.directory.path).keeper_pid
    (crowded / "cgroup.procs").write_text(str(keeper))
    with pytest.raises(errors.StartError, match=f"keeper, process {keeper}, .*pids.max"):
        for number in range(3):  # some are forked already
            engine.create_container({**config, "metadata": {"name": str(number)}}, pod).start()
    (crowded / "pids.max").write_text("max")
    container = engine.create_container(config, pod)
    container.start()
    assert container.wait(20).exit_code == 3
    pod.remove(force=True, timeout=0)


@pytest.mark.parametrize(("call", "number"), [("close_range", 436), ("faccessat2", 439)])
def test_a_sandbox_that_refuses_younger_calls_is_no_obstacle(state_dir: str, call: str, number: int) -> None:
    """As seccomp filters do that are older than the call: the older ways are gone, at once."""
    script = f"{REFUSE}\n{LIFE}\nprint(container.stop(0).exit_code)\npod.remove(force=True)\nengine.close()"
    command = [sys.executable, "-c", script, state_dir, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "137\n", ""), call


NO_LOG = """
logged = {"metadata": {"name": "two"}, "image": {"image": "host"}, "command": ["echo"], "log_path": "log"}
try:
    engine.create_container(logged, pod).start()
except errors.StartError as error:
    print(str(error).rpartition("[Errno 1] ")[2])
print(container.stop(0).exit_code)
pod.remove(force=True)
engine.close()
"""


def test_a_sandbox_in_which_no_output_can_be_copied_is_told(state_dir: str) -> None:
    """A log would stay empty, and nobody would know why; what asks for none runs."""
    number = {"x86_64": 276, "aarch64": 77}.get(os.uname().machine)
    if number is None:
        pytest.skip("the number of tee(2) is not known here")
    command = [sys.executable, "-c", f"{REFUSE}\n{LIFE}\n{NO_LOG}", state_dir, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    told = "its log cannot be written: tee(2): Operation not permitted"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{told}\n137\n", "")


def test_a_stop_whose_end_cannot_be_written_down_says_so() -> None:
    """And not that the process has not ended."""
    with pytest.raises(
        errors.InvalidStateError, match="it has ended, and that cannot be recorded yet: full; try again"
    ):
        Patience("one", 4711, -60, lambda: "it has ended, and that cannot be recorded yet: full").next_pause()
    with pytest.raises(errors.InvalidStateError, match="process 4711, or one that it left, has not ended"):
        Patience("one", 4711, -60, lambda: "").next_pause()


@pytest.mark.parametrize(("uid", "is_told"), [(0, False), (1000, True)])
def test_a_stop_that_may_not_end_a_process_says_so(uid: int, is_told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has become root by sudo is root's to end: an engine that is not root tells that, too."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    with pytest.raises(errors.InvalidStateError, match="state D") as caught:
        Patience("one", 4711, -60, lambda: "").next_pause()
    assert ("only that user or root can end" in str(caught.value)) is is_told


@pytest.mark.parametrize("error", ["ValueError('no such format')", "SystemExit(3)"])
def test_a_log_handler_that_raises_ends_nothing(state_dir: str, error: str) -> None:
    """What the watcher tells the host program's log is lost, and no end of a container; the engine can be closed."""
    command = [sys.executable, "-c", LIFE + BROKEN_LOG, state_dir, error]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "told\n3 137\n")
    assert error.partition("(")[0] in done.stderr


@pytest.mark.long
def test_who_closes_all_that_the_engine_has_open_is_kept_waiting_by_nothing(state_dir: str) -> None:
    """As a program that becomes a daemon too late: each call is refused, and the next engine knows what is true.

    The database is not written into what has its descriptor's number now.
    """
    command = [sys.executable, "-c", LIFE + CLOSED, state_dir]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\nrefused\ndone\nTrue\n"), done.stderr
    with Engine.open(state_dir) as engine:
        assert [one.state for one in engine.list()] == [ContainerState.RUNNING]
        engine.get_sandbox("pod").remove(force=True, timeout=0)


def test_a_task_that_asyncio_does_not_run_is_refused(engine: Engine) -> None:
    """Under another loop, as trio's, each call says that it needs asyncio's, and nothing is left open."""

    def ask(task: Coroutine[Any, Any, object]) -> None:
        with pytest.raises(errors.UnsupportedError, match="asyncio"):
            task.send(None)

    async def open_it(kind: Any, state_dir: str) -> None:
        await kind.open(state_dir)

    container = engine.create_container(
        {"metadata": {"name": "one"}, "image": {"image": "host"}, "command": ["true"]},
        engine.create_sandbox({"metadata": {"name": "pod"}}),
    )
    front = AsyncEngine(engine)
    for kind in (AsyncEngine, AsyncStore):
        ask(open_it(kind, f"{engine.store.directory.path}-other"))
    ask(front.get(container.id))
    ask(front.create_sandbox({"metadata": {"name": "other"}}))
    ask(front.close())
