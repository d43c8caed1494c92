"""The store is killed at every system call, loses power at every one, and has each of them fail.

The harness must be the only thread of its process, so each test runs it in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(calls: str) -> dict[str, int]:
    """Run calls of the testing package on a life in a fresh process, and return what the reports add up to."""
    script = (
        "import json, sys\n"
        "from limpet.engine.drill.engine_life import EngineLife\n"
        "from limpet.engine.drill.store_life import FailingDiskLife, StoreLife\n"
        "from limpet.engine.testing import *\n"
        "from tests.crash.mutants import *\n"
        "reason = supported()\n"
        "assert reason is None, reason\n"
        f"report = {calls}\n"
        "names = ('points', 'images', 'faults', 'lost', 'torn', 'false_verdicts', 'other', 'violations')\n"
        "told = {name: getattr(report, name) for name in names}\n"
        "print(json.dumps(told | {'findings': [str(finding) for finding in report.findings[:5]]}))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


WORKERS = os.cpu_count() or 1


@pytest.mark.timeout(600)
def test_every_kill_point() -> None:
    """Killed before, half-way through and after every file-changing call: nothing acknowledged is lost or torn."""
    report = run(
        f"kill_points(StoreLife(6), workers={WORKERS}) + kill_points(StoreLife(60, seed=1), workers={WORKERS})"
        f" + true_kills(StoreLife(2), every=7, workers={WORKERS})"
        f" + true_kills(EngineLife(1), every=9, workers={WORKERS})"
    )
    assert report["points"] > 1800
    assert report["violations"] == 0, report["findings"]


@pytest.mark.timeout(600)
def test_power_cuts() -> None:
    """Every disk that a power cut may leave, in both models, holds what was acknowledged, also after another cut."""
    report = run(
        f"power_cuts(StoreLife(2), samples=1, workers={WORKERS})"
        f" + power_cuts(StoreLife(1, seed=1), samples=1, every=3, workers={WORKERS})"
        f" + recovery_cuts(StoreLife(1), crashes=4, workers={WORKERS})"
    )
    assert report["images"] > 4000
    assert report["violations"] == 0, report["findings"]


@pytest.mark.timeout(600)
def test_failing_disk() -> None:
    """Calls fail with an error: the caller is told, or the store refuses to open; never a silent wrong answer."""
    failures = {"flush": ["EIO"], "rename": ["EIO"], "mkdir": ["ENOSPC"], "unlink": ["EIO"]}
    report = run(f"fault_points(FailingDiskLife(1), failures={failures!r}, cuts=0, workers={WORKERS})")
    assert report["faults"] > 100
    assert report["violations"] == 0, report["findings"]
