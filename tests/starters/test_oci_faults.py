"""A runtime that hangs, fails or answers rubbish is told as such within its deadline, and leaves nothing behind."""

import errno
import glob
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest

from limpet import Engine, errors
from limpet.engine import Container
from limpet.engine.starters.oci import OciStarter, sessions
from limpet.engine.starters.oci.cgroups import list_directories
from limpet.engine.starters.oci.ends import Ends
from limpet.engine.starters.process.keeper.kernel import read_children
from limpet.recovery.host import read_stat
from limpet.schema import ContainerState, Reason
from limpet.schema.cri import LinuxContainerResources
from tests.conftest import EngineProcess, find_processes, is_running, read_output, wait_until
from tests.starters.oci import config, end_everything, load_busybox, processes_of, runtime_entries

TIMEOUT = 3.0
SLEEP = f"exec sleep 4711.{os.getpid()}"
"""Not to be mistaken for that of another test, which may run at the same time."""

NAMES_A_STRANGER = f"""while [ "$1" != -P ]; do shift; done
    (echo $BASHPID > "$2"; echo '{{"data": {os.getpid()}}}' >&$_OCI_SYNCPIPE; {SLEEP}) & exit"""
"""A conmon that gives the pid of this very process as its container's."""


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    """A runc that does for each command what a file of that name beside it says."""
    directory = tmp_path / "fake"
    directory.mkdir()
    script = directory / "runc"
    script.write_text(
        "#!/bin/sh\n"
        f'for word in "$@"; do [ -e "{directory}/$word" ] && . "{directory}/$word"; done\n'
        'exec /usr/sbin/runc "$@"\n'
    )
    script.chmod(0o755)
    return script


@pytest.fixture(autouse=True)
def cleaned(state_dir: str) -> Iterator[None]:
    yield
    for pid in hanging():
        os.kill(pid, signal.SIGKILL)
    end_everything(state_dir)


