"""Damaged databases: healed, refused or flagged, never silently wrong; and how much of the damage nobody can see."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from limpet.engine.drill.damage import Outcome, survey
from limpet.testing import Violation
from tests.campaigns.sizes import Size

ROOT = Path(__file__).parents[2]


def run(code: str) -> Any:
    """Run code in a fresh process, whose harness may fork, and return what it prints as JSON."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


@pytest.mark.campaign("damage")
@pytest.mark.timeout(600)
def test_damaged_states(size: Size) -> None:
    """Bits flipped anywhere, parts lost, swapped or replaced, rows changed: nothing is silently wrong."""
    told = run(
        "import json; from limpet.engine.drill.damage import damage_states\n"
        f"report = damage_states(count={size.least}, seed=1, workers={2 * (os.cpu_count() or 1)})\n"
        "print(json.dumps([report.damaged, report.violations, [str(each) for each in report.findings[:5]]]))"
    )
    assert told == [size.least, 0, []]


@pytest.mark.campaign("bits")
@pytest.mark.timeout(300)
def test_the_bits_of_a_database(size: Size) -> None:
    """One bit of a closed database flipped, in the gate each 26th of all that mean anything."""
    told = run(
        "import json; from limpet.engine.drill.damage import flip_bits\n"
        f"report = flip_bits(every={26 * size.every}, workers={2 * (os.cpu_count() or 1)})\n"
        "print(json.dumps([report.damaged, report.violations, [str(each) for each in report.findings[:5]]]))"
    )
    assert told[1:] == [0, []]
    assert told[0] >= size.least


@pytest.mark.long
@pytest.mark.timeout(600)
def test_what_cannot_be_seen_is_little() -> None:
    """Only the end of a WAL can go unseen: the last transaction by a flipped bit, more of it if it was cut short."""
    outcomes = Counter[Outcome]()
    for words, outcome in survey(count=600, seed=2):
        outcomes[outcome] += 1
        if outcome in {Outcome.LAST_UNSEEN, Outcome.END_UNSEEN}:
            assert words.startswith("store.db-wal"), words
        if outcome is Outcome.END_UNSEEN:
            assert "bit" not in words, words
    assert outcomes[Outcome.REFUSED] > 100
    assert outcomes[Outcome.FLAGGED] > 30
    assert outcomes[Outcome.UNHARMED] > 30
    assert outcomes[Outcome.LAST_UNSEEN] + outcomes[Outcome.END_UNSEEN] < 60


@pytest.mark.timeout(120)
def test_a_store_that_believes_its_rows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge has teeth: without checksums a damaged row is taken for true, and that is noticed."""
    monkeypatch.setattr("limpet.engine.store.rows.row_is_sound", lambda *_: True)
    monkeypatch.setattr("limpet.engine.store.rows.find_unsound", lambda *_: [])
    monkeypatch.setattr("limpet.schema.codec.row_is_sound", lambda *_: True)
    with pytest.raises(Violation):
        for _ in survey(count=400, seed=2):
            pass
