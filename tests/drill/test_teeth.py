"""The drill has teeth: it passes an engine that keeps its promises, and finds out those that do not."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest

from limpet.engine.drill.script import Disaster, draw_rounds

ROUNDS, CONTAINERS, DRILLS = 4, 16, 5
RUN = f"""
import json, sys, msgspec
from limpet.engine.drill import run_drill
seed, directory, factory = sys.argv[1:]
report = run_drill(
    rounds={ROUNDS}, containers={CONTAINERS}, seed=int(seed), directory=directory, engine_factory=factory
)
print(json.dumps(msgspec.to_builtins(report) | dict(passed=report.passed)))
"""
FAULTS = {"lost", "torn", "false_running", "false_exited", "wrong_exit_code", "leaked", "harmed", "broken"}


def run(directory: Path, factory: str, seed: int) -> dict[str, Any]:
    """Run a drill in a pid namespace of its own, where it may choose pids; a user needs a user namespace for that."""
    flags = ["-pf", "--mount-proc", *([] if os.geteuid() == 0 else ["-Ur"])]
    drill = [sys.executable, "-c", RUN, str(seed), str(directory), factory]
    # The shell is the namespace's init, whose death ends whatever a broken engine may leave.
    result = subprocess.run(
        ["unshare", *flags, "--", "sh", "-c", '"$@"; exit $?', "sh", *drill],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"PYTHONPATH": os.path.dirname(__file__)},
    )
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def eventful_seeds() -> Iterator[int]:
    """Yield seeds whose plans have many chances to go wrong."""
    wanted = Counter({Disaster.KILL: 4, Disaster.REPLACE_UNSEEN: 2, Disaster.SWAP_BUNDLE: 1, Disaster.PLANT_LINK: 1})
    for seed in count(1):
        rounds = draw_rounds(ROUNDS, CONTAINERS, seed)
        if wanted <= Counter(each.disaster for planned in rounds for each in planned.disturbances):
            yield seed


def faults(report: dict[str, Any]) -> set[str]:
    return {name for name in FAULTS if report[name]}


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_an_engine_that_keeps_its_promises_passes(tmp_path: Path, seed: int) -> None:
    """Nothing is held against the real engine, whatever was killed, reused, removed or planted; much has happened."""
    report = run(tmp_path / "drill", "limpet.engine.engine:Engine.open", seed)
    assert not report["failures"]
    assert report["passed"]
    assert report["rounds"] == ROUNDS
    assert report["kills"] > ROUNDS
    assert report["containers"] > 30
    assert report["acknowledged"] > 100


BROKEN = {
    "follows_links": {"harmed"},
    "invents_exit_codes": {"wrong_exit_code"},
    "compares_pids_alone": {"false_running"},
    "takes_gates_for_starts": {"false_running"},
    "commits_by_halves": {"torn"},
    "acknowledges_before_commit": {"lost"},
    "opens_the_gate_early": {"leaked"},
}
"""What the drill finds of each broken engine."""


@pytest.mark.long
@pytest.mark.campaign("teeth")
@pytest.mark.parametrize("factory", BROKEN)
def test_a_broken_engine_is_found_out(tmp_path: Path, factory: str) -> None:
    """Each broken promise is found by its own name, by one drill or the next, and that drill fails."""
    reports, found = [], BROKEN[factory]
    for seed in islice(eventful_seeds(), DRILLS):  # when a kill hits is a matter of timing, so a drill may miss
        reports.append(run(tmp_path / f"drill-{seed}", f"broken_engines:{factory}", seed))
        assert reports[-1]["passed"] is not bool(reports[-1]["failures"])
        if found <= faults(reports[-1]):
            return
    pytest.fail(f"not found in {DRILLS} drills: {[report['failures'] for report in reports]}")
