"""The host's probe: what the kernel and a witness say of a process, and what is concluded from it."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.recovery import Boot, HostProbe, Observation, Process, host
from limpet.recovery.probe import Witnessed
from limpet.schema import ProcessIdentity, Status
from tests.conftest import require_namespaces, wait_until
from tests.drill.test_command import as_nobody

AS_ROOT = () if os.geteuid() == 0 else ("--user", "--map-root-user")


class Subject:
    """A container that is RUNNING according to its record."""

    id = "one"
    metadata = None  # never asked for

    def __init__(self, identity: ProcessIdentity | None) -> None:
        self.status = Status(created_at=1, started_at=2 if identity else 0, identity=identity)


def look(identity: ProcessIdentity | None, witnessed: Witnessed | None = None) -> Observation:
    probe = HostProbe(witness=lambda _id, _identity: witnessed)
    return probe.observe(Subject(identity))  # type: ignore[arg-type]


@pytest.fixture
def sleeper() -> Iterator[ProcessIdentity]:
    """The identity of a process that runs."""
    process = subprocess.Popen(["sleep", "1000"])
    with host.open_pidfd(process.pid) as pidfd:
        identity = host.identify(process.pid, pidfd)
    yield identity
    process.kill()
    process.wait()


def end(identity: ProcessIdentity) -> None:
    os.kill(identity.pid, 9)
    os.waitid(os.P_PID, identity.pid, os.WEXITED)


def test_a_zombie_is_not_alive_and_tells_its_exit_code() -> None:
    """A process that has ended and is not reaped yet has ended, with its real code; reaped, it may be lost."""
    process = subprocess.Popen(["sh", "-c", "read line; exit 5"], stdin=subprocess.PIPE)
    with host.open_pidfd(process.pid) as pidfd:
        identity = host.identify(process.pid, pidfd)
    assert look(identity).process is Process.ALIVE
    assert process.stdin is not None
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    seen = look(identity)
    assert (seen.process, seen.exit_code) == (Process.ENDED, 5)
    unproven = look(replace(identity, pidfd_inode=0))  # before Linux 6.9: whosever it is, ours has ended
    assert (unproven.process, unproven.exit_code) == (Process.GONE, None)
    process.wait()
    assert look(identity).process is Process.GONE


def test_the_kernel_tells_how_a_process_ended_that_another_has_reaped() -> None:
    """Exit code and signal are read by the pidfd that was held, on kernels that keep them (Linux 6.15)."""
    if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 15):
        pytest.skip("this kernel keeps no exit code of what was reaped")
    for script, code in (("exit 5", 5), ("kill -9 $$", 137), ("exit 0", 0)):
        process = subprocess.Popen(["sh", "-c", script])
        with host.open_pidfd(process.pid) as pidfd:
            process.wait()
            assert host.has_ended(pidfd)
            assert host.read_exit_code(process.pid, pidfd) == code


REAPED_AMID_THE_LOOK = """
import ctypes, os
from limpet.recovery import host
look = os.readlink
def look_late(path):
    os.waitpid(pid, 0)
    return look(path)
pid = os.fork()
if pid == 0:
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
    os._exit(5)
with host.open_pidfd(pid) as pidfd:
    host.wait_for_end(pidfd, 20)
    os.readlink = look_late
    print(host.read_exit_code(pid, pidfd))
"""


def test_what_is_reaped_amid_the_look_at_it_has_not_ended_with_0() -> None:
    """The stat of a zombie that we may not see has 0 for its code; that it is gone a moment later permits nothing."""
    command = [sys.executable, "-c", REAPED_AMID_THE_LOOK]
    command = command if os.geteuid() else as_nobody(command)
    told = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60, check=True).stdout
    assert told.strip() in {"5", "None"}  # the kernel keeps it since Linux 6.15


def test_looks_keep_no_descriptor() -> None:
    """Whether there are pidfs is asked by two descriptors, a file of /proc is read by one; all are closed."""
    before = os.listdir("/proc/self/fd")
    host.ask_for_pidfs.cache_clear()
    host.ask_for_pidfs()
    host.read_stat(os.getpid())
    assert os.listdir("/proc/self/fd") == before


def test_the_same_start_time_alone_is_no_proof(sleeper: ProcessIdentity) -> None:
    """Without an inode number a process with pid and start time of ours is unproven, whatever it calls itself."""
    unproven = replace(sleeper, pidfd_inode=0)
    assert look(unproven).process is Process.UNPROVEN
    assert look(replace(unproven, start_ticks=sleeper.start_ticks - 100)).process is Process.STRANGER


def test_what_runc_holds_is_not_said_to_run(sleeper: ProcessIdentity) -> None:
    """A process that has the name of runc's init is doubted, until it executes a program; a witness knows more."""
    script = "printf 'runc:[2:INIT]' > /proc/$$/comm; echo; read line; exec sleep 1000"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline()
        with host.open_pidfd(process.pid) as pidfd:
            identity = host.identify(process.pid, pidfd)
        seen = look(identity)
        assert (seen.process, "a runtime has made it" in seen.detail) == (Process.UNPROVEN, True)
        for known in (Process.HELD, Process.ALIVE):
            assert look(identity, Witnessed(known)).process is known
        process.stdin.close()
        wait_until(lambda: look(identity).process is Process.ALIVE, "the program to be executed")
        assert look(sleeper).process is Process.ALIVE
        process.kill()


