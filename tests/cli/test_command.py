"""The command line as such: what it loads, how it ends, what it does to pipes and terminals."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from limpet.engine import Engine, Store
from limpet.engine.cli import VERBS
from limpet.engine.cli import limpet as group
from limpet.engine.cli.exits import EXITS, exit_status
from limpet.engine.cli.options import default_state_dir
from limpet.engine.cli.output import Cell, Column, duration, measure, render_table, rfc3339
from limpet.schema import errors
from tests.cli.conftest import Jobs, Limpet
from tests.records import RUNNING, metadata, sandbox

HEAVY = ("sqlalchemy", "alembic", "rich", "asyncio", "matplotlib")


@pytest.mark.parametrize("args", [["--help"], ["ps"], ["ps", "-a", "-o", "json"], ["history", "x"]], ids=" ".join)
def test_looking_loads_nothing_heavy(args: list[str], state_dir: str) -> None:
    """--help loads no verb and no database; what only reads loads no SQLAlchemy, alembic or rich."""
    Engine.open(state_dir).close()
    script = (
        "import sys\nfrom limpet.engine.cli import main\n"
        f"try: main({['-s', state_dir, *args]!r})\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "limpet.engine.cli" in loaded
    assert not loaded & set(HEAVY)
    if args == ["--help"]:
        assert not {name for name in loaded if name.startswith("limpet.engine.cli.") and name.split(".")[-1] in VERBS}
        assert "sqlite3" not in loaded


def test_help_tells_verbs_and_exit_statuses() -> None:
    """--help lists every verb and every exit status with its meaning."""
    text = CliRunner().invoke(group, ["--help"], terminal_width=100).output
    for verb, meaning in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(meaning)}$", text, re.MULTILINE)
    for status, meaning, _ in EXITS:
        assert re.search(rf"^  {status} +{re.escape(meaning)}$", text, re.MULTILINE)


def test_every_error_has_an_exit_status() -> None:
    """Each error of the family ends in the status that --help promises for its kind."""
    expected = {
        errors.LimpetError: 1,
        errors.InvalidInputError: 2,
        errors.NotFoundError: 3,
        errors.AlreadyExistsError: 4,
        errors.AmbiguousError: 4,
        errors.InvalidStateError: 4,
        errors.StateDirectoryError: 1,
        errors.StateDirectoryLockedError: 5,
        errors.StoreError: 1,
        errors.DiskFullError: 1,
        errors.StoreDamagedError: 6,
        errors.StoreReplacedError: 6,
        errors.StoreTooNewError: 6,
        PermissionError: 1,
        KeyboardInterrupt: 130,
    }
    assert {kind: exit_status(kind("x")) for kind in expected} == expected


def make_state(state_dir: str) -> None:
    with Engine.open(state_dir) as engine:
        sandbox = engine.create_sandbox({"metadata": {"name": "jobs"}})
        config = {"metadata": {"name": "x"}, "image": {"image": "host"}, "command": ["true"]}
        engine.create_container(config, sandbox.id, id="c0ffee")


def test_options_may_stand_on_both_sides(tmp_path: Path, limpet: Limpet) -> None:
    """The state directory comes from the verb's option, else from the one before it, else from the environment."""
    for name in ("one", "two"):
        make_state(str(tmp_path / name))
    empty = str(tmp_path / "none")
    limpet.state_dir = str(tmp_path / "one")
    assert limpet.ok("ps", "-q") == "c0ffee\n"
    assert limpet("-s", empty, "ps").returncode == 3
    assert limpet.ok("-s", empty, "ps", "-q", "-s", str(tmp_path / "two")) == "c0ffee\n"
    assert limpet("ps", "-s", "").returncode == 2
    assert not os.path.exists(empty)


