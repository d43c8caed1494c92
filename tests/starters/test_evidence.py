"""What is said of a start that was cut short: neither "never ran" nor "running" without evidence, whoever hangs."""

import fcntl
import os
import resource
import signal
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from limpet import Engine, errors
from limpet.engine.starters.contract import Prepared
from limpet.engine.starters.process import ProcessStarter, client, ends, starts
from limpet.engine.starters.process.keeper.journal import Journal
from limpet.engine.starters.process.keeper.messages import Message
from limpet.recovery.host import identify, open_pidfd, read_boot_id, read_pid_namespace
from limpet.schema import ContainerState, Reason
from tests.conftest import EngineProcess, is_running, wait_until
from tests.starters.host import make
from tests.starters.keepers import find_keepers
from tests.stops import stop_by_signal

Start = Callable[[str], EngineProcess]
GO = ProcessStarter.go
FREEZER = Path("/sys/fs/cgroup/freezer")


def ask_keeper(directory: Path, *lines: Message) -> Message:
    """Have a keeper begin that finds these records of another one, and return what it says of the container "one"."""
    directory.mkdir(mode=0o700)
    descriptor = os.open(directory, os.O_RDONLY)
    world = f"{read_boot_id()}/{read_pid_namespace()}"
    Journal(descriptor, world).append({"world": world}, *lines)
    os.close(descriptor)
    with closing(client.KeeperClient(str(directory))) as begun, begun.connection(begin=True) as connection:
        assert connection is not None
        return connection.ask({"op": "end", "id": "one"})[0]


def dead_pid() -> int:
    """The number that a process had."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    return pid


def test_an_end_without_its_start_is_not_known(tmp_path: Path) -> None:
    """The line that said whether the program was executed is lost: the code may be the gate's, or the program's."""
    start: Message = {"id": "one", "pid": dead_pid(), "start": 1}
    end: Message = {"id": "one", "end": {"code": 128, "signal": False, "time": 5}}
    answer = ask_keeper(tmp_path / "keeper", start, end)
    assert (answer["executed"], answer["end"]) == (True, {"unseen": True, "time": 5})


def test_the_end_of_the_process_before_is_not_that_of_the_next(tmp_path: Path) -> None:
    """The line between them, that the first one is forgotten, is lost."""
    with open_pidfd(os.getpid()) as pidfd:
        ours = identify(os.getpid(), pidfd)
    first: Message = {"id": "one", "pid": dead_pid(), "start": 1, "executed": False}
    end: Message = {"id": "one", "end": {"code": 128, "signal": False, "time": 5}}
    second: Message = {
        "id": "one",
        "pid": ours.pid,
        "start": ours.start_ticks,
        "inode": ours.pidfd_inode,
        "executed": True,
    }
    answer = ask_keeper(tmp_path / "keeper", first, end, second)
    assert answer.get("running")
    assert "end" not in answer


@pytest.mark.parametrize("lasts", [True, False], ids=["it runs", "it ended"])
def test_whoever_holds_the_report_hides_no_start(engine: Engine, monkeypatch: pytest.MonkeyPatch, lasts: bool) -> None:
    """A process of our user has the gate's pipe open: the end of file does not come, and the start is known anyway."""
    held: list[int] = []

    def go(self: ProcessStarter, prepared: Prepared) -> None:
        report = f"/proc/{prepared.identity.pid}/fd/4"
        wait_until(lambda: os.path.exists(report), "the gate to be told what it is to become")
        held.append(os.open(report, os.O_WRONLY | os.O_CLOEXEC))
        GO(self, prepared)

    monkeypatch.setattr(ProcessStarter, "go", go)
    monkeypatch.setattr(client, "ANSWER_TIMEOUT_SECONDS", 0.5)
    container = make(engine, "one", "sh", "-c", "sleep 1000" if lasts else "exit 128")
    try:
        container.start()
        if lasts:
            assert container.state is ContainerState.RUNNING
            assert container.stop(0).exit_code == 137
        else:
            assert (container.wait(10).exit_code, container.status.reason) == (128, Reason.ERROR)
    finally:
        os.close(held[0])


