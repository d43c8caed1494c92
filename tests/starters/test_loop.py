"""The keeper's loop: whoever can be read is served, whatever the others do, and nobody in another's place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from limpet.engine.starters.process.keeper.loop import Loop


def pipe() -> int:
    """A pipe's end for reading, with a byte in it, and no writer any more."""
    read, write = os.pipe()
    os.write(write, b"x")
    os.close(write)
    return read


def serve(loop: Loop) -> None:
    loop.serve(loop.wait(0))


def test_each_that_can_be_read_is_served_though_another_raises() -> None:
    """In every round, until it is watched no more; who cannot be read is not called."""
    loop, called = Loop(), []
    quiet, quiet_end = os.pipe()
    rude, polite = pipe(), pipe()

    def raise_() -> None:
        called.append("rude")
        raise RuntimeError("not now")

    loop.watch(quiet, lambda: called.append("quiet"))
    loop.watch(rude, raise_)
    loop.watch(polite, lambda: called.append("polite"))
    serve(loop)
    assert called == ["rude", "polite"]
    loop.unwatch(rude)
    assert loop.wait(0) == [(polite, 1 | 16)]  # EPOLLIN | EPOLLHUP
    loop.unwatch(rude)
    serve(loop)
    assert called == ["rude", "polite", "polite"]
    for each in (quiet, quiet_end, rude, polite):
        loop.unwatch(each)
        os.close(each)
    assert loop.wait(0) == []


def test_a_number_that_is_anothers_by_now_is_not_served() -> None:
    """A handler closes a descriptor that can be read, too, and another one takes its number: it was not asked."""
    loop, called = Loop(), []
    first, second = pipe(), pipe()

    def replace() -> None:
        called.append("first")
        loop.unwatch(second)
        os.close(second)
        again, end = os.pipe()
        os.close(end)
        if again != second:
            os.dup2(again, second)
        loop.watch(second, lambda: called.append("another"))

    loop.watch(first, replace)
    loop.watch(second, lambda: called.append("second"))
    serve(loop)
    assert called == ["first"]
    loop.unwatch(first)
    serve(loop)
    assert called == ["first", "another"]


def test_what_epoll_refuses_is_not_watched(tmp_path: Path) -> None:
    """A plain file is refused with an error; its number can be watched later on, for something else."""
    loop, called = Loop(), []
    number = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with pytest.raises(PermissionError):
        loop.watch(number, lambda: called.append("file"))
    read = pipe()
    os.dup2(read, number)
    loop.unwatch(number)
    assert loop.wait(0) == []
    loop.watch(number, lambda: called.append("pipe"))
    serve(loop)
    assert called == ["pipe"]
    for each in (read, number):
        os.close(each)


CHILDREN = """
import os, subprocess, time
from limpet.engine.starters.process.keeper.loop import Loop
loop, seen = Loop(), []
before = len(os.listdir("/proc/self/fd"))
loop.watch_children(lambda: seen.append(1))
assert all(not os.get_inheritable(int(each)) for each in os.listdir("/proc/self/fd") if int(each) > 2 and
           os.path.exists(f"/proc/self/fd/{each}"))
for number in range(1, 4):
    pid = os.spawnlp(os.P_NOWAIT, "true", "true")
    deadline = time.monotonic() + 20
    while len(seen) < number and time.monotonic() < deadline:
        loop.serve(loop.wait(1.0))
    os.waitpid(pid, 0)
    assert len(seen) == number, seen
    assert loop.wait(0) == [], "what was noted is read"
print("told")
"""


def test_each_end_of_a_child_is_told_once() -> None:
    """SIGCHLD wakes the loop, and is over when it was seen; no program that is started inherits what it is told by."""
    done = subprocess.run([sys.executable, "-c", CHILDREN], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr
