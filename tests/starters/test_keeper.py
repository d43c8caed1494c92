"""The keeper: every end is witnessed whoever is killed, a start is a start, and nothing of the host gets in."""

import asyncio
import ctypes
import fcntl
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

from limpet import Engine, Snapshot, errors
from limpet.engine.starters.contract import Prepared
from limpet.engine.starters.process import ProcessStarter, find_facts
from limpet.engine.starters.process.client import ANSWER_TIMEOUT_SECONDS, Connection, KeeperClient, KeeperGoneError
from limpet.engine.starters.process.keeper.gate import EXECUTES
from limpet.engine.starters.process.keeper.kernel import read_stat_of
from limpet.engine.starters.process.keeper.messages import Message
from limpet.engine.starters.process.starts import Held
from limpet.recovery import Process, host
from limpet.recovery.host import read_stat, wait_for_end
from limpet.schema import ContainerState, Reason
from limpet.testing import open_descriptors
from tests.campaigns.refused_life import IMPATIENT_KEEPER
from tests.conftest import (
    PACKAGES,
    EngineProcess,
    find_interpreter,
    find_processes,
    in_thread,
    is_running,
    read_descriptors,
    wait_until,
)
from tests.output import read_output
from tests.starters.host import make
from tests.stops import has_taken_stop, read_state, stop_by_signal
from tests.tools_image import load_tools

Start = Callable[[str], EngineProcess]


def find_keepers(state_dir: str) -> dict[str, int]:
    """Return the pids of the keeper's processes by their names, found without asking it."""
    directory = os.path.join(os.path.realpath(state_dir), "keeper")
    found: dict[tuple[str, int], int] = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(OSError):
            comm = Path(f"/proc/{pid}/comm").read_text().strip()
            if comm.startswith("limpet-") and os.readlink(f"/proc/{pid}/fd/3") == directory:
                found[comm, pid] = int(read_stat(pid)[1])
    # What it forks is the same as itself for a moment.
    return {comm: pid for (comm, pid), parent in found.items() if (comm, parent) not in found}


def kill(state_dir: str, *names: str) -> None:
    """SIGKILL processes of the keeper, the anchor first: it has no time to take over, whatever their numbers are."""
    for name, pid in sorted(find_keepers(state_dir).items()):
        if name in names:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


KEEPER, ALL = ("limpet-keeper",), ("limpet-anchor", "limpet-keeper", "limpet-copier")
MANY = """
engine = Engine.open(state_dir)
engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
for n in range(20):
    engine.create_container({"metadata": {"name": f"c{n}"}, "image": {"image": "host"},
        "command": ["sh", "-c", f"while [ ! -e GO ]; do sleep 0.02; done; exit {n}".replace("GO", state_dir + ".go")]},
        "jobs", id=f"c{n}").start()
say("started"); time.sleep(999)
"""


@pytest.mark.parametrize("killed", [(), KEEPER, ("limpet-anchor",), ("limpet-copier",)])
def test_ends_are_witnessed_while_no_engine_lives(
    engine_process: Start, state_dir: str, killed: tuple[str, ...]
) -> None:
    """The engine is killed, and one of the keeper's processes too; all containers end: each code is known and right."""
    process = engine_process(MANY)
    process.read()
    process.kill()
    kill(state_dir, *killed)
    Path(state_dir + ".go").touch()
    time.sleep(0.3)  # they end while nobody asks; an engine that comes amid their ends must not matter
    with Engine.open(state_dir) as engine:
        codes = [engine.get(f"c{n}").wait(20).exit_code for n in range(20)]
        assert codes == list(range(20))
        assert all(engine.get(f"c{n}").status.finished_at for n in range(20))


def test_nothing_false_is_said_when_all_are_killed(engine_process: Start, state_dir: str) -> None:
    """Engine and keepers are killed: containers run on, are found, and an end that nobody saw is said to be unseen."""
    process = engine_process(MANY)
    process.read()
    process.kill()
    kill(state_dir, *ALL)
    with Engine.open(state_dir) as engine:
        assert {one.state for one in engine.list()} == {ContainerState.RUNNING}
        next_one = make(engine, "next", "sh", "-c", "exit 3")
        next_one.start()
        assert next_one.wait(20).exit_code == 3
        Path(state_dir + ".go").touch()
        for n in range(20):
            assert engine.get(f"c{n}").wait(20).exit_code in {n, 255}


class AsBefore69(ProcessStarter):
    """Works as where the kernel gives no proof of which process one is."""

    def __init__(self) -> None:
        super().__init__(compare=lambda *_: (Process.UNPROVEN, "pid and start time match, which is no proof"))


@pytest.mark.parametrize(("killed", "expected"), [((), "RUNNING"), (KEEPER, "RUNNING"), (ALL, "UNKNOWN")])
def test_only_a_parent_vouches_for_a_process(
    engine_process: Start, state_dir: str, killed: tuple[str, ...], expected: str
) -> None:
    """Without proof a keeper's word counts if it is the parent; one that begins anew knows but a number and a time."""
    process = engine_process(MANY)
    process.read()
    process.kill()
    kill(state_dir, *killed)
    for _ in range(2):
        with Engine.open(state_dir, starter=AsBefore69()) as engine:
            assert {one.state.name for one in engine.list()} == {expected}
    with Engine.open(state_dir) as engine:
        assert {one.state.name for one in engine.list()} == {"RUNNING"}
        for one in engine.list():
            one.stop(0)