def test_a_keeper_that_hangs_amid_go_leaves_no_doubt(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate never opened: that is told within the time limit, and it does not open once the keeper goes on."""
    monkeypatch.setattr(client, "ANSWER_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(starts, "_END_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(client, "_let_go_on", lambda _: None)  # it hangs, whatever it is sent
    pids: list[int] = []

    def go(self: ProcessStarter, prepared: Prepared) -> None:
        found = find_keepers(state_dir)
        pids.extend((prepared.identity.pid, found["limpet-anchor"], found["limpet-keeper"]))
        stop_by_signal(*pids[1:])  # the anchor, too, or it would have the keeper go on
        GO(self, prepared)

    with monkeypatch.context() as patch:
        patch.setattr(ProcessStarter, "go", go)
        container = make(engine, "one", "touch", "ran")
        try:
            with pytest.raises(errors.StartError, match="its keeper was killed or hangs"):
                container.start()
        finally:
            for pid in pids[1:]:
                os.kill(pid, signal.SIGCONT)
    assert (container.status.exit_code, container.status.reason) == (128, Reason.START_ERROR)
    wait_until(lambda: not is_running(pids[0]), "its gate to be reaped")
    assert not Path(container.metadata.root_dir, "working", "ran").exists()
    monkeypatch.undo()
    assert make(engine, "two", "sleep", "9").start().state is ContainerState.RUNNING
    engine.get("two").stop(0)


def test_a_report_is_read_whatever_the_number_of_its_descriptor() -> None:
    """An engine with thousands of containers has its pipe beyond those that select(2) takes."""
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    read, write = os.pipe()
    report = fcntl.fcntl(read, fcntl.F_DUPFD_CLOEXEC, 1500)
    try:
        os.write(write, b"why")
        os.close(write)
        assert starts._read_report(report) == b"why"
    finally:
        os.close(read)
        os.close(report)
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


def test_a_gate_ends_with_its_engine_though_a_fork_holds_the_connection(engine_process: Start, state_dir: str) -> None:
    """A fork of the engine (a worker of multiprocessing) lives on: the next engine says at once that it never ran."""
    process = engine_process("""
from limpet.engine.starters.process import ProcessStarter
engine = Engine.open(state_dir)
engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
one = engine.create_container({"metadata": {"name": "one"}, "image": {"image": "host"}, "command": ["true"]}, "jobs",
    id="one")
def go(self, prepared):
    child = os.fork()
    if not child:
        os.closerange(0, 3)
        time.sleep(30)
        os._exit(0)
    say(f"{child} {prepared.identity.pid}")
    os.kill(os.getpid(), signal.SIGKILL)
ProcessStarter.go = go
one.start()
""")
    child, gate = map(int, process.read())
    try:
        assert process.wait() == -signal.SIGKILL
        wait_until(lambda: not is_running(gate), "its gate to end")
        with Engine.open(state_dir, wait=20) as engine:  # a fork closes its copy of the lock once it gets to run
            status = engine.get("one").status
            assert (status.state, status.exit_code) == (ContainerState.EXITED, 128)
            assert "never ran" in status.message
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(not os.access(FREEZER, os.W_OK), reason="needs root and the freezer of cgroup v1")
def test_what_is_still_at_its_gate_is_not_said_to_run(
    engine_process: Start, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine was killed amid the start, and the gate cannot end yet, as it is frozen: Unknown, until it has."""
    monkeypatch.setattr(ends, "_SETTLED_SECONDS", 0.1)
    cgroup = FREEZER / f"limpet-test-{os.getpid()}"
    cgroup.mkdir()
    process = engine_process(f"""
from limpet.engine.starters.process import ProcessStarter
engine = Engine.open(state_dir)
engine.create_sandbox({{"metadata": {{"name": "jobs"}}}}, id="jobs")
config = {{"metadata": {{"name": "one"}}, "image": {{"image": "host"}}, "command": ["true"]}}
def go(self, prepared):
    for name, word in (("cgroup.procs", str(prepared.identity.pid)), ("freezer.state", "FROZEN")):
        with open("{cgroup}/" + name, "w") as file:
            file.write(word)
    while open("{cgroup}/freezer.state").read() != "FROZEN\\n":
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
ProcessStarter.go = go
engine.create_container(config, "jobs", id="one").start()
""")
    try:
        assert process.wait() == -signal.SIGKILL
        gate = int((cgroup / "cgroup.procs").read_text())
        with Engine.open(state_dir) as engine:
            assert engine.get("one").state is ContainerState.UNKNOWN
            (cgroup / "freezer.state").write_text("THAWED")
            wait_until(lambda: not is_running(gate), "its gate to end")
            engine.recover()
            assert engine.get("one").status.exit_code == 128
            assert "never ran" in engine.get("one").status.message
    finally:
        (cgroup / "freezer.state").write_text("THAWED")
        wait_until(lambda: not (cgroup / "cgroup.procs").read_text(), "the cgroup to be empty")
        cgroup.rmdir()
