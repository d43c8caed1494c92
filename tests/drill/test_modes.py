"""`limpet drill --mode`: each mode finds nothing wrong with limpet, and something with its control."""

import json
import os
import shlex
import subprocess
import sys
from typing import Any

import pytest

from limpet.engine.drill import modes
from limpet.engine.drill.modes import MODE_TRIALS, Mode, Trial, run_modes
from limpet.schema.errors import InvalidInputError
from limpet.testing import Finding, Report
from tests.campaigns.sizes import CAMPAIGNS

DRILL = [sys.executable, "-m", "limpet", "drill"]
CAMPAIGNS_OF_MODES = ("reuse", "reboot", "keeper")
"""The others try here what is a campaign elsewhere."""
TRIED = {"kill": "points", "power": "images", "disk": "faults", "reuse": "cases", "reboot": "cases", "keeper": "cases"}
MARKS = {mode: [pytest.mark.campaign(mode)] for mode in CAMPAIGNS_OF_MODES}
MODES = [pytest.param(mode, marks=[pytest.mark.long, *MARKS.get(mode, ())]) for mode in TRIED]


def drill(*arguments: str, before: tuple[str, ...] = (), code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [*DRILL, *arguments] if code is None else [sys.executable, "-c", code, *arguments]
    return subprocess.run([*before, *command], capture_output=True, text=True, timeout=400, check=False)


RUN = """
import sys
from limpet.engine.drill import controls, modes
from limpet.engine.cli import main
sys.argv[0] = "limpet"
modes._CHECKPOINTS |= {modes.Mode.KILL: 4, modes.Mode.POWER: 1}
modes._TRUE_KILLS_EVERY, modes._SAMPLES, modes._RECOVERIES, modes._CUTS_EVERY = 240, 1, 1, 128
modes._FAULTS_EVERY, modes._DAMAGED = 60, 200
"""
SHORT = f"""{RUN}
main()
"""
"""The same in less time: what finds nothing in limpet's store at length has tests of its own."""
BROKEN = f"""{RUN}
modes.StoreLife = controls.HastyLife
main()
"""


@pytest.mark.timeout(500)
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_is_clean_and_its_control_is_not(mode: str) -> None:
    """Nothing is lost, torn or false, the broken store is caught, and the document has all that it should have."""
    result = drill("drill", "--mode", mode, "--seed", "2", "--rounds", "1", "-o", "json", code=SHORT)
    report = json.loads(result.stdout)
    assert (result.returncode, report["findings"]) == (0, [])
    assert report[TRIED[mode]] >= CAMPAIGNS["reuse"].gate
    assert report["damaged"] == (200 if mode == "disk" else 0)
    assert report["control"][mode]["violations"] > 0
    assert (report["modes"], report["rounds"], report["seed"]) == ([mode], {mode: 1}, 2)
    assert [report[name] for name in ("lost", "torn", "false_verdicts", "other")] == [0, 0, 0, 0]
    assert {"points", "images", "faults", "damaged", "cases", "acknowledged", "seconds"} <= report.keys()
    assert report["repeat"] == f"limpet drill --mode {mode} --seed 2 --rounds 1"
    assert report["unsupported"] == {}


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_finding_is_repeated_alone_by_its_command() -> None:
    """A store that acknowledges too early fails the drill, and the command that is printed shows that point again."""
    result = drill("drill", "--mode", "kill", "--seed", "2", "--rounds", "1", "-o", "json", code=BROKEN)
    report = json.loads(result.stdout)
    assert result.returncode == 1
    assert report["lost"] > 0
    finding = next(each for each in report["findings"] if each["kind"] == "lost")
    name, *words = shlex.split(finding["repeat"])
    assert name == "limpet"
    again = drill(*words, code=BROKEN)
    assert again.returncode == 1, again.stdout + again.stderr
    assert finding["message"][:40] in " ".join(again.stdout.split())
    document = json.loads(drill(*words, "-o", "json", code=BROKEN).stdout)
    assert (document["lost"], document["findings"][0]["message"]) == (1, finding["message"])
    assert drill(*words, code=SHORT).returncode == 0  # limpet's own store keeps the promise at that point


def test_a_command_is_one_for_a_shell() -> None:
    """The name of a cut within a recovery has a sign that a shell would take for a redirection."""
    point = "7:12:all:posix>7:3:none:posix"
    found = modes._repeatable(Mode.POWER, 7, Finding(point, "lost", "x"))
    assert shlex.split(found.repeat)[-2:] == ["--point", point]


def test_what_earlier_modes_found_is_not_lost_with_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that cannot come to its end is a finding of its mode; a control that shows only that was not noticed."""

    def fail(_: Trial) -> Report:
        raise InvalidInputError("the trial is broken")

    anywhere: dict[str, Any] = {"find_obstacle": lambda: None, "rounds": 1}
    found = Report.of([Finding("kill:after:1", "lost", "x")], points=1)
    plans = {
        Mode.KILL: MODE_TRIALS[Mode.KILL]._replace(**anywhere, run=lambda _: found, run_control=lambda _: found),
        Mode.POWER: MODE_TRIALS[Mode.POWER]._replace(**anywhere, run=fail, run_control=fail),
    }
    monkeypatch.setattr(modes, "MODE_TRIALS", plans)
    report = run_modes(list(plans), seed=1, rounds=None, workers=1, progress=lambda *_: None)
    assert [finding.message for finding in report.findings] == ["x", "InvalidInputError: the trial is broken"]
    assert "--point" not in report.findings[1].repeat
    assert [report.control[mode].violations for mode in plans] == [1, 0]


def test_what_cannot_be_tried_is_said() -> None:
    """Without namespaces of one's own there is no other boot: that is said, and is neither success nor failure."""
    env = os.environ | {"PATH": "/nonexistent"}
    command = [*DRILL, "--mode", "reboot", "-o", "json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert result.returncode == 3
    assert "unshare" in json.loads(result.stdout)["unsupported"]["reboot"]
    table = subprocess.run(command[:-2], capture_output=True, text=True, timeout=60, check=False, env=env)
    assert table.stdout.count("NOT RUN: reboot:\n  ") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--point", "x"), "need --mode"),
        (("--mode", "all", "--seed", "1", "--point", "kill:after:1"), "exactly one --mode"),
        (("--mode", "kill", "--point", "kill:after:1"), "needs --seed"),
        (("--mode", "power", "--seed", "1", "--point", "what"), "expected SEED:CUT:KIND:MODEL"),
        (("--mode", "kill", "--seed", "1", "--point", "7:118:torn.0:journaled"), "a point of mode power"),
        (("--mode", "power", "--seed", "1", "--point", "engine/kill:before:1"), "a point of mode kill"),
        (("--mode", "disk", "--seed", "1", "--point", "damage:x"), "expected damage:"),
        (("--mode", "reuse", "--seed", "1", "--point", "1"), "by its seed"),
        (("--mode", "kill", "--keep"), "cannot be used with --mode"),
        (("--mode", "kill", "--containers", "3"), "cannot be used with --mode"),
        (("--mode", "earthquake"), "earthquake"),
    ],
)
def test_wrong_arguments_are_refused_in_words(arguments: tuple[str, ...], words: str) -> None:
    """A point that is none, or of no mode, is refused with a line that says what it should be."""
    result = drill(*arguments)
    assert result.returncode == 2
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_a_fleet_is_asked_for() -> None:
    """That mode says what it needs; `all` leaves it out where no database is given."""
    result = drill("--mode", "fleet")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--mode fleet needs --fleet URL" in result.stderr
