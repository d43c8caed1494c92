"""A start is a start: whose program was executed runs; of all others it is said that they never ran, and why."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Event

import pytest

from limpet import Engine, errors
from limpet.engine.starters.contract import Prepared
from limpet.engine.starters.process import ProcessStarter
from limpet.engine.starters.process.client import ANSWER_TIMEOUT_SECONDS, Connection, KeeperClient
from limpet.engine.starters.process.keeper.gate import EXECUTES
from limpet.engine.starters.process.keeper.kernel import read_stat_of
from limpet.engine.starters.process.keeper.messages import Message
from limpet.engine.starters.process.starts import Held
from limpet.recovery.host import wait_for_end
from limpet.schema import ContainerState, Reason
from limpet.testing import open_descriptors
from tests.conftest import PACKAGES, find_interpreter, is_running, wait_until
from tests.starters.host import make
from tests.starters.keepers import ALL, find_keepers, held, kill
from tests.stops import stop_by_signal


@pytest.mark.parametrize("seconds", [0.3, 3.0])
def test_a_program_that_is_still_open_for_writing_is_tried_again(
    engine: Engine, tmp_path: Path, seconds: float
) -> None:
    """A fork of who has written it may hold it for a moment: execve(2) says ETXTBSY. What stays so is told."""
    program = tmp_path / "program"
    shutil.copy("/bin/true", program)
    with program.open("ab"):
        holder = os.fork()
        if not holder:
            time.sleep(seconds)
            os._exit(0)
    container = make(engine, "one", str(program))
    if seconds < 1:
        container.start()
        assert container.wait(20).exit_code == 0
    else:
        with pytest.raises(errors.StartError, match="program': Text file busy"):
            container.start()
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)


def leave_by_all(state_dir: str, prepared: Prepared) -> None:
    """Kill all keepers, and wait until the process has ended and somebody else has reaped it."""
    kill(state_dir, *ALL)
    wait_until(lambda: read_stat_of(prepared.identity.pid, prepared.pidfd) is None, "its end to be reaped")


def leave_untold(prepared: Prepared) -> None:
    """Have its keeper not be told that it is to go."""
    held = prepared.own
    assert isinstance(held, Held)
    held.connection.tell = lambda *_: None  # type: ignore[method-assign]


def blind_keepers(state_dir: str) -> None:
    """Stop them, so that they see no end, and write none down."""
    stop_by_signal(*(find_keepers(state_dir)[name] for name in ("limpet-anchor", "limpet-keeper")))


@pytest.mark.parametrize("case", ["its gate opened", "its gate closed", "it was killed at its gate"])
def test_a_start_that_all_keepers_leave_is_told_by_its_process(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Whose gate had opened has run, whether or not its end was seen; whose gate closed never ran, and that is said."""
    is_open = case == "its gate opened"
    real = ProcessStarter.go

    def go(self: ProcessStarter, prepared: Prepared) -> None:
        held = prepared.own
        assert isinstance(held, Held)
        if is_open:
            held.connection.tell({"op": "go", "id": held.container_id})
            assert wait_for_end(prepared.pidfd, 20)
        if case == "it was killed at its gate":  # as by a keeper that takes over; it reports nothing
            signal.pidfd_send_signal(prepared.pidfd, signal.SIGKILL)
        leave_by_all(state_dir, prepared)
        real(self, prepared)

    monkeypatch.setattr(ProcessStarter, "go", go)
    container = make(engine, "one", "touch", "ran")
    if is_open:
        container.start()
        status = container.wait(20)
        # From Linux 6.15 on a pidfd tells the code after all.
        assert (status.exit_code, status.reason) in {(0, Reason.COMPLETED), (255, Reason.UNKNOWN)}
    else:
        with pytest.raises(errors.StartError):
            container.start()
        assert (container.status.exit_code, container.status.reason) == (128, Reason.START_ERROR)
        assert "never ran" in container.status.message
    assert Path(container.metadata.root_dir, "working", "ran").exists() is is_open


