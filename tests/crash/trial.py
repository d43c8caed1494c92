"""Runs the harness, which must be the only thread of its process, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(calls: str) -> dict[str, Any]:
    """Run calls of the testing package on a life in a fresh process, and return what the reports add up to."""
    script = (
        "import json, sys\n"
        "from limpet.engine.drill.engine_life import EngineLife\n"
        "from limpet.engine.drill.store_life import FailingDiskLife, StoreLife\n"
        "from limpet.testing import *\n"
        "from tests.campaigns.refused_life import *\n"
        "from tests.crash.bundle_life import *\n"
        "from tests.crash.keeper_life import *\n"
        "from tests.crash.mutants import *\n"
        "from tests.crash.read_life import ReadLife, UnflushedReadLife\n"
        "from tests.crash.sandbox_life import *\n"
        "from tests.crash.upgrade import Upgrade\n"
        "from tests.crash.watch_life import *\n"
        "reason = supported()\n"
        "assert reason is None, reason\n"
        f"report = {calls}\n"
        "names = ('points', 'images', 'faults', 'unreached', 'lost', 'torn', 'false_verdicts', 'other', 'violations')\n"
        "told = {name: getattr(report, name) for name in names}\n"
        "print(json.dumps(told | {'findings': [str(finding) for finding in report.findings[:5]]}))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    told: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return told


WORKERS = os.cpu_count() or 1
