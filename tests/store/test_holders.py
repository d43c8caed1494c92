"""Who has a state directory open is named by a pid only where that number means this very process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from limpet.engine import Engine, Store, errors
from limpet.engine.inspection.snapshot import Snapshot
from limpet.engine.state.names import LOCK
from limpet.recovery.host import read_stat
from tests.conftest import EngineProcess, wait_until

pytestmark = pytest.mark.usefixtures("namespaces")

OPEN_IT = """
import sys
from limpet.engine import Engine, errors
try:
    Engine.open(sys.argv[1])
except errors.StateDirectoryLockedError as error:
    print(error.holder_pid, error)
"""
HOLD_IT = """
import os, sys
from limpet.engine import Engine
with Engine.open(sys.argv[1]):
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def elsewhere(script: str, state_dir: str) -> list[str]:
    """Return the command that runs a script as the first process of a pid namespace of its own."""
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    flags = [*as_root, "--pid", "--fork", "--kill-child", "--mount-proc"]
    return ["unshare", *flags, sys.executable, "-c", script, state_dir]


@contextmanager
def held_elsewhere(state_dir: str) -> Iterator[int]:
    """Have an engine in a pid namespace below ours; yield the pid that it has here."""
    command = elsewhere(HOLD_IT, state_dir)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii")
        yield int(children)
        assert process.stdin is not None
        process.stdin.close()  # it ends
        assert process.wait(30) == 0


def test_a_holder_below_has_the_pid_that_it_has_here(state_dir: str) -> None:
    """An engine in a container calls itself process 1, which here is another; the error names it as seen from here."""
    with held_elsewhere(state_dir) as pid:
        with pytest.raises(errors.StateDirectoryLockedError, match=f"by process {pid};") as raised:
            Engine.open(state_dir)
        assert raised.value.holder_pid == pid
        with Snapshot.open(state_dir) as snapshot:
            assert snapshot.holder == pid
        told = subprocess.run(
            [sys.executable, "-m", "limpet", "-s", state_dir, "info", "-o", "json"],
            stdout=subprocess.PIPE,
            check=True,
        )
        assert json.loads(told.stdout)["info"]["engine"]["pid"] == pid


def test_a_holder_beside_us_is_named_by_no_pid(state_dir: str) -> None:
    """Of two containers' engines each is process 1: the second is not told that it has the directory open itself."""
    with held_elsewhere(state_dir):
        told = subprocess.run(elsewhere(OPEN_IT, state_dir), stdout=subprocess.PIPE, text=True, check=True).stdout
    assert told.startswith("None "), told
    assert "in use by a process of another pid namespace (as a container has) or host;" in told
    assert "process 1" not in told
    assert "this process" not in told


def test_a_holder_above_us_is_named_by_no_pid(state_dir: str) -> None:
    """Seen from a container, the number of the host's engine is nobody's or a stranger's."""
    with Engine.open(state_dir):
        told = subprocess.run(elsewhere(OPEN_IT, state_dir), stdout=subprocess.PIPE, text=True, check=True).stdout
    assert told.startswith("None "), told
    assert str(os.getpid()) not in told.replace(state_dir, "")
    assert "another pid namespace" in told


def test_check_says_that_an_engine_elsewhere_cannot_be_seen(state_dir: str) -> None:
    """`limpet check` in a container does not say of a directory that the host's engine has open that none uses it."""
    check = "import sys\nfrom limpet.engine.inspection.check import check_state\nprint(*check_state(sys.argv[1]).notes)"
    command = elsewhere(check, state_dir)
    with Engine.open(state_dir):
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        assert "an engine of another pid namespace or host may be using it" in told
    assert "no engine is using it" in subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_where_proc_is_another_namespaces_no_pid_is_taken_from_it(state_dir: str) -> None:
    """In a pid namespace whose /proc is still the host's, the numbers there are not ours."""
    command = [word for word in elsewhere(OPEN_IT, state_dir) if word != "--mount-proc"]
    with Engine.open(state_dir):
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert told.startswith("None "), told
    assert "another pid namespace" in told


def test_no_process_of_another_namespaces_proc_is_taken_for_a_holder(state_dir: str) -> None:
    """Where /proc is the host's, a pid from there is another process here: none is yielded that would be signalled."""
    look = """
import os, signal, sys
from limpet.engine.state.holders import find_stopped
with open("/proc/sys/kernel/ns_last_pid", "w") as last:  # of our pid namespace, whatever /proc shows
    last.write(str(int(sys.argv[2]) - 1))
stranger = os.fork()
if not stranger:
    signal.pause()
found = [pid for pid, _ in find_stopped(os.open(sys.argv[1], os.O_PATH), with_lock=True)]
os.kill(stranger, signal.SIGKILL)
print(stranger, found)
"""
    process = EngineProcess(state_dir, "engine = Engine.open(state_dir); say('open'); time.sleep(999)")
    try:
        process.read()
        os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: read_stat(process.pid)[0] == b"T", "the stop")
        command = [word for word in elsewhere(look, os.path.join(state_dir, LOCK)) if word != "--mount-proc"]
        told = subprocess.run([*command, str(process.pid)], stdout=subprocess.PIPE, text=True, check=True).stdout
        assert told == f"{process.pid} []\n"
    finally:
        process.kill()


@pytest.mark.parametrize("note", ['{"pid": 1}', '{"pid": 0}', '{"pid": 123456789012345678901}', "[]", '{"pid": "1"}'])
def test_a_note_without_a_place_names_nobody_who_is_not_seen_to_hold_the_lock(state_dir: str, note: str) -> None:
    """What an older limpet or a damaged file names may be anybody: only who is seen to hold the lock is named."""
    with Store.open(state_dir):
        Path(state_dir, LOCK).write_text(note, encoding="ascii")
        with pytest.raises(errors.StateDirectoryLockedError, match="in use by another process;") as raised:
            Store.open(state_dir)
    assert raised.value.holder_pid is None


def test_a_note_of_an_older_limpet_names_who_is_seen(state_dir: str) -> None:
    """An engine of an older limpet notes its pid alone, and is named where it is seen to hold the lock."""
    process = EngineProcess(state_dir, "engine = Engine.open(state_dir); say('open'); time.sleep(999)")
    try:
        process.read()
        Path(state_dir, LOCK).write_text(json.dumps({"pid": process.pid}), encoding="ascii")
        with pytest.raises(errors.StateDirectoryLockedError, match=f"in use by process {process.pid};"):
            Store.open(state_dir)
    finally:
        process.kill()
