"""The verbs that change something: by the live engine, by one opened for it, and across the kill of either."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from limpet.engine import Engine, Store
from limpet.engine.cli.output import Cell, Column, Ids, cut_middle, measure, render_table, short_id, size
from limpet.engine.control.requests import MADE_BY
from limpet.engine.drill.small_image import IMAGE, make_archive
from limpet.engine.inspection.snapshot import Snapshot
from limpet.schema import errors
from tests.cli.conftest import Jobs, Limpet, photograph
from tests.cli.test_command import on_terminal
from tests.conftest import PACKAGES, EngineProcess, count_sockets, find_interpreter, is_running, wait_until

LIVE = "engine = Engine.open(state_dir); say(os.getpid()); time.sleep(1000)"
Start = Callable[[str], EngineProcess]
Begin = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def begin(state_dir: str) -> Iterator[Begin]:
    """Starts limpet and goes on; what a test that fails has left running is in the way of no other."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "limpet", "-s", state_dir, *args]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def state_of(limpet: Limpet, name: str) -> str:
    """Return the state of the container with this name; nothing if there is none."""
    try:
        with Snapshot.open(limpet.state_dir) as snapshot:
            return next((view.status.state.name for view in snapshot.list(name=name)), "")
    except errors.NotFoundError:  # nothing is there yet
        return ""


@pytest.fixture(params=["a live engine", pytest.param("none", marks=pytest.mark.long)])
def somewhere(request: pytest.FixtureRequest, limpet: Limpet, engine_process: Start) -> Limpet:
    """The command line, beside a live engine and without one."""
    if request.param != "none":
        engine_process(LIVE).read()
    else:
        engine_process("say(1); time.sleep(1000)")  # whose teardown ends the containers
    return limpet