def hanging() -> list[int]:
    """The processes of the fake that hang."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b" ".join(words).decode(errors="replace").strip() == SLEEP.removeprefix("exec ") and is_running(int(name)):
            found.append(int(name))
    return found


def open_with(state_dir: str, runtime: Path, tmp_path: Path) -> Engine:
    engine = Engine.open(state_dir, runtimes={"runc": OciStarter(str(runtime), timeout=TIMEOUT)})
    if not engine.list_sandboxes():
        load_busybox(engine, tmp_path / "image")
        engine.create_sandbox({"metadata": {"name": "a"}}, id="a", runtime_handler="runc")
        engine.create_container(config("one", "echo ran; sleep 1000"), "a", id="one")
    return engine


@pytest.mark.parametrize(
    ("command", "does", "why"),
    [
        ("create", SLEEP, "in time"),
        ("create", "head -c 5000000 /dev/zero; exit 0", "."),
        ("create", "echo nonsense >&2; exit 3", "nonsense"),
        ("create", "printf 'runtime: out of memory\\n\\ngoroutine 1:\\ngs 0x0\\n' >&2; exit 2", "out of memory"),
        (
            "start",
            "printf 'cannot parse it: rubbish\\n    {\\n    (right here) --^\\n\\n' >&2; exit 1",
            "cannot parse it",
        ),
        ("start", SLEEP, "did not end in time and was killed"),
        ("start", "yes | head -c 3000000; echo no way >&2; exit 4", "no way"),
        ("start", "exit 0", "has not executed its program in time"),
    ],
    ids=[
        "create-hangs",
        "create-rubbish",
        "create-fails",
        "create-crashes",
        "start-cannot-parse",
        "start-hangs",
        "start-fails",
        "start-nothing",
    ],
)
def test_a_start_that_fails(state_dir: str, tmp_path: Path, runtime: Path, command: str, does: str, why: str) -> None:
    """A StartError with the reason after the deadline at the latest, and neither process nor entry is left."""
    with open_with(state_dir, runtime, tmp_path) as engine:
        (runtime.parent / command).write_text(does)
        began = time.monotonic()
        with pytest.raises(errors.StartError, match=why):
            engine.get("one").start()
        assert time.monotonic() - began < 4 * TIMEOUT
        status = engine.get("one").status
        assert (status.exit_code, status.reason) == (128, Reason.START_ERROR)
        assert runtime_entries(state_dir, "runc") == []
        wait_until(lambda: not hanging(), "what hung to end")
        pids = [int(path.read_text()) for path in Path(state_dir).glob("containers/one/oci/*/*pidfile")]
        wait_until(lambda: not any(map(is_running, pids)), "its processes to end")
        (runtime.parent / command).unlink()
        engine.create_container(config("two", "echo ran; sleep 1000"), "a", id="two").start()
        engine.get("two").stop(0)
        engine.get("two").release()


@pytest.mark.parametrize(
    ("does", "why"),
    [
        (SLEEP, "in time"),
        ("exit 0", "conmon ended without an answer"),
        ("echo trouble >&2; exit 3", "trouble"),
        ("eval \"head -c 100000 /dev/zero | tr '\\\\0' x >&$_OCI_SYNCPIPE\"", "conmon answered 'xxx"),
        ('echo \'{"data": "many"}\' >&$_OCI_SYNCPIPE', "many"),
        ("echo '{\"data\": 4194303}' >&$_OCI_SYNCPIPE", "has not written its pid"),
        ('echo \'{"data": -1, "message": "no room"}\' >&$_OCI_SYNCPIPE', "no room"),
        (NAMES_A_STRANGER, "no process of its own"),
    ],
    ids=["hangs", "says-nothing", "fails", "rubbish", "no-number", "a-pid-that-is-none", "refuses", "a-stranger"],
)
def test_a_conmon_that_fails(state_dir: str, tmp_path: Path, does: str, why: str) -> None:
    """A StartError with the reason, within the deadline; with a conmon as it should be the next one starts."""
    script = tmp_path / "conmon"
    script.write_text(f'#!/bin/bash\n[ "$1" = --version ] || {{ {does}; exit; }}\nexec /usr/bin/conmon "$@"\n')
    script.chmod(0o755)
    starter = OciStarter("runc", conmon=str(script), timeout=TIMEOUT)
    with Engine.open(state_dir, runtimes={"runc": starter}) as engine:
        load_busybox(engine, tmp_path / "image")
        engine.create_sandbox({"metadata": {"name": "a"}}, id="a", runtime_handler="runc")
        one = engine.create_container(config("one", "sleep 1000"), "a", id="one")
        began = time.monotonic()
        with pytest.raises(errors.StartError, match=why):
            one.start()
        assert time.monotonic() - began < 4 * TIMEOUT
        assert runtime_entries(state_dir, "runc") == []
        wait_until(lambda: not hanging(), "what hung to end")
        script.write_text('#!/bin/sh\nexec /usr/bin/conmon "$@"\n')
        engine.create_container(config("two", "exit 4"), "a", id="two").start()
        assert engine.get("two").wait(20).exit_code == 4


@pytest.mark.long
def test_what_fails_while_it_runs(state_dir: str, tmp_path: Path, runtime: Path) -> None:
    """A pause, new limits, a command that fail or hang: an error that says why, and the container is as it was."""
    with open_with(state_dir, runtime, tmp_path) as engine:
        one = engine.get("one")
        one.start()
        limits = LinuxContainerResources(memory_limit_in_bytes=64 << 20)
        for does, why in ((SLEEP, "did not end in time"), ("echo no way >&2; exit 4", "no way"), ("exit 5", "with 5")):
            for command in ("pause", "update", "exec"):
                (runtime.parent / command).write_text(does)
            with pytest.raises(errors.UnsupportedError, match=why):
                one.pause()
            with pytest.raises(errors.InvalidInputError, match=why):
                one.change_limits(limits)
            with pytest.raises(errors.WaitTimeoutError if does == SLEEP else errors.StartError):
                one.execute(["true"], timeout=1)
            assert (one.state, one.status.paused, one.status.resources) == (ContainerState.RUNNING, False, None)
        for command in ("pause", "update", "exec"):
            (runtime.parent / command).unlink()
        assert one.execute(["true"]).code == 0
        one.stop(0)


SAYS_THE_PID_LATE = """for word; do [ "$last" = --pid-file ] && file=$word; last=$word; done
/usr/sbin/runc $(echo "$@" | sed "s,$file,$file.early,") & sleep 0.6; mv "$file.early" "$file"; wait; exit 0
"""


@pytest.mark.long
def test_a_deadline_before_a_command_is_known(state_dir: str, tmp_path: Path, runtime: Path) -> None:
    """The runtime has started it, and not yet said which process it is: it does not run on in the container."""
    command = ["sleep", f"4718{os.getpid()}"]

    with open_with(state_dir, runtime, tmp_path) as engine:
        container = engine.get("one")
        container.start()
        (runtime.parent / "exec").write_text(SAYS_THE_PID_LATE)
        with pytest.raises(errors.WaitTimeoutError, match="was killed"):
            container.execute(command, timeout=0.4)
        wait_until(lambda: not find_processes(*command), "the command to be gone")
        session = container.open_command(command)
        wait_until(lambda: find_processes(*command), "the command")
        session.close()
        wait_until(lambda: not find_processes(*command), "the command to be gone")
        container.stop(0)
        container.release()


NO_TERMINAL = """while [ "$1" != --console-socket ]; do shift; done
exec python3 -c "import socket, sys
door = socket.socket(socket.AF_UNIX)
door.connect(sys.argv[1])
socket.send_fds(door, [b'x'], [0])" "$2"
"""
"""A runtime that hands over /dev/null."""


@pytest.mark.parametrize(
    ("does", "terminal", "why"),
    [
        (f"({SLEEP}) & wait", True, "has not made a terminal in time"),
        (NO_TERMINAL, True, "is no terminal"),
        (f"head -c 3000000 /dev/zero; {SLEEP}", False, "nothing was written"),
    ],
    ids=["hangs", "no-terminal", "floods"],
)
def test_a_command_that_never_begins(
    state_dir: str, tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch, does: str, terminal: bool, why: str
) -> None:
    """It is told within its deadline, and neither the runtime, nor what that has started, nor a file is left.

    Of crun: runc copies a command's terminal instead of handing it over.
    """
    monkeypatch.setattr(sessions, "_ANSWER_SECONDS", 20 if does == NO_TERMINAL else 0.5)
    crun = runtime.parent / "crun"
    crun.write_text(runtime.read_text().replace("/usr/sbin/runc", shutil.which("crun") or ""))
    crun.chmod(0o755)
    with Engine.open(state_dir, runtimes={"crun": OciStarter(str(crun), timeout=TIMEOUT)}) as engine:
        load_busybox(engine, tmp_path / "image")
        engine.create_sandbox({"metadata": {"name": "a"}}, id="a", runtime_handler="crun")
        container = engine.create_container(config("one", "sleep 1000"), "a", id="one")
        container.start()
        (runtime.parent / "exec").write_text(does)
        with (
            pytest.raises((errors.StartError, errors.WaitTimeoutError), match=why),
            closing(
                container.open_command(["true"], terminal=terminal, size=(5, 5) if terminal else (0, 0))
            ) as session,
        ):
            session.read(0.5)
        wait_until(lambda: not hanging(), "all of it to end")
        assert list(Path(state_dir).glob("containers/one/oci/*/exec-*")) == []
        container.stop(0)
        container.release()


@pytest.mark.long
def test_killed_while_a_start_hangs(
    state_dir: str, tmp_path: Path, runtime: Path, engine_process: Callable[[str], EngineProcess]
) -> None:
    """Its `runc start` outlives the engine and may yet let it run: Unknown until that is over, then it never ran."""
    with open_with(state_dir, runtime, tmp_path):
        (runtime.parent / "start").write_text(SLEEP)
    process = engine_process(f"""
