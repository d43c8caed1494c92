"""`limpet drill --mode`: each mode finds nothing wrong with limpet, and something with its control."""

import json
import os
import subprocess
import sys

import pytest

DRILL = [sys.executable, "-m", "limpet.engine.cli", "drill"]
TRIED = {"kill": "points", "power": "images", "disk": "faults", "reuse": "cases", "reboot": "cases"}


def drill(*arguments: str, before: tuple[str, ...] = (), code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [*DRILL, *arguments] if code is None else [sys.executable, "-c", code, *arguments]
    return subprocess.run([*before, *command], capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.timeout(500)
@pytest.mark.parametrize("mode", TRIED)
def test_each_mode_is_clean_and_its_control_is_not(mode: str) -> None:
    """Nothing is lost, torn or false, the broken store is caught, and the document has all that it should have."""
    result = drill("--mode", mode, "--seed", "1", "--rounds", "1", "-o", "json")
    report = json.loads(result.stdout)
    assert (result.returncode, report["findings"]) == (0, [])
    assert report[TRIED[mode]] > 20
    assert report["control"][mode]["violations"] > 0
    assert (report["modes"], report["rounds"], report["seed"]) == ([mode], {mode: 1}, 1)
    assert [report[name] for name in ("lost", "torn", "false_verdicts", "other")] == [0, 0, 0, 0]
    assert {"points", "images", "faults", "damaged", "cases", "acknowledged", "seconds"} <= report.keys()
    assert report["repeat"] == f"limpet drill --mode {mode} --seed 1 --rounds 1"
    assert report["unsupported"] == {}


BROKEN = """
import sys
from limpet.engine.drill import controls, modes
from limpet.engine.cli import main
modes.StoreLife = controls.HastyLife
sys.argv[0] = "limpet"
main()
"""


@pytest.mark.timeout(500)
def test_a_finding_is_repeated_alone_by_its_command() -> None:
    """A store that acknowledges too early fails the drill, and the command that is printed shows that point again."""
    result = drill("drill", "--mode", "kill", "--seed", "2", "--rounds", "1", "-o", "json", code=BROKEN)
    report = json.loads(result.stdout)
    assert result.returncode == 1
    assert report["lost"] > 0
    finding = next(each for each in report["findings"] if each["kind"] == "lost")
    name, *words = finding["repeat"].split()
    assert name == "limpet"
    again = drill(*words, code=BROKEN)
    assert again.returncode == 1, again.stdout + again.stderr
    assert finding["message"][:40] in " ".join(again.stdout.split())
    assert drill(*words[1:]).returncode == 0  # limpet's own store keeps the promise at that point


def test_what_cannot_be_tried_is_said() -> None:
    """Without namespaces of one's own there is no other boot: that is said, and is neither success nor failure."""
    env = os.environ | {"PATH": "/nonexistent"}
    command = [*DRILL, "--mode", "reboot", "-o", "json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert result.returncode == 3
    assert "unshare" in json.loads(result.stdout)["unsupported"]["reboot"]
    table = subprocess.run(command[:-2], capture_output=True, text=True, timeout=60, check=False, env=env)
    assert "NOT TRIED" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--point", "x"), "for a --mode"),
        (("--mode", "all", "--point", "kill:after:1"), "of one --mode"),
        (("--mode", "power", "--point", "what"), "names no image"),
        (("--mode", "disk", "--point", "damage:x"), "names no damage"),
        (("--mode", "reuse", "--point", "1"), "by its seed"),
        (("--mode", "earthquake"), "earthquake"),
    ],
)
def test_wrong_arguments_are_refused_in_words(arguments: tuple[str, ...], words: str) -> None:
    """A point that is none, or of no mode, is refused with a line that says what it should be."""
    result = drill(*arguments)
    assert result.returncode not in {0, 1, 3}
    assert words in result.stderr
    assert "Traceback" not in result.stderr