def test_who_looks_on_asks_the_keeper_where_the_kernel_gives_no_proof(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Linux 6.9 what runs is said to run beside its engine, as long as a keeper is its parent; and no more."""
    monkeypatch.setattr(host, "ask_for_pidfs", lambda: False)
    container = make(engine, "one", "sleep", "1000")
    container.start()

    def look() -> str:
        with Snapshot.open(state_dir) as snapshot:
            return snapshot.get(container.id).status.state.name

    assert look() == "RUNNING"
    kill(state_dir, *KEEPER)
    assert look() == "RUNNING"
    kill(state_dir, *ALL)
    assert look() == "UNKNOWN"
    os.kill(container.status.pid, signal.SIGKILL)
    assert container.wait(20).finished_at


def test_the_keeper_is_killed_again_and_again(engine: Engine, state_dir: str) -> None:
    """Starts and ends go on; each code that is told is right, and no container ends with its keeper."""
    lasting = make(engine, "lasting", "sleep", "1000")
    lasting.start()
    pid = lasting.status.pid
    for n in range(12):
        container = make(engine, f"c{n}", "sh", "-c", f"sleep 0.0{n % 7}; exit {n}")
        threading.Timer(random.random() / 20, kill, (state_dir, *KEEPER)).start()
        try:
            container.start()
        except errors.StartError:
            assert container.status.reason == Reason.START_ERROR  # it never ran, and that is said
            continue
        assert container.wait(20).exit_code in ({n} if n % 2 else {n, 255})
        if n % 2:
            kill(state_dir, *ALL)  # from nothing: an anchor has no other behind it
    assert (lasting.state, lasting.status.pid) == (ContainerState.RUNNING, pid)
    assert is_running(pid)
    assert lasting.stop(1).finished_at


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


NARROW = """
import resource
from limpet import errors
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
engine = Engine.open(state_dir)
engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
def start(n, log_path=""):
    config = {"metadata": {"name": f"c{n}"}, "image": {"image": "host"}, "log_path": log_path,
        "command": ["sh", "-c", f"while [ ! -e {state_dir}.go ]; do sleep 0.02; done; exit {n}"]}
    engine.create_container(config, "jobs", id=f"c{n}").start()
count, problem = 0, ""
while not problem:
    try:
        start(count, LOG)
        count += 1
    except errors.StartError as error:
        problem = str(error)
open(state_dir + ".go", "w").close()
codes = [engine.get(f"c{n}").wait(20).exit_code for n in range(count)]
start(99)
say(0 < count == len([n for n in range(count) if codes[n] == n]), engine.get("c99").wait(20).exit_code, problem)
"""


@pytest.mark.parametrize("log_path", ["", "one.log"])
def test_a_keeper_that_has_no_descriptor_left_says_so(engine_process: Start, log_path: str) -> None:
    """Whether it is the keeper that needs one, or the gate that it forks; no end is lost, and others can start then."""
    told = " ".join(engine_process(NARROW.replace("LOG", repr(log_path))).read())
    said = r"True 99 container c\d+: the keeper, process \d+, has no file descriptor left: its limit is 40"
    assert re.match(said, told)


def wait_for_another_copier(state_dir: str, before: int) -> None:
    wait_until(lambda: find_keepers(state_dir).get("limpet-copier", before) != before, "the next copier")


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


def test_a_copier_that_was_killed_leaves_no_zombie(engine: Engine, state_dir: str) -> None:
    """Whoever is its parent waits for it, and the keeper has another."""
    container = make(engine, "one", "sh", "-c", "while echo line; do sleep 0.01; done", log_path="one.log")
    container.start()
    for _ in range(2):  # the anchor's first, then the keeper's own
        killed = find_keepers(state_dir)["limpet-copier"]
        kill(state_dir, "limpet-copier")
        wait_for_another_copier(state_dir, killed)
        wait_until(lambda killed=killed: not Path(f"/proc/{killed}").exists(), "its end to be waited for")  # type: ignore[misc] # bound at once
    container.stop(0)


def test_the_next_copier_goes_on_with_every_log(engine: Engine, state_dir: str) -> None:
    """Whoever is killed, what is written before and after is in the log: each line once, in order."""
    count = "i=0; while echo $i; do i=$((i+1)); sleep 0.005; done"
    containers = [make(engine, name, "sh", "-c", count, log_path=f"{name}.log") for name in ("one", "two")]
    logs = [Path(container.metadata.log_path) for container in containers]
    for container in containers:
        container.start()

    def lines(log: Path) -> list[int]:
        text = log.read_text() if log.exists() else ""
        return [int(line.split()[-1]) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    for _ in range(2):  # the anchor's first, then the keeper's own
        before = [len(lines(log)) for log in logs]
        wait_until(
            lambda before=before: all(len(lines(log)) > old for log, old in zip(logs, before, strict=True)),  # type: ignore[misc] # bound at once
            "both logs to grow",
        )
        killed = find_keepers(state_dir)["limpet-copier"]
        kill(state_dir, "limpet-copier")
        wait_for_another_copier(state_dir, killed)
    before = [len(lines(log)) for log in logs]
    wait_until(lambda: all(len(lines(log)) > old for log, old in zip(logs, before, strict=True)), "both to go on")
    for container, log in zip(containers, logs, strict=True):
        container.stop(0)
        assert lines(log) == [*range(len(lines(log)))]


@pytest.mark.parametrize("killed", [("limpet-copier",), ALL])
def test_the_next_copier_finds_the_logs_of_a_moved_directory(state_dir: str, killed: tuple[str, ...]) -> None:
    """Whoever is killed once the state directory has been moved, the output goes on where the log is now."""
    moved = f"{state_dir}.moved"
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        make(engine, "one", "sh", "-c", "while echo line; do sleep 0.01; done", log_path="one.log").start()
    os.rename(state_dir, moved)
    before = find_keepers(moved)["limpet-copier"]
    kill(moved, *killed)
    with Engine.open(moved) as engine:
        wait_for_another_copier(moved, before)
        one = engine.get("one")
        lines = len(list(one.read_log()))
        wait_until(lambda: len(list(one.read_log())) > lines, "the log to grow")
        one.stop(0)
    assert not os.path.exists(state_dir)


def test_the_keeper_that_is_shown_is_the_one_that_lives(engine: Engine, state_dir: str) -> None:
    """It is the containers' parent: the first, and the one that takes its place."""
    assert find_facts(state_dir).keeper_pid == 0
    container = make(engine, "one", "sleep", "1000")
    container.start()

    def is_shown() -> bool:
        parent = int(Path(f"/proc/{container.status.pid}/stat").read_text().rpartition(")")[2].split()[1])
        return find_facts(state_dir).keeper_pid == parent == find_keepers(state_dir).get("limpet-keeper")

    wait_until(is_shown, "the first to be shown")  # a fork of it has its name for a moment
    first = find_facts(state_dir).keeper_pid
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not is_running(first), "the keeper to end")
    wait_until(is_shown, "the next one to be shown")
    container.stop(0)


def test_a_keeper_that_was_stopped_goes_on_once_it_is_needed(engine: Engine, state_dir: str) -> None:
    """A container of root's can send SIGSTOP to its parent: it is stopped in its time, and others are started."""
    container = make(engine, "one", "sh", "-c", "kill -STOP $PPID; exec sleep 1000")
    container.start()
    comm = Path(f"/proc/{container.status.pid}/comm")
    wait_until(lambda: comm.read_text() == "sleep\n", "the signal to be sent")
    wait_until(lambda: has_taken_stop(find_keepers(state_dir)["limpet-keeper"]), "it to stop")
    assert container.stop(5).exit_code == 128 + signal.SIGTERM
    assert make(engine, "two", "sh", "-c", "exit 4").start().state is not ContainerState.UNKNOWN
    assert engine.get("two").wait(20).exit_code == 4


def test_a_release_asks_nobody_where_all_is_known_to_be_gone(engine: Engine, state_dir: str) -> None:
    """The end tells that nothing is left; where there is more than processes, such as a log, the keeper is asked."""
    make(engine, "plain", "true").start()
    make(engine, "logged", "echo", "said", log_path="out.log").start()
    for key in ("plain", "logged"):
        engine.get(key).wait(20)
    keepers = find_keepers(state_dir)
    keeper = keepers["limpet-keeper"]
    stop_by_signal(keepers["limpet-anchor"], keeper)  # the anchor, too, or it would have the keeper go on
    engine.get("plain").remove()
    assert read_state(keeper) == "T"  # it would have been sent SIGCONT
    engine.get("logged").release()
    assert read_state(keeper) != "T"
    assert [each.text for each in engine.get("logged").read_log()] == [b"said\n"]


def test_a_log_is_read_whole_once_its_container_has_ended(engine: Engine, state_dir: str) -> None:
    """Its end is known before its output is copied: a reader waits for what is on its way."""
    go = Path(state_dir, "go")
    one = make(
        engine, "one", "sh", "-c", f"until [ -e {go} ]; do sleep 0.01; done; seq 3000; echo last", log_path="one.log"
    )
    one.start()
    stop_by_signal(find_keepers(state_dir)["limpet-copier"])
    go.touch()
    one.wait(20)
    assert [each.text for each in one.read_log()][-1] == b"last\n"


Befalls = Callable[[int], AbstractContextManager[None]]