from limpet.engine.starters.oci import OciStarter
engine = Engine.open(state_dir, runtimes={{"runc": OciStarter({str(runtime)!r}, timeout=60)}})
engine.get("one").start()
""")
    wait_until(hanging, "the start to hang")
    process.kill()
    with open_with(state_dir, runtime, tmp_path) as engine:
        status = engine.get("one").status
        assert status.state is ContainerState.UNKNOWN, status
        assert "still under way" in status.message
        (pid,) = hanging()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not hanging(), "the start to end")
        engine.recover()
        status = engine.get("one").status
        assert (status.state, status.exit_code) == (ContainerState.EXITED, 128)
        assert read_output(engine.get("one"), 0) == []
        assert runtime_entries(state_dir, "runc") == []


@pytest.mark.parametrize(
    ("command", "act"),
    [
        ("pause", "one.pause()"),
        ("update", "one.change_limits(LinuxContainerResources(memory_limit_in_bytes=128 << 20))"),
        ("delete", "one.stop(0); open(sys.argv[1], 'w').close(); one.release()"),
    ],
)
def test_killed_while_the_runtime_hangs(
    state_dir: str,
    tmp_path: Path,
    runtime: Path,
    engine_process: Callable[[str], EngineProcess],
    command: str,
    act: str,
) -> None:
    """The next engine ends what the dead one has asked for, before it looks; somebody who is at work there stays."""
    with open_with(state_dir, runtime, tmp_path) as engine:
        engine.get("one").start()
        (runtime.parent / command).write_text(f"({SLEEP}) & wait")
    entry = processes_of(state_dir, "one").entry
    process = engine_process(f"""