@pytest.mark.parametrize("program", ["sleep 1000", "exit 7"])
def test_what_may_have_been_a_gate_gives_no_code(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """One that was killed amid its exec, by a keeper that is gone, too, has no code; which it ended with is its own."""
    real = ProcessStarter.go

    def go(self: ProcessStarter, prepared: Prepared) -> None:
        held = prepared.own
        assert isinstance(held, Held)
        if program == "exit 7":
            held.connection.tell({"op": "go", "id": held.container_id})
            assert wait_for_end(prepared.pidfd, 20)
        else:
            stop_by_signal(
                *(find_keepers(state_dir)[name] for name in ("limpet-anchor", "limpet-keeper"))
            )  # sees nothing
            os.lseek(held.plan, EXECUTES, os.SEEK_SET)
            signal.pidfd_send_signal(prepared.pidfd, signal.SIGKILL)
        leave_by_all(state_dir, prepared)
        real(self, prepared)

    monkeypatch.setattr(ProcessStarter, "go", go)
    container = make(engine, "one", "sh", "-c", program)
    container.start()
    codes = {7, 255} if program == "exit 7" else {255}  # before Linux 6.15 a pidfd tells none
    assert container.wait(20).exit_code in codes


def test_a_start_that_fails_otherwise_gives_no_code_of_its_gate(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What became of it is not known then; all keepers are killed, and its process was killed at its gate."""

    def fail(held: Held, prepared: Prepared) -> bool:
        blind_keepers(state_dir)
        signal.pidfd_send_signal(prepared.pidfd, signal.SIGKILL)
        leave_by_all(state_dir, prepared)
        raise MemoryError

    monkeypatch.setattr("limpet.engine.starters.process.starts._has_executed", fail)
    go = ProcessStarter.go

    def go_untold(self: ProcessStarter, prepared: Prepared) -> None:
        leave_untold(prepared)
        go(self, prepared)

    monkeypatch.setattr(ProcessStarter, "go", go_untold)
    container = make(engine, "one", "true")
    with pytest.raises(MemoryError):
        container.start()
    assert container.wait(20).exit_code == 255


def test_a_start_is_told_though_all_keepers_are_killed_as_it_is_given_up(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs at its gate, and the keeper kills it when it is asked to; then that one is killed, and the anchor."""
    ask, go = KeeperClient.ask, ProcessStarter.go
    starts: list[Prepared] = []
    asked: list[Message] = []

    def kill_all_after_signal(self: KeeperClient, message: Message, **options: bool) -> Message | None:
        if message["op"] == "end" and not asked:
            (prepared,) = starts
            asked.append(message)
            return {"pid": prepared.identity.pid, "start": prepared.identity.start_ticks, "executed": None}
        answer = ask(self, message, **options)
        if message["op"] == "signal":
            leave_by_all(state_dir, *starts)
        return answer

    def hang(self: ProcessStarter, prepared: Prepared) -> None:
        starts.append(prepared)
        monkeypatch.setattr("limpet.engine.starters.process.starts._has_executed", time_out)
        monkeypatch.setattr(KeeperClient, "ask", kill_all_after_signal)
        leave_untold(prepared)
        go(self, prepared)

    def time_out(held: Held, prepared: Prepared) -> bool:
        raise errors.KeeperError("nothing has happened")

    monkeypatch.setattr(ProcessStarter, "go", hang)
    container = make(engine, "one", "touch", "ran")
    with pytest.raises(errors.StartError, match="it did not come through its gate: nothing has happened"):
        container.start()
    assert (container.status.exit_code, container.status.reason) == (128, Reason.START_ERROR)
    assert not Path(container.metadata.root_dir, "working", "ran").exists()


Befalls = Callable[[int], AbstractContextManager[None]]


@contextmanager
def killed(pid: int) -> Iterator[None]:
    """Have it killed before all that is done."""
    os.kill(pid, signal.SIGKILL)
    yield


def test_a_gate_that_dies_or_hangs_is_no_start(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, or held by a debugger, before its program is executed: StartError, EXITED 128, never ran; then all works.

    One that a signal has stopped goes on.
    """
    monkeypatch.setattr("limpet.engine.starters.process.client.ANSWER_TIMEOUT_SECONDS", 0.5)
    make(engine, "first", "true").start()  # the keeper is there, and a connection to it
    engine.get("first").wait(20)
    real = ProcessStarter.go
    for befalls in (killed, held):

        def go(self: ProcessStarter, prepared: Prepared, befalls: Befalls = befalls) -> None:
            with befalls(prepared.identity.pid):
                real(self, prepared)

        monkeypatch.setattr(ProcessStarter, "go", go)
        container = make(engine, befalls.__name__, "touch", "ran")
        wait_until(lambda: not any("pidfd" in one for one in open_descriptors().values()), "the end of the watch")
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(errors.StartError):
            container.start()
        monkeypatch.setattr(ProcessStarter, "go", real)
        status = container.status
        assert (status.state, status.exit_code, status.reason) == (ContainerState.EXITED, 128, Reason.START_ERROR)
        assert "never ran" in status.message
        assert not Path(container.metadata.root_dir, "working", "ran").exists()
        assert status.identity is not None
        assert not is_running(status.identity.pid)
        # Where the keeper was asked anew, the number differs.
        wait_until(lambda before=before: len(os.listdir("/proc/self/fd")) == before, "no descriptor more or less")  # type: ignore[misc] # bound at once
        following = make(engine, f"next-{befalls.__name__}", "true")
        following.start()
        assert following.wait(20).exit_code == 0


def test_an_engine_that_does_not_see_the_exec_itself_is_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first engines are, which ask for no report."""
    ask = Connection.ask

    def ask_without(self: Connection, message: Message, descriptors: Sequence[int] = ()) -> tuple[Message, list[int]]:
        return ask(self, {key: value for key, value in message.items() if key != "report"}, descriptors)

    monkeypatch.setattr(Connection, "ask", ask_without)
    for key in ("first", "second"):
        began = time.monotonic()
        container = make(engine, key, "sh", "-c", "exit 4")
        container.start()
        assert time.monotonic() - began < ANSWER_TIMEOUT_SECONDS
        assert container.wait(20).exit_code == 4
    with pytest.raises(errors.StartError, match="No such file"):
        make(engine, "none", "/nowhere").start()


@pytest.mark.parametrize("when", ["before it has a connection", "as it asks"])
def test_a_start_that_outlives_its_engine_leaves_nothing_with_a_keeper(
    state_dir: str, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Interrupted twice, a start goes on behind its caller, and behind the close: no later engine knows of it."""
    engine = Engine.open(state_dir)
    engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
    container = make(engine, "one", "sleep", "1000", log_path="one.log")
    is_amid, is_closed = Event(), Event()
    owner, name = (KeeperClient, "take") if when.startswith("before") else (Connection, "ask")
    call = getattr(owner, name)

    def wait_for_the_close(self: object, *given: object, **options: object) -> object:
        is_amid.set()
        assert is_closed.wait(20)
        return call(self, *given, **options)

    monkeypatch.setattr(owner, name, wait_for_the_close)
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(container.start)
        assert is_amid.wait(20)
        engine.close()
        monkeypatch.undo()
        with Engine.open(state_dir) as following:
            following.get("one").remove(force=True)
            following.get_sandbox("jobs").remove()
            is_closed.set()
            assert isinstance(start.exception(20), errors.LimpetError)
    wait_until(lambda: not find_keepers(state_dir), "the keeper to end")


def test_128_of_a_program_is_not_a_start_error(engine: Engine) -> None:
    """A program that ends with 128 ran: reason Error."""
    container = make(engine, "one", "sh", "-c", "exit 128")
    container.start()
    status = container.wait(20)
    assert (status.exit_code, status.reason) == (128, Reason.ERROR)


def test_an_interpreter_that_is_none_is_refused(state_dir: str, tmp_path: Path) -> None:
    """A frozen program's executable is not started again; an interpreter that cannot load is a StartError."""
    broken = tmp_path / "python3"
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 127\n")
    broken.chmod(0o755)
    marker = tmp_path / "ran"
    app = tmp_path / "application"
    app.write_text(f"#!/bin/sh\ntouch {marker}\n")
    app.chmod(0o755)
    for number, (interpreter, words) in enumerate([(broken, "broken"), (app, "is none")]):
        with Engine.open(state_dir, starter=ProcessStarter(interpreter=str(interpreter))) as engine:
            if not number:
                engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
            container = make(engine, f"c{number}", "true")
            with pytest.raises(errors.StartError, match=words):
                container.start()
            assert container.status.reason == Reason.START_ERROR
    assert not marker.exists()


def test_what_keeps_a_keeper_from_serving_is_told_at_once(state_dir: str) -> None:
    """It fails after whoever was spawned has forked it: the start waited for 20 seconds, and did not learn why."""
    journal = Path(state_dir, "keeper", "journal")
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        journal.mkdir(parents=True)
        begun = time.monotonic()
        with pytest.raises(errors.StartError, match="the keeper cannot begin: journal: Is a directory"):
            make(engine, "one", "true").start()
        assert time.monotonic() - begun < 5
        journal.rmdir()
        container = make(engine, "two", "true")
        container.start()
        assert container.wait(timeout=10).exit_code == 0


@pytest.mark.usefixtures("namespaces")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("unshare --pid --fork sh -c", "/proc is of another pid namespace than this process"),
        (
            "unshare --mount sh -c 'umount -l /proc; mount -t proc -o subset=pid proc /proc; eval \"$0\"'",
            "mount all of it",
        ),
    ],
    ids=["another's", "a part"],
)
def test_a_proc_that_is_not_the_keepers_own_is_told_as_that(state_dir: str, place: str, what: str) -> None:
    script = (
        "import sys; from limpet import Engine\n"
        "with Engine.open(sys.argv[1]) as e:\n"
        " s = e.create_sandbox({'metadata': {'name': 's'}})\n"
        " config = {'metadata': {'name': 'c'}, 'image': {'image': 'host'}, 'command': ['true']}\n"
        " e.create_container(config, s.id).start()\n"
    )
    command = shlex.join([sys.executable, "-c", script, state_dir])
    told = subprocess.run(f"{place} {shlex.quote(command)}", shell=True, capture_output=True, text=True, check=False)
    assert what in told.stderr, told.stderr


@pytest.mark.usefixtures("namespaces")
def test_where_proc_is_not_mounted_nobody_is_gone() -> None:
    """That no process is to be seen is no answer: a program that ran is not said to have never run."""
    if os.geteuid():
        pytest.skip("only root mounts")
    script = f"from limpet.engine.starters.process.keeper.kernel import read_stat; read_stat({os.getpid()})"
    covered = f'mount -t tmpfs limpet /proc && exec "{sys.executable}" -c "{script}"'
    told = subprocess.run(["unshare", "-m", "sh", "-c", covered], capture_output=True, text=True, check=False)
    assert "FileNotFoundError" in told.stderr, told.stderr


HIDDEN = """
import os, signal, sys, time
from limpet import Engine
from limpet.engine.starters.process import find_facts
state, programs = sys.argv[1], sys.argv[2:]
engine = Engine.open(state)
pod = engine.create_sandbox({"metadata": {"name": "pod"}})
for name in programs:
    config = {"metadata": {"name": os.path.basename(name)}, "image": {"image": "host"}, "command": [name, "600"]}
    container = engine.create_container(config, pod)
    container.start()
    print(os.path.exists(f"/proc/{container.status.pid}/stat"), container.state.name)
keeper = find_facts(state).keeper_pid
os.kill(keeper, signal.SIGKILL)  # the anchor takes over what it cannot see
engine.close()
with Engine.open(state) as engine:
    for container in sorted(engine.list(), key=lambda one: one.name):
        print(container.name, container.state.name, container.stop(20).exit_code)
    engine.get_sandbox("pod").remove(force=True, timeout=0)
"""


AS_NOBODY = """
import os, sys
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""


@pytest.mark.usefixtures("namespaces")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount /proc so")
def test_a_program_that_proc_hides_is_seen_to_run_and_ended() -> None:
    """Where /proc hides what its reader may not look into (hidepid): a set-uid program, and one that none may read."""
    interpreter = find_interpreter(65534)
    if not interpreter:
        pytest.skip("another user cannot read this installation")
    with tempfile.TemporaryDirectory(prefix="limpet-hidden-", dir="/tmp") as place:
        os.chown(place, 65534, 65534)
        for name, mode in (("set-uid", 0o4755), ("unreadable", 0o711)):
            shutil.copyfile("/bin/sleep", f"{place}/{name}")
            os.chmod(f"{place}/{name}", mode)
        hidden = ["sh", "-c", 'mount -t proc -o hidepid=2 proc /proc && exec "$@"', "sh"]
        script = [interpreter, "-c", AS_NOBODY, HIDDEN, f"{place}/state", f"{place}/set-uid", f"{place}/unreadable"]
        done = subprocess.run(
            ["unshare", "--mount", *hidden, *script],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=PACKAGES,
        )
    told = ["False RUNNING", "False RUNNING", "set-uid RUNNING 143", "unreadable RUNNING 143"]
    assert done.stdout.splitlines() == told, done.stderr


NO_EXEC = """
import os, shutil, subprocess, sys
from limpet import Engine, errors
place = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", place], check=True)
shutil.copy("/bin/true", place)
with Engine.open(os.path.join(place, "state")) as engine:
    engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
    there = f"{place}/true"
    for name, command, path in (("a", there, ""), ("b", "true", place), ("c", "true", f"{place}:/bin")):
        config = {"metadata": {"name": name}, "image": {"image": "host"}, "command": [command]}
        container = engine.create_container({**config, "envs": [{"key": "PATH", "value": path}]}, "jobs")
        try:
            container.start()
            print(container.wait(20).exit_code)
        except errors.StartError as error:
            print(str(error).rpartition(": its ")[2])
"""


@pytest.mark.usefixtures("namespaces")
def test_a_program_on_a_mount_that_executes_none_is_told_so(tmp_path: Path) -> None:
    """As a hardened host's /var is, where images are unpacked: the program's own file permits it."""
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = ["unshare", *as_root, "--mount", sys.executable, "-c", NO_EXEC, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    told = ["file system is mounted noexec", "file system is mounted noexec", "0"]
    assert (done.stdout.splitlines(), done.stderr) == (told, "")
