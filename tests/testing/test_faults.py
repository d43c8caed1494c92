"""Failing disks: every error reaches the call it is meant for, and a store that trusts a failed flush is found."""

import contextlib
import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from limpet.schema.errors import InvalidInputError
from limpet.testing import FAILURES, Model, fault_points, replay
from limpet.testing.faults import Fault, live_with
from tests.workloads import Acknowledge, SQLiteCheckpoints, require, sync


class EveryCall:
    """Makes one call of each kind, and acknowledges what each returned: a size or an errno."""

    def live(self, directory: str, acknowledge: Acknowledge) -> None:
        os.chdir(directory)
        file = os.open("kept", os.O_CREAT | os.O_EXCL | os.O_RDWR)
        calls = {
            "open": lambda: os.close(os.open("file", os.O_CREAT | os.O_WRONLY)),
            "write": lambda: os.write(file, b"12345678"),
            "flush": lambda: os.fsync(file),
            "truncate": lambda: os.ftruncate(file, 4),
            "rename": lambda: os.rename("kept", "moved"),
            "link": lambda: os.link("moved", "linked"),
            "symlink": lambda: os.symlink("moved", "symlinked"),
            "unlink": lambda: os.unlink("linked"),
            "mkdir": lambda: os.mkdir("directory"),
            "chmod": lambda: os.fchmod(file, 0o600),
        }
        for kind, call in calls.items():
            try:
                result = call()
            except OSError as error:
                result = errno.errorcode[error.errno]  # type: ignore[assignment, index]
            acknowledge(f"{kind}={result}".encode())

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        pass


@pytest.mark.parametrize(("kind", "error"), [(kind, error) for kind in FAILURES for error in FAILURES[kind]])
def test_every_error_is_delivered(kind: str, error: str, tmp_path: Path) -> None:
    """The chosen call and no earlier one fails with the chosen error; one that lasts fails those after it."""
    fault = Fault(kind, 1 if kind == "open" else 0, error)
    assert Fault.parse(str(fault)) == fault
    aftermath = live_with(EveryCall(), fault, str(tmp_path / "live"), 60.0)
    results = dict(text.decode().split("=") for text in aftermath.trace.acknowledged)
    struck = list(results).index(kind)
    before, after = list(results.values())[:struck], list(results.values())[struck + 1 :]
    assert results[kind] == ("4" if error == "SHORT" else error.rstrip("+"))
    assert not set(before) & set(errno.errorcode.values())
    assert (error.rstrip("+") in after) is (error.endswith("+") and kind not in {"flush", "chmod"})


@pytest.mark.parametrize(
    "failures",
    [{"wirte": ("EIO",)}, {"write": ("ENOSUCH",)}, {"write": ("EDQUOT+",)}],
    ids=["kind", "error", "lasting"],
)
def test_failures_that_are_none_are_refused(failures: dict[str, Sequence[str]]) -> None:
    """A misspelt kind or error is refused; it would fail nothing, and look like a pass."""
    with pytest.raises(InvalidInputError, match="unknown kind"):
        fault_points(EveryCall(), failures=failures)


HARD = {"write": ("EIO", "SHORT"), "flush": ("EIO",), "open": ("EMFILE",), "unlink": ("EIO",)}


def test_a_store_that_heeds_errors_is_clean() -> None:
    """SQLite loses nothing acknowledged to any single error, whatever of the data had landed when a flush failed."""
    report = fault_points(SQLiteCheckpoints(count=2), failures=HARD, cuts=1, models=[Model.JOURNALED])
    assert report.clean, report.findings
    assert report.faults > 60
    assert report.images > 400


def test_an_error_that_is_ignored_is_found() -> None:
    """SQLite ignores a failed flush of its directory, which costs it the database by the letter of POSIX."""
    report = fault_points(SQLiteCheckpoints(count=1), failures={"flush": ("EIO",)}, models=[Model.POSIX])
    assert report.lost
    assert len({finding.point.split(":")[2] for finding in report.findings}) == 1, report.findings


class RetriesTheFlush:
    """Appends records, and takes a flush that succeeds at the second try for a success (fsyncgate)."""

    def live(self, directory: str, acknowledge: Acknowledge) -> None:
        file = os.open(f"{directory}/log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        sync(directory)
        for number in range(2):
            os.write(file, bytes([number]) * 4096)
            with contextlib.suppress(OSError):
                os.fsync(file)
            os.fsync(file)
            acknowledge(b"")

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        content = Path(directory, "log").read_bytes() if acknowledged else b""
        for number in range(len(acknowledged)):
            expected = bytes([number]) * 4096
            require(content[number * 4096 :][:4096] == expected, "lost", f"record {number}")


def test_a_flush_that_is_retried_is_found(tmp_path: Path) -> None:
    """The page that a failed flush dropped is missing in an image after the flush that succeeded."""
    report = fault_points(RetriesTheFlush(), failures={"flush": ("EIO",)})
    assert report.lost
    assert all(":dropped>" in f.point or ":partial>" in f.point for f in report.findings), report.findings
    finding = report.findings[0]
    again = replay(RetriesTheFlush(), finding.point, str(tmp_path / "again"))
    assert [(f.point, f.kind) for f in again.findings] == [(finding.point, finding.kind)]
