"""Reading logs: all that is there, across rotation and while it is written; never through a link."""

import errno
import os
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from limpet.engine.logs import read_log
from limpet.engine.starters.log_directory import open_log_directory
from limpet.schema.errors import NotFoundError, ResourcesError, StartError, StateDirectoryError
from tests.conftest import wait_until
from tests.logs.conftest import Keeper, numbers, write_numbers


def line(second: int, text: str, *, stream: str = "stdout", tag: str = "F") -> str:
    return f"2026-01-31T12:00:{second:02}.000000001Z {stream} {tag} {text}\n"


ROTATED = [
    ("c.log.20260131-120000", line(1, "a") + line(2, "b1", tag="P")),
    ("c.log.20260131-120000.000001", line(3, "error", stream="stderr") + line(4, "b2", tag="P") + line(5, "b3")),
    ("c.log", line(6, "c") + line(7, "d") + line(8, "prompt> ", tag="P") + "2026-01-31T12:00:09.00"),
]


def write(directory: Path, files: Sequence[tuple[str, str]]) -> str:
    for name, text in files:
        (directory / name).write_text(text)
    return str(directory / "c.log")


def read(path: str, **wanted: object) -> list[str]:
    return [entry.text.decode() for entry in read_log(os.path.dirname(path), path, **wanted)]  # type: ignore[arg-type]


def test_parts_are_joined_across_files(tmp_path: Path) -> None:
    """All files are one log, oldest first; a line's parts are one line again; a torn line is none."""
    path = write(tmp_path, ROTATED)
    (tmp_path / "c.log.old").write_text("not ours\n")
    assert read(path) == ["a\n", "error\n", "b1b2b3\n", "c\n", "d\n", "prompt> "]
    assert read(path, stream="stderr") == ["error\n"]
    when = next(iter(read_log(str(tmp_path), path))).time_ns
    assert read(path, since_ns=when + 5 * 10**9) == ["c\n", "d\n", "prompt> "]


@pytest.mark.parametrize("count", range(8))
def test_tail_is_the_last_lines(tmp_path: Path, count: int) -> None:
    """The last lines begin in whichever file they begin; one that is not finished is one of them."""
    path = write(tmp_path, ROTATED)
    lines = ["a\n", "error\n", "b1b2b3\n", "c\n", "d\n", "prompt> "]
    assert read(path, tail=count) == lines[len(lines) - min(count, 6) :]


def test_tail_reads_little_of_a_long_log(tmp_path: Path) -> None:
    """The last lines of a long log are found from its end, also beyond a block."""
    whole = [f"{number} {'x' * 90}" for number in range(300_000)]
    path = write(tmp_path, [("c.log", "".join(line(1, text) for text in whole))])
    before = time.process_time()
    assert read(path, tail=5_000) == [f"{text}\n" for text in whole[-5_000:]]
    assert time.process_time() - before < 0.5


def test_a_plain_log_is_shown_as_it_is(tmp_path: Path) -> None:
    """A log without the format says neither streams nor times: no line of it is left out."""
    path = write(tmp_path, [("c.log", "one\ntwo\n" + "x" * 200_000 + "\nthe end")])
    whole = ["one\n", "two\n", "x" * 200_000 + "\n", "the end"]
    assert read(path) == read(path, stream="stderr", since_ns=time.time_ns()) == whole
    assert read(path, tail=2) == whole[2:]


@pytest.mark.parametrize("text", ["no end", "x" * 200_000])
def test_a_plain_log_of_one_line_without_its_end_is_its_tail(tmp_path: Path, text: str) -> None:
    """With no newline in it at all, the log is one line."""
    path = write(tmp_path, [("c.log", text)])
    assert read(path, tail=1) == read(path, tail=5) == [text]


@pytest.mark.parametrize("tail", [None, 1])
@pytest.mark.parametrize(
    "text",
    [line(1, "....", tag="P") * 250_000 + line(2, ""), "x" * (48 << 20) + "\n"],
    ids=["many parts", "one long line"],
)
def test_long_lines_take_time_by_their_length(tmp_path: Path, text: str, tail: int | None) -> None:
    """A line of very many parts, as conmon writes dots that come one by one, and a long one in a plain log."""
    path = write(tmp_path, [("c.log", text)])
    before = time.process_time()
    shown = read(path, tail=tail)
    assert time.process_time() - before < 4
    assert sum(map(len, shown)) in {1_000_001, len(text)}


