"""`limpet drill` as its users meet it: its result, its exit status, and that it leaves nothing behind."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet.engine.drill.world import VARIABLE
from tests.conftest import wait_until

ROOT = Path(__file__).parents[2]
DRILL = [sys.executable, "-m", "limpet", "drill"]
INTEGERS = {
    "schema_version", "seed", "rounds", "kills", "containers", "acknowledged", "lost", "torn", "false_running",
    "false_exited", "wrong_exit_code", "leaked", "harmed", "broken", "unknown",
}  # fmt: skip


@pytest.fixture
def temporary() -> Iterator[str]:
    """A directory that every user may reach, unlike pytest's."""
    path = tempfile.mkdtemp()
    yield path
    shutil.rmtree(path)


def processes_below(directory: str) -> list[int]:
    prefix = f"{VARIABLE}={os.path.realpath(directory)}/".encode()
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and prefix in Path(f"/proc/{name}/environ").read_bytes():
                found.append(int(name))
        except OSError:
            continue
    return found


def as_nobody(command: list[str]) -> list[str]:
    """Return a command that runs another as user nobody, also where what it needs lies in a closed directory."""
    lower = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
    closed = {path: gate for path in find_needed() if (gate := find_closed(path)) is not None}
    if not closed:
        return lower
    # In a mount namespace of its own an open directory takes each closed one's place, with what is needed in it.
    steps = ["umask 022", "mount -t tmpfs -o mode=755 none /mnt"]
    for number, path in enumerate(closed):
        steps += [f"mkdir /mnt/{number}", f"mount --bind {shlex.quote(path)} /mnt/{number}"]
    steps += [f"mount -t tmpfs -o mode=755 none {shlex.quote(gate)}" for gate in dict.fromkeys(closed.values())]
    for number, path in enumerate(closed):
        steps += [f"mkdir -p {shlex.quote(path)}", f"mount --bind /mnt/{number} {shlex.quote(path)}"]
    return ["unshare", "--mount", "sh", "-c", " && ".join([*steps, 'exec "$@"']), "sh", *lower]


def find_needed() -> list[str]:
    """Return the directories of the interpreter, of what is installed for it, and of the sources."""
    folders = [str(path) for path in sorted(ROOT.iterdir()) if path.is_dir() and not path.is_symlink()]
    return list(dict.fromkeys([sys.base_prefix, *folders, sys.prefix]))


def find_closed(path: str) -> str | None:
    """Return the topmost directory above `path` that others may not enter."""
    above = reversed(Path(path).parents)
    return next((str(each) for each in above if not each.stat().st_mode & 0o001), None)


def test_an_ordinary_user_gets_a_result(temporary: str) -> None:
    """Without root it runs, prints one JSON object with the counts, exits with 0, and leaves nothing."""
    command = [*DRILL, "--rounds", "3", "--containers", "12", "--seed", "4", "-o", "json"]
    if os.geteuid() == 0:
        os.chown(temporary, 65534, 65534)
        command = as_nobody(command)
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"TMPDIR": temporary},
    )
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert all(type(report[name]) is int for name in INTEGERS)
    assert (report["seed"], report["rounds"], report["failures"]) == (4, 3, [])
    assert 0 < report["recovery_ms"]["p50"] <= report["recovery_ms"]["max"]
    assert report["repeat"] == "limpet drill --rounds 3 --containers 12 --seed 4"
    assert os.listdir(temporary) == []
    assert processes_below(temporary) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(temporary: str, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM, also again and again, end it; no process and no directory is left."""
    drill = subprocess.Popen(
        [*DRILL, "--rounds", "50"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": temporary},
    )
    wait_until(lambda: len(processes_below(temporary)) > 3 or drill.poll() is not None, "containers to run")
    while drill.poll() is None:  # as one who is impatient
        drill.send_signal(number)
        time.sleep(0.001)
    output, errors = drill.communicate(timeout=30)
    assert (drill.returncode, output) == (128 + number, "")
    assert "interrupted" in errors
    assert os.listdir(temporary) == []
    assert processes_below(temporary) == []


def test_a_table_for_people(temporary: str) -> None:
    """The table explains each count in plain words, fits 80 columns, and stands alone where there is no terminal."""
    result = subprocess.run(
        [*DRILL, "--rounds", "1", "--containers", "4", "--keep"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"TMPDIR": temporary},
    )
    assert result.returncode == 0, result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "false running    0" in result.stdout
    assert "PASSED" in result.stdout
    (kept,) = os.listdir(temporary)
    assert result.stderr == f"limpet: kept {temporary}/{kept}\n"


def test_a_process_with_children_is_refused(temporary: str) -> None:
    """A drill ends all children of its process, so one that has other children is refused, and they live on."""
    script = f"sleep 1000 > /dev/null 2>&1 & echo $!; exec {' '.join(DRILL)} --rounds 1"
    result = subprocess.run(
        ["sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"TMPDIR": temporary},
    )
    os.kill(int(result.stdout.split()[0]), signal.SIGKILL)
    assert result.returncode == 4
    assert "has children" in result.stderr
    assert os.listdir(temporary) == []
