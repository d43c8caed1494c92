"""exec, attach, stats, pause and resume with containers of an OCI runtime, by the live engine and without one."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from limpet.engine import Engine
from tests.cli.conftest import Limpet
from tests.conftest import EngineProcess, find_processes, read_output, wait_until
from tests.starters.oci import config, end_everything, free_sandboxes, load_busybox, open_engine

LIVE = """
from limpet import OciStarter
engine = Engine.open(state_dir, runtimes={"runc": OciStarter("runc")})
say(os.getpid())
time.sleep(1000)
"""
ECHO = "trap 'exit 4' TERM; while read x; do echo got $x; done; exit 6"


@pytest.fixture(params=["a live engine", pytest.param("none", marks=pytest.mark.long)])
def somewhere(
    request: pytest.FixtureRequest, limpet: Limpet, engine_process: Callable[[str], EngineProcess], tmp_path: Path
) -> Iterator[Limpet]:
    """The command line, with two containers: one that sleeps, and one whose input is echoed."""
    with open_engine(limpet.state_dir) as engine:
        load_busybox(engine, tmp_path / "image")
        engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod", runtime_handler="runc")
        engine.create_container(config("sleeps", "sleep 1000"), "pod", id="sleeps").start()
        engine.create_container(config("echo", ECHO, stdin=True, stdin_once=True), "pod", id="echo").start()
    process = engine_process(LIVE) if request.param != "none" else None
    if process is not None:
        process.read()
    yield limpet
    if process is not None:
        process.kill()
    with open_engine(limpet.state_dir) as engine:
        engine.get_sandbox("pod").remove(force=True, timeout=0)
    end_everything(limpet.state_dir)
    free_sandboxes(limpet.state_dir)


def run_with(limpet: Limpet, text: str, *args: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "limpet", "-s", limpet.state_dir, *args],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_talking_to_programs(somewhere: Limpet) -> None:
    """Output and input go where they belong, and the exit status is the program's."""
    script = "cat; echo bad >&2; exit 3"
    assert run_with(somewhere, "one\ntwo\n", "exec", "-i", "sleeps", "sh", "-c", script) == (3, "one\ntwo\n", "bad\n")
    assert run_with(somewhere, "unread", "exec", "sleeps", "cat") == (0, "", "")
    status, _, error = run_with(somewhere, "", "exec", "sleeps", "/no/such")
    assert status == 125
    assert "such" in error
    assert run_with(somewhere, "", "exec", "nobody", "true")[0] == 125
    assert run_with(somewhere, "hello\n", "attach", "echo") == (6, "got hello\n", "")
    assert run_with(somewhere, "", "attach", "nobody")[0] == 3


def test_pause_and_stats(somewhere: Limpet) -> None:
    """They are frozen, and go on; what they use is told."""
    assert somewhere.json("pause", "sleeps")["paused"][0]["paused"]
    assert not somewhere.json("resume", "sleeps")["resumed"][0]["paused"]
    used = {each["name"]: each for each in somewhere.json("stats")["containers"]}
    assert set(used) == {"sleeps", "echo"}
    assert used["sleeps"]["processes"] in {1, None}
    assert used["sleeps"]["memory_bytes"] > 0
    assert "sleeps" in somewhere.ok("stats", "sleeps")
    assert somewhere("stats", "nobody").returncode == 3


def test_what_goes_wrong_is_told(somewhere: Limpet, request: pytest.FixtureRequest) -> None:
    """With the value, in the words of the command line: its verbs and options, and the names that were given."""
    told = {
        ("rm", "sleeps"): (4, "container sleeps: it is RUNNING; stop it first, or give --force"),
        ("run", "-w", "a/b", "--sandbox", "pod", "box:1", "true"): (125, "--workdir 'a/b': an absolute path is needed"),
        ("run", "--name", "a/b", "box:1", "true"): (125, "limpet: --name 'a/b': use 1 to 253"),
        ("run", "--runtime", "runc", "--rm", "--name", "n", "box:1", "nosuch"): (
            125,
            "container n: runc create failed: ",
        ),
        ("exec", "sleeps", "echo", "\udcff"): (125, r"limpet: '\udcff' is not UTF-8"),
    }
    if "live" in request.node.name:
        told["run", "--runtime", "crun", "box:1", "true"] = (125, "--runtime 'crun': this engine has 'runc'; a program")
    for args, (status, text) in told.items():
        found, _, error = run_with(somewhere, "", *args)
        assert found == status
        assert text in error
    assert somewhere("pause", "sleeps").returncode == 0
    assert "it is paused; resume it first" in run_with(somewhere, "", "exec", "sleeps", "true")[2]
    assert somewhere("resume", "sleeps").returncode == 0


def test_an_end_that_is_forced(somewhere: Limpet) -> None:
    """SIGTERM and a terminal that is closed end the command as well; an output that takes no more does so, too.

    A stream that the caller has closed is none of ours.
    """
    base = [sys.executable, "-m", "limpet", "-s", somewhere.state_dir, "exec"]
    mark = f"4718{os.getpid()}"

    def is_there() -> bool:
        return bool(find_processes("sleep", mark))

    for number in (signal.SIGTERM, signal.SIGHUP):
        before = signal.signal(number, signal.SIG_DFL)  # under nohup(1) it is ignored, and that is inherited
        asked = subprocess.Popen([*base, "sleeps", "sleep", mark], stderr=subprocess.PIPE)
        signal.signal(number, before)
        with asked:
            wait_until(is_there, "the command")
            asked.send_signal(number)
            assert asked.communicate(timeout=30)[1] == b""
        assert asked.returncode == 128 + number
        wait_until(lambda: not is_there(), "the command to be gone")
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*base, "sleeps", "echo"], stdout=full, stderr=subprocess.PIPE, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (125, b"limpet: the output cannot be written: No space left on device\n")
    closed = ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", *base, "-i", "sleeps", "sh", "-c", "cat; echo bad >&2; exit 3"]
    assert subprocess.run(closed, timeout=30, check=False).returncode == 3