def test_following_misses_nothing_of_a_log_that_is_rotated(keeper: Keeper) -> None:
    """A reader beside the copier sees every line once, in order, and ends when the container has."""
    last = 60_000
    path = str(keeper.logs / "c.log")
    out, err = keeper.make("c", max_bytes=300_000, max_files=1000)
    os.close(err)
    over = threading.Event()
    writer = write_numbers(out, last)
    wait_until(lambda: keeper.files("c"), "the log")  # that of a container is made before its program runs
    threading.Thread(target=lambda: (keeper.wait_done("c"), over.set())).start()
    found = [entry.text for entry in read_log(str(keeper.logs), path, is_over=over.is_set)]
    assert b"".join(found) == numbers(last)
    assert writer.wait() == 0
    assert len(keeper.files("c")) > 5


@pytest.mark.parametrize("tail", [None, 100])
def test_a_rotation_at_any_moment_hides_nothing(
    tmp_path: Path, tail: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is renamed as reading begins: before and after the rotated files are listed, or with no new log yet."""
    path = write(tmp_path, ROTATED)
    listed = os.scandir
    names = [f"c.log.20260131-12000{second}" for second in (4, 3, 2, 1)]

    def rotate() -> None:
        if names:
            (tmp_path / "c.log").rename(tmp_path / names.pop())
            write(tmp_path, [("c.log", "")])

    def list_amid_rotation(directory: int) -> object:
        rotate()
        with listed(directory) as entries:
            found = list(entries)
        rotate()
        return nullcontext(found)

    whole = ["a\n", "error\n", "b1b2b3\n", "c\n", "d\n"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", list_amid_rotation)
        assert read(path, tail=tail)[:5] == whole
    (tmp_path / "c.log").unlink()
    assert read(path, tail=tail)[:5] == whole


def test_a_log_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a descriptor it is the limit that is in the way, and not the file."""
    path = tmp_path / "a.log"
    path.write_bytes(b"one\n")

    def read() -> list[bytes]:
        return [entry.text for entry in read_log(str(tmp_path), str(path))]

    assert read() == [b"one\n"]
    for number, kind, told in (
        (errno.EMFILE, ResourcesError, "RLIMIT_NOFILE"),
        (errno.EIO, StateDirectoryError, "Input/output error; the disk has failed"),
    ):

        def refuse(*_: object, number: int = number, **__: object) -> int:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr("limpet.engine.logs.reader.open_parent_beneath", refuse)
            with pytest.raises(kind, match=told):
                read()


def test_no_link_or_pipe_is_read(tmp_path: Path) -> None:
    """A link, a FIFO or a missing file in the log's place is an error; so is a directory that became a link."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "c.log").write_text("secret\n")
    top = tmp_path / "logs"
    top.mkdir()
    (top / "sub").symlink_to(tmp_path / "secret")
    (top / "link").symlink_to(tmp_path / "secret" / "c.log")
    os.mkfifo(top / "fifo")
    for name, error in (
        ("sub/c.log", StateDirectoryError),
        ("link", StateDirectoryError),
        ("fifo", StateDirectoryError),
    ):
        with pytest.raises(error):
            list(read_log(str(top), str(top / name)))
    with pytest.raises(NotFoundError):
        list(read_log(str(top), str(top / "none")))
    with pytest.raises(StateDirectoryError):
        list(read_log(str(top), str(tmp_path / "secret" / "c.log")))


def test_the_log_directory_is_opened_through_no_link(tmp_path: Path) -> None:
    """Missing directories are made; a link between the log directory and the log is refused when it is used."""
    top = tmp_path / "logs"
    directory, name = open_log_directory(str(top), str(top / "a" / "b" / "c.log"))
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    os.close(directory)
    assert (top / "a" / "b" / "c.log").exists()
    (tmp_path / "elsewhere").mkdir()
    (top / "x").symlink_to(tmp_path / "elsewhere")
    (top / "file").touch()
    for inside in ("x/c.log", "x/y/c.log", "file/c.log", "../elsewhere/c.log"):
        before = os.listdir("/proc/self/fd")
        with pytest.raises(StartError):
            open_log_directory(str(top), str(top / inside))
        assert os.listdir("/proc/self/fd") == before
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "by-link").symlink_to(top)  # the directory itself is the operator's choice
    os.close(open_log_directory(str(tmp_path / "by-link"), str(top / "c.log"))[0])