@pytest.mark.parametrize(
    "args",
    [
        *(("run", option, "", "host", "true") for option in ("--runtime", "--sandbox", "--name", "--workdir")),
        ("load", ""),
        ("backup", ""),
        ("fleet", "restore", "--fleet", "postgresql://", "node", ""),
    ],
    ids=lambda args: " ".join(args[:2]),
)
def test_what_is_given_and_empty_is_not_the_default(limpet: Limpet, args: tuple[str, ...]) -> None:
    """An unset variable of a shell must neither take the isolation from a container nor name the working directory."""
    done = limpet(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert "it is empty" in done.stderr
    assert not os.path.exists(limpet.state_dir)


def test_names_are_taken_for_ids(limpet: Limpet) -> None:
    """A container or sandbox is meant by its name, too; a name that means several ends with 4, and names them."""
    make_state(limpet.state_dir)
    assert limpet.json("inspect", "x")["inspected"][0]["id"] == "c0ffee"
    assert limpet.json("inspect", "jobs")["inspected"][0]["kind"] == "sandbox"
    assert limpet.json("history", "x")["id"] == "c0ffee"
    assert limpet.ok("ps", "-q", "--sandbox", "jobs") == "c0ffee\n"
    with Engine.open(limpet.state_dir) as engine:
        config = {"metadata": {"name": "x"}, "image": {"image": "host"}, "command": ["true"]}
        engine.create_container(config, engine.create_sandbox({"metadata": {"name": "other"}}), id="decaf")
    done = limpet("inspect", "x")
    assert (done.returncode, done.stdout) == (4, "")
    assert "c0ffee, decaf" in done.stderr


def test_default_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's state is under /var/lib, a user's where XDG says, and only an absolute XDG path counts."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_state_dir() == "/var/lib/limpet"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/one")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert default_state_dir() == "/home/one/.local/state/limpet"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert default_state_dir() == "/state/limpet"


def test_usage_errors(limpet: Limpet) -> None:
    """Wrong usage ends with 2 and a hint on stderr."""
    for args in (
        ["nope"],
        ["ps", "--state", "x"],
        ["ps", "--label", "novalue"],
        ["inspect"],
        ["backup"],
        ["ps", "-o", "xml"],
        ["top", "--interval", "nan"],
    ):
        done = limpet(*args)
        assert (done.returncode, done.stdout) == (2, ""), args
        assert "--help" in done.stderr


@pytest.mark.parametrize("args", [("inspect", "zzz"), ("history", "zzz"), ("inspect", "")])
def test_an_unknown_id_is_not_found(limpet: Limpet, args: tuple[str, str]) -> None:
    """An id that names nothing ends with 3, and the message names it."""
    make_state(limpet.state_dir)
    done = limpet(*args)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("limpet: ")
    assert repr(args[1]) in done.stderr


def test_an_unknown_node_is_not_an_empty_state(limpet: Limpet) -> None:
    """Another node's name gets an error that lists those there are, not an empty list."""
    make_state(limpet.state_dir)
    done = limpet("ps", "--node", "worker-1")
    assert done.returncode == 3
    assert "'local'" in done.stderr


@pytest.mark.parametrize("target", ["/dev/full", "closed pipe", "closed"])
def test_an_output_that_takes_nothing(limpet: Limpet, target: str) -> None:
    """A full disk, a reader that went away and a closed stdout never end in a traceback."""
    make_state(limpet.state_dir)
    redirect = {"/dev/full": "> /dev/full", "closed pipe": "| true", "closed": ">&-"}[target]
    command = f"set -o pipefail; {sys.executable} -m limpet -s {limpet.state_dir} ps -o json {redirect}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if target == "/dev/full":
        assert (done.returncode, done.stderr) == (1, "limpet: the output cannot be written: No space left on device\n")
        command = command.replace("ps -o json", "run --rm host echo said")
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (
            125,
            "limpet: the output cannot be written: No space left on device\n",
        )  # 1 would be the program's


@pytest.mark.parametrize(
    ("args", "status"),
    [
        ("nonsense", 2),
        ("ps --nonsense", 2),
        ("inspect nobody", 3),
        ("rm nobody noone", 3),
        ("run --rm host /nowhere", 125),
        ("run --rm host sh -c 'echo wrong >&2; exit 1'", 125),
    ],
)
def test_errors_that_nobody_can_read(limpet: Limpet, args: str, status: int) -> None:
    """Where stderr takes nothing, the exit status is what it would be, and what was to be done is done."""
    make_state(limpet.state_dir)
    command = f"{sys.executable} -m limpet -s {limpet.state_dir} {args} 2> /dev/full"
    assert subprocess.run(["bash", "-c", command], timeout=60, check=False).returncode == status
    if "nowhere" in args:
        assert limpet.ok("ps", "-aq", "--state", "exited") == ""


