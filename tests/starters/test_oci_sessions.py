"""Connections to programs in OCI containers: commands, with and without a terminal, and the container's own program."""

import glob
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from limpet import Engine, errors
from limpet.engine import Container
from limpet.engine.starters.abilities import Session
from limpet.engine.starters.oci import abilities
from limpet.engine.starters.oci.commands import CommandFiles
from limpet.schema import ContainerState
from tests.conftest import find_processes, read_output, wait_until
from tests.starters.host import list_children
from tests.starters.oci import RUNTIMES, config

_opened: list[Session] = []


def keep(session: Session) -> Session:
    """Have it closed after the test."""
    _opened.append(session)
    return session


@pytest.fixture(autouse=True)
def close_all() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


@pytest.fixture(params=RUNTIMES)
def sleeping(request: pytest.FixtureRequest, shared: Engine) -> Iterator[Container]:
    container = shared.create_container(config(f"c{time.monotonic_ns()}", "sleep 1000"), request.param)
    container.start()
    yield container
    container.stop(0)
    container.release()


def test_a_client_that_does_not_read_holds_up_the_log(shared: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reopen says so, is carried out once the client has left, and no line is lost in between."""
    monkeypatch.setattr(abilities, "_REOPEN_SECONDS", 0.2)
    script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i + 1)); done; sleep 1000"
    container = shared.create_container(config("flood", f"sleep 0.3; {script}"), "crun")
    container.start()
    session = container.attach()
    path = container.metadata.log_path
    sizes = [0]
    while not sizes[-1] or len(set(sizes[-4:])) > 1 or len(sizes) < 4:  # until conmon waits for us
        time.sleep(0.2)
        sizes.append(os.stat(path).st_size)
    os.rename(path, f"{path}.1")
    with pytest.raises(errors.InvalidStateError, match="attached and does not read"):
        container.reopen_log()
    assert not os.path.exists(path)
    session.close()
    wait_until(lambda: os.path.exists(path) and "line 19999" in Path(path).read_text(), "the rest of the log")
    text = ""
    for line in (Path(f"{path}.1").read_text() + Path(path).read_text()).splitlines():
        _, _, tag, written = line.split(" ", 3)
        text += written + ("\n" if tag == "F" else "")
    assert text == "".join(f"line {number}\n" for number in range(20000))
    container.stop(0)
    container.release()


def read_all(session: Session) -> dict[str, bytes]:
    """All that is written until nothing more comes, by stream."""
    found = {"stdout": b"", "stderr": b""}
    while (chunk := session.read(20)) is not None:
        found[chunk.stream] += chunk.data
    return found


def read_until(session: Session, text: bytes, seconds: float = 10) -> bytes:
    found = b""
    while text not in found:
        chunk = session.read(seconds)
        assert chunk is not None, found
        found += chunk.data
    return found


def ask_until(session: Session, text: bytes) -> None:
    """Write lines until a text is answered: a size reaches the terminal a moment after it is given."""
    found = b""
    deadline = time.monotonic() + 20
    while text not in found:
        assert time.monotonic() < deadline, found
        session.write(b"\n")
        with suppress(errors.WaitTimeoutError):
            while chunk := session.read(0.2):
                found += chunk.data


def test_a_command_that_is_talked_to(sleeping: Container) -> None:
    """What is written reaches it, what it writes comes as it is written, and its code is told."""
    session = keep(sleeping.open_command(["/bin/sh", "-c", "read a; echo got $a; echo bad >&2; cat; exit 5"]))
    session.write(b"one\n")
    assert read_until(session, b"got one\n")
    with pytest.raises(errors.WaitTimeoutError):
        read_all_quickly(session)
    session.write(b"x" * 30_000)
    session.end_input()
    assert read_all(session)["stdout"] == b"x" * 30_000
    assert session.wait(10) == 5
    session.close()
    session.close()


def read_all_quickly(session: Session) -> None:
    while session.read(0.2) is not None:
        pass


def test_a_terminal_and_its_size(sleeping: Container) -> None:
    """A command has a terminal if it is asked for: of the size given, which can change; Ctrl-C reaches it."""
    script = "test -t 0 && echo tty; trap 'echo interrupted; exit 9' INT; while read x; do busybox stty size; done"
    session = keep(sleeping.open_command(["/bin/sh", "-c", script], terminal=True))
    assert read_until(session, b"tty")
    session.resize(-1, -1)  # of no terminal, as is the last one, for which busybox says 80
    for rows, columns, given in ((30, 100, 100), (50, 60, 60), (20, 80, 70_000)):
        session.resize(rows, given)
        ask_until(session, b"%d %d" % (rows, columns))
    for _ in range(10):
        session.write(b"\x03")
        with suppress(errors.WaitTimeoutError):  # a shell that is just about to read misses it
            assert read_until(session, b"interrupted", 2)
            break
    read_all(session)
    assert session.wait(10) == 9
    session.close()


def test_a_deadline_ends_a_write_that_nobody_reads(sleeping: Container) -> None:
    """The caller's own TimeoutError, by SIGALRM, comes to it: what could not be written is not passed over."""

    def raise_own(*_: object) -> None:
        raise TimeoutError("the caller's own")

    session = keep(sleeping.open_command(["sleep", "1000"]))
    before = signal.signal(signal.SIGALRM, raise_own)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(TimeoutError, match="the caller's own"):
            session.write(bytes(1 << 22))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_command_has_the_oom_score_of_its_container(shared: Engine, runtime: str) -> None:
    """From its first instruction on, and whatever the engine has: crun 1.8 does not see to it."""
    asked = config(f"score-{runtime}", "sleep 1000", linux={"resources": {"oom_score_adj": 321}})
    container = shared.create_container(asked, runtime)
    container.start()
    args = ["cat", "/proc/self/oom_score_adj"]
    assert container.execute(args).output == b"321\n"
    for terminal in (False, True):
        session = keep(container.open_command(args, terminal=terminal))
        assert (read_all(session)["stdout"].strip(), session.wait(10)) == (b"321", 0)
    container.stop(0)
    container.release()


def test_sizes_that_no_terminal_can_have(sleeping: Container) -> None:
    """A command begins with the nearest that it can have, as when its terminal is given one later."""
    slow = ["/bin/sh", "-c", "sleep 0.3; busybox stty size"]  # crun gives it one while the program begins
    for rows, columns, given in ((20, 80, 70_000), (30, 100, 100), (20, 80, -1)):  # busybox says 80 for those of none
        session = keep(sleeping.open_command(slow, terminal=True, size=(rows, given)))
        said = read_all(session)["stdout"]
        assert (said, session.wait(10)) == (b"%d %d\r\n" % (rows, columns) if given > 0 else said, 0)


def test_what_is_closed_before_its_runtime_has_told_its_pid_is_killed(
    sleeping: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs a moment before: that it never began is not said of it."""
    mark = f"4715{os.getpid()}"
    session = keep(sleeping.open_command(["sleep", mark]))
    wait_until(lambda: len(find_processes("sleep", mark)) == 1, "the command")
    monkeypatch.setattr(CommandFiles, "read_pid", lambda _: 0)
    session.close()
    assert session.wait(20) == 137
    wait_until(
        lambda: find_processes("sleep", mark) == [], "its end"
    )  # it is killed, and goes once it gets a processor


def test_what_is_closed_is_killed(sleeping: Container, shared: Engine) -> None:
    """A command ends with its connection or at its deadline, and what it has started; nothing is left on disk.

    So does what has another parent and is still of its session. One that cannot be executed is a StartError.
    """
    mark = f"4716{os.getpid()}"
    sleep = f"sleep {mark}"
    script = f"trap '' TERM HUP; {sleep} & /bin/sh -c '{sleep}; true' & ({sleep} &) ; {sleep}; true"

    def count() -> int:
        return len(find_processes("sleep", mark))

    session = keep(sleeping.open_command(["/bin/sh", "-c", script]))
    wait_until(lambda: count() == 4, "the command")
    session.close()
    with pytest.raises(errors.InvalidStateError, match="closed"):
        session.read(1)
    assert session.wait(20) == 137  # it had begun
    wait_until(lambda: count() == 0, "the command to be gone")
    with pytest.raises(errors.WaitTimeoutError, match="was killed"):
        sleeping.execute(["/bin/sh", "-c", script], timeout=0.5)
    wait_until(lambda: count() == 0, "the command to be gone")
    wrong = keep(sleeping.open_command(["/no/such/program"]))
    read_all(wrong)
    with pytest.raises(errors.StartError, match=r"(?i)not found|no such file"):
        wrong.wait(10)
    wrong.close()
    bundle = f"{shared.store.directory.path}/containers/{sleeping.id}"
    assert glob.glob(f"{bundle}/oci/*/exec-*") == []


@pytest.mark.parametrize("is_waited_for", [True, False], ids=["waited for", "closed"])
def test_a_runtime_that_is_killed_takes_its_command_along(sleeping: Container, *, is_waited_for: bool) -> None:
    """Nobody would see how it ends: it is killed, as its code says, also where nobody asks for that."""
    mark = f"4717{os.getpid()}"

    def find(pattern: str) -> list[int]:
        done = subprocess.run(["pgrep", "-f", pattern], capture_output=True, check=False)
        return [int(pid) for pid in done.stdout.split()]

    session = keep(sleeping.open_command(["/bin/sh", "-c", f"(sleep {mark} &); echo on; sleep {mark}"]))
    read_until(session, b"on")
    wait_until(lambda: len(find_processes("sleep", mark)) == 2, "the command")
    (runtime,) = find(f"exec --process .*/{sleeping.id}/")
    os.kill(runtime, signal.SIGKILL)
    wait_until(lambda: not find(f"exec --process .*/{sleeping.id}/"), "the runtime to be gone")
    if is_waited_for:
        assert session.wait(10) == 137
    else:
        session.close()
    wait_until(lambda: not find_processes("sleep", mark), "the command to be gone")


def test_output_that_an_orphan_holds_open(shared: Engine) -> None:
    """The command has ended, and what it has started may write for ever: that is waited for no longer than a moment."""
    container = shared.create_container(config("orphan", "sleep 1000"), "crun")
    container.start()
    session = keep(container.open_command(["/bin/sh", "-c", "sleep 1000 & echo on; exit 6"]))
    began = time.monotonic()
    assert read_all(session) == {"stdout": b"on\n", "stderr": b""}
    assert session.wait(10) == 6
    assert time.monotonic() - began < 10
    session.close()
    container.stop(0)


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_runtime_says_is_no_output(sleeping: Container, terminal: bool) -> None:
    """What it says of a command that it cannot begin is the error, plain and once; what one writes comes as written."""
    for program, why in (
        ("nosuch", r"^[^\x1b]*`?nosuch.*not found in \$PATH"),
        ("/bin/garbage", "^exec /bin/garbage: "),
    ):
        session = keep(sleeping.open_command([program], terminal=terminal))
        said = read_all(session)
        with pytest.raises(errors.StartError, match=why):
            session.wait(10)
        session.close()
        if program == "nosuch":
            assert said == {"stdout": b"", "stderr": b""}
    for _ in range(12):
        session = keep(sleeping.open_command(["echo", "one"], terminal=terminal))
        said = read_all(session)
        line = said["stdout"].replace(b"\r", b"")  # runc sets one of two terminals, perhaps too late for a quick one
        assert (line, said["stderr"]) == (b"one\n", b"")
        assert session.wait(10) == 0
        session.close()


def test_no_command_in_what_is_paused(sleeping: Container) -> None:
    """It would wait for ever, or be refused with an option of the runtime's."""
    sleeping.pause()
    for begin in (sleeping.execute, sleeping.open_command):
        with pytest.raises(errors.InvalidStateError, match="it is paused; resume it first"):
            begin(["true"])
    sleeping.resume()
    assert sleeping.execute(["true"]).code == 0


def test_no_command_in_what_is_paused_or_ends_as_it_is_asked_for(
    sleeping: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said to be frozen, or to have ended, and not that the command cannot be executed."""
    write = CommandFiles.write
    meanwhile: Callable[[], object] = sleeping.pause

    def write_and_wait(*about: Any) -> CommandFiles:
        files = write(*about)
        meanwhile()
        return files

    def open_and_wait(args: Sequence[str]) -> None:
        with closing(sleeping.open_command(args)) as session:
            session.wait(20)

    monkeypatch.setattr(CommandFiles, "write", write_and_wait)
    for begin in (sleeping.execute, open_and_wait):
        with pytest.raises(errors.InvalidStateError, match="are frozen"):
            begin(["true"])
        sleeping.resume()
    meanwhile = partial(sleeping.stop, 0)
    with pytest.raises(errors.InvalidStateError, match="it has ended"):
        sleeping.execute(["true"])


def test_without_descriptors_nothing_is_left_of_a_command(sleeping: Container, shared: Engine) -> None:
    """However many there are: it runs, or it is an error, and its file with the environment goes either way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    bundle = f"{shared.store.directory.path}/containers/{sleeping.id}"
    failed = 0
    for free in range(14):
        used = {int(name) for name in os.listdir("/proc/self/fd")}
        limit = [number for number in range(len(used) + free + 1) if number not in used][free]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            for terminal in (True, False):
                sleeping.open_command(["sleep", "1000"], terminal=terminal).close()
        except errors.ResourcesError:
            failed += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert glob.glob(f"{bundle}/oci/*/exec-*") == []
    assert 0 < failed < 14


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_attach(shared: Engine, runtime: str) -> None:
    """Input and output of the container's own program; who leaves ends nothing; with stdin_once its input ends."""
    script = "while read x; do echo got $x; echo bad >&2; done; exit 6"
    container = shared.create_container(config(f"a{runtime}", script, stdin=True, stdin_once=True), runtime)
    container.start()
    session = keep(container.attach())
    session.write(b"one\n")
    assert b"got one\n" in read_until(session, b"got one\n")
    session.end_input()
    read_all(session)
    assert session.wait() is None
    session.close()
    assert container.wait(10).exit_code == 6
    assert sorted(read_output(container, 2)) == ["bad", "got one"]
    with pytest.raises(errors.InvalidStateError):
        container.attach()
    open_end = shared.create_container(config(f"b{runtime}", script, stdin=True), runtime)
    open_end.start()
    for word in (b"one", b"two"):
        session = keep(open_end.attach())
        session.write(word + b"\n")
        read_until(session, b"got " + word)
        session.close()
    assert open_end.state is ContainerState.RUNNING
    open_end.stop(0)


HOST = """
import signal, sys, threading, time
from contextlib import suppress
from pathlib import Path
from limpet import Engine, errors
from limpet.engine.control import open_live
from limpet.engine.control.requests import Execute
from tests.starters.oci import config, load_busybox, open_engine

state_dir, image, runtime = sys.argv[1:]
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
with open_engine(state_dir) as engine:
    load_busybox(engine, Path(image))
    engine.create_sandbox({"metadata": {"name": "a"}}, id="a", runtime_handler=runtime)
    one = engine.create_container(config("one", "sleep 1000"), "a", id="one")
    one.start()
    session = one.open_command(["/bin/true"])
    print(session.wait(20), flush=True)
    session.write(b"x" * 100_000)
    session.close()
    live = open_live(state_dir, Execute(id="one", args=["/bin/sh", "-c", "while true; do echo here; done"]))
    live.read()
    live.close()
    while any(thread.name.startswith("limpet-control-") for thread in threading.enumerate()):
        time.sleep(0.01)
    one.stop(0)
    one.remove()
    engine.get_sandbox("a").remove()
print("over", flush=True)
"""


@pytest.mark.long
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_host_program_that_a_broken_pipe_would_end(tmp_path: Path, runtime: str) -> None:
    """It writes to a command that has ended, and for a client that goes away amid its output, and lives on."""
    command = [sys.executable, "-c", HOST, str(tmp_path / "oci"), str(tmp_path / "image"), runtime]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "0\nover\n"), result.stderr


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_attach_to_a_terminal(shared: Engine, runtime: str) -> None:
    """Its size is what the one who is attached gives it."""
    script = "while read x; do busybox stty size; done"
    container = shared.create_container(config(f"t{runtime}", script, stdin=True, tty=True), runtime)
    container.start()
    session = keep(container.attach())
    session.resize(33, 77)
    ask_until(session, b"33 77")
    session.close()
    container.stop(0)


@pytest.mark.usefixtures("subreaper")
@pytest.mark.parametrize(("runtime", "is_paused"), [("runc", False), ("crun", False), ("runc", True)])
def test_what_is_killed_is_reaped_where_orphans_come_to_the_engine(
    shared: Engine, runtime: str, *, is_paused: bool
) -> None:
    """Nobody else does there: a container never ended in which a command had been killed, and each left its conmon."""
    before = list_children()
    container = shared.create_container(config(f"orphans-{runtime}-{is_paused}", "sleep 1000"), runtime)
    container.start()
    with pytest.raises(errors.WaitTimeoutError):
        container.execute(["sleep", "1000"], timeout=0.3)
    session = keep(container.open_command(["sh", "-c", "echo begun; cat"]))
    chunk = session.read(10)
    assert chunk is not None
    assert chunk.data == b"begun\n"
    if is_paused:
        container.pause()
    session.close()
    begun = time.monotonic()
    assert container.stop(0).exit_code == 128 + signal.SIGKILL
    assert time.monotonic() - begun < 5
    container.release()
    wait_until(lambda: list_children() <= before, "all to be reaped")
