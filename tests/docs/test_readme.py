"""The README is short, and its programs run as printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
MAX_WORDS = 900


def test_the_readme_is_short() -> None:
    """It has at most 900 words, counted as `wc -w` counts them."""
    assert len(README.split()) <= MAX_WORDS


def test_there_are_programs() -> None:
    """The test below has something to run."""
    assert len(PROGRAMS) == 2


@pytest.mark.parametrize("program", PROGRAMS, ids=["engine", "store"])
def test_a_program_runs_as_printed(program: str, tmp_path: Path) -> None:
    """Copied into an empty directory, it runs twice in a row, and prints what its comments say."""
    promised = re.findall(r"# prints (.*)$", program, re.MULTILINE)
    assert promised
    for _ in range(2 if "create_container" in program else 1):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == promised