@pytest.mark.parametrize(("before", "expected"), [((), Process.ALIVE), (("-m",), Process.UNPROVEN)])
def test_what_crun_holds_is_told_from_crun_itself(tmp_path: Path, before: tuple[str, ...], expected: Process) -> None:
    """Both have its name: what becomes a container is in a mount namespace of its own, who waits for it is in ours."""
    shutil.copy("/bin/sleep", tmp_path / "crun")
    command = [str(tmp_path / "crun"), "1000"]
    if before:
        require_namespaces()
        command = ["unshare", *AS_ROOT, *before, *command]
    with subprocess.Popen(command) as process:
        wait_until(lambda: host.read_name(process.pid) == b"crun", "crun to be executed")
        with host.open_pidfd(process.pid) as pidfd:
            identity = host.identify(process.pid, pidfd)
        assert look(identity).process is expected
        process.kill()


def test_the_end_of_what_runc_holds_is_not_its_programs() -> None:
    """Killed while it has the name of runc's init, and not reaped yet: it has ended, and nothing says with what."""
    script = "printf 'runc:[2:INIT]' > /proc/$$/comm; echo; read line"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        with host.open_pidfd(process.pid) as pidfd:
            identity = host.identify(process.pid, pidfd)
            process.kill()
            assert host.wait_for_end(pidfd, 60)
        seen = look(identity)
        assert (seen.process, seen.exit_code) == (Process.GONE, None)


def test_a_witness_proves_what_the_kernel_cannot(sleeper: ProcessIdentity) -> None:
    """Its parent knows that it is the very one; where the kernel knows better, the kernel is believed."""
    alive = Witnessed(Process.ALIVE)
    assert look(replace(sleeper, pidfd_inode=0), alive).process is Process.ALIVE
    assert look(replace(sleeper, pidfd_inode=1), alive).process is Process.STRANGER
    for known in (Process.PAUSED, Process.MONITOR_GONE, Process.HELD):
        assert look(sleeper, Witnessed(known)).process is known
        assert look(replace(sleeper, pidfd_inode=1), Witnessed(known)).process is Process.STRANGER
    end(sleeper)
    for known in (Process.ALIVE, Process.PAUSED, Process.MONITOR_GONE, Process.HELD):
        assert look(sleeper, Witnessed(known)).process is Process.GONE


@pytest.mark.parametrize(
    "witnessed",
    [
        Witnessed(Process.ENDED, 3, 77),
        Witnessed(Process.GONE, None, 77),
        Witnessed(Process.NEVER_RAN, None, 77),
    ],
)
def test_an_end_that_was_witnessed_is_told_as_it_was(sleeper: ProcessIdentity, witnessed: Witnessed) -> None:
    """Code, time and "never ran" come from who was there, in this boot and after the next."""
    end(sleeper)
    for identity in (sleeper, replace(sleeper, boot_id="another"), replace(sleeper, pid_namespace=1)):
        seen = look(identity, witnessed)
        assert (seen.process, seen.exit_code, seen.finished_at) == witnessed[:3]


