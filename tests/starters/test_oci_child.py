"""What a host does with its children, forks and signals: what is said of OCI containers is true nevertheless."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet.engine.starters.oci import child
from limpet.engine.starters.oci.child import UNKNOWN, Child
from limpet.engine.starters.oci.command import run
from limpet.engine.state import forks
from limpet.engine.state.forks import opened_here, undisturbed
from limpet.recovery.host import read_wait_status, wait_for_end
from tests.children import reap_any
from tests.starters.oci import each_runtime, end_everything, load_busybox, open_engine

HOST = """
import os, signal, sys, threading, time
from limpet.engine import Engine, errors
from limpet.schema.cri import LinuxContainerResources
from tests.children import reap_any
from tests.starters.oci import config, open_engine

state_dir, runtime, harm = sys.argv[1:]
over, forked = threading.Event(), []
forking = threading.Lock()  # until a fork runs: before that it has open what was being unpacked

def fork():
    has_begun, begin = os.pipe2(os.O_CLOEXEC)
    while not over.is_set():
        with forking:
            pid = os.fork()
            if not pid:
                os.write(begin, b"x")
                time.sleep(1000)
                os._exit(0)
            forked.append(pid)
            os.read(has_begun, 1)
        time.sleep(0.02)

def connected(container, script):
    session = container.open_command(["sh", "-c", script])
    try:
        session.end_input()
        return session.wait(20)
    finally:
        session.close()

if harm == "ignore":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])
thread = threading.Thread(target={"fork": fork, "reap": lambda: reap_any(over), "ignore": lambda: None}[harm])
thread.start()
try:
    with open_engine(state_dir) as engine:
        sandboxes = [
            engine.create_sandbox({"metadata": {"name": name}}, id=name, runtime_handler=runtime)
            for name in ("s0", "s1", "s2")
        ]
        for n in range(3):
            script = "grep -E 'Sig(Ign|Blk)' /proc/self/status; while :; do sleep 1; done"
            one = engine.create_container(config(f"c{n}", script), "s0", id=f"c{n}")
            with forking:
                pass
            one.start()
            codes = [one.execute(["sh", "-c", f"exit {code}"], timeout=20).code for code in (3, 4, 0, 5)]
            print(*codes, connected(one, "exit 6"))
            try:
                one.change_limits(LinuxContainerResources(memory_limit_in_bytes=4096))
            except errors.InvalidInputError:
                print("refused")
            signals = [int(entry.text.split()[1], 16) & ~(3 << 31) for entry in one.read_log()]  # without glibc's own
            print(signals, one.stop(0).exit_code)
            one.remove()
        try:
            engine.create_sandbox(
                {"metadata": {"name": "bad"}, "linux": {"sysctls": {"net.no.such": "1"}}}, runtime_handler=runtime
            )
        except errors.UnsupportedError:
            print("refused")
        began = time.monotonic()
        for each in sandboxes:
            each.remove()
        print(time.monotonic() - began < 5)
    over.set()
    thread.join()
    began = time.monotonic()
    with open_engine(state_dir) as engine:
        print(engine.list_sandboxes(), time.monotonic() - began < 4)
finally:
    over.set()
    for pid in forked:
        os.kill(pid, signal.SIGKILL)
"""


@pytest.mark.parametrize("harm", ["fork", "reap", "ignore"])
@each_runtime
def test_a_host_that(state_dir: str, tmp_path: Path, runtime: str, harm: str) -> None:
    """Forks, reaps or ignores what ends: each code is the program's, and what failed is not said to be done."""
    if harm != "fork" and not tells_exits():
        pytest.skip("this kernel tells nobody else how a process has ended")
    with open_engine(state_dir) as engine:
        load_busybox(engine, tmp_path / "image")
    try:
        done = subprocess.run(
            [sys.executable, "-c", HOST, state_dir, runtime, harm],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            cwd=Path(__file__).parents[2],
        )
    finally:
        end_everything(state_dir)
    assert done.returncode == 0, done.stderr
    each = ["3 4 0 5 6", "refused", "[0, 0] 137"]
    assert done.stdout.splitlines() == [*each * 3, "refused", "True", "[] True"]


def tells_exits() -> bool:
    """Say whether the kernel tells an exit code by a pidfd (Linux 6.15)."""
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 3"], {})
    pidfd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    try:
        return read_wait_status(pid, pidfd) is not None
    finally:
        os.close(pidfd)