@contextmanager
def killed(pid: int) -> Iterator[None]:
    """Have it killed before all that is done."""
    os.kill(pid, signal.SIGKILL)
    yield


@contextmanager
def held(pid: int) -> Iterator[None]:
    """Hold a process as a debugger does: no signal has it go on."""
    seize, interrupt, detach = 0x4206, 0x4207, 17  # PTRACE_SEIZE and so on
    ptrace = ctypes.CDLL(None).ptrace
    ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    if ptrace(seize, pid, None, None):
        pytest.skip("no process can be traced here")
    ptrace(interrupt, pid, None, None)
    os.waitpid(pid, 0)
    try:
        yield
    finally:
        ptrace(detach, pid, None, None)


@pytest.mark.parametrize(
    "names", [("limpet-copier",), ("limpet-keeper",), ("limpet-spare",), ("limpet-anchor", "limpet-keeper")]
)
def test_whichever_of_the_keepers_processes_is_stopped_the_next_life_is_whole(
    engine: Engine, state_dir: str, names: tuple[str, ...]
) -> None:
    """A container of root's, or a person, can stop each; right after it starts, ends and output are as ever."""
    first = make(engine, "one", "sleep", "1000")
    first.start()
    keeper = find_keepers(state_dir)["limpet-keeper"]

    def find() -> dict[str, int]:
        found = find_keepers(state_dir)
        for pid in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split():
            with suppress(OSError):  # it was reaped meanwhile
                found.setdefault(Path(f"/proc/{pid}/comm").read_text().strip(), int(pid))
        return found

    wait_until(lambda: set(names) <= set(find()), "a gate that is forked ahead")
    stop_by_signal(*(find()[name] for name in names))
    next_one = make(engine, "two", "sh", "-c", "echo heard; exit 4", log_path="two.log")
    begun = time.monotonic()
    next_one.start()
    assert next_one.wait(20).exit_code == 4
    assert next_one.release().released
    assert time.monotonic() - begun < 9
    assert [entry.text for entry in next_one.read_log()] == [b"heard\n"]
    assert first.stop(5).exit_code == 128 + signal.SIGTERM


IMPORTS_NOTHING = """
import sys
sys.path.insert(0, sys.argv[1])
from keeper import main

anchor = main._anchor

def import_nothing(*given):
    sys.meta_path.clear()
    anchor(*given)

main._anchor = import_nothing
main.main()
"""


@pytest.mark.usefixtures("namespaces")
def test_a_keeper_needs_none_of_its_files(
    engine: Engine, state_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Python and limpet may be upgraded, or removed, while containers run: what it needs it has loaded by then."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", IMPORTS_NOTHING)
    image = str(load_tools(engine, tmp_path / "tools", {"Env": ["PATH=/bin"]}))
    for life in ("first", "next"):
        for root in ("host", image):
            key = f"{life}-{len(root)}"
            container = make(engine, key, "sh", "-c", "echo on; exit 7", image={"image": root}, log_path=f"{key}.log")
            container.start()
            assert container.wait(20).exit_code == 7
            assert read_output(container.metadata.log_path, "on\n") == "on\n"
        with pytest.raises(errors.StartError, match="No such file or directory"):
            make(engine, f"{life}-none", "/no/such/program").start()
        kill(state_dir, *KEEPER, "limpet-copier")
        wait_until(lambda: "limpet-anchor" not in find_keepers(state_dir), "the anchor to take over")


BEGINS_LATE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from keeper import main

become_subreaper = main.become_subreaper

def become_late():
    time.sleep(0.2)
    become_subreaper()

main.become_subreaper = become_late
main.main()
"""


def test_one_that_began_late_goes_on_when_it_is_stopped(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has connected before it was there, as on a busy machine: its peer is the process that was spawned."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", BEGINS_LATE)
    make(engine, "one", "true").start()
    engine.get("one").wait(20)
    keeper = find_keepers(state_dir)["limpet-keeper"]
    stop_by_signal(keeper)
    begun = time.monotonic()
    next_one = make(engine, "two", "sh", "-c", "exit 4")
    next_one.start()
    assert next_one.wait(20).exit_code == 4
    assert time.monotonic() - begun < 9
    assert find_keepers(state_dir)["limpet-keeper"] == keeper


def leave_one(state_dir: str) -> Path:
    """Start the container "one", which ends with 3 once the file is there that is returned; no engine is left."""
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        container = make(engine, "one", "sh", "-c", "while [ ! -e end ]; do sleep 0.01; done; exit 3")
        container.start()
        return Path(container.metadata.root_dir, "working", "end")


def test_a_keeper_that_dies_as_it_is_greeted_is_not_taken_for_none(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The anchor takes over, and knows what has left its container's group: a stop reaches all of it."""
    one = make(engine, "one", "sh", "-c", "setsid sleep 1000 & echo $! > left; exec sleep 1000")
    one.start()
    left = Path(one.metadata.root_dir, "working", "left")
    wait_until(lambda: left.exists() and left.read_text(), "the first to have another")
    greet = KeeperClient._greet
    killed: list[int] = []

    def kill_amid_greeting(self: KeeperClient, connection: Connection) -> Connection:
        if not killed:
            killed.append(connection.ask({"op": "hello"})[0]["pid"])
            os.kill(killed[0], signal.SIGKILL)
            wait_until(lambda: not is_running(killed[0]), "the keeper to end")
        return greet(self, connection)

    starter = engine.starter
    assert isinstance(starter, ProcessStarter)
    starter._keeper.forget_connections()
    monkeypatch.setattr(KeeperClient, "_greet", kill_amid_greeting)
    identity = one.status.identity
    assert identity is not None
    assert starter.signal("one", identity, 0) == 2
    assert killed
    one.stop(0)


def test_an_anchor_that_was_stopped_takes_over(state_dir: str) -> None:
    """It is stopped, and then the keeper is killed: the next engine has it go on, and knows what ended meanwhile."""
    end = leave_one(state_dir)
    stop_by_signal(find_keepers(state_dir)["limpet-anchor"])
    kill(state_dir, *KEEPER)
    end.touch()
    with Engine.open(state_dir) as engine:
        assert engine.get("one").wait(20).exit_code == 3
        assert make(engine, "two", "true").start().state is not ContainerState.UNKNOWN