from limpet.engine.starters.oci import OciStarter
from limpet.schema.cri import LinuxContainerResources
sys.argv[1:] = [{entry + "/more"!r}]
engine = Engine.open(state_dir, runtimes={{"runc": OciStarter({str(runtime)!r}, timeout=60)}})
one = engine.get("one")
{act}
""")
    wait_until(hanging, "the runtime to hang")
    process.kill()
    assert hanging()
    with subprocess.Popen(["sleep", "1000"], cwd=os.path.dirname(entry), start_new_session=True) as person:
        (runtime.parent / command).unlink()
        with open_with(state_dir, runtime, tmp_path) as engine:
            assert hanging() == []
            assert person.poll() is None
            person.kill()
            one = engine.get("one")
            if command == "delete":
                assert runtime_entries(state_dir, "runc") == []
                assert one.status.released
            else:
                wait_until(lambda: one.is_frozen() is one.status.paused, "it to be as is written down")
                one.resume()
                assert one.execute(["echo", "ok"]).output == b"ok\n"


def test_a_release_needs_no_runtime(state_dir: str, tmp_path: Path, runtime: Path) -> None:
    """What the runtime keeps of a container that has ended is removed without it: its entry and its cgroups."""
    with open_with(state_dir, runtime, tmp_path) as engine:
        one = engine.get("one")
        one.start()
        processes = processes_of(state_dir, "one")
        name = os.path.basename(processes.cgroup)
        cgroups = [directory for _, directory in list_directories(processes.cgroups, name)]
        assert cgroups
        one.stop(0)
        (runtime.parent / "delete").write_text("exit 1")
        one.release()
        assert runtime_entries(state_dir, "runc") == []
        assert [each for each in cgroups if os.path.exists(each)] == []


def test_a_delete_that_hangs_can_be_repeated(state_dir: str, tmp_path: Path, runtime: Path) -> None:
    """release says so, and the bundle stays; once the runtime works again, all of it goes.

    The runtime is asked where it keeps more of the container than is known.
    """
    with open_with(state_dir, runtime, tmp_path) as engine:
        one = engine.get("one")
        one.start()
        one.stop(0)
        Path(processes_of(state_dir, "one").entry, "more").touch()
        (runtime.parent / "delete").write_text(SLEEP)
        with pytest.raises(errors.InvalidStateError, match="runc cannot delete it: it did not end in time"):
            one.release()
        assert Path(state_dir, "containers/one").exists()
        (runtime.parent / "delete").unlink()
        one.release()
        assert not Path(state_dir, "containers/one").exists()
        assert runtime_entries(state_dir, "runc") == []


@pytest.mark.parametrize("damage", [b"", b"\0\0\0", b"4711", b"-1", b"7\n7"])
def test_a_damaged_exit_file_is_none(state_dir: str, tmp_path: Path, runtime: Path, damage: bytes) -> None:
    """conmon does not flush it: what a power cut leaves of it is no exit code."""
    with open_with(state_dir, runtime, tmp_path) as engine:
        engine.create_container(config("short", "sleep 0.4; exit 9"), "a", id="short").start()
    processes = processes_of(state_dir, "short")
    wait_until(lambda: not is_running(processes.init.pid) and not is_running(processes.monitor.pid), "its end")
    (exit_file,) = Path(state_dir).glob("containers/short/oci/*/exit")
    exit_file.write_bytes(damage)
    with open_with(state_dir, runtime, tmp_path) as engine:
        status = engine.get("short").status
        assert status.state is ContainerState.EXITED
        assert status.exit_code in {9, 255}  # the kernel may know it, where init has not reaped it
        assert (status.exit_code == 255) == (status.reason == Reason.UNKNOWN)


def test_an_exit_that_cannot_be_read_now_is_asked_again(state_dir: str, tmp_path: Path, runtime: Path) -> None:
    """Without a free descriptor nobody says that an end was unseen, or that a process is gone: it is an error."""
    with open_with(state_dir, runtime, tmp_path) as engine:
        engine.create_container(config("short", "sleep 0.2; exit 9"), "a", id="short").start()
        engine.get("short").wait(20)
        identity = engine.get("short").status.identity
    assert identity is not None
    starter = OciStarter(str(runtime))
    starter.open(state_dir)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    opened = []
    try:
        with suppress(OSError):
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(errors.ResourcesError, match="Too many open files"):
            starter.read_exit("short", identity, -1)
        with pytest.raises(errors.ResourcesError):
            starter.adopt("short", identity)
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    found = starter.read_exit("short", identity, -1)
    assert found is not None
    assert found.code == 9


def test_marks_that_cannot_be_looked_for_are_not_said_to_be_missing(
    state_dir: str, tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its mark a start was not let go: that the disk refuses a look does not say that the program never ran."""
    with open_with(state_dir, runtime, tmp_path) as engine:
        engine.create_container(config("short", "exit 9"), "a", id="short").start()
        identity = engine.get("short").wait(20).identity
    assert identity is not None
    starter = OciStarter(str(runtime))
    starter.open(state_dir)
    look = os.lstat

    def refuse(path: str) -> os.stat_result:
        if os.path.basename(path) in {"starting", "executed"}:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return look(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", refuse)
        with pytest.raises(errors.ResourcesError, match="Input/output error"):
            starter.read_exit("short", identity, -1)
    found = starter.read_exit("short", identity, -1)
    assert found is not None
    assert (found.code, found.never_ran) == (9, "")


@pytest.mark.parametrize("is_by_next", [False, True])
def test_both_killed_amid_making_it(
    state_dir: str, tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch, is_by_next: bool
) -> None:
    """Of conmon and runtime the cgroups stayed, which nothing else tells of; the next who comes removes them, too."""
    key = f"cut{os.getpid()}"

    def find_cgroups() -> list[str]:
        return [each for place in ("limpet", "*/limpet") for each in glob.glob(f"/sys/fs/cgroup/{place}/*-{key}")]

    with open_with(state_dir, runtime, tmp_path) as engine:
        cut = engine.create_container(config(key, "echo ran"), "a", id=key)
        (runtime.parent / "create").write_text(
            f"""/usr/sbin/runc "$@" & runc=$!
            until ls -d /sys/fs/cgroup/limpet/*-{key} /sys/fs/cgroup/*/limpet/*-{key}; do kill -0 $runc || break; done
            kill -9 $runc $PPID; exec sleep 10""".replace("; do", " | grep .; do")
        )
        with monkeypatch.context() as patched:
            if is_by_next:
                patched.setattr(Ends, "discard", lambda *_: None)
            with pytest.raises(errors.StartError):
                cut.start()
        assert bool(find_cgroups()) is is_by_next
        cut.remove()
        assert find_cgroups() == []


def wait_for_end_of(container: Container) -> None:
    with closing(container.open_command(["true"])) as session:
        session.wait(20)


def is_parent(pid: int) -> bool:
    return bool(read_children(pid))


def is_reaped(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


@pytest.mark.usefixtures("subreaper")
def test_a_command_that_nobody_knows_is_reaped(state_dir: str, tmp_path: Path, runtime: Path) -> None:
    """Its runtime was killed before it had said which it is: the container could not end. Its first process stays."""
    with open_with(state_dir, runtime, tmp_path) as engine:
        one = engine.get("one")
        pid = one.start().pid
        monitor = processes_of(state_dir, "one").monitor.pid
        os.kill(monitor, signal.SIGKILL)
        wait_until(lambda: read_stat(pid)[1] == str(os.getpid()).encode(), "it to come to us")
        (runtime.parent / "exec").write_text("kill -9 $$")
        acts: list[Callable[[], object]] = [
            lambda: one.execute(["true"]),
            lambda: wait_for_end_of(one),
            engine.recover,
        ]
        for act in acts:
            with subprocess.Popen(["nsenter", "-t", str(pid), "-p", "sleep", "1000"]) as entered:
                wait_until(partial(is_parent, entered.pid), "it to be in there")
                (lost,) = read_children(entered.pid)
                entered.kill()
            with suppress(errors.StartError):
                act()
            wait_until(partial(is_reaped, lost), "it to be reaped")
        assert is_running(pid)
        one.stop(0)
        one.release()
        wait_until(partial(is_reaped, pid), "it to be reaped, too")