@pytest.fixture
def reaped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Children are reaped by another thread, as before Linux 6.15."""
    over = threading.Event()
    monkeypatch.setattr(child, "read_wait_status", lambda *_: None)
    monkeypatch.setattr(child, "_others", set())
    monkeypatch.setattr(child, "_REAPED_SECONDS", 0.01)
    real = os.waitid

    def wait(*arguments: int) -> object:  # as if the other thread was always the first
        raise ChildProcessError

    monkeypatch.setattr(os, "waitid", wait)
    thread = threading.Thread(target=reap_any, args=(over,))
    thread.start()
    yield
    over.set()
    thread.join()
    monkeypatch.setattr(os, "waitid", real)


@pytest.mark.usefixtures("reaped")
def test_what_nobody_can_tell_is_unknown() -> None:
    """It is no success, and no end of another kind; a deadline is still one."""
    outcome = run(["/bin/sh", "-c", "echo said >&2; exit 0"], timeout=20)
    assert (outcome.code, outcome.error) == (UNKNOWN, b"said\n")
    assert "how is not known" in outcome.problem
    assert "(said)" in outcome.problem
    assert run(["/bin/sleep", "1000"], timeout=0.2).code is None


def test_a_child() -> None:
    """Its end, how it was, and its streams; a signal by its number, and once it is closed no less."""
    quick = begin("exit 7")
    assert quick.wait(20)
    assert (quick.poll(), quick.poll()) == (7, 7)
    quick.kill()
    slow = begin("exec sleep 1000")
    assert not slow.wait(0.01)
    assert slow.poll() is None
    slow.kill()
    assert slow.wait(20)
    for each, code in ((quick, 7), (slow, -signal.SIGKILL)):
        each.close()
        each.close()
        assert (each.poll(), each.pidfd) == (code, -1)
    with pytest.raises(FileNotFoundError):
        Child(["/no/such"], stdin=-3, stdout=-3, stderr=-3, environment={})


def begin(script: str) -> Child:
    null = subprocess.DEVNULL
    return Child(["/bin/sh", "-c", script], stdin=null, stdout=null, stderr=null, environment={})


def fork_into(forked: list[int]) -> None:
    """Fork, and note the pid. The fork ends at once, if it may: what another thread was at is not its own any more."""
    pid = os.fork()
    if not pid:
        with undisturbed():
            os._exit(0)
    forked.append(pid)


def test_a_fork_waits_for_a_beginning() -> None:
    """And has none of its locks; one by a signal's handler, or amid a beginning that hangs, goes on."""
    read, write = os.pipe()
    forked: list[int] = []
    thread = threading.Thread(target=fork_into, args=(forked,))
    with undisturbed():
        thread.start()
        time.sleep(0.1)
        assert not forked
        fork_into(forked)  # in this thread
        os.close(write)
    thread.join(20)
    assert os.read(read, 1) == b""
    os.close(read)
    assert [os.waitpid(pid, 0)[1] for pid in forked] == [0, 0]


def test_a_fork_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the program is on a disk that hangs."""
    monkeypatch.setattr(forks, "_FORK_SECONDS", 0.05)
    forked: list[int] = []
    thread = threading.Thread(target=fork_into, args=(forked,))
    with undisturbed():
        thread.start()
        thread.join(20)
        assert len(forked) == 1
    with os.fdopen(os.pidfd_open(forked[0])) as pidfd:
        assert wait_for_end(pidfd.fileno(), 20)
    os.waitpid(forked[0], 0)


def test_what_forks_close(tmp_path: Path) -> None:
    """A file that is open for writing in one could not be executed."""
    script = tmp_path / "script"
    read, write = os.pipe()
    parent = os.open(tmp_path, os.O_PATH)
    with opened_here(b"script", os.O_WRONLY | os.O_CREAT, 0o755, dir_fd=parent) as descriptor:
        os.write(descriptor, b"#!/bin/sh\nexit 3\n")
        pid = os.fork()
        if not pid:
            os.write(write, b"x")
            time.sleep(1000)
            os._exit(0)
    os.close(parent)
    try:
        assert os.read(read, 1) == b"x"
        assert subprocess.run([script], check=False).returncode == 3
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("ends_by", ["close_input", "close"])
def test_an_input_ends_though_a_fork_lives(tmp_path: Path, ends_by: str) -> None:
    """A worker that the host has forked meanwhile, and that runs for long, does not keep it open."""
    with open(tmp_path / "said", "wb") as said:
        one = Child(["cat"], stdin=subprocess.PIPE, stdout=said.fileno(), stderr=said, environment=os.environ)
    has_begun, begin = os.pipe()
    assert one.stdin is not None
    number = one.stdin.fileno()
    pid = os.fork()
    if not pid:
        os.write(begin, b"x" if os.readlink(f"/proc/self/fd/{number}") == os.devnull else b"-")
        signal.pause()
    try:
        assert os.read(has_begun, 1) == b"x"
        os.write(number, b"here")
        getattr(one, ends_by)()
        assert one.wait(10)
        assert one.poll() == 0
        assert (tmp_path / "said").read_bytes() == b"here"
    finally:
        one.kill()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for each in (has_begun, begin):
            os.close(each)
        one.wait(10)
        one.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_not_open_any_more_is_not_hidden() -> None:
    """A fork keeps what has got the number since, also where nobody has closed the file."""
    with undisturbed():
        file = os.fdopen(os.dup(0), "rb", buffering=0)
        forks.hide(file)
    number = file.fileno()
    del file
    read, write = os.pipe()
    assert number in {read, write}
    pid = os.fork()
    if not pid:
        os._exit(os.readlink(f"/proc/self/fd/{number}") == os.devnull)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(read)
    os.close(write)