def test_a_keeper_that_is_killed_as_an_engine_opens_has_told_its_journal(
    state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has begun and taken over, and is killed before it is asked: the next one tells the same."""
    end = leave_one(state_dir)
    end.touch()
    wait_until(lambda: b'"end"' in Path(state_dir, "keeper", "journal").read_bytes(), "its end to be noted")
    real = ProcessStarter.open

    def open_and_kill(self: ProcessStarter, state_dir: str) -> None:
        real(self, state_dir)
        kill(state_dir, *ALL)

    monkeypatch.setattr(ProcessStarter, "open", open_and_kill)
    with Engine.open(state_dir) as engine:
        assert engine.get("one").exit_code == 3


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


@pytest.mark.usefixtures("namespaces")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has the namespaces by which these are told")
def test_what_is_left_by_a_program_that_ends_at_once_is_known(engine: Engine) -> None:
    """Also in a session of its own, and an orphan before the keeper has heard that the program was executed."""
    for number in range(25):
        mark = f"10{os.getpid()}{number:02}"
        container = make(engine, f"c{number}", "sh", "-c", f"setsid sleep {mark} & exit {number}")
        container.start()
        assert container.wait(20).exit_code == number
        container.remove()
        left = find_processes("sleep", mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"life {number} has left a process behind"


STRAY = f"{'unshare -u ' if os.geteuid() == 0 else ''}setsid sh -c 'trap : TERM; while :; do sleep MARK; done'"
"""A process that has left all by which it could be told, and does not end by SIGTERM."""


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("program", [f"{STRAY} & wait", f'sh -c "{STRAY} & wait" & sleep 0.3'])
def test_what_descended_from_a_container_when_it_was_signalled_ends_with_it(engine: Engine, program: str) -> None:
    """Its parent ends by the stop's signal, or with the first process: then nothing else tells whose it is."""
    mark = f"30{os.getpid()}{len(program)}"
    container = make(engine, "c", "sh", "-c", program.replace("MARK", mark))
    container.start()
    wait_until(lambda: len(find_processes("sleep", mark)) == 1, "it to run")
    if program.endswith("wait"):
        container.stop(0.5)
    container.wait(20)
    container.remove()
    left = find_processes("sleep", mark)
    subprocess.run(["pkill", "-KILL", "-f", f"sleep {mark}(;|$)"], check=False)
    assert not left


@pytest.mark.usefixtures("namespaces")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has the namespaces by which these are told")
@pytest.mark.parametrize("is_acknowledged", [True, False])
def test_what_is_left_is_known_to_the_keeper_that_takes_over(state_dir: str, is_acknowledged: bool) -> None:
    """Also where the end is written down already, and where no engine has heard of it."""
    mark = f"20{os.getpid()}{is_acknowledged:d}"
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        container = make(engine, "c", "sh", "-c", f"setsid sleep {mark} & sleep 0.3; exit 3")
        container.start()
        pid = container.status.pid
        if is_acknowledged:
            assert container.wait(20).exit_code == 3
    wait_until(lambda: not is_running(pid), "the program to end")
    wait_until(lambda: len(find_processes("sleep", mark)) == 1, "a daemon to be left")
    kill(state_dir, *KEEPER)
    wait_until(lambda: "limpet-anchor" not in find_keepers(state_dir), "the anchor to take over")
    with Engine.open(state_dir) as engine:
        assert engine.get("c").exit_code == 3
        engine.get("c").remove()
    left = find_processes("sleep", mark)
    for each in left:
        os.kill(each, signal.SIGKILL)
    assert not left


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


DIES_AS_IT_BEGINS = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from keeper import main
with open(COUNT, "a") as file:
    file.write("x")
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if os.stat(COUNT).st_size <= DEATHS:
    main.WHERE = die
main.main()
"""


@pytest.mark.parametrize("deaths", [2, 3])
@pytest.mark.parametrize("where", ["_take_lock", "become_subreaper"])
def test_a_keeper_that_is_killed_as_it_begins_is_begun_again(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, deaths: int
) -> None:
    """Whether the process that was spawned is killed or its anchor; of one that always is, that is told."""
    program = DIES_AS_IT_BEGINS.replace("COUNT", repr(str(tmp_path / "count"))).replace("DEATHS", str(deaths))
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", program.replace("WHERE", where))
    container = make(engine, "one", "true")
    if deaths == 2:
        container.start()
        assert container.wait(20).exit_code == 0
    else:
        with pytest.raises(errors.StartError, match="the keeper cannot begin: it was killed as it began"):
            container.start()


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


def test_a_container_has_nothing_of_the_hosts(engine: Engine, state_dir: str, tmp_path: Path) -> None:
    """Descriptors, umask, signals, session, terminal, oom score: those of a new process, whatever the host's are."""
    kept = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(kept, True)
    score = Path("/proc/self/oom_score_adj")
    old_score = score.read_text()
    score.write_text("500")
    old_mask = os.umask(0o077)
    old_handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    script = "ls /proc/self/fd | wc -w; umask; grep -E '^Sig(Blk|Ign)' /proc/self/status; cat /proc/self/oom_score_adj"
    container = make(engine, "one", "sh", "-c", f"{script}; echo end", log_path="one.log")
    try:
        container.start()
    finally:
        score.write_text(old_score)
        os.umask(old_mask)
        signal.signal(signal.SIGUSR1, old_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        os.close(kept)
    fields = read_output(container.metadata.log_path, "end\n").split()
    # ls has opened the directory itself.
    assert fields == ["4", "0022", "SigBlk:", "0" * 16, "SigIgn:", "0" * 16, "0", "end"]
    keeper = Path(f"/proc/{find_keepers(state_dir)['limpet-keeper']}/oom_score_adj")
    assert int(keeper.read_text()) in {-900, 0}
    assert os.getsid(0) != container.status.identity.pid  # type: ignore[union-attr]


def test_the_keeper_is_small_and_ends_when_nothing_is_left(state_dir: str) -> None:
    """All its processes together take at most 20 MB, with 50 containers; it ends by itself after the last of them."""
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        containers = [make(engine, f"c{n}", "sleep", "1000", log_path=f"{n}.log") for n in range(50)]
        for container in containers:
            container.start()
        pids = find_keepers(state_dir)
        assert set(pids) >= {"limpet-anchor", "limpet-keeper"}
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids.values()]
        sizes = [int(line.split()[1]) for text in rollups for line in text.splitlines() if line.startswith("Pss:")]
        assert sum(sizes) < 20 * 1024
        for container in containers:
            container.stop(0)
            container.release()
    wait_until(lambda: not find_keepers(state_dir), "the keeper to end")


@pytest.mark.parametrize("is_released", [True, False], ids=["the container is released", "the state is removed"])
def test_output_that_nobody_can_have_keeps_no_keeper(
    state_dir: str, monkeypatch: pytest.MonkeyPatch, *, is_released: bool
) -> None:
    """Output for a log whose directory is gone waits for as long as somebody may ask for it, and no longer."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", IMPATIENT_KEEPER)
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}, "log_directory": f"{state_dir}-logs"}, id="jobs")
        container = make(engine, "one", "sh", "-c", "while :; do echo x; sleep 0.01; done", log_path="one.log")
        container.start()
        read_output(container.metadata.log_path, "x\n")
        keeper = engine.starter._keeper.keeper_pid  # type: ignore[attr-defined]
        shutil.rmtree(f"{state_dir}-logs")
        kill(state_dir, "limpet-copier")
        container.stop(0)
        if is_released:
            container.release()
    if not is_released:
        time.sleep(0.5)
        assert is_running(keeper)
        shutil.rmtree(state_dir)
    wait_until(lambda: not is_running(keeper), "the keeper to end")


def test_the_keeper_inherits_nothing(state_dir: str, tmp_path: Path) -> None:
    """It is in / with umask 022, in a session of its own, without the host's descriptors or environment."""
    script = (
        "import os, sys\nfrom limpet import Engine\n"
        "kept = os.open(sys.argv[2], os.O_RDONLY); os.set_inheritable(kept, True); os.umask(0o077)\n"
        "with Engine.open(sys.argv[1]) as e:\n"
        " s = e.create_sandbox({'metadata': {'name': 's'}})\n"
        " e.create_container({'metadata': {'name': 'c'}, 'image': {'image': 'host'}, 'command': ['sleep', '9']}, s.id)"
        ".start()\n"
    )
    environment = {**os.environ, "SECRET": "x"}
    subprocess.run([sys.executable, "-c", script, state_dir, str(tmp_path)], env=environment, check=True)
    for pid in find_keepers(state_dir).values():
        links = read_descriptors(pid)
        assert str(tmp_path) not in links
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert "Umask:\t0022" in Path(f"/proc/{pid}/status").read_text()
        assert b"SECRET" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert os.getsid(pid) != os.getsid(0)
    with Engine.open(state_dir) as engine:
        engine.list()[0].stop(0)


def test_a_keeper_answers_what_it_does_not_know(engine: Engine, state_dir: str) -> None:
    """An engine of a later version asks for more: unknown fields are ignored, an unknown request is an error."""
    container = make(engine, "one", "sleep", "1000")
    container.start()
    client = KeeperClient(os.path.join(state_dir, "keeper"))
    assert client.ask({"op": "end", "id": "one", "new": 1})["running"]  # type: ignore[index]
    with pytest.raises(errors.KeeperError, match="does not know 'later'"):
        client.ask({"op": "later", "id": "one"})
    client.close()
    assert container.stop(1).exit_code == 143


def test_a_connection_that_is_closed_amid_a_request_is_gone(engine: Engine, state_dir: str) -> None:
    """As by the close of its engine: who waits for the answer may ask anew, and hears nothing of descriptors."""
    make(engine, "one", "sleep", "1000").start()
    client = KeeperClient(os.path.join(state_dir, "keeper"))
    connection = client.take(begin=False)
    assert connection is not None
    connection.tell({"op": "hello"})
    client.close()
    with pytest.raises(KeeperGoneError, match="was closed"):
        connection.wait_for_answer({"op": "hello"})
    assert (client.ask({"op": "hello"}) or {})["pid"] == client.keeper_pid
    engine.get("one").stop(0)


def test_a_connection_that_was_left_behind_is_closed(engine: Engine, state_dir: str) -> None:
    """An interrupted call may leave one; a keeper would stay for it as long as this program lives."""
    make(engine, "one", "true").start()
    client = KeeperClient(os.path.join(state_dir, "keeper"))
    left = client.take(begin=False)
    assert left is not None
    client.close()
    with pytest.raises(errors.KeeperError):
        left.ask({"op": "end", "id": "one"})


def test_stop_gives_all_processes_the_grace(engine: Engine, tmp_path: Path) -> None:
    """A shell before a server: both get the signal, the server has its time, and what is left is killed after it."""
    script = f"(trap 'sleep 0.3; touch {tmp_path}/done; exit' TERM; echo up; while :; do sleep 0.05; done) & wait"
    container = make(engine, "one", "sh", "-c", script, log_path="one.log")
    container.start()
    read_output(container.metadata.log_path, "up\n")
    began = time.monotonic()
    assert container.stop(10).exit_code == 128 + signal.SIGTERM
    assert (tmp_path / "done").exists()
    assert time.monotonic() - began < 8


COUNTS = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN + 3})
print("up", flush=True)
signal.sigwait({signal.SIGRTMIN + 3})
more = 0
while signal.sigtimedwait({signal.SIGRTMIN + 3}, 0.3):
    more += 1
