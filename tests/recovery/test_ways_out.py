"""Nothing stays Unknown for ever, and nothing that is damaged, too much or too long stops the rest."""

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from limpet.engine import Engine, Store, errors
from limpet.engine.starters.process import ProcessStarter
from limpet.recovery import HostProbe, Process
from limpet.recovery.orphans import QUARANTINE_MOST
from limpet.schema import ContainerState, ProcessIdentity, Reason
from tests.conftest import is_running, wait_until
from tests.engine_lives import LIVE, Start, rule_of, start_one


class Unseeing(ProcessStarter):
    """Says of no process what became of it."""

    def probe(self, containers_dir: str) -> HostProbe:
        return HostProbe(containers_dir, compare=lambda *_: (Process.UNPROVEN, "nothing is seen"))


def test_a_persons_word_settles_what_no_look_can(engine_process: Start, state_dir: str) -> None:
    """It is EXITED, 255, DeclaredGone, with the person's words in status and history; nothing is signalled."""
    pid = start_one(engine_process, "sleep", "1000")
    with Engine.open(state_dir, starter=Unseeing()) as engine:
        assert engine.get("one").state is ContainerState.UNKNOWN
        assert "limpet resolve" in engine.get("one").status.message
        status = engine.declare_gone("one", "I pulled the plug")
        assert (status.exit_code, status.reason) == (255, Reason.DECLARED_GONE)
        assert is_running(pid)
        last = engine.store.history("one")[-1]
        assert (last.reason, last.message) == (Reason.DECLARED_GONE, "I pulled the plug")
    with Engine.open(state_dir) as engine:
        assert engine.get("one").status.reason == Reason.DECLARED_GONE
        engine.get("one").release()
        engine.get("one").delete()


def test_the_command_records_a_persons_word(state_dir: str) -> None:
    """`limpet resolve` needs the word and the reason, and prints what is recorded."""
    with Engine.open(state_dir) as engine:
        sandbox = engine.create_sandbox({"metadata": {"name": "s"}})
        config = {"metadata": {"name": "c"}, "image": {"image": "host"}, "command": ["true"]}
        engine.create_container(config, sandbox.id, id="one")
    shutil.rmtree(f"{state_dir}/containers/one")
    command = [sys.executable, "-m", "limpet", "--state-dir", state_dir, "resolve", "one"]

    def resolve(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, check=False)

    for arguments in (("--gone",), ("--why", "x"), ("--gone", "--why", " ")):
        assert resolve(*arguments).returncode == 2
    done = resolve("--gone", "--why", "I removed it", "-o", "json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [document[key] for key in ("id", "state", "exit_code", "reason", "message")] == [
        "one",
        "EXITED",
        255,
        "DeclaredGone",
        "I removed it",
    ]
    assert resolve("--gone", "--why", "again").returncode == 4