@pytest.mark.parametrize("line", ["load image.tar", "backup copy", "history one --plot x.svg", "ps -s state"])
def test_a_working_directory_that_is_gone(limpet: Limpet, tmp_path: Path, line: str) -> None:
    """It is what is named, and not the output."""
    make_state(limpet.state_dir)
    place = tmp_path / "gone"
    place.mkdir()
    command = f"cd {place} && rmdir {place} && {sys.executable} -m limpet -s {limpet.state_dir} {line}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "No such file or directory" in done.stderr
    assert "output" not in done.stderr


def test_interrupted(limpet: Limpet, state_dir: str) -> None:
    """Ctrl-C ends a verb with 130 and without a traceback."""
    make_state(state_dir)
    # The signal comes while the verb is at work, before it has printed anything.
    script = (
        "import os, signal\n"
        "from limpet.engine.cli import main\n"
        "import limpet.engine.inspection.snapshot as snapshot\n"
        "snapshot.require_state = lambda _: os.kill(os.getpid(), signal.SIGINT)\n"
        f"main(['-s', {state_dir!r}, 'ps'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("is_ignored", [False, True])
def test_interrupted_while_it_is_loaded(*, is_ignored: bool) -> None:
    """Ctrl-C ends the command by the signal, and nothing is printed; ignored, as after nohup, it goes on."""
    script = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'limpet.schema.errors': os.kill(os.getpid(), signal.SIGINT)\n"
        f"if {is_ignored}: signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "sys.meta_path.insert(0, Finder)\n"
        "sys.argv[1:] = ['--version']\n"
        "from limpet.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0 if is_ignored else -signal.SIGINT, "")
    assert done.stdout.startswith("limpet ") == is_ignored


def test_completion(limpet: Limpet) -> None:
    """Each shell's script is printed; verbs and ids are completed, and nothing where the state cannot be read."""
    make_state(limpet.state_dir)
    for shell in ("bash", "zsh", "fish"):
        assert "_LIMPET_COMPLETE" in limpet.ok("completion", shell)

    def complete(*words: str, **variables: str) -> list[str]:
        done = limpet(
            COMP_WORDS=" ".join(words), COMP_CWORD=str(len(words) - 1), _LIMPET_COMPLETE="bash_complete", **variables
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return [line.partition(",")[2] for line in done.stdout.split()]

    assert complete("limpet", "hi") == ["history"]
    assert complete("limpet", "inspect", "c0") == ["c0ffee"]
    assert complete("limpet", "inspect", "-s", limpet.state_dir, "c0", LIMPET_STATE_DIR="/nowhere") == ["c0ffee"]
    assert complete("limpet", "inspect", "c0", LIMPET_STATE_DIR="/nowhere") == []


def on_terminal(limpet: Limpet, columns: int, *args: str, until: int = 0, **variables: str) -> str:
    """Run limpet on a terminal of that width and return what it prints there; interrupt it after `until` lines."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    environment = {"PATH": os.environ["PATH"], "TERM": "xterm", "LIMPET_STATE_DIR": limpet.state_dir, **variables}
    # A background job of a shell ignores SIGINT, and so would all that it runs.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "limpet", *args]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    printed = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        before, is_silent = printed.count(b"\n"), not select.select([ours], [], [], 3)[0]
        if not is_silent:
            try:
                printed += os.read(ours, 65536)
            except OSError:  # EIO: the other side is closed
                break
        # Again where nothing comes of it: Python loses an interrupt that comes in a destructor.
        if 0 < until <= printed.count(b"\n") and (before < until or is_silent):
            process.send_signal(signal.SIGINT)
    os.close(ours)
    assert process.wait(30) in ({130} if until else {0, 7})
    return printed.decode()


_PS, _RECOVER = ("ps", "-a"), ("recover", "--dry-run")


@pytest.mark.long
def test_tables_fit_the_terminal(limpet: Limpet, jobs: Jobs) -> None:
    """On a terminal no line is wider than it, in colour unless that is not wanted; elsewhere nothing is cut."""
    jobs.kill_engine_then_one()
    for columns, commands in ((60, (_PS, _RECOVER)), (80, (("events",),)), (140, (_PS, _RECOVER))):
        for args in commands:
            plain = re.sub(r"\x1b\[[0-9;]*m", "", on_terminal(limpet, columns, *args))
            assert max(len(line) for line in plain.splitlines()) <= columns
    assert "\x1b[" in on_terminal(limpet, 80, "ps")
    assert "\x1b[" not in on_terminal(limpet, 80, "ps", NO_COLOR="1")
    assert "\x1b[" not in on_terminal(limpet, 80, "ps", TERM="dumb")
    assert "…" in on_terminal(limpet, 60, "ps")
    assert "…" not in limpet.ok("ps")
    assert "\x1b[" not in limpet.ok("ps")
    ids = [line.split()[0] for line in limpet.ok("ps", "--no-trunc").splitlines()[1:]]
    assert ids == limpet.ok("ps", "-q").split()


def test_logs_fit_the_terminal(limpet: Limpet) -> None:
    """What events and history say of odd ids, names and keys is no wider than the terminal, followed or not."""
    key, name = "docker://" + "f" * 247, "a-name-that-is-longer-than-any-column"
    ended = replace(RUNNING, pid=0, finished_at=9, exit_code=128, reason="CreateInterrupted", message="why " * 20)
    with Store.open(limpet.state_dir) as store:
        store.add_sandbox(sandbox())
        store.add(replace(metadata(name), id=key), RUNNING)
        store.update(key, lambda old: replace(old, paused=True))
        store.update(key, lambda old: replace(old, stop_requested_at=5, stop_deadline=6))
        store.checkpoint(key, ended)
        store.put("a-kind-that-is-long-as-well", "a key that is longer than any column/" * 3, 1)
    for columns, count, args in (
        (60, 0, ("events",)),
        (60, 8, ("events", "--follow", "--since", "0")),
        (60, 0, ("history", key)),
        (100, 0, ("events",)),
    ):
        printed = on_terminal(limpet, columns, *args, until=count)
        told = re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines()
        assert max(map(measure, told)) <= columns, told
        assert any("EXITED  " in line or "EXITED C" in line for line in told), told
    told = limpet.ok("events").splitlines()
    assert [line.split()[-1] for line in told[3:5]] == ["paused", "requested"]
    assert key in told[2]  # elsewhere nothing is shortened


def test_table() -> None:
    """Columns are aligned by what a terminal shows, control characters are escaped, optional columns go first."""
    columns = (Column("ID"), Column("NAME", flexible=True), Column("MORE", optional=True), Column("X"))
    rows = [["1", "日本", "m", "end"], ["22", "a\x1b[31m\n", "mm", Cell("red", "red")]]
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in render_table(columns, rows, None)] == [  # type: ignore[arg-type]
        "ID  NAME         MORE  X",
        "1   日本         m     end",
        "22  a\\x1b[31m\\n  mm    red",
    ]
    narrow = render_table(columns, rows, 19)  # type: ignore[arg-type]
    assert "MORE" not in narrow[0]
    assert all(measure(re.sub(r"\x1b\[[0-9;]*m", "", line)) <= 19 for line in narrow)


def test_duration() -> None:
    """A time span is told in one unit, or in two while the first is small; a clock that was set back shows none."""
    expected = {-5: "0s", 59.9: "59s", 60: "1m", 61: "1m1s", 599: "9m59s", 600: "10m", 659: "10m", 3600: "1h"}
    expected |= {3660: "1h1m", 36_000: "10h", 86_400: "1d", 90_000: "1d1h", 864_000: "10d"}
    assert {seconds: duration(seconds) for seconds in expected} == expected


def test_rfc3339() -> None:
    """Nanoseconds are kept, and 0 is no time."""
    assert rfc3339(1_700_000_000_000_000_001) == "2023-11-14T22:13:20.000000001Z"
    assert rfc3339(0) is None


def test_version(limpet: Limpet) -> None:
    """--version names what a bug report needs."""
    assert re.fullmatch(r"limpet \S+ \(schema \d{4}, Python [\d.]+, SQLite [\d.]+\)\n", limpet.ok("--version"))