os._exit(1 + more)
"""
"""Tells how often it was signalled: signals of this kind are queued, and none swallows another."""


def test_the_stop_signal_comes_once(engine: Engine) -> None:
    """A second one may mean something else to a program: to end at once, and not in good order."""
    container = make(engine, "one", sys.executable, "-S", "-c", COUNTS, log_path="one.log", stop_signal="SIGRTMINPLUS3")
    container.start()
    read_output(container.metadata.log_path, "up\n")
    assert container.stop(10).exit_code == 1


HOPS = """
import os, time
for _ in range(8):
    if not os.fork():
        while True:
            time.sleep(0.0005)
            if os.fork():
                os._exit(0)
open("up", "x").close()
time.sleep(1000)
"""
"""Eight processes, each of which goes on as its own child, again and again."""


def test_the_stop_signal_misses_nobody_who_forks_and_ends(engine: Engine) -> None:
    """The signal goes to the group at once: none passes it by as a child that has just been forked."""
    container = make(engine, "hops", sys.executable, "-S", "-c", HOPS)
    container.start()
    wait_until(Path(container.metadata.root_dir, "working", "up").exists, "them to go")
    begun = time.monotonic()
    assert container.stop(30).exit_code == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 15


def test_a_second_stop_hurries_the_first(engine: Engine) -> None:
    """stop(0) beside stop(60): the container is killed at once, and both return."""
    container = make(engine, "one", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done", log_path="one.log")
    container.start()
    read_output(container.metadata.log_path, "up\n")
    thread, outcome = in_thread(lambda: container.stop(60))
    wait_until(lambda: container.status.stop_requested_at, "the first stop")
    assert container.stop(0).exit_code == 128 + signal.SIGKILL
    thread.join(20)
    assert not thread.is_alive()
    assert outcome[0] == container.status


def test_a_stop_is_finished_by_the_next_engine(engine_process: Start, state_dir: str) -> None:
    """It is written before the first signal; the engine is killed in its grace: the next one kills when it is over."""
    process = engine_process(
        "engine = Engine.open(state_dir); s = engine.create_sandbox({'metadata': {'name': 'p'}})\n"
        "c = engine.create_container({'metadata': {'name': 'n'}, 'image': {'image': 'host'},\n"
        "  'command': ['sh', '-c', \"trap '' TERM; touch up; while :; do sleep 1; done\"]}, s.id, id='one')\n"
        "c.start()\nwhile not os.path.exists(c.metadata.root_dir + '/working/up'): time.sleep(0.01)\n"
        "import threading; threading.Thread(target=c.stop, args=(1.5,)).start()\n"
        "while not c.status.stop_requested_at: time.sleep(0.01)\n"
        "say('stopping'); time.sleep(99)"
    )
    process.read()
    process.kill()
    with Engine.open(state_dir) as engine:
        container = engine.get("one")
        assert (container.state, container.status.reason) == (ContainerState.RUNNING, Reason.STOPPING)
        assert container.wait(20).exit_code == 128 + signal.SIGKILL


def test_wait_tells_that_its_time_is_over_and_that_the_engine_is_closed(engine: Engine) -> None:
    """WaitTimeoutError is a TimeoutError and a LimpetError; closing wakes who waits, with ClosedError."""
    container = make(engine, "one", "sleep", "1000")
    container.start()
    with pytest.raises(errors.WaitTimeoutError) as told:
        container.wait(0.05)
    assert isinstance(told.value, TimeoutError)
    threads = [in_thread(container.wait) for _ in range(3)]
    time.sleep(0.1)
    pid = container.status.pid
    engine.close()
    for thread, outcome in threads:
        thread.join(20)
        assert isinstance(outcome[0], errors.ClosedError)
    os.kill(pid, signal.SIGKILL)


def test_tasks_wait_without_a_thread(engine: Engine) -> None:
    """Fifty tasks wait for fifty containers in one thread; a wait that is too short, or cancelled, tells so."""
    containers = [make(engine, f"c{n}", "sh", "-c", f"sleep 0.2; exit {n}") for n in range(50)]
    for container in containers:
        container.start()

    async def wait_for_all() -> list[int]:
        threads = threading.active_count()
        with pytest.raises(errors.WaitTimeoutError):
            await containers[-1].wait_async(0)
        began = time.monotonic()
        ended = await asyncio.gather(*(container.wait_async(30) for container in containers))
        assert time.monotonic() - began < 20, "an end wakes who waits for it"
        assert threading.active_count() <= threads
        return [status.exit_code for status in ended]

    assert asyncio.run(wait_for_all()) == list(range(50))


def test_ctrl_c_cuts_no_step_in_two(engine_process: Start, state_dir: str) -> None:
    """SIGINT at random moments of start and stop: what is told is true, and the next start works."""
    process = engine_process(
        "import random, threading\n"
        "engine = Engine.open(state_dir); s = engine.create_sandbox({'metadata': {'name': 'p'}})\n"
        "config = {'image': {'image': 'host'}, 'command': ['sleep', '1000']}\n"
        "for name in 'ab':  # how long it takes here, with a keeper: or a busy machine cuts all off before the create\n"
        "  began = time.monotonic()\n"
        "  c = engine.create_container(config | {'metadata': {'name': name}}, s.id); c.start(); c.stop(1)\n"
        "took = time.monotonic() - began\n"
        "def strike(): time.sleep(random.random() * took); os.kill(os.getpid(), signal.SIGINT)\n"
        "fds = len(os.listdir('/proc/self/fd')); told = []\n"
        "for n in range(60):\n"
        "  t = threading.Thread(target=strike)\n"
        "  try:\n"
        "    t.start()\n"
        "    c = engine.create_container({'metadata': {'name': f'c{n}'}, 'image': {'image': 'host'},\n"
        "      'command': ['sleep', '1000']}, s.id, id=f'c{n}'); c.start(); c.stop(1)\n"
        "  except KeyboardInterrupt: pass\n"
        "  while t.is_alive():\n"
        "    try: t.join()\n"
        "    except KeyboardInterrupt: pass\n"
        "for c in engine.list():\n"
        "  if c.state.name == 'CREATED': c.start()\n"
        "  c.stop(5); told.append(c.status.exit_code)\n"
        "say(len(told), sorted(set(told)), len(os.listdir('/proc/self/fd')) - fds < 12)\n"
    )
    words = process.read()
    assert int(words[0]) > 2
    assert words[1:] in (["[137,", "143]", "True"], ["[143]", "True"])
    assert process.wait() == 0
    with Engine.open(state_dir) as engine:
        assert {one.state for one in engine.list()} <= {ContainerState.EXITED, ContainerState.UNKNOWN}


def test_nothing_stays_of_output_that_a_lost_keeper_had_copied(engine: Engine, state_dir: str) -> None:
    """A copier that is late, whose keeper is killed meanwhile, copies what has ended, and leaves no file behind."""
    make(engine, "first", "true").start()
    engine.get("first").wait(20)
    old = find_keepers(state_dir)
    kill(state_dir, "limpet-copier")  # the next one is the keeper's own, and ends with it
    make(engine, "late", "sh", "-c", "exec >&2; echo said", log_path="late.log").start()
    wait_for_another_copier(state_dir, old["limpet-copier"])
    copier = find_keepers(state_dir)["limpet-copier"]
    with held(copier):
        container = make(engine, "last", "sh", "-c", "echo said", log_path="last.log")
        container.start()
        container.wait(20)
        for key in ("late", "last"):
            engine.get(key).release()
        os.kill(old["limpet-keeper"], signal.SIGKILL)
        make(engine, "next", "true").start()  # the anchor has taken over
    wait_until(lambda: not is_running(copier), "the end of the late copier")
    assert b"said" in Path(container.metadata.log_path).read_bytes()
    wait_until(lambda: not os.listdir(f"{state_dir}/keeper/fifo"), "an empty folder")


@pytest.mark.usefixtures("namespaces")
def test_where_proc_is_not_mounted_nobody_is_gone() -> None:
    """That no process is to be seen is no answer: a program that ran is not said to have never run."""
    if os.geteuid():
        pytest.skip("only root mounts")
    script = f"from limpet.engine.starters.process.keeper.kernel import read_stat; read_stat({os.getpid()})"
    covered = f'mount -t tmpfs limpet /proc && exec "{sys.executable}" -c "{script}"'
    told = subprocess.run(["unshare", "-m", "sh", "-c", covered], capture_output=True, text=True, check=False)
    assert "FileNotFoundError" in told.stderr, told.stderr


def test_a_keeper_that_has_fewer_descriptors_gives_what_it_has(engine_process: Start, state_dir: str) -> None:
    """It was begun by an engine with a lower limit than today's, and may not raise it: a start was refused for that."""
    first = engine_process(
        """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (500, 1000))
engine = Engine.open(state_dir)
engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
config = {"metadata": {"name": "a"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
engine.create_container(config, "jobs", id="a").start()
say("ready")
"""
    )
    first.read()
    first.kill()
    with Engine.open(state_dir) as engine:
        script = 'test "$(ulimit -Hn)" = 1000 || test "$(ulimit -Hn)" = "$1"'
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        command = ["sh", "-c", script, "sh", str(hard)]
        config = {"metadata": {"name": "b"}, "image": {"image": "host"}, "command": command}
        second = engine.create_container(config, "jobs", id="b")
        second.start()
        assert second.wait(20).exit_code == 0
        engine.get("a").stop(0)


