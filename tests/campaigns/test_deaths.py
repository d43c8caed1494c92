"""Several of an engine's processes are killed at once: what is told of programs is what they have left themselves."""

import subprocess
import sys

import pytest

from tests.campaigns.sizes import Size
from tests.crash.trial import ROOT


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Do trials in a process without other threads, for it forks."""
    command = [sys.executable, "-m", "tests.campaigns.deaths", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.campaign("deaths")
@pytest.mark.timeout(1200)
def test_what_is_told_after_several_deaths_is_true(size: Size) -> None:
    """Engines, keepers, anchors, gates and programs, at random moments, and amid starts."""
    done = run(1, size.least)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_an_engine_that_takes_the_end_of_a_gate_for_a_programs_is_found_out() -> None:
    """One whose keeper and its successor are killed amid a start tells a code of what never ran."""
    done = run(1, 120, "credulous")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "it has never begun" in done.stdout
