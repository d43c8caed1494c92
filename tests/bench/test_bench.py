"""The benchmark measures what it says, and its report is whole; how fast anything is, no test asks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from limpet.engine.bench.contenders import CONTENDERS, Contender


@pytest.mark.parametrize("kind", CONTENDERS, ids=[kind.name for kind in CONTENDERS])
def test_each_contender_keeps_what_it_is_given(kind: type[Contender], tmp_path: Path) -> None:
    """A contender that kept nothing would be fast: each is read back."""
    contender = kind()
    contender.open(str(tmp_path), 20)
    for number in range(20):
        contender.checkpoint(number, number + 100)
    assert [contender.read(number) for number in range(20)] == list(range(100, 120))
    contender.close()


def test_a_quick_run_reports_everything_and_leaves_nothing(tmp_path: Path) -> None:
    """One JSON document with every cell, every opening and the machine; the directory is empty afterwards."""
    command = [sys.executable, "-m", "limpet.engine.cli", "bench", "--quick", "--dir", str(tmp_path), "-o", "json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    report = json.loads(result.stdout)
    cells = {(cell["name"], cell["callers"]) for cell in report["cells"]}
    assert {("limpet", 1), ("limpet", 16), ("limpet", 64), ("limpet, asyncio", 64)} <= cells
    assert all(cell["per_second"] > 0 and cell["p50_us"] <= cell["p99_us"] for cell in report["cells"])
    assert [opening["containers"] for opening in report["openings"]] == [1_000, 10_000]
    assert {"cpu", "cores", "kernel", "file system", "python", "sqlite"} <= set(report["machine"])
    assert list(tmp_path.iterdir()) == []
