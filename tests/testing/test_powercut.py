"""Power cuts: mistakes that only an image shows are found, correct stores are clean, and a name repeats an image."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from limpet.schema.errors import InvalidInputError
from limpet.testing import Model, Point, Violation, Workload, power_cuts, recovery_cuts, replay
from tests.workloads import JSONFiles, SQLiteCheckpoints

BOTH = frozenset(Model)
CLEAN: dict[str, Workload] = {
    "WAL FULL": SQLiteCheckpoints(),
    "DELETE EXTRA": SQLiteCheckpoints(journal="delete", synchronous="EXTRA"),
    "WAL FULL in new directories, each made durable": SQLiteCheckpoints(parents="a/b", count=3),
    "JSON fsync, rename, fsync of the directory": JSONFiles("fsync", "rename", "directory"),
}
BROKEN: dict[str, tuple[Workload, frozenset[Model]]] = {  # and in which models it shows
    "WAL NORMAL": (SQLiteCheckpoints(synchronous="NORMAL"), BOTH),
    "WAL OFF": (SQLiteCheckpoints(synchronous="OFF"), BOTH),
    "acknowledged before the commit": (SQLiteCheckpoints(acknowledge_early=True), BOTH),
    "DELETE FULL": (SQLiteCheckpoints(journal="delete"), BOTH),
    "WAL FULL in new directories": (
        SQLiteCheckpoints(parents="a/b", sync_parents=False, count=3),
        frozenset({Model.POSIX}),
    ),
    "JSON in place": (JSONFiles(), BOTH),
    "JSON rename": (JSONFiles("rename"), BOTH),
    "JSON fsync, rename": (JSONFiles("fsync", "rename"), BOTH),
}


@pytest.mark.parametrize("name", CLEAN)
def test_a_store_that_keeps_its_promises_is_clean(name: str) -> None:
    """No legal image of a correct store lacks anything acknowledged, in either model, garbage included."""
    report = power_cuts(CLEAN[name], garbage=name.startswith("WAL"), samples=2)
    assert report.clean, report.findings
    assert report.images > 40


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_store_is_found(name: str) -> None:
    """Each mistake is found, in the models in which it is one, and what is lost is called so."""
    workload, models = BROKEN[name]
    for model in Model:
        report = power_cuts(workload, models=[model], samples=1)
        assert bool(report.violations) is (model in models), (model, report.findings[:3])
        assert bool(report.lost) is (model in models)


def test_a_forgotten_flush_is_found_without_chance() -> None:
    """No sample at random is needed to find a file that was renamed before its data was flushed."""
    for model in Model:
        report = power_cuts(JSONFiles("rename", "directory", count=1), samples=0, models=[model])
        assert f"names:{model}" in {finding.point.split(":", 2)[2] for finding in report.findings}


@pytest.mark.parametrize("name", ["WAL NORMAL", "JSON rename"])
def test_replay_repeats_every_finding(name: str, tmp_path: Path) -> None:
    """Findings of another seed and two workers repeat alone from their names, in the kind found."""
    workload, _ = BROKEN[name]
    report = power_cuts(workload, seed=7, workers=2)
    for finding in report.findings[:: max(1, len(report.findings) // 8)]:
        again = replay(workload, finding.point, str(tmp_path / "again"))
        assert [(f.point, f.kind) for f in again.findings] == [(finding.point, finding.kind)]


def test_workers_and_seeds_do_not_change_what_is_certain() -> None:
    """The same seed gives the same report, whoever does the work, and another seed other images."""
    workload = JSONFiles("fsync", "rename")
    assert power_cuts(workload, seed=3, workers=2) == power_cuts(workload, seed=3)
    first, second, other = (power_cuts(workload, seed=seed) for seed in (3, 3, 4))
    assert (first, first.findings) == (second, second.findings)
    assert first.findings != other.findings


def test_crashes_in_recovery() -> None:
    """Recovery that is cut short by power cuts of its own still ends in the acknowledged state."""
    report = recovery_cuts(SQLiteCheckpoints(count=6), crashes=20)
    assert report.clean, report.findings
    assert report.images > 150


class Forgetful(JSONFiles):
    """A store whose recovery rewrites its files in place: right when it ends, wrong when it is cut."""

    def __init__(self) -> None:
        super().__init__("fsync", "rename", "directory", count=4)

    def check(self, directory: str, acknowledged: object) -> None:
        super().check(directory, acknowledged)  # type: ignore[arg-type] # the same arguments
        for path in Path(directory).glob("?.json"):
            path.write_bytes(path.read_bytes())


def test_a_recovery_that_breaks_things_is_found(tmp_path: Path) -> None:
    """A recovery that is wrong only when it is interrupted is found, and its double name repeats it."""
    assert power_cuts(Forgetful()).clean
    report = recovery_cuts(Forgetful(), crashes=10)
    assert report.violations
    finding = report.findings[-1]
    assert finding.point.count(">") == 1
    again = replay(Forgetful(), finding.point, str(tmp_path / "again"))
    assert [(f.point, f.kind) for f in again.findings] == [(finding.point, finding.kind)]


class LostInTwoLines(JSONFiles):
    """Its recovery always says that something is lost, in more than one line."""

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        raise Violation("lost", "payment 1\nis gone")


def test_a_recovery_says_itself_what_it_found() -> None:
    """What a recovery that is recorded finds is reported as it says it, its kind and all lines."""
    report = recovery_cuts(LostInTwoLines(count=1), crashes=1)
    assert report.lost == report.violations == report.images
    assert report.findings[0].message == "payment 1\nis gone"


@pytest.mark.parametrize(
    "name", ["", "1", "a:1:all:posix", "0:-1:all:posix", "0:1:all:fat", "0:1:drop:posix", "kill:now:1"]
)
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    """A mistyped name is an input error that quotes it, and never a quiet pass."""
    with pytest.raises(InvalidInputError, match=re.escape(repr(name))):
        replay(JSONFiles(), name, str(tmp_path / "again"))
    with pytest.raises(InvalidInputError):
        replay(JSONFiles(), "0:999999:all:posix", str(tmp_path / "again"))


def test_names_are_read_as_they_are_printed() -> None:
    """A point's text and the point are the same thing."""
    point = Point(3, 14, "torn.15", Model.JOURNALED)
    assert Point.parse(str(point)) == point