def test_a_record_without_a_process_is_warned_of_one_and_nothing_else() -> None:
    """A witness who sees a process of a container that was not started makes it doubtful; an old end does not."""
    for living in (Process.ALIVE, Process.PAUSED, Process.MONITOR_GONE):
        assert look(None, Witnessed(living)).process is Process.UNPROVEN
    assert look(None, Witnessed(Process.HELD)).process is Process.NONE
    assert look(None, Witnessed(Process.ENDED, 3, 77)).process is Process.NONE


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOENT])
def test_a_pid_that_names_a_thread_is_a_strangers(
    monkeypatch: pytest.MonkeyPatch, sleeper: ProcessIdentity, number: int
) -> None:
    """Kernels say it with either error: our process has ended, and a thread of another has its number."""

    def refuse(_pid: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert look(sleeper).process is Process.STRANGER


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPERM])
def test_a_look_that_fails_proves_nothing(
    monkeypatch: pytest.MonkeyPatch, sleeper: ProcessIdentity, number: int
) -> None:
    """Too few descriptors, no memory, no permission: hidden, with the reason, and never "gone"."""

    def refuse(_pid: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    seen = look(sleeper)
    assert (seen.boot, seen.process) == (Boot.SAME, Process.HIDDEN)
    assert os.strerror(number) in seen.detail


PIDFS = """
import os, resource, sys
from limpet.recovery import host
if sys.argv[1] == "full":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(os.listdir("/proc/self/fd")) - 1
    for free in (0, 1):
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + free, hard))
        print(host.has_pidfs())
        try:
            host.ask_for_pidfs()
        except OSError as error:
            print(error.errno)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(host.has_pidfs())
"""


@pytest.mark.usefixtures("namespaces")
def test_whether_the_kernel_has_pidfs_is_asked_until_it_answers() -> None:
    """Without a free descriptor there is no answer, and none is remembered; the first process gets the same one."""

    def ask(*command: str) -> list[str]:
        result = subprocess.run([*command], capture_output=True, text=True, timeout=30, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    python = (sys.executable, "-c", PIDFS)
    (answer,) = ask(*python, "plain")
    assert ask(*python, "full") == ["False", str(errno.EMFILE)] * 2 + [answer]
    assert ask("unshare", *AS_ROOT, "-p", "-f", "--mount-proc", *python, "plain") == [answer]


LOOK_AT = """
import os, sys, msgspec
from limpet.recovery import host
from limpet.schema import ProcessIdentity
identity = msgspec.json.decode(sys.argv[1], type=ProcessIdentity)
here = dict(pid_namespace=os.stat(f"/proc/self/ns/{sys.argv[2]}").st_ino) if len(sys.argv) > 2 else {}
found, _, detail = host.observe_process(msgspec.structs.replace(identity, **here))
print(found.value, "|", detail)
"""


def observe(identity: ProcessIdentity, *more: str, prefix: tuple[str, ...] = ()) -> str:
    import msgspec

    command = [*prefix, sys.executable, "-c", LOOK_AT, msgspec.json.encode(identity).decode(), *more]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


NEW_PIDS = ("unshare", *AS_ROOT, "-p", "-f", "--mount-proc")
IN_FIRST_NAMESPACES = os.geteuid() == 0 and (
    os.stat("/proc/self/ns/pid").st_ino,
    os.stat("/proc/self/ns/user").st_ino,
) == (0xEFFFFFFC, 0xEFFFFFFD)


@pytest.mark.usefixtures("namespaces")
def test_another_pid_namespace_proves_nothing_from_a_new_one(sleeper: ProcessIdentity) -> None:
    """From a namespace of its own, nobody sees whether the recorded one is over; its number says it in one case."""
    assert observe(sleeper, prefix=NEW_PIDS).startswith("elsewhere")
    assert "that namespace is over" in observe(sleeper, "mnt", prefix=NEW_PIDS)


@pytest.mark.skipif(not IN_FIRST_NAMESPACES, reason="only who sees all processes can show that a namespace is over")
def test_who_sees_every_process_sees_that_a_pid_namespace_is_over() -> None:
    """What ran in it has ended once the namespace has; until then it may live, and then it is not ended by a number."""
    script = textwrap.dedent("""
        import msgspec, os, subprocess, sys
        from limpet.recovery import host
        child = subprocess.Popen(["sleep", "1000"])
        with host.open_pidfd(child.pid) as pidfd:
            print(msgspec.json.encode(host.identify(child.pid, pidfd)).decode(), flush=True)
        sys.stdin.readline()
        child.kill(); child.wait()
        print("ended", flush=True)
        sys.stdin.readline()
    """)
    import msgspec

    first = subprocess.Popen(
        [*NEW_PIDS, sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdin is not None
    assert first.stdout is not None
    identity = msgspec.json.decode(first.stdout.readline(), type=ProcessIdentity)
    assert observe(identity).startswith("elsewhere")
    first.stdin.write("\n")
    first.stdin.flush()
    assert first.stdout.readline() == "ended\n"
    expected = "gone" if identity.pidfd_inode else "elsewhere"
    assert observe(identity).startswith(expected)
    first.communicate()
    wait_until(lambda: "no process of this machine is in it" in observe(identity), "the namespace to be over")
    assert observe(identity).startswith("gone")