def test_a_terminal(somewhere: Limpet) -> None:
    """A command of `exec -it` has a terminal of this one's size, and this one is put back."""
    near, far = pty.openpty()
    script = "busybox stty size; read x; echo got $x; exit 7"
    process = subprocess.Popen(
        [sys.executable, "-m", "limpet", "-s", somewhere.state_dir, "exec", "-it", "sleeps", "sh", "-c", script],
        stdin=far, stdout=far, stderr=far, start_new_session=True,
    )  # fmt: skip
    try:
        os.write(near, b"hello\r")
        said = b""
        deadline = time.monotonic() + 30
        while b"got hello" not in said and time.monotonic() < deadline:
            if select.select([near], [], [], 0.1)[0]:
                said += os.read(near, 4096)
        assert b"got hello" in said, said
        assert process.wait(20) == 7
    finally:
        process.kill()
        process.wait()
        os.close(near)
        os.close(far)


def test_a_command_ends_with_who_asked(
    limpet: Limpet, engine_process: Callable[[str], EngineProcess], tmp_path: Path
) -> None:
    """Killed, the command that asked takes what it ran along; if the engine is killed, who asked is told."""
    with open_engine(limpet.state_dir) as engine:
        load_busybox(engine, tmp_path / "image")
        engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod", runtime_handler="runc")
        engine.create_container(config("one", "sleep 1000"), "pod", id="one").start()
    process = engine_process(LIVE)
    process.read()
    mark = f"4717{os.getpid()}"

    def begin() -> subprocess.Popen[bytes]:
        """Return the command that asks, once it has been told that what it asked for has begun."""
        script = f"echo on; exec sleep {mark}"
        command = [sys.executable, "-m", "limpet", "-s", limpet.state_dir, "exec", "one", "sh", "-c", script]
        asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert asked.stdout is not None
        assert asked.stdout.readline() == b"on\n"
        return asked

    def is_there() -> bool:
        return bool(find_processes("sleep", mark))

    try:
        with begin() as asked:
            wait_until(is_there, "the command")
            asked.kill()
        wait_until(lambda: not is_there(), "the command to be gone")
        with begin() as asked:
            process.kill()
            _, error = asked.communicate(timeout=30)
        assert asked.returncode == 125
        assert b"has ended" in error
    finally:
        with open_engine(limpet.state_dir) as engine:
            engine.get_sandbox("pod").remove(force=True, timeout=0)
        end_everything(limpet.state_dir)


@pytest.mark.parametrize(
    ("dies", "code", "runs"),
    [
        ("streams.encode_result", 125, 1),
        ("ControlServer._attend", 0, 1),
    ],
    ids=["before it says so", "before it is asked"],
)
def test_a_command_whose_engine_is_killed_meanwhile_runs_once(
    limpet: Limpet, engine_process: Callable[[str], EngineProcess], tmp_path: Path, dies: str, code: int, runs: int
) -> None:
    """One that may have been begun is not begun again, as it could do harm; one that cannot have been is begun."""
    with open_engine(limpet.state_dir) as engine:
        load_busybox(engine, tmp_path / "image")
        engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod", runtime_handler="runc")
        engine.create_container(config("one", "sleep 1000"), "pod", id="one").start()
    process = engine_process(f"""
from limpet import OciStarter
from limpet.engine.control import streams
from limpet.engine.control.server import ControlServer
{dies} = lambda *_: os.kill(os.getpid(), 9)
engine = Engine.open(state_dir, runtimes={{"runc": OciStarter("runc")}})
say(os.getpid())
time.sleep(1000)
""")
    process.read()
    try:
        status, _, error = run_with(limpet, "", "exec", "one", "sh", "-c", "echo ran >> /proc/1/fd/1")
        assert status == code, error
        assert process.wait() == -signal.SIGKILL
        with open_engine(limpet.state_dir) as engine:
            assert read_output(engine.get("one"), runs) == ["ran"] * runs
    finally:
        with open_engine(limpet.state_dir) as engine:
            engine.get_sandbox("pod").remove(force=True, timeout=0)
        end_everything(limpet.state_dir)


def test_run_under_a_runtime(limpet: Limpet, tmp_path: Path) -> None:
    """`run --runtime` makes the sandbox for it, also where no engine lives, and removes all with --rm."""
    with Engine.open(limpet.state_dir) as engine:
        load_busybox(engine, tmp_path / "image")
    try:
        script = "echo $$; exit 9"
        assert run_with(limpet, "", "run", "--rm", "--runtime", "runc", "box:1", "sh", "-c", script)[:2] == (9, "1\n")
        assert limpet.json("pods")["sandboxes"] == []
        status, _, error = run_with(limpet, "", "run", "--runtime", "none", "box:1", "true")
        assert status == 125
        assert "--runtime 'none': use one of" in str(error)
        assert "Engine.open" not in str(error)
    finally:
        end_everything(limpet.state_dir)
