"""Kill points: what a SIGKILL at each system call leaves, by copy and in earnest."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from limpet.schema.errors import InvalidInputError
from limpet.testing import (
    Life,
    NothingToTestError,
    Workload,
    fault_points,
    kill_points,
    power_cuts,
    replay,
    true_kills,
)
from limpet.testing.disk import SECTOR
from limpet.testing.kills import KillPoint, kill_at
from limpet.testing.operations import Write
from tests.workloads import JSONFiles, SQLiteCheckpoints, require, sync

BROKEN = {
    "acknowledged before the commit": (SQLiteCheckpoints(acknowledge_early=True), {"lost"}),
    "two transactions instead of one": (SQLiteCheckpoints(transactions=2), {"torn", "other"}),
    "a file overwritten in place": (JSONFiles("fsync", "directory"), {"torn"}),
}


def test_a_store_that_keeps_its_promises_is_clean_at_every_kill_point() -> None:
    """SQLite with one transaction per acknowledgement loses nothing to a kill, at any call or half-way through one."""
    report = kill_points(SQLiteCheckpoints())
    assert report.clean, report.findings
    assert report.points > 150
    assert report.acknowledged > 700


def test_true_kills_agree() -> None:
    """The same store killed in earnest before, after and half-way through every seventh call is clean too."""
    report = true_kills(SQLiteCheckpoints(), every=7, workers=2)
    assert report.clean, report.findings
    assert report.points > 40


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("way", [kill_points, true_kills])
def test_a_broken_store_is_found(name: str, way: object) -> None:
    """Every mistake that a kill can show is shown, whichever way the kill is made."""
    workload, kinds = BROKEN[name]
    report = kill_points(workload) if way is kill_points else true_kills(workload, every=3)  # type: ignore[arg-type]
    assert {finding.kind for finding in report.findings} & kinds
    assert {finding.kind for finding in report.findings} <= kinds


def tree(directory: str) -> dict[str, bytes]:
    return {name: Path(directory, name).read_bytes() for name in sorted(os.listdir(directory))}


class Pages(JSONFiles):
    """Writes of several sectors, which can be cut in half."""

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        for number in range(3):
            with open(f"{directory}/{number}", "wb") as file:
                file.write(bytes([number]) * 3 * SECTOR)
            acknowledge(b"%d" % number)


def test_a_copy_is_what_a_kill_leaves(tmp_path: Path) -> None:
    """Before, after and half-way through every call the stopped life's directory is what a kill there leaves."""
    workload: Workload = Pages()
    seen: dict[KillPoint, object] = {}
    (tmp_path / "live").mkdir()
    with Life(workload.live, str(tmp_path / "live")) as life:
        for number, step in enumerate(life):
            seen[KillPoint("kill", "before", number)] = (tree(life.directory), life.acknowledged)
            if isinstance(step.operation, Write):
                step.perform(2 * SECTOR)
                seen[KillPoint("kill", "half", number)] = (tree(life.directory), life.acknowledged)
            step.perform()
            seen[KillPoint("kill", "after", number)] = (tree(life.directory), life.acknowledged)
    assert len({point.when for point in seen}) == 3
    for point, state in seen.items():
        acknowledged = kill_at(workload, point, str(tmp_path / "killed"), 60.0)
        assert (tree(str(tmp_path / "killed")), acknowledged) == state, point


@pytest.mark.parametrize("way", ["snapshot", "kill"])
def test_replay_repeats_a_finding(way: str, tmp_path: Path) -> None:
    """The name in a finding is enough to make the same state again and find the same in it."""
    workload: Workload = JSONFiles("fsync")
    report = kill_points(workload) if way == "snapshot" else true_kills(workload, every=2)
    for finding in report.findings[:3]:
        again = replay(workload, finding.point, str(tmp_path / "again"))
        assert [(f.point, f.kind) for f in again.findings] == [(finding.point, finding.kind)]
        assert (tmp_path / "again" / "found").is_dir()


class LivesOnce(JSONFiles):
    """Needs something outside that only its first life finds: the others end before their time."""

    def __init__(self, outside: Path) -> None:
        super().__init__("fsync", "directory")
        self.outside = outside

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        self.outside.mkdir()
        super().live(directory, acknowledge)


def test_a_point_that_is_not_reached_is_no_pass(tmp_path: Path) -> None:
    """A life that ends too early is a finding with its traceback, and a point beyond its end is refused."""
    for report in (true_kills(LivesOnce(tmp_path / "1")), fault_points(LivesOnce(tmp_path / "2"), every=3)):
        assert report.other == report.points + report.faults > 5
        assert "FileExistsError" in report.findings[0].message
    for point in ("kill:before:999", "snapshot:half:999", "fault:write:999:EIO", "0:999:all:posix"):
        with pytest.raises(InvalidInputError, match="999"):
            replay(JSONFiles("fsync"), point, str(tmp_path / "again"))


class Published(JSONFiles):
    """Publishes a file by a second name, and the two are one."""

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        with open(f"{directory}/new", "wb", buffering=0) as file:
            file.write(b"x")
            os.fsync(file.fileno())
        os.link(f"{directory}/new", f"{directory}/published")
        sync(directory)
        acknowledge(b"")
        os.unlink(f"{directory}/new")

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        names = os.listdir(directory)
        if acknowledged:
            require("published" in names, "lost", f"{names}")
        if len(names) == 2:
            require(os.path.samefile(f"{directory}/new", f"{directory}/published"), "torn", "two files")


def test_names_of_one_file_stay_names_of_one_file() -> None:
    """What a kill or a power cut leaves has hard links where the life made them."""
    for report in (kill_points(Published()), true_kills(Published()), power_cuts(Published())):
        assert report.clean, report.findings


@pytest.mark.parametrize("name", ["every", "workers"])
def test_numbers_that_are_none_are_refused(name: str) -> None:
    """A step or a number of processes of 0 is refused, and one that leaves no point proves nothing."""
    for way in (true_kills, power_cuts, fault_points):
        with pytest.raises(InvalidInputError, match=f"{name} is 0"):
            way(JSONFiles(), **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(NothingToTestError):
        power_cuts(JSONFiles(), seed=998, every=999)


def test_a_workload_that_does_nothing_proves_nothing() -> None:
    """A life without a single operation is refused, for a report without findings would look like a pass."""

    class Idle(JSONFiles):
        def live(self, directory: str, acknowledge: object) -> None:
            pass

    for way in (kill_points, true_kills):
        with pytest.raises(NothingToTestError):
            way(Idle())


def test_what_is_left_out_is_tried_from_another_one_on() -> None:
    """Every third operation from the first, second and third on is all of them, each once."""
    whole = true_kills(Published())
    assert sum(true_kills(Published(), every=3, first=first).points for first in range(3)) == whole.points
