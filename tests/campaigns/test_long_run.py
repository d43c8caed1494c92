"""The long run goes on where it was, of the same sources only, and docs/testing.md says what it has done."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.campaigns.long_run import RESULTS, Result, read_result, render

ROOT = Path(__file__).parents[2]
DAMAGE = 500
"""How many states a seed damages."""


@pytest.mark.long
@pytest.mark.timeout(300)
def test_it_goes_on_with_the_next_seed(tmp_path: Path) -> None:
    """Each call adds a seed to what is kept; of other sources nothing is added, and what is kept stays."""
    for seeds in (1, 2):
        assert go_on(tmp_path).returncode == 0
        result = read_result(tmp_path, "damage")
        assert result is not None
        assert (result.seeds, result.count, result.findings) == (seeds, seeds * DAMAGE, [])
    kept = tmp_path / "damage.json"
    kept.write_bytes(msgspec.json.encode(Result(sources="others", seeds=7)))
    refused = go_on(tmp_path)
    assert refused.returncode == 3
    assert "of other sources" in refused.stderr
    assert read_result(tmp_path, "damage") == Result(sources="others", seeds=7)


@pytest.mark.long
def test_what_was_found_is_status_1(tmp_path: Path) -> None:
    """A finding of an earlier call is not forgotten."""
    assert go_on(tmp_path).returncode == 0
    result = read_result(tmp_path, "damage")
    assert result is not None
    result.findings, result.count = ["seed 1: damage:1:5"], 10**9
    (tmp_path / "damage.json").write_bytes(msgspec.json.encode(result))
    done = go_on(tmp_path)
    assert done.returncode == 1
    assert "| 1-1 | 1 |" in done.stdout


def test_the_page_has_the_table() -> None:
    """docs/testing.md has the table that `python -m tests.campaigns.long_run` prints."""
    assert render(RESULTS) in (ROOT / "docs" / "testing.md").read_text()


def go_on(results: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.campaigns.long_run",
            "--part",
            "damage",
            "--minutes",
            "0",
            "--results",
            str(results),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