def test_only_what_is_unknown_can_be_declared_gone(engine: Engine) -> None:
    """A word does not change what is known: neither of what runs, nor of what was created, nor without a reason."""
    sandbox = engine.create_sandbox({"metadata": {"name": "s"}})
    config = {"metadata": {"name": "c"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
    container = engine.create_container(config, sandbox.id)
    with pytest.raises(errors.InvalidStateError, match="CREATED"):
        engine.declare_gone(container.id, "because")
    pid = container.start().pid
    with pytest.raises(errors.InvalidStateError, match="RUNNING"):
        engine.declare_gone(container.id, "because")
    with pytest.raises(errors.InvalidInputError, match="say why"):
        engine.declare_gone(container.id, " ")
    with pytest.raises(errors.NotFoundError):
        engine.declare_gone("nobody", "because")
    os.kill(pid, 9)
    container.wait(20)


def test_a_look_before_the_word_settles_it_if_it_can(engine_process: Start, state_dir: str) -> None:
    """What can be seen by now goes before what is said: the container that has ended keeps its own verdict."""
    pid = start_one(engine_process, "sleep", "1000")
    starter = Unseeing()
    with Engine.open(state_dir, starter=starter) as engine:
        assert engine.get("one").state is ContainerState.UNKNOWN
        os.kill(pid, 9)
        wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the process to be reaped")
        assert engine.declare_gone("one", "because").reason != Reason.DECLARED_GONE


def damage_status(state_dir: str, container_id: str) -> None:
    with sqlite3.connect(f"{state_dir}/store.db") as connection:
        connection.execute("UPDATE container_status SET message = 'evil' WHERE id = ?", (container_id,))
    connection.close()


@pytest.mark.parametrize("steps", [("stop", "delete"), ("release", "delete"), ("delete",)])
def test_a_damaged_record_of_a_running_container_leaks_nothing(
    engine_process: Start, state_dir: str, steps: tuple[str, ...]
) -> None:
    """It can be stopped, released and deleted; its process and its bundle go with it, and nobody else's."""
    script = "for n in ('one', 'two'):\n    c = make(n, 'sleep', '1000'); c.start(); say(c.status.pid)\ntime.sleep(999)"
    process = engine_process(LIVE + script)
    one, two = (int(process.read()[0]) for _ in range(2))
    process.kill()
    with Engine.open(state_dir):
        pass
    damage_status(state_dir, "one")
    with Engine.open(state_dir) as engine:
        assert engine.get("one").status.reason == Reason.DAMAGED
        for step in steps:
            getattr(engine.get("one"), step)()
        wait_until(lambda: not is_running(one), "the process of the damaged record to end")
        assert not os.path.exists(f"{state_dir}/containers/one")
        assert [each.id for each in engine.list()] == ["two"]
        assert engine.get("two").state is ContainerState.RUNNING
    assert is_running(two)
    os.kill(two, 9)


def test_a_damaged_record_is_kept_while_its_process_lives(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the starter cannot end it, deleting is refused: no process that runs is forgotten."""
    suspect = subprocess.Popen(["sleep", "1000"])
    from limpet.recovery import host

    with host.open_pidfd(suspect.pid) as pidfd:
        identity = host.identify(suspect.pid, pidfd)
    sandbox = engine.create_sandbox({"metadata": {"name": "s"}})
    config = {"metadata": {"name": "c"}, "image": {"image": "host"}, "command": ["true"]}
    container = engine.create_container(config, sandbox.id)
    monkeypatch.setattr(Store, "is_damaged", lambda *_: True)
    named: list[ProcessIdentity | None] = [identity]
    monkeypatch.setattr(Store, "find_suspect", lambda *_: named[0])
    with pytest.raises(errors.InvalidStateError, match=f"names process {suspect.pid}"):
        container.delete()
    assert suspect.poll() is None
    suspect.kill()
    suspect.wait()
    container.delete()
    assert engine.list() == []


def test_a_container_that_cannot_be_watched_is_unknown(
    engine_process: Start, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUNNING is not said of what nobody would see end; the next pass watches it."""
    pid = start_one(engine_process, "sleep", "1000")

    def refuse(*_: object) -> int:
        raise OSError(errno.EPERM, "not now")

    with monkeypatch.context() as broken:
        broken.setattr(ProcessStarter, "adopt", refuse)
        with Engine.open(state_dir) as engine:
            (finding,) = engine.recovery.findings
            assert (finding.state, engine.get("one").state) == ("UNKNOWN", ContainerState.UNKNOWN)
            assert "cannot be watched" in engine.get("one").status.message
            broken.undo()
            engine.recover()
            assert (rule_of(engine), engine.get("one").state) == ("survivor", ContainerState.RUNNING)
    os.kill(pid, 9)


OPEN_WITH = """
import resource, sys
from limpet.engine import Engine, errors
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit) if sys.argv[3] == "hard" else (limit, 4096))
try:
    with Engine.open(sys.argv[1]) as engine:
        states = {each.state.name for each in engine.list()}
        print("opened", *sorted(states), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
except errors.LimpetError as error:
    print("refused", error)
"""


def test_descriptors_that_run_out_are_told(engine_process: Start, state_dir: str) -> None:
    """The soft limit is raised; below what is needed, each limit gives an engine or a LimpetError, nothing else."""
    script = "for n in range(40):\n    make(f'c{n}', 'sleep', '1000').start()\nsay('started'); time.sleep(999)"
    process = engine_process(LIVE + script)
    process.read()
    process.kill()

    def open_with(limit: int, kind: str) -> list[str]:
        command = [sys.executable, "-c", OPEN_WITH, state_dir, str(limit), kind]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    assert open_with(30, "soft") == ["opened", "RUNNING", "4096"]
    outcomes = {}
    for limit in (40, 16, 7):
        outcomes[limit] = open_with(limit, "hard")
        assert outcomes[limit][0] in {"opened", "refused"}
    assert outcomes[40] == ["opened", "RUNNING", "40"]
    assert "descriptor" in outcomes[16] or outcomes[16][0] == "opened"


MANY_WITH = """
import os, resource, signal, sys
from contextlib import suppress
from limpet.engine import Engine
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit // 2, int(sys.argv[3])))
with Engine.open(sys.argv[1]) as engine:
    states = {each.state.name for each in engine.list()}
    taken = len(os.listdir("/proc/self/fd"))
    watched = set()
    for name in os.listdir("/proc/self/fdinfo"):
        with suppress(OSError), open(f"/proc/self/fdinfo/{name}") as file:
            watched |= {int(line.split()[1]) for line in file if line.startswith("Pid:")}
    ending = [each for each in engine.list() if each.status.pid not in watched] or engine.list()
    for each in ending:
        os.kill(each.status.pid, signal.SIGKILL)
    codes = {each.wait(20).exit_code for each in ending}
    config = {"metadata": {"name": "next"}, "image": {"image": "host"}, "command": ["true"]}
    container = engine.create_container(config, "jobs")
    container.start()
    print(*states, taken, *codes, container.wait(20).exit_code)
"""


@pytest.mark.parametrize(
    "is_raised",
    [
        pytest.param(True, marks=pytest.mark.long, id="the soft limit is low"),
        pytest.param(False, id="the hard limit is low"),
    ],
)
def test_more_containers_than_descriptors(engine_process: Start, state_dir: str, *, is_raised: bool) -> None:
    """Of what no descriptor is left for the ends are seen, too, and steps go on; a soft limit is raised before that."""
    script = "for n in range(60):\n    make(f'c{n}', 'sleep', '1000').start()\nsay('started'); time.sleep(999)"
    process = engine_process(LIVE + script)
    process.read()
    process.kill()
    command = [sys.executable, "-c", MANY_WITH, state_dir, "60", "1024" if is_raised else "60"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    state, taken, code, following = result.stdout.split()
    assert (state, code, following) == ("RUNNING", "137", "0")
    assert (int(taken) > 60) is is_raised


def test_quarantine_is_bounded_and_takes_long_names(engine: Engine, state_dir: str) -> None:
    """A name of 255 bytes is moved aside with no character cut in two; when the quarantine is full, it says so."""
    containers, quarantine = Path(state_dir, "containers"), Path(state_dir, "quarantine")
    for name in ("n" * 255, "é" * 127, "€" * 85):
        (containers / name).mkdir()
        (containers / name / "file").touch()
    report = engine.recover()
    assert not [orphan.error for orphan in report.orphans if orphan.error]
    moved = [path.name.rpartition(".")[0] for path in quarantine.iterdir()]
    assert all(name.isprintable() and len(set(name)) == 1 for name in moved)
    assert {name[0] for name in moved} == {"n", "é", "€"}
    for number in range(QUARANTINE_MOST - 3):
        (quarantine / str(number)).touch()
    (containers / "one-too-many").touch()
    (orphan,) = engine.recover().orphans
    assert "the most it may" in orphan.error
    assert (containers / "one-too-many").exists()
    (quarantine / "0").unlink()
    assert not engine.recover().orphans[0].error
    assert not (containers / "one-too-many").exists()


def test_a_sandbox_stops_its_containers_side_by_side(engine: Engine) -> None:
    """Five that need their whole grace take the time of one; one that fails is named and keeps no other alive."""
    sandbox = engine.create_sandbox({"metadata": {"name": "s"}})
    containers = []
    for number in range(5):
        config = {
            "metadata": {"name": f"c{number}"},
            "image": {"image": "host"},
            "command": ["sh", "-c", "trap '' TERM; touch ready; while :; do sleep 0.05; done"],
        }
        containers.append(engine.create_container(config, sandbox.id))
        containers[-1].start()
    for each in containers:
        ready = Path(each.metadata.root_dir, "working", "ready")
        wait_until(ready.exists, "the signal to be ignored")
    sandbox.stop(1.0)
    assert max(one.status.stop_requested_at for one in containers) < min(one.status.finished_at for one in containers)
    assert {each.state for each in containers} == {ContainerState.EXITED}