def test_run_ends_as_its_program(somewhere: Limpet) -> None:
    """Its output comes where it belongs, its exit code is the exit status, and with --rm nothing is left."""
    script = "echo out $A; echo wrong >&2; exit 7"
    done = somewhere("run", "--rm", "-e", "A=1", "host", "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (7, "out 1\n", "wrong\n")
    assert somewhere.json("ps", "-a")["containers"] == []
    assert somewhere.json("pods")["sandboxes"] == []
    assert somewhere("run", "--rm", "host", "sh", "-c", "kill -9 $$").returncode == 128 + 9
    document = json.loads(somewhere.ok("run", "--rm", "-o", "json", "host", "sh", "-c", "echo x; exit 3", status=3))
    assert (document["state"], document["exit_code"]) == ("EXITED", 3)


def test_a_life_by_name(somewhere: Limpet) -> None:
    """A container is run, seen, stopped, waited for and removed under its name; its sandbox comes and goes with it."""
    key = somewhere.ok("run", "-d", "--name", "web", "-l", "app=web", "host", "sleep", "1000").strip()
    (shown,) = somewhere.json("ps", "web")["containers"]
    assert (shown["id"], shown["image"], shown["command"]) == (key, "host:latest", ["sleep", "1000"])
    assert (shown["attempt"], shown["labels"], shown["state"]) == (0, {"app": "web"}, "RUNNING")
    (pod,) = somewhere.json("pods", "web")["sandboxes"]
    assert pod["containers"] == {"CREATED": 0, "RUNNING": 1, "EXITED": 0, "UNKNOWN": 0}
    (used,) = somewhere.json("top")["containers"]
    assert (used["id"], used["processes"]) == (key, 1)
    refused = somewhere("rm", "web")
    assert refused.returncode == 4
    assert "stop it first" in refused.stderr
    assert somewhere.ok("stop", "-t", "5", "web") == "web: EXITED, exit code 143, Error\n"
    assert somewhere.ok("wait", "-q", key[:10]) == "143\n"
    assert somewhere.ok("rm", "web").splitlines() == [
        f"removed container web ({key[:12]})",
        f"removed sandbox web ({pod['id'][:12]})",
    ]
    assert somewhere("rm", "web").returncode == 3


def test_force_and_sandboxes(somewhere: Limpet) -> None:
    """rm -f kills; a sandbox that is named goes with all that is in it, by force alone."""
    somewhere.ok("run", "-d", "--name", "one", "host", "sleep", "1000")
    sandbox_id = somewhere.json("ps", "one")["containers"][0]["sandbox_id"]
    somewhere.ok("run", "-d", "--name", "two", "--sandbox", sandbox_id[:8], "host", "sleep", "1000")
    pids = [one["pid"] for one in somewhere.json("ps")["containers"]]
    assert somewhere("rm", sandbox_id).returncode == 4
    assert len(somewhere.ok("rm", "-f", sandbox_id).splitlines()) == 3
    assert not any(map(is_running, pids))
    assert somewhere.json("ps", "-a")["containers"] == somewhere.json("pods")["sandboxes"] == []


def test_several_at_once_and_one_that_is_not_there(somewhere: Limpet) -> None:
    """Several are stopped side by side; the one that fails is told, and gives the status."""
    for name in ("one", "two", "three"):
        somewhere.ok("run", "-d", "--name", name, "host", "sh", "-c", "trap '' TERM; while :; do sleep 1; done")
    begun = time.monotonic()
    done = somewhere("stop", "-t", "2", "one", "nope", "two", "three")
    assert time.monotonic() - begun < 30
    assert done.returncode == 3
    assert "'nope'" in done.stderr
    assert sorted(line.split(":")[0] for line in done.stdout.splitlines()) == ["one", "three", "two"]


def test_prune(somewhere: Limpet) -> None:
    """What has ended goes, and what runs stays. A dry run says the same, and does nothing."""
    somewhere.ok("run", "-d", "--name", "alive", "host", "sleep", "1000")
    somewhere.ok("run", "--name", "done", "host", "true")
    before = photograph(somewhere.state_dir)
    planned = somewhere.json("prune", "--dry-run")
    assert photograph(somewhere.state_dir) == before
    done = somewhere.json("prune")
    assert sorted(map(str, done["removed"])) == sorted(map(str, planned["removed"]))
    assert [(one["kind"], one["name"]) for one in done["removed"]] == [("container", "done"), ("sandbox", "done")]
    assert (planned["dry_run"], done["dry_run"], done["problems"]) == (True, False, {})
    assert [one["name"] for one in somewhere.json("ps", "-a")["containers"]] == ["alive"]
    assert somewhere.json("prune", "--sandboxes")["removed"] == []


def test_prune_leaves_what_waits_for_its_restart(limpet: Limpet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service between two attempts is not over: it is there still, and told in no dry run."""
    monkeypatch.setattr("limpet.schema.restart.FIRST_DELAY_NS", 600 * 10**9)
    config = {"metadata": {"name": "web"}, "image": {"image": "host"}, "command": ["false"]}
    with Engine.open(limpet.state_dir) as engine:
        pod = engine.create_sandbox({"metadata": {"name": "web"}, "annotations": {MADE_BY: "run"}})
        web = engine.create_container(config, pod, restart="always")
        web.start()
        web.wait(20)
        for options in ([], ["--dry-run"], ["--sandboxes"], ["--sandboxes", "--dry-run"]):
            assert limpet.json("prune", *options)["removed"] == []
        assert web.restart_at
        web.stop()
        assert [each["kind"] for each in limpet.json("prune")["removed"]] == ["container", "sandbox"]


def test_prune_keeps_sandboxes_that_are_empty_unless_asked(limpet: Limpet) -> None:
    """A sandbox that a program made stays when its last container goes."""
    with Engine.open(limpet.state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "own"}})
        assert limpet.json("prune")["removed"] == []
        assert [one["name"] for one in limpet.json("prune", "--sandboxes", "--dry-run")["removed"]] == ["own"]
        assert [one["name"] for one in limpet.json("prune", "--sandboxes")["removed"]] == ["own"]


def test_run_says_why_it_cannot(somewhere: Limpet) -> None:
    """An image or a program that is not there: 125 and the reason; with -d the status of any verb."""
    for args, words in ((("nope", "x"), "not in the store"), (("host", "/no/program"), "No such file")):
        done = somewhere("run", "--rm", *args)
        assert (done.returncode, done.stdout) == (125, "")
        assert words in done.stderr
    assert somewhere("run", "-d", "nope", "x").returncode == 3
    assert somewhere("run", "-d", "--rm", "host", "true").returncode == 2
    somewhere.ok("run", "--name", "x", "host", "true")
    taken = somewhere("run", "-d", "--name", "x", "host", "true")
    assert taken.returncode == 4
    assert "the name 'x' is taken" in taken.stderr
    somewhere.ok("rm", "x")
    assert somewhere("run", "host").returncode == 125  # neither says what to run
    assert somewhere.json("ps", "-a")["containers"] == somewhere.json("pods")["sandboxes"] == []


def test_interrupted_run_stops_its_container(somewhere: Limpet, begin: Begin) -> None:
    """Ctrl-C has the container stopped, and the exit status is what it made of that."""
    process = begin(
        "run", "--name", "x", "host", "sh", "-c", "trap 'exit 9' TERM; echo on; while :; do sleep 0.1; done"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 9
    process.communicate()
    assert state_of(somewhere, "x") == "EXITED"


def test_interrupted_run_that_tells_by_a_document_stops_its_container(somewhere: Limpet, begin: Begin) -> None:
    """So it does where nothing is followed."""
    process = begin("run", "--rm", "--name", "x", "-o", "json", "host", "sleep", "1000")
    wait_until(lambda: state_of(somewhere, "x") == "RUNNING", "the container")
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert (process.returncode, json.loads(told)["exit_code"]) == (143, 143)
    assert state_of(somewhere, "x") == ""


@pytest.mark.parametrize("signals", [1, 2])
def test_a_run_that_is_interrupted_before_it_has_begun(
    limpet: Limpet, engine_process: Start, tmp_path: Path, signals: int, begin: Begin
) -> None:
    """The container is stopped once it has begun, and removed with --rm. A second signal leaves it to the engine."""
    engine = engine_process(
        "engine = Engine.open(state_dir)\n"
        "go = engine.starter.go\n"
        "def hold(prepared):\n"
        "    say('held')\n"
        f"    while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)\n"
        "    return go(prepared)\n"
        "engine.starter.go = hold\n"
        "say('ready'); time.sleep(1000)\n"
    )
    engine.read()
    process = begin("run", "--rm", "--name", "x", "host", "sleep", "1000")
    assert engine.read() == ["held"]
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert "container x is stopped once it has begun" in process.stderr.readline()
    if signals == 2:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    (tmp_path / "go").touch()
    if signals == 1:
        assert process.wait(60) == 143
        assert state_of(limpet, "x") == ""
    process.communicate()


def test_a_run_whose_reader_goes_away_waits_all_the_same(somewhere: Limpet) -> None:
    """`limpet run ... | head` ends as its program does."""
    command = f"set -o pipefail; {sys.executable} -m limpet -s {somewhere.state_dir} run --rm host sh -c"
    command += " 'for i in $(seq 2000); do echo $i; done; sleep 1; echo more; exit 4' | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (4, "1\n")
    assert "Traceback" not in done.stderr


def test_run_goes_on_when_the_engine_is_killed(
    limpet: Limpet, engine_process: Start, tmp_path: Path, begin: Begin
) -> None:
    """The engine that a run went to is killed: the output goes on, and the exit status is the program's."""
    engine = engine_process(LIVE)
    engine.read()
    os.mkfifo(tmp_path / "go")
    script = f"echo begun; read line < {tmp_path}/go; echo last; exit 5"
    process = begin("run", "--name", "x", "host", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    engine.kill()
    (tmp_path / "go").write_text("\n")
    assert process.stdout.read() == "last\n"
    assert process.wait(60) == 5
    process.communicate()
    assert limpet.json("ps", "-a", "x")["containers"][0]["exit_code"] == 5


def test_a_command_that_waits_keeps_nobody_out(limpet: Limpet, engine_process: Start, begin: Begin) -> None:
    """Without a live engine a run opens one, and closes it again: while it waits a service can open its own."""
    engine_process("say(1); time.sleep(1000)")
    process = begin("run", "--name", "x", "host", "sh", "-c", "trap 'exit 8' TERM; while :; do sleep 0.1; done")
    wait_until(lambda: state_of(limpet, "x") == "RUNNING", "the container")
    waiting = begin("wait", "-q", "x")
    wait_until(lambda: limpet.json("info")["info"]["holder"] is None, "the engine's close")
    service = engine_process(LIVE)
    service.read()
    wait_until(lambda: count_sockets(service.pid) >= 3, "both to come to it")
    service.kill()
    assert process.poll() is None
    assert waiting.poll() is None
    assert limpet.ok("stop", "-t", "10", "x") == "x: EXITED, exit code 8, Error\n"
    assert process.wait(60) == 8
    assert waiting.communicate(timeout=60) == ("8\n", "")
    process.communicate()


@pytest.mark.long
@pytest.mark.usefixtures("engine_process")  # whose teardown ends the container
def test_a_wait_outlasts_engines_that_come_and_go(limpet: Limpet, begin: Begin) -> None:
    """Each is soon closed or killed, as those of other commands are; at the end the state is locked for a moment."""
    limpet.ok("run", "-d", "--name", "x", "host", "sleep", "1000")
    waiting = begin("wait", "-q", "x")
    since = time.monotonic()
    while time.monotonic() < since + 4:  # longer than a command bears what is in the way
        with Engine.open(limpet.state_dir) as engine:
            pid = engine.get("x").status.pid
            callers = engine._control._callers
            wait_until(lambda callers=callers: any(each.waits_for for each in list(callers.values())), "it to ask")  # type: ignore[misc] # bound at once
    wait_until(lambda: "nanosleep" in Path(f"/proc/{waiting.pid}/wchan").read_text(), "it to look by itself")
    with Store.open(limpet.state_dir):  # takes no requests
        os.kill(pid, signal.SIGKILL)
        time.sleep(1)
    assert waiting.communicate(timeout=60) == ("137\n", "")


@pytest.mark.parametrize("verb", ["wait", "run"])
def test_no_empty_state_takes_the_place_of_one_that_is_moved(limpet: Limpet, begin: Begin, verb: str) -> None:
    """Who waits says that the state is gone; where it is, the end is found."""
    moved = f"{limpet.state_dir}.moved"
    if verb == "wait":
        limpet.ok("run", "-d", "--name", "job", "host", "sleep", "1000")
    waiting = begin("wait", "job") if verb == "wait" else begin("run", "--name", "job", "host", "sleep", "1000")
    wait_until(lambda: state_of(limpet, "job") == "RUNNING", "nothing runs")
    time.sleep(2)  # it keeps no engine open from here on
    with Snapshot.open(limpet.state_dir) as snapshot:
        pid = snapshot.get("job").status.pid
    os.rename(limpet.state_dir, moved)
    os.kill(pid, signal.SIGKILL)
    _, said = waiting.communicate(timeout=20)
    assert (waiting.returncode, os.path.lexists(limpet.state_dir)) == ({"wait": 3, "run": 125}[verb], False), said
    assert "does not exist" in said
    os.rename(moved, limpet.state_dir)
    assert limpet.ok("wait", "--quiet", "job") == "137\n"


def test_who_waits_is_told_of_the_end_of_what_another_removes(limpet: Limpet, begin: Begin) -> None:
    """Without a live engine, too: the command that removes it opens one for as long as that takes."""
    limpet.ok("run", "-d", "--name", "x", "host", "sleep", "1000")
    waiting = begin("wait", "-q", "x")
    wait_until(lambda: "nanosleep" in Path(f"/proc/{waiting.pid}/wchan").read_text(), "it to sleep between two looks")
    limpet.ok("rm", "-f", "x")
    assert waiting.communicate(timeout=60) == ("137\n", "")


@pytest.mark.usefixtures("engine_process")  # whose teardown ends the container
def test_a_run_that_is_killed_leaves_its_container_running(limpet: Limpet, begin: Begin, tmp_path: Path) -> None:
    """SIGKILL of the command itself: the container is in ps, and its end is known."""
    script = f"while [ ! -e {tmp_path}/go ]; do sleep 0.1; done; exit 6"
    process = begin("run", "--rm", "--name", "x", "host", "sh", "-c", script)
    wait_until(lambda: state_of(limpet, "x") == "RUNNING", "the container")
    process.kill()
    process.communicate()
    assert limpet.json("ps", "x")["containers"][0]["state"] == "RUNNING"
    (tmp_path / "go").touch()
    assert limpet.ok("wait", "-q", "x") == "6\n"


def test_a_kill_of_the_engine_before_the_program_is_let_go(limpet: Limpet, engine_process: Start) -> None:
    """What was asked for is running when `run -d` says so: what never ran is no answer, and is begun anew."""
    engine = engine_process(
        "engine = Engine.open(state_dir)\n"
        "engine.starter.go = lambda prepared: os.kill(os.getpid(), 9)\n"
        "say('ready'); time.sleep(1000)\n"
    )
    engine.read()
    (key,) = limpet.ok("run", "-d", "--name", "x", "host", "sleep", "1000").split()
    (one,) = limpet.json("ps", "-a")["containers"]
    assert (one["id"], one["state"]) == (key, "RUNNING")
    assert limpet.ok("events", "--id", key, "--kind", "added").count(" added ") == 2
    limpet.ok("rm", "-f", "x")


@pytest.mark.long
@pytest.mark.parametrize(
    "verb",
    [
        ["run", "-d", "--name", "x", "host", "sleep", "1000"],
        ["stop", "-t", "1", "y"],
        ["rm", "-f", "y"],
        ["prune"],
    ],
    ids=lambda verb: verb[0],
)
def test_a_kill_of_the_engine_amid_a_command(limpet: Limpet, engine_process: Start, verb: list[str]) -> None:
    """Whenever the engine is killed, the command is done by the next one, and nothing is done twice."""
    stubborn = "trap '' TERM; while :; do sleep 0.1; done"
    for delay in (0.0, 0.01, 0.05, 0.2):
        engine = engine_process(
            "engine = Engine.open(state_dir)\n"
            "sandbox = engine.create_sandbox({'metadata': {'name': 'p'}})\n"
            "def make(name, *command):\n"
            "    config = {'metadata': {'name': name}, 'image': {'image': 'host'}, 'command': command}\n"
            "    engine.create_container(config, sandbox.id).start()\n"
            f"make('y', 'sh', '-c', {stubborn!r}); make('z', 'true')\n"
            "engine.get('z').wait(30)\n"
            "from limpet.engine.control import server\n"
            "answer = server.perform\n"
            "def perform(engine, request):\n"
            f"    import threading; threading.Timer({delay}, lambda: os.kill(os.getpid(), 9)).start()\n"
            "    return answer(engine, request)\n"
            "server.perform = perform\n"
            "say('ready'); time.sleep(1000)\n"
        )
        engine.read()
        done = limpet(*verb)
        assert done.returncode == 0, done.stderr
        if not engine.is_over():
            engine.kill()
        found = {one["name"]: one["state"] for one in limpet.json("ps", "-a")["containers"]}
        expected = {
            "run": {"x": "RUNNING", "y": "RUNNING", "z": "EXITED"},
            "stop": {"y": "EXITED", "z": "EXITED"},
            "rm": {"z": "EXITED"},
            "prune": {"y": "RUNNING"},
        }[verb[0]]
        assert found == expected
        for pod in limpet.json("pods")["sandboxes"]:
            limpet.ok("rm", "-f", pod["id"])


def test_a_store_takes_no_commands(limpet: Limpet) -> None:
    """A program that has the state open with a store of its own is named, and nothing is done."""
    Engine.open(limpet.state_dir).close()
    with Store.open(limpet.state_dir):
        done = limpet("run", "-d", "host", "true")
        assert done.returncode == 5
        assert f"process {os.getpid()}" in done.stderr
        assert "takes no commands" in done.stderr
        info = limpet.json("info")["info"]
        assert (info["holder"], info["engine"]) == (os.getpid(), None)


def test_names_that_several_have(limpet: Limpet) -> None:
    """A text that means several is refused with their ids, and is not called missing."""
    with Engine.open(limpet.state_dir) as engine:
        for number in (1, 2):
            sandbox = engine.create_sandbox({"metadata": {"name": f"p{number}"}})
            config = {"metadata": {"name": "same"}, "image": {"image": "host"}, "command": ["true"]}
            engine.create_container(config, sandbox.id, id=f"4a{number}")
        for verb in ("stop", "rm", "wait", "inspect", "history"):
            for text in ("same", "4a"):
                done = limpet(verb, text)
                assert done.returncode == 4, (verb, text)
                assert "4a1" in done.stderr


def test_images_and_load(somewhere: Limpet, tmp_path: Path) -> None:
    """An archive is loaded and listed; what is no image is refused."""
    archive = tmp_path / "image.tar"
    archive.write_bytes(make_archive())
    assert somewhere.json("load", str(archive))["images"] == [IMAGE]
    listed = {one["name"]: one for one in somewhere.json("images")["images"]}
    assert set(listed) == {"host:latest", IMAGE}
    assert listed[IMAGE]["digest"].startswith("sha256:")
    assert listed["host:latest"]["digest"] is None
    before = photograph(somewhere.state_dir)
    somewhere.ok("images")
    assert photograph(somewhere.state_dir) == before
    (tmp_path / "no.tar").write_text("no")
    assert somewhere("load", str(tmp_path / "no.tar")).returncode == 2
    assert somewhere("load", str(tmp_path / "missing")).returncode == 2


VERBS = (
    "ps", "pods", "top", "images", "inspect x", "history x", "logs x", "wait x", "stop x", "rm x", "prune",
    "prune --dry-run", "run -d host true", "load /dev/null", "recover", "recover --dry-run", "resolve x --gone --why y",
    "check", "backup /tmp/never-made.db",
)  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_directory_that_was_never_limpets(tmp_path: Path, limpet: Limpet, verb: str) -> None:
    """It is called that, whatever the verb, and not a bit of it is changed."""
    foreign = tmp_path / "etc"
    (foreign / "containers").mkdir(parents=True)
    (foreign / "passwd").write_text("root")
    foreign.chmod(0o755)
    limpet.state_dir = str(foreign)
    before = photograph(str(foreign))
    done = limpet(*verb.split())
    assert done.returncode == 1 if not verb.startswith("run -d") else done.returncode in {1, 125}
    assert "contains no limpet state" in done.stderr
    assert photograph(str(foreign)) == before


def test_info_of_a_directory_that_was_never_limpets(tmp_path: Path, limpet: Limpet) -> None:
    """info says what it is not, and what it can say all the same."""
    (tmp_path / "etc" / "containers").mkdir(parents=True)
    limpet.state_dir = str(tmp_path / "etc")
    before = photograph(limpet.state_dir)
    info = limpet.json("info")["info"]
    assert "contains no limpet state" in info["problem"]
    assert info["limpet"]
    assert photograph(limpet.state_dir) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_root_asks_the_engine_of_a_service_user(limpet: Limpet) -> None:
    """Root reads what a service user's engine keeps, and has that engine change it: no file becomes root's."""
    user = 12345
    interpreter = find_interpreter(user)
    if not interpreter:
        pytest.skip("another user cannot read this installation")
    place = Path(f"/tmp/limpet-test-{os.getpid()}")
    place.mkdir(mode=0o755)
    os.chown(place, user, user)
    limpet.state_dir = str(place / "state")
    script = (
        f"import os, sys\nos.setgroups([]); os.setgid({user}); os.setuid({user})\n"
        "from limpet.engine import Engine\n"
        f"engine = Engine.open({limpet.state_dir!r}); print('ready', flush=True)\n"
        "if sys.stdin.read(): os.kill(os.getpid(), 9)\n"
        "[container.stop(0) for container in engine.list()]\nengine.close()\n"
    )

    def begin_engine() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [interpreter, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", env=PACKAGES
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def owners() -> set[int]:
        return {path.lstat().st_uid for path in place.rglob("*")}

    try:
        engine = begin_engine()
        limpet.ok("run", "-d", "--name", "x", "host", "sh", "-c", "echo hello; sleep 1000")
        (shown,) = limpet.json("ps")["containers"]
        assert os.stat(f"/proc/{shown['pid']}").st_uid == user
        wait_until(lambda: limpet.ok("logs", "x") == "hello\n", "its output")
        assert owners() == {user}
        engine.communicate("die")
        Path(limpet.state_dir, "store.db-shm").unlink()  # which a reader makes anew
        assert limpet.json("ps")["containers"][0]["state"] == "RUNNING"
        refused = limpet("rm", "x")
        assert refused.returncode == 1
        assert f"sudo -u '#{user}'" in refused.stderr
        assert owners() == {user}
        engine = begin_engine()
        limpet.ok("stop", "-t", "0", "x")
        engine.communicate("")
        assert limpet.json("ps", "-a")["containers"][0]["state"] == "EXITED"
        assert owners() == {user}
    finally:
        subprocess.run(["rm", "-rf", str(place)], check=False)


@pytest.mark.long
def test_rows_never_look_alike(limpet: Limpet) -> None:
    """At any width each id is unique and can be typed in again, each column is there, and names are cut last."""
    with Engine.open(limpet.state_dir) as engine:
        sandbox = engine.create_sandbox({"metadata": {"name": "p"}})
        ids = [f"{number:02}" + "a" * 30 + str(number) for number in range(4)] + ["ab" * 16 + "1", "ab" * 16 + "2"]
        for key in ids[:4]:
            config = {"metadata": {"name": f"integration-{key[-1]}"}, "image": {"image": "host"}, "command": ["true"]}
            engine.create_container(config, sandbox.id, id=key)
    for columns in (60, 80, 160):
        printed = re.sub(r"\x1b\[[0-9;]*m", "", on_terminal(limpet, columns, "ps")).split("\r\n")
        assert max(map(len, printed)) <= columns
        header, *rows = filter(None, printed)
        assert {"CONTAINER", "NAME", "SANDBOX", "STATE", "AGE", "STATUS"} <= set(header.split())
        assert ({"ATTEMPT", "IMAGE", "COMMAND"} <= set(header.split())) == (columns == 160)
        shown = [row.split()[0] for row in rows]
        assert len(set(shown)) == len(rows) == 4
        for text in shown:
            assert len(limpet.json("inspect", text)["inspected"]) == 1
        assert len({row.split()[1] for row in rows}) == 4


def test_top_is_live_on_a_terminal_alone(limpet: Limpet, jobs: Jobs) -> None:
    """Elsewhere it prints once; on a terminal until Ctrl-C, and ends with 0. Any signal leaves that as it was."""
    assert {one["name"] for one in limpet.json("top")["containers"]} == {"alive", "dying"}
    assert "alive" in limpet.ok("top")
    script = (
        "import os, pty, select, signal, sys, time\n"
        "pid, ours = pty.fork()\n"
        f"top = [sys.executable, '-m', 'limpet', '-s', {limpet.state_dir!r}, 'top', '--interval', '0.3']\n"
        "if pid == 0: os.execv(sys.executable, top)\n"
        "seen = b''\n"
        "while seen.count(b'running: 2') < 2:\n"
        "    assert select.select([ours], [], [], 30)[0]\n"
        "    seen += os.read(ours, 65536)\n"
        "number = int(sys.argv[1])\n"
        "os.write(ours, b'\\x03') if number == signal.SIGINT else os.kill(pid, number)\n"
        "while True:\n"
        "    try: seen += os.read(ours, 65536)\n"
        "    except OSError: break\n"
        "shown = seen.rfind(b'\\x1b[?25h') > seen.rfind(b'\\x1b[?25l')\n"
        "left = seen.count(b'\\x1b[?1049h') == seen.count(b'\\x1b[?1049l')\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), b'alive' in seen, shown, left)\n"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "24"}
    for number, status in ((signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        command = [sys.executable, "-c", script, str(int(number))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
        assert done.stdout == f"{status} True True True\n", done.stderr


def test_ids_in_tables() -> None:
    """As short as they are unique, and never as another's name; sizes have one unit."""
    ids = Ids(
        ["a" * 64, "a" * 20 + "b", "integration-tests-1", "integration-tests-2", "0123456789abcdef"], ["0123456789ab"]
    )
    assert ids.cell("integration-tests-1").text == "integration-tests-1"
    assert ids.cell("a" * 20 + "b").text == "a" * 20 + "b"
    assert ids.cell("a" * 64).text == "a" * 21
    assert ids.cell("0123456789abcdef").text == "0123456789abcdef"
    assert Ids(["0123456789abcdef"]).cell("0123456789abcdef")[::2] == ("0123456789ab", 6)
    assert [short_id(key) for key in ("f" * 64, "worker-of-a-pod-1", "worker-of-a-pod-2")] == [
        *("f" * 12, "worker-of-a-pod-1", "worker-of-a-pod-2")
    ]
    assert [size(count) for count in (0, 999, 1000, 1_449_000, 37_000_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.4 MB",
        "37 GB",
    ]
    assert cut_middle("integration-tests-browser-1", 11) == "integ…ser-1"
    assert measure(cut_middle("日本日本日本", 7)) <= 7
    columns = (Column("ID"), Column("NAME", keeps_end=True), Column("STATUS", flexible=True))
    rows: list[list[str | Cell]] = [[Ids(["0123456789abcdef"]).cell("0123456789abcdef"), "n" * 20, "s" * 40]]
    assert render_table(columns, rows, 56)[1] == "0123456789ab  " + "n" * 20 + "  " + "s" * 19 + "…"
    assert render_table(columns, rows, 50)[1] == "012345  " + "n" * 20 + "  " + "s" * 19 + "…"
    assert render_table(columns, rows, 40)[1] == "012345  " + "nnnnn…nnnn" + "  " + "s" * 19 + "…"


def test_what_is_run_with_a_policy_is_started_again(limpet: Limpet, engine_process: Start) -> None:
    """By the live engine, as the next attempt of its name, until it is stopped; only -d goes with it."""
    engine_process(LIVE).read()
    for args in (("--restart", "always"), ("-d", "--restart", "sometimes"), ("-d", "--restart", "always:3")):
        refused = limpet("run", *args, "host", "true")
        assert (refused.returncode, "restart" in refused.stderr) == (2, True)
    limpet.ok("run", "-d", "--restart", "on-failure:1", "--name", "flaky", "host", "false")
    limpet.ok("run", "-d", "--restart", "always", "--name", "web", "host", "sleep", "1000")

    def attempts(name: str) -> dict[int, str]:
        return {each["attempt"]: each["state"] for each in limpet.json("ps", "-a", name)["containers"]}

    (shown,) = limpet.json("inspect", "web")["inspected"]
    os.kill(shown["status"]["pid"], signal.SIGKILL)
    wait_until(lambda: attempts("flaky") == {0: "EXITED", 1: "EXITED"}, "one restart of what failed")
    wait_until(lambda: attempts("web") == {0: "EXITED", 1: "RUNNING"}, "a restart of what was killed")
    limpet.ok("stop", "web")
    assert limpet.json("ps")["containers"] == []
    (last,) = (each["id"] for each in limpet.json("ps", "-a", "flaky")["containers"] if each["attempt"] == 1)
    limpet.ok("rm", last)
    assert attempts("flaky") == {0: "EXITED"}
    limpet.ok("rm", "web")  # and its name is free again
    assert attempts("web") == {}
    assert {each["name"] for each in limpet.json("pods")["sandboxes"]} == {"flaky"}
