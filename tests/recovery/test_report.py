"""A report says of itself what is left to be done."""

import os
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.recovery import Boot, Observation, Process
from limpet.recovery.orphans import Disposal, judge_orphan
from limpet.recovery.report import Finding, Report, SandboxFinding, make_damaged_finding
from limpet.recovery.users import Users

RUNS = Finding(
    id="a",
    checkpoint={},
    observation=Observation(boot=Boot.SAME, process=Process.ALIVE),
    rule="survivor",
    state="RUNNING",
    status={},
    because="",
)
ENDED = replace(RUNS, id="b", rule="exit-observed", state="EXITED")
DOUBTFUL = replace(RUNS, id="c", rule="not-proven", state="UNKNOWN")
FAILED = replace(RUNS, id="d", problem="the disk is full")
READY = SandboxFinding(id="s", checkpoint={}, rule="sandbox-rebooted", state="NOTREADY", status={}, because="")
NOTHING = Report(number=1, at=1, took_ns=1, boot_id="b")


def test_the_totals_count_each_container_once() -> None:
    """By its state, and once more if something failed for it."""
    report = replace(NOTHING, findings=(RUNS, ENDED, DOUBTFUL, FAILED))
    assert report.totals == {"CREATED": 0, "RUNNING": 2, "EXITED": 1, "UNKNOWN": 1, "problems": 1}
    assert set(NOTHING.totals.values()) == {0}


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (NOTHING, False),
        (replace(NOTHING, findings=(RUNS, ENDED), sandboxes=(READY,)), False),
        (replace(NOTHING, findings=(RUNS, DOUBTFUL)), True),
        (replace(NOTHING, findings=(RUNS, FAILED)), True),
        (replace(NOTHING, sandboxes=(READY, replace(READY, rule="sandbox-no-boot-id"))), True),
        (replace(NOTHING, sandboxes=(READY, make_damaged_finding("t", "its checksum is wrong"))), True),
    ],
)
def test_one_thing_that_is_left_open_is_enough(report: Report, expected: bool) -> None:
    """A doubtful container, one for which something failed, or a sandbox that may not be ready."""
    assert report.has_unresolved is expected


def test_an_orphan_that_could_not_be_moved_is_left_open(tmp_path: Path) -> None:
    """What a recovery could not do is told, also where every container is as it should be."""
    orphan = judge_orphan(str(tmp_path), node="local", users=Users(), now=time.time())
    assert not replace(NOTHING, orphans=(orphan,)).has_unresolved
    assert replace(NOTHING, orphans=(orphan, replace(orphan, error="read-only"))).has_unresolved


@pytest.mark.parametrize(("age", "disposal"), [(50, Disposal.QUARANTINE), (150, Disposal.REMOVE)])
def test_an_orphan_of_ours_is_removed_when_its_time_of_grace_is_over(
    tmp_path: Path, age: int, disposal: Disposal
) -> None:
    """Within it, somebody may be making it just now: it is put aside."""
    if time.clock_gettime(time.CLOCK_BOOTTIME) < 300:
        pytest.skip("this machine has just been started")
    now = time.time()
    (tmp_path / "one").mkdir()
    os.utime(tmp_path / "one", (now - age, now - age))
    path = str(tmp_path / "one")
    assert judge_orphan(path, node="local", users=Users(), now=now, grace_seconds=100).disposal is disposal
