"""The log copier: no line is lost or doubled, and nothing that happens to one log ends or stops it."""

import os

from tests.logs.conftest import Keeper, numbers, put, write_numbers


def test_output_is_in_the_log_as_it_was_written(keeper: Keeper) -> None:
    """Lines, binary output, long lines, and an end without a newline, of both streams; then the copier says `done`."""
    long = b"x" * 16384 + b"\n" + b"y" * 16385 + b"\n" + b"z" * 50_000
    binary = bytes(range(256)) * 300
    texts = {"lines": numbers(20_000), "long": long, "binary": binary, "none": b"", "open": b"a\nprompt> "}
    for id, text in texts.items():
        out, err = keeper.make(id)
        put(err, text[::-1])
        put(out, text)
    keeper.wait_done(*texts)
    for id, text in texts.items():
        assert keeper.output(id) == text
        assert keeper.output(id, "stderr") == text[::-1]
    assert keeper.files("none")[0].stat().st_size == 0
    assert keeper.files("none")[0].stat().st_mode & 0o777 == 0o640
    assert not list((keeper.directory / "fifo").glob("*.at"))
