"""`limpet drill` as its users meet it: its result, its exit status, and that it leaves nothing behind."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from limpet.engine.cli.timeline import Sign
from limpet.engine.drill.world import VARIABLE
from tests.conftest import require_tools, wait_until

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


@pytest.mark.usefixtures("namespaces")
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


@pytest.mark.parametrize("command", ["drill --rounds 1 --containers 1", "bench --quick --only life --dir ."])
def test_a_directory_that_is_not_utf8_is_no_fault_of_an_engine(tmp_path: Path, command: str) -> None:
    """No engine takes it: that is said before anything is tried."""
    directory = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(directory)
    done = subprocess.run(
        [*DRILL[:-1], *command.split()],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=directory,
        env=os.environ | {"TMPDIR": os.fsdecode(directory)},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "is not UTF-8" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(directory) == []


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


@pytest.mark.long
def test_a_plot_shows_what_happened(temporary: str, tmp_path: Path) -> None:
    """The picture has the containers, the kills and what was said; the result is as without it."""
    result = subprocess.run(
        [*DRILL, "--rounds", "2", "--containers", "8", "--seed", "4", "-o", "json", "--plot", str(tmp_path / "a.svg")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"TMPDIR": temporary},
    )
    assert (result.returncode, result.stderr) == (0, f"limpet: drew {tmp_path}/a.svg\n")
    report = json.loads(result.stdout)
    texts = [node.text or "" for node in ET.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert len({text for text in texts if re.fullmatch(r"r0[12]-c00\d", text)}) == report["containers"]
    assert "kill 1" in texts
    assert f": {report['kills']} kills, " in "".join(texts)
    assert Sign.SAID_CREATED.value in texts
    assert os.listdir(tmp_path) == ["a.svg"]
    assert (tmp_path / "a.svg").stat().st_mode & 0o444
    assert os.listdir(temporary) == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--plot", "a.pdf"], 2, "a.pdf: its ending must be .svg or .png"),
        (["--plot", "a"], 2, "a: its ending must be .svg or .png"),
        (["--plot", "missing/a.svg"], 2, "missing/a.svg: its directory does not exist or is not writable"),
        (["--plot", "file/a.svg"], 2, "file/a.svg: its directory does not exist or is not writable"),
        (["--plot", "folder.png"], 2, "folder.png: it is a directory"),
        (["--plot", "a.svg", "--mode", "kill"], 2, "--plot cannot be used with --mode"),
        (["--plot", "a.svg", "--rounds", "61"], 2, "--plot can show 60 rounds at most"),
        (
            ["--plot", "a.svg"],
            1,
            "limpet: --plot needs matplotlib, which is not installed: pip install 'limpet[plots]'",
        ),
    ],
)
def test_a_plot_that_cannot_be_drawn_is_refused_first(
    temporary: str, tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    """Before a drill of minutes begins it is known whether its picture can be drawn and written."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    variables = os.environ | {"TMPDIR": temporary}
    if status == 1:
        (tmp_path / "stub").mkdir()
        (tmp_path / "stub" / "matplotlib.py").write_text("raise ModuleNotFoundError('no', name='matplotlib')")
        variables["PYTHONPATH"] = str(tmp_path / "stub")
    result = subprocess.run(
        [*DRILL, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False, env=variables
    )
    assert (result.returncode, result.stdout) == (status, "")
    assert message in result.stderr
    assert os.listdir(temporary) == []


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="OCI containers need root")
def test_a_drill_with_an_oci_runtime(temporary: str) -> None:
    """The same truth for containers of runc, whose conmons are killed, too; nothing is left, mounts included."""
    require_tools("runc", "conmon", "busybox")
    command = [*DRILL, "--runtime", "runc", "--rounds", "3", "--containers", "6", "--seed", "4", "-o", "json"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=False, env=os.environ | {"TMPDIR": temporary}
    )
    assert result.returncode == 0, result.stderr + result.stdout
    report = json.loads(result.stdout)
    assert report["kills"] >= 3
    assert report["acknowledged"] > 10
    assert processes_below(temporary) == []
    assert os.listdir(temporary) == []
