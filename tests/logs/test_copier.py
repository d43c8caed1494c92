"""The log copier: no line is lost or doubled, and nothing that happens to one log ends or stops it."""

import fcntl
import itertools
import os
import random
import select
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from limpet.engine.starters.process.keeper.log import Log
from limpet.testing import open_descriptors
from tests.campaigns.sizes import Size
from tests.conftest import DEADLINE_SECONDS, wait_until
from tests.logs.conftest import Forker, Keeper, numbers, put, write_numbers


def test_output_is_in_the_log_as_it_was_written(keeper: Keeper) -> None:
    """Lines, binary output, long lines, and an end without a newline, of both streams; then the copier says `done`."""
    long = b"x" * 16384 + b"\n" + b"y" * 16385 + b"\n" + b"z" * 50_000
    binary = bytes(range(256)) * 300
    texts = {"lines": numbers(20_000), "long": long, "binary": binary, "none": b"", "open": b"a\nprompt> "}
    for key, text in texts.items():
        out, err = keeper.make(key)
        put(err, text[::-1])
        put(out, text)
    keeper.wait_done(*texts)
    for key, text in texts.items():
        assert keeper.output(key) == text
        assert keeper.output(key, "stderr") == text[::-1]
    assert keeper.files("none")[0].stat().st_size == 0
    assert keeper.files("none")[0].stat().st_mode & 0o777 == 0o600


