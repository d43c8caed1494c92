"""A drill tells all that happens in it, in order."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec

from limpet.engine.drill import DrillReport, Happened, Happening

RUN = """
import sys, msgspec
from limpet.engine.drill import run_drill
happenings = []
report = run_drill(rounds=3, containers=8, seed=4, directory=sys.argv[1], on_happening=happenings.append)
sys.stdout.buffer.write(msgspec.json.encode((happenings, report)))
"""


def test_a_drill_tells_what_happens(tmp_path: Path) -> None:
    """Every kill and every restart is told, what was said after each, every container, and nothing of a dead one."""
    command = [sys.executable, "-c", RUN, str(tmp_path / "drill")]
    done = subprocess.run(command, capture_output=True, timeout=100, check=True)
    happenings, report = msgspec.json.decode(done.stdout, type=tuple[list[Happening], DrillReport])
    assert report.passed
    count = Counter(one.kind for one in happenings)
    assert count[Happened.ENGINE_KILLED] == report.rounds
    assert count[Happened.ENGINE_KILLED] + count[Happened.RECOVERY_KILLED] == report.kills
    assert count[Happened.KEEPERS_KILLED] == report.keeper_kills > 0
    assert count[Happened.RECOVERED] == report.rounds + 1
    assert count[Happened.FAULT] == 0
    assert (happenings[0].kind, happenings[-1].kind) == (Happened.RECOVERED, Happened.CLOSED)
    assert [one.at for one in happenings] == sorted(one.at for one in happenings)
    assert len({one.container for one in happenings if one.status is not None}) == report.containers
    restarts = [place for place, one in enumerate(happenings) if one.kind is Happened.RECOVERED]
    assert all(happenings[place + 1].kind is Happened.SAID for place in restarts[2:])
    assert any(one.kind is Happened.SEEN for one in happenings[: restarts[1]])
    gone = [one.container for one in happenings if one.kind is Happened.GONE]
    assert 0 < len(gone) == len(set(gone)) <= report.containers
    for key in gone:
        own = [one.kind for one in happenings if one.container == key and one.kind is not Happened.DISTURBED]
        assert own[-1] is Happened.GONE
