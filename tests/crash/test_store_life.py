"""The store is killed at every system call, loses power at every one, and has each of them fail."""

from collections.abc import Iterable

import pytest

from tests.campaigns.sizes import Size
from tests.crash.trial import WORKERS, run


def over(seeds: Iterable[int], call: str) -> str:
    """Return an expression that adds up the reports of a call over seeds."""
    return f"sum(({call} for seed in {[*seeds]}), Report())"


def mostly_current(count: int, others: int) -> list[int]:
    """Return the seeds of so many lives, of which `others` make their database first, and as many migrate one.

    What is left before that is made or migrated again by each check, which takes half as long again.
    """
    return [*(seed for seed in range(3 * others) if seed % 3 != 2), *range(2, 3 * (count - 2 * others), 3)]


@pytest.mark.campaign("kill")
@pytest.mark.timeout(1800)
def test_every_kill_point(size: Size) -> None:
    """Killed before, amid and after every file-changing call: nothing acknowledged is lost or torn."""
    options = f"every={size.every}, workers={WORKERS}"
    report = run(
        f"kill_points(StoreLife(6), {options})"
        f" + {over(mostly_current(19, 1), f'kill_points(StoreLife(120, seed=seed), {options})')}"
    )
    assert report["points"] >= size.least
    assert report["violations"] == 0, report["findings"]


@pytest.mark.campaign("sigkill")
@pytest.mark.timeout(1800)
def test_true_kills(size: Size) -> None:
    """A store and an engine are killed in earnest: their locks, shared memory and processes are no hindrance."""
    report = run(
        f"true_kills(StoreLife(2), every={7 * size.every}, workers={WORKERS})"
        f" + true_kills(EngineLife(1), every={9 * size.every}, workers={WORKERS})"
    )
    assert report["points"] >= size.least
    assert report["violations"] == 0, report["findings"]


@pytest.mark.campaign("engine")
@pytest.mark.timeout(1800)
def test_kills_of_an_engine(size: Size) -> None:
    """An engine with real processes, killed at every call: every verdict is true, nothing is left over."""
    report = run(f"kill_points(EngineLife(0), every={size.every}, workers={WORKERS})")
    assert report["points"] >= size.least
    assert report["violations"] == 0, report["findings"]


@pytest.mark.campaign("power")
@pytest.mark.timeout(1800)
def test_power_cuts(size: Size) -> None:
    """Every disk that a power cut may leave, in both models, holds what was acknowledged."""
    options = f"every={size.every}, workers={WORKERS}"
    report = run(
        over(mostly_current(8, 2), f"power_cuts(StoreLife(12, seed=seed), seed=seed, samples=4, {options})")
        + f" + power_cuts(EngineLife(processes=False), samples=1, every={8 * size.every}, workers={WORKERS})"
    )
    assert report["images"] >= size.least
    assert report["violations"] == 0, report["findings"]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("life", "is_sound"), [("ReadLife", True), ("UnflushedReadLife", False)])
def test_power_cuts_that_are_read(life: str, is_sound: bool) -> None:
    """Reading what a cut left, as the long run does, finds nothing in the store, and what is lost in a broken one."""
    report = run(f"power_cuts({life}(2), samples=1, every=8, workers={WORKERS})")
    assert report["images"] > 100
    assert (report["violations"] == 0) is is_sound, report["findings"]


@pytest.mark.long
@pytest.mark.campaign("recovery")
@pytest.mark.timeout(1800)
def test_power_cuts_of_the_recovery(size: Size) -> None:
    """The power is cut again during the recovery: also the remains of two torn commits are no damage."""
    options = f"every={size.every}, workers={WORKERS}"
    report = run(
        f"recovery_cuts(StoreLife(12, seed=34), crashes=8, seed=34, {options})"
        f" + recovery_cuts(StoreLife(12, seed=23), crashes=8, seed=23, {options})"
        f" + recovery_cuts(EngineLife(processes=False), crashes=1, {options})"
    )
    assert report["images"] >= size.least
    assert report["violations"] == 0, report["findings"]


@pytest.mark.long
@pytest.mark.campaign("wal")
@pytest.mark.timeout(1800)
def test_power_cuts_while_the_wal_begins_anew(size: Size) -> None:
    """A WAL that is begun anew every few commits, by the writer or by SQLite, and cut amid that and its recovery."""
    options = f"every={size.every}, workers={WORKERS}"
    report = run(
        over(range(2), f"power_cuts(small_wal(seed), seed=seed, samples=1, {options})")
        + f" + recovery_cuts(small_wal(2), crashes=2, seed=2, {options})"
    )
    assert report["images"] >= size.least
    assert report["violations"] == 0, report["findings"]


@pytest.mark.campaign("upgrade")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.long) for name in ("0001", "0001-killed", "0002")), "0002-killed"]
)
def test_an_upgrade_cut_short(name: str, size: Size) -> None:
    """A saved state of each older revision, killed or cut off amid its upgrade, loses nothing and gains no damage."""
    life, options = f"Upgrade({name!r})", f"every={size.every}, workers={WORKERS}"
    report = run(
        f"kill_points({life}, {options}) + power_cuts({life}, samples=1, {options})"
        f" + recovery_cuts({life}, crashes=1, samples=1, {options})"
    )
    assert report["points"] + report["images"] >= size.least
    assert report["violations"] == 0, report["findings"]


@pytest.mark.campaign("errors")
@pytest.mark.timeout(1800)
def test_failing_disk(size: Size) -> None:
    """Every call fails with every error: the caller is told, or the store will not open; never a wrong answer."""
    report = run(f"fault_points(FailingDiskLife(1), cuts=0, every={size.every}, workers={WORKERS})")
    assert report["faults"] >= size.least
    assert report["images"] >= 15 * size.least
    assert report["violations"] == 0, report["findings"]