def test_a_limit_of_open_files_that_is_set_later_is_handed_on(engine_process: Start) -> None:
    """What an engine has raised for itself is put back in containers; what its program has set since, they get."""
    process = engine_process(
        """
import resource
def tell_limit(name):
    config = {"metadata": {"name": name}, "image": {"image": "host"}, "log_path": name}
    container = engine.create_container({**config, "command": ["sh", "-c", "ulimit -Sn; ulimit -Hn"]}, "jobs")
    container.start()
    container.wait(20)
    say(" ".join(entry.text.decode().strip() for entry in container.read_log()))

resource.setrlimit(resource.RLIMIT_NOFILE, (500, 1000))
engine = Engine.open(state_dir)
engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
tell_limit("one")
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 900))
tell_limit("two")
Engine.open(state_dir + "-other").close()
tell_limit("three")
"""
    )
    assert [process.read() for _ in range(3)] == [["500", "1000"], ["300", "900"], ["300", "900"]]


def test_a_folder_of_pipes_that_is_cleared_away_is_made_again(engine: Engine, state_dir: str) -> None:
    """As what is old and empty is where a state directory is in /tmp: what starts then has a log all the same."""
    make(engine, "one", "sleep", "1000").start()
    os.rmdir(os.path.join(state_dir, "keeper", "fifo"))
    second = make(engine, "two", "sh", "-c", "echo here", log_path="two.log")
    second.start()
    assert read_output(second.metadata.log_path, "here\n") == "here\n"
    engine.get("one").stop(0)


@pytest.mark.parametrize("instead", ["nothing", "a file", "a link"])
def test_a_socket_that_is_cleared_away_is_made_again(state_dir: str, instead: str) -> None:
    """By the keeper, soon, and by the anchor that takes over from that: engines after this one find them.

    A backup that is put back may have an empty file in its place.
    """
    leave_one(state_dir)
    path = os.path.join(state_dir, "keeper", "socket")
    os.unlink(path)
    if instead == "a file":
        Path(path).touch()
    elif instead == "a link":
        os.symlink("/nowhere", path)
    wait_until(lambda: os.path.lexists(path) and stat.S_ISSOCK(os.lstat(path).st_mode), "the socket")
    for number, killed in enumerate(((), KEEPER)):
        kill(state_dir, *killed)
        with Engine.open(state_dir) as engine:
            assert engine.get("one").state is ContainerState.RUNNING
            container = make(engine, f"c{number}", "sh", "-c", "exit 3")
            container.start()
            assert container.wait(20).exit_code == 3
    with Engine.open(state_dir) as engine:
        engine.get("one").stop(0)