def test_no_line_is_lost_or_doubled_by_kills(keeper: Keeper) -> None:
    """20 containers write to two streams each, their logs are rotated, and the copier is killed again and again."""
    last = 60_000
    keys = [f"c{number}" for number in range(20)]
    writers = []
    for number, key in enumerate(keys):
        out, err = keeper.make(key, max_bytes=400_000, max_files=1000)
        writers += [write_numbers(out, last, first=number), write_numbers(err, last // 3, first=number)]
    kills = 0
    pauses = random.Random(7)
    while not keeper.is_done(*keys):
        time.sleep(pauses.uniform(0.002, 0.02))
        if kills < 40:
            keeper.kill()
            keeper.start()
            kills += 1
    assert [writer.wait(DEADLINE_SECONDS) for writer in writers] == [0] * 40
    for number, key in enumerate(keys):
        assert keeper.output(key) == numbers(last, first=number)
        assert keeper.output(key, "stderr") == numbers(last // 3, first=number)
    assert kills >= 5  # each takes a while, in which a fast machine copies much
    assert len(keeper.files("c0")) > 3


CALLS = ("open", "writev", "read", "pwrite", "rename", "unlink", "ftruncate", "close")
WHEN = ("before", "amid", "after")


@pytest.mark.campaign("copier")
@pytest.mark.timeout(600)
def test_a_kill_at_each_call_loses_and_doubles_nothing(tmp_path: Path, forker: Forker, size: Size) -> None:
    """The copier is killed before, amid and after each call that changes something; the next one goes on with the log.

    The calls are those of copying, of rotation, and of the next copier's own beginning, which is killed too.
    """
    done = 0
    for trial, (calls, when) in enumerate(itertools.product(range(1, 71), WHEN)):
        if trial % size.every:
            continue
        keeper = Keeper(tmp_path / str(trial), forker)
        try:
            keeper.kill()
            die = {"calls": calls, "of": CALLS, "when": when}
            out, err = keeper.make("c", max_bytes=60_000, max_files=1000)
            keeper.start(die=die)
            writers = [write_numbers(out, 40_000), write_numbers(err, 20_000)]
            select.select([keeper.link], [], [], 30)
            keeper.listen()
            was_killed = not keeper.done
            keeper.kill()
            if was_killed:
                keeper.start(die=die | {"calls": calls % 17 + 1})
                select.select([keeper.link], [], [], 30)
                keeper.kill()
                keeper.start()
                keeper.wait_done("c")
            assert [writer.wait(DEADLINE_SECONDS) for writer in writers] == [0, 0]
            assert keeper.output("c") == numbers(40_000), (calls, when)
            assert keeper.output("c", "stderr") == numbers(20_000), (calls, when)
            done += was_killed
        finally:
            keeper.close()
    assert done >= size.least


def test_rotation_keeps_so_many_files(keeper: Keeper) -> None:
    """A log of its size gets a name with the time; the oldest go, and files of other names stay."""
    other = keeper.logs / "c.log.other"
    other.touch()
    out, err = keeper.make("c", max_bytes=100_000, max_files=3)
    os.close(err)
    writer = write_numbers(out, 100_000)
    keeper.wait_done("c")
    assert writer.wait() == 0
    files = keeper.files("c")
    assert len(files) == 3
    assert all(file.stat().st_size <= 100_000 + 3 * 65536 * 8 for file in files)
    output = keeper.output("c")
    assert numbers(100_000).endswith(output)
    assert len(output) > 20_000  # two files of that size: what is around a line is some five times as long
    assert other.exists()


def test_a_moved_log_is_reopened_on_request(keeper: Keeper) -> None:
    """Until then, output goes to the file that was moved; from then on, to a new one of the old name."""
    out, err = keeper.make("c")
    log, moved = keeper.logs / "c.log", keeper.logs / "moved"
    os.write(out, b"1\n")
    wait_until(lambda: log.exists() and log.read_bytes().endswith(b" 1\n"), "output")
    log.rename(moved)
    os.write(err, b"2\n")
    wait_until(lambda: moved.read_bytes().endswith(b" stderr F 2\n"), "output")
    keeper.send("reopen", "c")
    wait_until(log.exists, "a new log")
    keeper.kill()
    keeper.start()
    os.write(out, b"3\n")
    wait_until(lambda: log.read_bytes().endswith(b" 3\n"), "output")
    assert log.read_bytes().count(b"\n") == 1
    assert moved.read_bytes().count(b"\n") == 2
    put(err, b"")
    put(out, b"")


def make_link(log: Path, outside: Path) -> None:
    log.symlink_to(outside)


def make_name(log: Path, outside: Path) -> None:
    log.hardlink_to(outside)


def make_fifo(log: Path, outside: Path) -> None:
    os.mkfifo(log)


def make_device(log: Path, outside: Path) -> None:
    os.mknod(log, 0o600 | stat.S_IFCHR, os.makedev(1, 3))


def test_a_line_that_another_has_not_ended_is_ended_first(tmp_path: Path) -> None:
    """Of a log that nothing is known of, the last line may be half: what comes is a line of its own."""
    (tmp_path / "c.log").write_bytes(b"half")
    note = os.open(tmp_path / "note", os.O_RDWR | os.O_CREAT, 0o600)
    log = Log(os.open(tmp_path, os.O_PATH), note, "c.log", 0, 0)
    assert log.open() == b""
    log.note()
    log.append([b"whole", b"\n"])
    assert (tmp_path / "c.log").read_bytes() == b"half\nwhole\n"
    log.end()


@pytest.mark.parametrize("swap", [make_link, make_name, make_fifo, make_device])
def test_what_is_put_in_a_logs_place_is_not_written(
    keeper: Keeper, tmp_path: Path, swap: Callable[[Path, Path], None]
) -> None:
    """Nothing is written through it; the output waits, the keeper is told, and others go on until it is gone."""
    if swap is make_device and os.geteuid():
        pytest.skip("only root makes devices")
    outside, log = tmp_path / "outside", keeper.logs / "c.log"
    outside.touch()
    swap(log, outside)
    ends = keeper.make("c")
    other, *_ = keeper.make("other")
    os.write(ends[0], b"1\n")
    wait_until(lambda: keeper.is_done() and keeper.trouble.get("c"), "the message")
    os.write(other, b"2\n")
    wait_until(lambda: (keeper.logs / "other.log").exists() and keeper.output("other") == b"2\n", "the other's output")
    assert outside.read_bytes() == b""
    log.unlink()
    wait_until(lambda: log.exists() and keeper.output("c") == b"1\n", "the output")
    wait_until(lambda: keeper.is_done() and keeper.trouble["c"] == "", "the message")
    for end in (*ends, other):
        os.close(end)


def test_output_waits_while_the_log_cannot_grow(keeper: Keeper) -> None:
    """A full disk, here a limit to a file's size: the writer is blocked, others go on, and then nothing is missing.

    The disk is full amid a write, so the log ends with a torn line for a while.
    """
    keeper.kill()
    keeper.start(fsize=100_001)
    out, err = keeper.make("c")
    os.close(err)
    other = keeper.make("other")
    writer = write_numbers(out, 30_000)
    wait_until(lambda: keeper.is_done() and keeper.trouble.get("c"), "the message")
    os.write(other[0], b"2\n")
    wait_until(lambda: keeper.output("other") == b"2\n", "the other's output")
    assert writer.poll() is None
    assert keeper.is_alive()
    keeper.kill()
    keeper.start()
    keeper.wait_done("c")
    assert writer.wait(DEADLINE_SECONDS) == 0
    assert keeper.output("c") == numbers(30_000)
    for end in other:
        os.close(end)


@pytest.mark.usefixtures("namespaces")
def test_a_full_disk_is_waited_for(tmp_path: Path, forker: Forker) -> None:
    """With no room left on the disk nothing is lost; with room again, the output comes."""
    if os.geteuid():
        pytest.skip("only root mounts")
    tmp_path = tmp_path / "disk"
    tmp_path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "limpet", tmp_path], check=True)
    try:
        keeper = Keeper(tmp_path, forker)
        out, err = keeper.make("c")
        os.close(err)
        ballast = tmp_path / "ballast"
        ballast.write_bytes(b"x" * 900_000)
        writer = write_numbers(out, 15_000)
        wait_until(lambda: keeper.is_done() and keeper.trouble.get("c"), "the message")
        ballast.unlink()
        keeper.wait_done("c")
        assert writer.wait(DEADLINE_SECONDS) == 0
        assert keeper.output("c") == numbers(15_000)
        keeper.close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_running_out_of_descriptors_delays_and_loses_nothing(keeper: Keeper) -> None:
    """With room for few logs, the others are taken as the first ones end."""
    keeper.kill()
    keeper.start(nofile=40)
    keys = [f"c{number}" for number in range(12)]
    ends = {key: keeper.make(key) for key in keys}
    for key, (out, err) in ends.items():
        os.write(out, key.encode() + b"\n")
        os.close(err)
    wait_until(lambda: (keeper.logs / "c3.log").exists() and keeper.output("c3") == b"c3\n", "the first ones")
    assert not (keeper.logs / "c11.log").exists()
    for out, _ in ends.values():
        os.close(out)
    keeper.wait_done(*keys)
    assert [keeper.output(key) for key in keys] == [key.encode() + b"\n" for key in keys]
    assert keeper.is_alive()


def test_an_unfinished_line_is_in_the_log_after_a_second(keeper: Keeper) -> None:
    """A prompt without a newline is a part of a line; what follows goes on with it."""
    out, err = keeper.make("c")
    os.write(out, b"password: ")
    wait_until(lambda: (keeper.logs / "c.log").exists() and keeper.output("c") == b"password: ", "the prompt")
    os.write(out, b"secret\n")
    put(err, b"")
    put(out, b"")
    keeper.wait_done("c")
    assert [line.split(b" ", 2)[2] for line in keeper.files("c")[0].read_bytes().splitlines()] == [
        b"P password: ",
        b"F secret",
    ]


def test_writes_that_fill_a_pipe_without_a_newline_are_taken(keeper: Keeper) -> None:
    """A pipe of few pages, or in packet mode, is full before a line is long: its parts are written."""
    out, err = keeper.make("c")
    keeper.kill()
    fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, 4096)
    keeper.start()
    os.close(err)
    put(out, b"x" * 30_000)
    keeper.wait_done("c")
    assert keeper.output("c") == b"x" * 30_000


