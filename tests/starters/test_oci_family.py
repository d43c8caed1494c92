"""Who is killed with a process: all in its session, unless others are in that, too."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from limpet.engine.starters.oci import command
from limpet.engine.starters.oci.family import find_half_dead, kill_family
from limpet.recovery.host import open_pidfd, wait_for_end
from tests.conftest import is_running, wait_until

KILL = """
import subprocess, sys
from limpet.engine.starters.oci.family import find_half_dead, kill_family
from limpet.recovery.host import open_pidfd, read_stat, wait_for_end
given = sys.argv[1:]
children = [] if given else [subprocess.Popen(["sleep", "1000"]) for _ in range(2)]
first, other = map(int, given) if given else (each.pid for each in children)
session = int(read_stat(first)[3])
with open_pidfd(first) as pidfd, open_pidfd(other) as spared:
    kill_family(first, pidfd, sessions=True)
    print(session, wait_for_end(pidfd, 5), wait_for_end(spared, 0.2))
for each in children:
    each.kill()
"""


def test_our_own_session_is_spared() -> None:
    """A process that has stayed in the session of who kills it is killed, and no other in that session."""
    done = subprocess.run(
        [sys.executable, "-c", KILL], start_new_session=True, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.split()[1:] == ["True", "False"], (done.stdout, done.stderr)


def test_all_are_stopped_before_any_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none starts another once it has been looked for."""
    sent = []
    send = signal.pidfd_send_signal

    def note(pidfd: int, number: int) -> None:
        sent.append(number)
        send(pidfd, number)

    with subprocess.Popen(["sh", "-c", "sleep 1000 & sleep 1000 & wait"], start_new_session=True) as first:
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
        wait_until(lambda: len(children.read_text().split()) == 2, "its children")
        pids = [int(each) for each in children.read_text().split()]
        monkeypatch.setattr(signal, "pidfd_send_signal", note)
        with open_pidfd(first.pid) as pidfd:
            kill_family(first.pid, pidfd)
            assert wait_for_end(pidfd, 20)
    assert sent == [signal.SIGSTOP] * 3 + [signal.SIGKILL] * 3
    wait_until(lambda: not any(map(is_running, pids)), "its children to end")


@pytest.mark.skipif(os.geteuid() != 0, reason="a pid namespace needs root")
def test_session_zero_is_spared() -> None:
    """All that have come from another pid namespace are in session 0, and have nothing to do with each other."""
    room = subprocess.Popen(["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sleep", "1000"])
    entered = []
    try:
        children = Path(f"/proc/{room.pid}/task/{room.pid}/children")
        wait_until(lambda: children.read_text().split(), "the namespace")
        target = children.read_text().split()[0]
        wait_until(lambda: Path(f"/proc/{target}/comm").read_text() == "sleep\n", "its /proc")
        enter = ["nsenter", "--target", target, "--pid", "--mount"]
        entered = [subprocess.Popen([*enter, "sleep", "1000"], start_new_session=True) for _ in range(2)]
        inside = [number_inside(each.pid) for each in entered]
        command = [*enter, sys.executable, "-c", KILL, *inside]
        done = subprocess.run(command, start_new_session=True, capture_output=True, text=True, timeout=30, check=False)
        assert done.stdout.split() == ["0", "True", "False"], (done.stdout, done.stderr)
    finally:
        for each in [room, *entered]:
            each.kill()  # also an nsenter that has stopped with its child
            each.wait(20)


def number_inside(pid: int) -> str:
    """The pid that the child of an nsenter has in the namespace."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_until(lambda: children.read_text().split(), "it to enter")
    (child,) = children.read_text().split()
    status = Path(f"/proc/{child}/status").read_text()
    return next(line.split()[-1] for line in status.splitlines() if line.startswith("NSpid:"))


FREEZER = Path("/sys/fs/cgroup/freezer")
ENTER = 'echo $$ > "$0/cgroup.procs"; sleep 1000'


@pytest.mark.skipif(not os.access(FREEZER, os.W_OK), reason="needs root and the freezer of cgroup v1")
def test_a_program_that_cannot_be_killed_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is frozen, as one that hangs on a disk would be: its deadline holds, and it is reaped once it has ended."""
    monkeypatch.setattr(command, "_END_SECONDS", 0.2)
    cgroup = FREEZER / f"limpet-test-{os.getpid()}"
    cgroup.mkdir()

    def freeze(_: int) -> None:
        (cgroup / "freezer.state").write_text("FROZEN")

    monkeypatch.setattr(command, "LOOK_SECONDS", 0.1)
    try:
        begun = time.monotonic()
        outcome = command.run(["sh", "-c", ENTER, str(cgroup)], timeout=0.5, see_to=freeze)
        assert outcome.code is None
        assert time.monotonic() - begun < 5
        (pid,) = (each.pid for each in command._unreaped)
    finally:
        (cgroup / "freezer.state").write_text("THAWED")
    wait_until(lambda: not is_running(pid), "its end")
    assert command.run(["sh", "-c", "sleep 1000"], timeout=0.1).code is None
    assert not os.path.exists(f"/proc/{pid}")
    wait_until(lambda: not (cgroup / "cgroup.procs").read_text(), "all to end")
    cgroup.rmdir()


HALF_DEAD = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=[60]).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_what_has_lost_its_first_thread() -> None:
    """It is told while others of its threads live, and not once it has ended, reaped or not."""
    with subprocess.Popen([sys.executable, "-c", HALF_DEAD]) as process:
        wait_until(lambda: process.pid in {pid for pid, _ in find_half_dead(os.getpid())}, "its first thread to end")
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process.pid not in {pid for pid, _ in find_half_dead(os.getpid())}