def test_a_directory_in_the_place_of_the_socket_is_told(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper removes none, which somebody has made: what is to be moved away is named, and then all goes on."""
    leave_one(state_dir)
    path = os.path.join(state_dir, "keeper", "socket")
    os.unlink(path)
    os.mkdir(path)
    monkeypatch.setattr("limpet.engine.starters.process.client._BEGIN_TIMEOUT_SECONDS", 1.0)
    with Engine.open(state_dir) as engine:
        with pytest.raises(errors.StartError, match=f"{path}' is no socket; move it away and try again"):
            make(engine, "two", "true").start()
        os.rmdir(path)
        wait_until(lambda: os.path.exists(path), "the socket")
        engine.recover()
        engine.get("one").stop(0)


def test_a_keeper_without_descriptors_says_whose_are_missing(engine: Engine, state_dir: str) -> None:
    """Its limit is that of who began it: what the engine has says nothing, and the number of an error even less."""
    make(engine, "one", "sleep", "1000").start()
    keeper = find_keepers(state_dir)["limpet-keeper"]
    soft, hard = resource.prlimit(keeper, resource.RLIMIT_NOFILE)
    resource.prlimit(keeper, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{keeper}/fd")), hard))
    with pytest.raises(errors.StartError, match=f"process {keeper}, has no file descriptor left"):
        make(engine, "two", "true", log_path="two.log").start()
    resource.prlimit(keeper, resource.RLIMIT_NOFILE, (soft, hard))
    make(engine, "three", "true", log_path="three.log").start()
    engine.get("one").stop(0)


CANNOT_LOOK = """
import sys
sys.path.insert(0, sys.argv[1])
from keeper import journal, keeper, main

def find_again(container, anonymous):
    raise OSError("no descriptor left")

keeper.find_again, journal._WORTH_REWRITING = find_again, 0
main.main()
"""


def test_what_could_not_be_looked_at_yet_stays_in_the_journal(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A keeper that takes over and rewrites the journal is killed, too: the next one knows of every container."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", CANNOT_LOOK)
    make(engine, "one", "sleep", "1000").start()
    kill(state_dir, *KEEPER)
    for number in range(8):
        make(engine, f"c{number}", "true").start()
        engine.get(f"c{number}").wait(20)
    assert b'"id":"one"' in Path(state_dir, "keeper", "journal").read_bytes()
    monkeypatch.undo()
    kill(state_dir, *ALL)
    assert engine.get("one").stop(0).exit_code == 137


def describe_standing(pid: int) -> tuple[object, ...]:
    """Return what a process has of its parent: CPUs, policy, niceness, limits."""
    limits = (resource.RLIMIT_FSIZE, resource.RLIMIT_STACK, resource.RLIMIT_MSGQUEUE)
    scheduling = os.sched_getaffinity(pid), os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)
    return (*scheduling, *(resource.prlimit(pid, number) for number in limits))


def may_lower_niceness() -> bool:
    capabilities = re.search(r"^CapEff:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return capabilities is not None and bool(int(capabilities[1], 16) >> 23 & 1)  # CAP_SYS_NICE


def test_limits_and_scheduling_are_those_of_the_engine_that_starts_it(engine_process: Start, state_dir: str) -> None:
    """Not those of the one by which the keeper was begun; as far as it need not, the keeper is bound by none itself."""
    narrow = engine_process(
        """
import resource
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
os.nice(7)
for number in (resource.RLIMIT_FSIZE, resource.RLIMIT_STACK, resource.RLIMIT_MSGQUEUE):
    resource.setrlimit(number, (1 << 22 if number != resource.RLIMIT_MSGQUEUE else 4096, resource.getrlimit(number)[1]))
engine = Engine.open(state_dir)
engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
config = {"metadata": {"name": "a"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
container = engine.create_container(config, "jobs", id="a")
say(container.start().pid); time.sleep(999)
"""
    )
    pid = int(*narrow.read())
    assert describe_standing(pid) == describe_standing(narrow.pid) != describe_standing(os.getpid())
    narrow.kill()
    with Engine.open(state_dir) as engine:
        second = make(engine, "b", "sleep", "1000")
        assert describe_standing(second.start().pid)[:2] == describe_standing(os.getpid())[:2]
        if may_lower_niceness():  # else the keeper stays as nice as it was begun
            assert describe_standing(second.status.pid) == describe_standing(os.getpid())
            keeper = find_keepers(state_dir)["limpet-keeper"]
            assert describe_standing(keeper)[1:3] == (os.SCHED_OTHER, 0)
            assert os.sched_getaffinity(keeper) >= os.sched_getaffinity(0)
        for container in engine.list():
            container.stop(0)


SILENT, CLOSED_TO_MORE = b"", b"-"


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        pytest.param(socket.SOCK_SEQPACKET, SILENT, id="that answers nothing"),
        pytest.param(socket.SOCK_SEQPACKET, CLOSED_TO_MORE, id="that has no room for more"),
        pytest.param(socket.SOCK_SEQPACKET, b"HTTP/1.1 400 Bad Request\r\n", id="of another protocol"),
        pytest.param(socket.SOCK_SEQPACKET, b'{"hello": 1}', id="whose answer is no keeper's"),
        pytest.param(socket.SOCK_SEQPACKET, b"[1]", id="whose answer is no object"),
        pytest.param(socket.SOCK_STREAM, SILENT, id="of another type"),
    ],
)
def test_a_stranger_at_the_keepers_socket(
    state_dir: str, monkeypatch: pytest.MonkeyPatch, kind: socket.SocketKind, answer: bytes
) -> None:
    """It is told from a keeper that hangs by the lock, which nobody holds: soon, and with what to do."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PATIENCE_SECONDS", 0.1)
    leave_one(state_dir)
    kill(state_dir, *ALL)
    path = os.path.join(state_dir, "keeper", "socket")
    os.unlink(path)
    with socket.socket(socket.AF_UNIX, kind) as stranger, socket.socket(socket.AF_UNIX, kind) as other:
        stranger.bind(path)
        stranger.listen(0 if answer == CLOSED_TO_MORE else 8)
        if answer == CLOSED_TO_MORE:
            other.connect(path)
        is_talking = answer not in {SILENT, CLOSED_TO_MORE}
        answering, _ = in_thread(lambda: answer_all(stranger, answer) if is_talking else None)
        try:
            begun = time.monotonic()
            with Engine.open(state_dir) as engine:
                assert engine.get("one").state is ContainerState.UNKNOWN  # its end may be in the journal, say
                with pytest.raises(errors.StartError, match=r"what listens there.* is no keeper.* move that file away"):
                    make(engine, "two", "true").start()
                assert time.monotonic() - begun < ANSWER_TIMEOUT_SECONDS
                assert os.path.exists(path)
                stranger.shutdown(socket.SHUT_RDWR)
                stranger.close()  # as was advised: its file stays
                make(engine, "three", "sh", "-c", "exit 3").start()
                assert engine.get("three").wait(20).exit_code == 3
                engine.recover()
                assert engine.get("one").stop(0).exit_code == 128 + signal.SIGKILL
        finally:
            with suppress(OSError):
                stranger.shutdown(socket.SHUT_RDWR)
            answering.join()


def test_a_keeper_that_was_killed_may_hold_its_lock_for_a_moment(state_dir: str) -> None:
    """Its processes take time to end: what has taken its socket meanwhile is a stranger's soon after."""
    leave_one(state_dir)
    kill(state_dir, *ALL)
    path = os.path.join(state_dir, "keeper", "socket")
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as stranger, open(os.path.join(state_dir, "keeper", "lock")) as lock:
        stranger.bind(path)
        stranger.listen()
        wait_until(lambda: try_lock(lock), "the keeper's end")
        ending = threading.Timer(0.2, fcntl.flock, (lock, fcntl.LOCK_UN))
        ending.start()
        with Engine.open(state_dir) as engine:
            assert engine.get("one").state is ContainerState.UNKNOWN
            ending.join()
            stranger.close()
            assert engine.recover() is not None
            assert engine.get("one").stop(0).exit_code == 128 + signal.SIGKILL


def try_lock(file: IO[str]) -> bool:
    """Lock a file; return False if another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def answer_all(stranger: socket.socket, answer: bytes) -> None:
    """Answer whoever connects, until the socket is shut down."""
    with suppress(OSError):
        while True:
            link, _ = stranger.accept()
            with link:
                link.recv(1000)
                link.sendall(answer)
                link.recv(1000)


def test_the_keeper_keeps_nothing_of_its_program(engine: Engine, state_dir: str) -> None:
    """A pipe that the program lets its children have ends with the program; and no other user gets at the keeper's."""
    read, write = os.pipe()
    try:
        os.set_inheritable(write, True)
        make(engine, "one", "sh", "-c", "echo here; sleep 1000", log_path="one.log").start()
    finally:
        os.close(write)
    os.set_blocking(read, False)
    assert os.read(read, 1) == b""
    os.close(read)
    directory = Path(state_dir, "keeper")
    found = {str(path.relative_to(directory)): path.lstat().st_mode for path in (directory, *directory.rglob("*"))}
    assert found.keys() >= {".", "lock", "socket", "journal"}
    open_to_all = {name for name, mode in found.items() if mode & 0o077 and not stat.S_ISLNK(mode)}
    assert open_to_all == {"fifo/one.out", "fifo/one.err"}  # which whoever the container is may open, by its own links
    engine.get("one").stop(0)


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


REFUSING = """
import errno, sys
sys.path.insert(0, sys.argv[1])
from keeper import main, members

def signal(self, containers, number, *given, real=members.Members.signal):
    if any(each.id == "refused" for each in containers):
        raise OSError(errno.ENFILE, "Too many open files in system")
    return real(self, containers, number, *given)

members.Members.signal = signal
main.main()
"""
"""The keeper's program, which cannot look for the processes of one container."""


def test_leftovers_that_cannot_be_ended_keep_no_engine_from_opening(
    engine_process: Start, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill has come between ends and their daemons': one cannot be looked at now, and the other one is ended."""
    lasting = ["sh", "-c", "setsid sleep 3000 & echo $! >PID; exit 3"]
    process = engine_process(
        """
import limpet.engine.starters.process.client as client
from limpet.engine.starters.process import ProcessStarter
client._PROGRAM = THE_KEEPER
ProcessStarter.signal = lambda *_, **__: 0
ProcessStarter.forget_exits = lambda *_: None
engine = Engine.open(state_dir)
engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
for key in ("other", "refused"):
    command = [each.replace("PID", f"{state_dir}.{key}") for each in THE_COMMAND]
    engine.create_container({"metadata": {"name": key}, "image": {"image": "host"}, "command": command},
        "jobs", id=key).start()
    engine.get(key).wait(20)
say("ended"); time.sleep(999)
""".replace("THE_KEEPER", repr(REFUSING)).replace("THE_COMMAND", repr(lasting))
    )
    process.read()
    process.kill()
    pids = {key: int(Path(f"{state_dir}.{key}").read_text()) for key in ("other", "refused")}
    try:
        with Engine.open(state_dir) as engine:
            assert {each.exit_code for each in engine.list()} == {3}
            wait_until(lambda: not is_running(pids["other"]), "what one has left to be ended")
            assert is_running(pids["refused"])
            monkeypatch.setattr(KeeperClient, "ask", refuse_to_answer)
            engine.recover()
    finally:
        for pid in pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def refuse_to_answer(_: KeeperClient, message: Message, **__: object) -> Message:
    raise errors.KeeperError(f"the keeper has not answered {message['op']!r} for 10 s")


SLOW_TO_FLUSH = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from keeper import journal, main

def fdatasync(file, real=os.fdatasync):
    real(file)
    time.sleep(1)
    with open("NOTE", "a") as note:
        print(os.fstat(file).st_ino, file=note)

os.fdatasync, journal._WORTH_REWRITING = fdatasync, 2000
main.main()
"""
"""The keeper's program, on a slow disk, and with a journal that has soon grown enough to be rewritten."""


def test_a_journal_that_is_being_flushed_is_not_replaced(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is reaped after a flush is in the file that was flushed, though others' ends are taken meanwhile."""
    note = Path(state_dir + ".flushed")
    program = SLOW_TO_FLUSH.replace("NOTE", str(note))
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", program)
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        take = engine.starter.forget_exits
        monkeypatch.setattr(engine.starter, "forget_exits", lambda ids: take([each for each in ids if each != "slow"]))
        slow = make(engine, "slow", "true")
        slow.start()
        for number in range(100):
            other = make(engine, f"c{number}", "true")
            other.start()
            other.wait(20)
            if note.exists():
                break
        identity = slow.status.identity
        assert identity is not None
        wait_until(lambda: not os.path.exists(f"/proc/{identity.pid}"), "the keeper to reap it")
        assert str(os.stat(f"{state_dir}/keeper/journal").st_ino) in note.read_text().split()


DEAF_ONCE = """
import errno, sys
sys.path.insert(0, sys.argv[1])
from keeper import loop, main

def watch(self, descriptor, handler, real=loop.Loop.watch):
    if handler.__name__ == "_listen":
        heard.append(descriptor)
        if len(heard) == 2:
            raise OSError(errno.ENOSPC, "max_user_watches")
    return real(self, descriptor, handler)

heard, loop.Loop.watch = [], watch
main.main()
"""
"""The keeper's program, which the kernel refuses to tell of its second copier."""


def test_output_is_copied_on_though_the_next_copier_cannot_be_watched(
    state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copier is killed, and the kernel has no room for the next one's link: the one after that gets all pipes."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", DEAF_ONCE)
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        script = "echo one; while [ ! -e GO ]; do sleep 0.02; done; echo two".replace("GO", state_dir + ".go")
        container = make(engine, "a", "sh", "-c", script, log_path="a.log")
        container.start()
        read_output(container.metadata.log_path, "one\n")
        time.sleep(0.2)  # one that ends sooner is begun anew at the next tick only
        kill(state_dir, "limpet-copier")
        Path(state_dir + ".go").touch()
        assert container.wait(20).exit_code == 0
        read_output(container.metadata.log_path, "one\ntwo\n")
        wait_until(lambda: not os.listdir(f"{state_dir}/keeper/fifo"), "its pipes to be removed")