def test_long_writes_are_copied_without_a_pause(keeper: Keeper) -> None:
    """A writer that finds a beginning of a line in the pipe, fills it and waits is seen at once, not after a second."""
    out, err = keeper.make("c")
    os.close(err)
    began = time.monotonic()
    for count in range(1, 16):
        os.write(out, b"x")
        time.sleep(0.05)  # it is looked at, and left there
        os.write(out, b"x" * 100_000 + b"\n")
        wait_until(lambda count=count: keeper.output("c").count(b"\n") == count, "the line")  # type: ignore[misc]
    assert time.monotonic() - began < 12
    os.close(out)


def test_messages_that_come_twice_or_late(keeper: Keeper) -> None:
    """A copy of what is copied changes nothing; a drop ends it with the rest unread; the copier ends with its link."""
    ends = keeper.make("c")
    keeper.copy_again("c")
    for op in ("reopen", "drop"):
        keeper.send(op, "none")
    put(ends[0], b"1\n")
    wait_until(lambda: (keeper.logs / "c.log").exists() and keeper.output("c") == b"1\n", "the output")
    keeper.send("drop", "c")
    wait_until(lambda: not has_open(keeper.pid, "c.log"), "the end of copying")
    os.close(ends[1])
    assert keeper.is_alive()
    keeper.link.shutdown(socket.SHUT_RDWR)
    assert keeper.wait() == 0


def test_a_copier_whose_keeper_is_gone_copies_what_has_ended(keeper: Keeper) -> None:
    """To the end, also what it was sent and has not taken; of what is still written it leaves the rest to the next."""
    out, err = keeper.make("running")
    os.write(out, b"1\n")
    wait_until(lambda: (keeper.logs / "running.log").exists() and keeper.output("running") == b"1\n", "the output")
    os.kill(keeper.pid, signal.SIGSTOP)
    os.write(out, b"2\n")
    said = b"a line, and one without its end: " * 1000 + b"\n$ "
    for key in ("ended", "refused"):
        ends = keeper.make(key)
        put(ends[0], said)
        os.close(ends[1])
    (keeper.logs / "refused.log").mkdir()
    os.kill(keeper.pid, signal.SIGCONT)
    assert keeper.wait() == 0
    assert keeper.output("ended") == said
    keeper.start()
    wait_until(lambda: keeper.output("running") == b"1\n2\n", "the rest")
    keeper.wait_done("ended")
    assert keeper.output("ended") == said
    for end in (out, err):
        os.close(end)


def has_open(pid: int, name: str) -> bool:
    """Say whether a process has a file of this name open."""
    return any(target.endswith(f"/{name}") for target in open_descriptors(pid).values())


def test_the_copier_stays_small(keeper: Keeper) -> None:
    """Its own memory is bounded, whatever is written: lines without end, and newlines alone."""
    for key in ("first", "second"):  # what it has read and called once is in memory
        out, err = keeper.make(key)
        os.close(err)
        put(out, b"a line\n")
        keeper.wait_done(key)
    before = rss_kib(keeper.pid)
    for key, text in {"long": b"x" * 3_000_000, "empty": b"\n" * 150_000}.items():
        out, err = keeper.make(key)
        os.close(err)
        put(out, text)
        keeper.wait_done(key)
    assert rss_kib(keeper.pid) - before < 8_000


def rss_kib(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
