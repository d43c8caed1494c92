"""Small files of untrusted places: read whole up to the limit, and refused without waiting or following."""

import errno
import os
from pathlib import Path

import pytest

from limpet.recovery.bundles import is_empty
from limpet.recovery.files import read_small_file
from tests.conftest import wait_until

LIMIT = 200_000


@pytest.mark.parametrize("size", [0, 1, LIMIT - 1, LIMIT])
def test_a_file_up_to_the_limit_is_read_whole(tmp_path: Path, size: int) -> None:
    """Every byte, in order, of small files and of those that take several reads."""
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert read_small_file(str(tmp_path / "file"), LIMIT) == data


def test_a_file_whose_size_is_not_told_is_read_whole() -> None:
    """Files of /proc have no size."""
    environment = b"".join(b"V%d=%s\0" % (number, b"x" * 90) for number in range(300))
    child = os.posix_spawn(
        "/bin/sleep", ["sleep", "60"], dict(item.split(b"=") for item in environment.split(b"\0") if item)
    )
    try:
        wait_until(lambda: read_small_file(f"/proc/{child}/environ", LIMIT) == environment, "its environment")
        with pytest.raises(OSError, match="larger than 1000 bytes"):
            read_small_file(f"/proc/{child}/environ", 1000)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_what_is_too_large_is_refused_at_the_first_byte_more(tmp_path: Path) -> None:
    """The error names the file and the limit."""
    (tmp_path / "file").write_bytes(b"x" * (LIMIT + 1))
    with pytest.raises(OSError, match=f"larger than {LIMIT} bytes") as caught:
        read_small_file(str(tmp_path / "file"), LIMIT)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "file"))


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    """A pipe without a writer is not waited for, a link not followed, and a directory or a device not read."""
    (tmp_path / "file").write_text("secret")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    before = os.listdir("/proc/self/fd")
    for path, number in (
        (tmp_path / "link", errno.ELOOP),
        (tmp_path / "pipe", errno.EINVAL),
        (tmp_path, errno.EINVAL),
        ("/dev/zero", errno.EINVAL),
        (tmp_path / "missing", errno.ENOENT),
    ):
        with pytest.raises(OSError, match=str(path)) as caught:
            read_small_file(str(path), LIMIT)
        assert caught.value.errno == number
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [("other", "", False), (".limpet.json", "", True), (".limpet.json", "\0", True), (".limpet.json", "{}", False)],
)
def test_only_an_empty_marker_counts_as_nothing(tmp_path: Path, name: str, content: str, expected: bool) -> None:
    """Whatever else is in a directory, empty or not, is somebody's, and so is a marker that says something."""
    (tmp_path / name).write_text(content)
    assert is_empty(str(tmp_path)) is expected
