"""The log copier: no line is lost or doubled, and nothing that happens to one log ends or stops it."""

import itertools
import random
import select
import time
from pathlib import Path

import pytest

from tests.campaigns.sizes import Size
from tests.conftest import DEADLINE_SECONDS
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
    assert keeper.files("none")[0].stat().st_mode & 0o777 == 0o640
    assert not list((keeper.directory / "fifo").glob("*.at"))


def test_no_line_is_lost_or_doubled_by_kills(keeper: Keeper) -> None:
    """20 containers write to two streams each, their logs are rotated, and the copier is killed again and again."""
    last = 150_000
    keys = [f"c{number}" for number in range(20)]
    writers = []
    for number, key in enumerate(keys):
        out, err = keeper.make(key, max_bytes=1_000_000, max_files=1000)
        writers += [write_numbers(out, last, first=number), write_numbers(err, last // 3, first=number)]
    kills = 0
    pauses = random.Random(7)
    while not keeper.is_done(*keys):
        time.sleep(pauses.uniform(0.002, 0.02))
        keeper.kill()
        keeper.start()
        kills += 1
    assert [writer.wait(DEADLINE_SECONDS) for writer in writers] == [0] * 40
    for number, key in enumerate(keys):
        assert keeper.output(key) == numbers(last, first=number)
        assert keeper.output(key, "stderr") == numbers(last // 3, first=number)
    assert kills >= 10
    assert len(keeper.files("c0")) > 3


CALLS = ("open", "writev", "read", "pwrite", "rename", "unlink", "ftruncate", "close")
WHEN = ("before", "amid", "after")


@pytest.mark.campaign("copier")
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
