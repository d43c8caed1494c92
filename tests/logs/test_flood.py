"""Containers that write without end, while all goes wrong with their logs (`python -m tests.logs.flood` has more)."""

import subprocess
import sys

import pytest

from tests.crash.trial import ROOT
from tests.logs.flood import find_obstacle


@pytest.mark.long
@pytest.mark.timeout(180)
def test_no_line_is_lost_and_no_container_ends() -> None:
    """The copier is killed each second, the disk is full, then frozen, and logs are rotated all the time."""
    if obstacle := find_obstacle():
        pytest.skip(obstacle)
    command = [sys.executable, "-m", "tests.logs.flood", "--seconds", "9", "--containers", "8", "--slowest", "2000"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
