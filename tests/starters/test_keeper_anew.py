"""A keeper that begins anew: of a process that only has a container's pid and start time it records nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.engine.starters.process.client import KeeperClient, is_about
from limpet.engine.starters.process.keeper.adoption import settle_executed
from limpet.engine.starters.process.keeper.container import Container
from limpet.engine.starters.process.keeper.journal import Journal
from limpet.engine.starters.process.keeper.kernel import read_exit_of_stranger, read_stat
from limpet.engine.starters.process.keeper.messages import Message
from limpet.recovery.host import identify, open_pidfd
from limpet.schema import ProcessIdentity
from tests.conftest import is_running, require_namespaces, wait_until

# One that never read the inode, as before Linux 6.9; the true one; another's: the same pid and start time each time.
UNKNOWN, TRUE, WRONG = 0, 1, 2


@pytest.fixture
def process() -> Iterator["subprocess.Popen[bytes]"]:
    """A process in a session and a UTS namespace of its own, that ends with 7 when it is told to."""
    require_namespaces()
    command = ["sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.02; done"]
    with subprocess.Popen(
        ["unshare", *([] if os.geteuid() == 0 else ["-r"]), "-u", *command], start_new_session=True
    ) as one:
        wait_until(lambda: Path(f"/proc/{one.pid}/comm").read_text() == "sh\n", "the shell")
        yield one
        one.kill()


def begin(
    directory: Path, identity: ProcessIdentity, inode: int, *, executed: bool | None = True, uts: int = 0
) -> KeeperClient:
    """Have a keeper begin whose journal has this process for the container "one"."""
    directory.mkdir(mode=0o700)
    descriptor = os.open(directory, os.O_RDONLY)
    journal = Journal(descriptor, f"{identity.boot_id}/{identity.pid_namespace}")
    known = {"id": "one", "pid": identity.pid, "start": identity.start_ticks, "executed": executed}
    uts = uts or os.stat(f"/proc/{identity.pid}/ns/uts").st_ino
    journal.append({"world": f"{identity.boot_id}/{identity.pid_namespace}"}, known | {"inode": inode, "uts": uts})
    os.close(descriptor)
    client = KeeperClient(str(directory))
    with client.connection(begin=True):
        return client


def ask(client: KeeperClient, op: str, **fields: object) -> Message:
    answer = client.ask({"op": op, "id": "one", **fields})
    assert answer is not None
    return answer


@pytest.mark.parametrize("inode", [UNKNOWN, TRUE, WRONG])
def test_the_end_of_a_stranger_is_not_a_containers(
    tmp_path: Path, process: "subprocess.Popen[bytes]", inode: int
) -> None:
    """Only the one with the inode is signalled, and its code recorded; without proof it is an end that nobody saw."""
    with open_pidfd(process.pid) as pidfd:
        identity = identify(process.pid, pidfd)
    if inode != UNKNOWN and not identity.pidfd_inode:
        pytest.skip("before Linux 6.9")
    number = {UNKNOWN: 0, TRUE: identity.pidfd_inode, WRONG: identity.pidfd_inode + 1}[inode]
    client = begin(tmp_path / "keeper", identity, number)
    first = ask(client, "end")
    assert ("running" in first) is (inode != WRONG)
    assert (first.get("end") or {}).get("unseen", False) is (inode == WRONG)
    # Its session has the container's number, too.
    assert bool(ask(client, "signal", number=signal.SIGCONT)["left"]) is (inode == TRUE)
    ask(client, "release")
    if inode == TRUE:
        assert process.wait(20) == -signal.SIGKILL
    else:
        assert is_running(process.pid)
    client.close()


@pytest.mark.parametrize("inode", [UNKNOWN, TRUE])
def test_a_code_is_recorded_of_the_very_process(tmp_path: Path, process: "subprocess.Popen[bytes]", inode: int) -> None:
    """A code that the kernel still has is the container's if the inode was its own."""
    with open_pidfd(process.pid) as pidfd:
        identity = identify(process.pid, pidfd)
    if inode == TRUE and not identity.pidfd_inode:
        pytest.skip("before Linux 6.9")
    client = begin(tmp_path / "keeper", identity, identity.pidfd_inode * inode)
    os.kill(process.pid, signal.SIGTERM)
    wait_until(lambda: ask(client, "end").get("end"), "its end to be noted")
    end = ask(client, "end")["end"]
    assert (end.get("code"), end.get("unseen", False)) == ((7, False) if inode == TRUE else (None, True))
    client.close()


def test_a_number_that_is_a_threads_by_now_is_an_end_that_nobody_saw(tmp_path: Path) -> None:
    """The kernel has an error of its own for it: it is no reason to ask again and again."""
    script = "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); print(flush=True)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            with open_pidfd(process.pid) as pidfd:
                identity = identify(process.pid, pidfd)
            (thread,) = (int(name) for name in os.listdir(f"/proc/{process.pid}/task") if int(name) != process.pid)
            client = begin(tmp_path / "keeper", replace(identity, pid=thread), UNKNOWN)
            assert ask(client, "end")["end"]["unseen"] is True
            ask(client, "release")
            client.close()
            assert is_running(process.pid)
        finally:
            process.kill()


@pytest.mark.parametrize("inode", [UNKNOWN, TRUE, WRONG])
def test_what_may_be_held_is_not_killed_by_its_number(tmp_path: Path, inode: int) -> None:
    """A forked process that has executed nothing, as a gate has not, and has the container's pid and start time.

    The very one, by its inode, is ended, for its gate is closed: it never ran. Of any other nobody knows.
    """
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        stat = read_stat(child)
        assert stat is not None
        assert not stat.has_executed
        with open_pidfd(child) as pidfd:
            identity = identify(child, pidfd)
        if inode == TRUE and not identity.pidfd_inode:
            pytest.skip("before Linux 6.9")
        number = {UNKNOWN: 0, TRUE: identity.pidfd_inode, WRONG: identity.pidfd_inode + 1}[inode]
        client = begin(tmp_path / "keeper", identity, number if identity.pidfd_inode else 0, executed=None)
        assert ask(client, "end")["executed"] is (inode != TRUE)
        assert is_running(child) is (inode != TRUE)
        client.close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.fixture
def reaped_at_once() -> Iterator[int]:
    """A forked process that has executed nothing; whose child it is reaps it as soon as it has ended."""
    told, tell = os.pipe()
    parent = os.fork()
    if not parent:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        child = os.fork()
        if child:
            os.write(tell, str(child).encode())
        signal.pause()
        os._exit(0)
    os.close(tell)
    child = int(os.read(told, 20))
    os.close(told)
    yield child
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)


def test_what_was_held_never_ran_whoever_reaps_it(tmp_path: Path, reaped_at_once: int) -> None:
    """All keepers before are dead, and its own parent reaps it as it is killed: what it was is not to be seen then."""
    with open_pidfd(reaped_at_once) as pidfd:
        identity = identify(reaped_at_once, pidfd)
    if not identity.pidfd_inode:
        pytest.skip("before Linux 6.9")
    client = begin(tmp_path / "keeper", identity, identity.pidfd_inode, executed=None)
    wait_until(lambda: ask(client, "end").get("end"), "its end to be noted")
    assert ask(client, "end")["executed"] is False
    assert not is_running(reaped_at_once)
    client.close()


@pytest.mark.parametrize("executed", [True, False])
def test_what_was_seen_at_its_gate_never_ran_though_its_end_was_not_seen(tmp_path: Path, executed: bool) -> None:
    """The keeper that ended it there wrote that down, and was killed before it saw the end."""
    with subprocess.Popen(["sleep", "1000"]) as process, open_pidfd(process.pid) as pidfd:
        identity = identify(process.pid, pidfd)
        uts = os.stat(f"/proc/{process.pid}/ns/uts").st_ino
        process.kill()
    client = begin(tmp_path / "keeper", identity, identity.pidfd_inode, executed=executed, uts=uts)
    answer = ask(client, "end")
    assert (answer["executed"], answer["end"]["unseen"]) == (executed, True)
    client.close()


@pytest.mark.parametrize(("ends_by", "is_own"), [("exit 3", True), ("exit 128", False), ("kill -KILL $$", False)])
def test_how_a_process_has_ended_may_tell_that_it_was_at_its_gate_no_more(ends_by: str, is_own: bool) -> None:
    """Once it is reaped nothing else is left; 128, or a signal, may have been its gate's end or its program's."""
    with subprocess.Popen(["sh", "-c", f"read line; {ends_by}"], stdin=subprocess.PIPE) as process:
        pidfd = os.pidfd_open(process.pid)
        process.communicate(b"\n")
    container = Container("one", process.pid, 0, pidfd, None)
    try:
        is_known = is_own and read_exit_of_stranger(process.pid, pidfd) is not None
        assert settle_executed(container) is is_known
        assert container.executed is (True if is_known else None)
    finally:
        if container.pidfd >= 0:
            os.close(pidfd)


def test_a_journal_is_rewritten_once_it_has_grown(tmp_path: Path) -> None:
    """What was acknowledged and forgotten takes no room for ever; a small journal is left as it is."""
    directory = os.open(tmp_path, os.O_RDONLY)
    path = tmp_path / "journal"
    try:
        journal = Journal(directory, "world")
        kept = {"id": "kept", "end": {"code": 3, "signal": False, "time": 1}}
        journal.append(kept, {"id": "gone", "forgotten": True})
        before = path.read_bytes()
        journal.rewrite([kept])
        assert path.read_bytes() == before
        while path.stat().st_size < 2 << 20:
            journal.append(*({"id": f"c{number}", "forgotten": True} for number in range(1000)))
        journal.rewrite([kept])
        assert path.stat().st_size < 1000
        assert Journal(directory, "world").load()["kept"]["end"] == kept["end"]
    finally:
        os.close(directory)


@pytest.mark.parametrize(
    ("answer", "inode", "expected"),
    [
        ({"pid": 7, "start": 8, "inode": 9}, 9, True),
        ({"pid": 7, "start": 8, "inode": 9}, 10, False),
        ({"pid": 7, "start": 8, "inode": 9}, 8, False),
        ({"pid": 7, "start": 8, "inode": 9}, 0, True),
        ({"pid": 7, "start": 8, "inode": 0}, 9, True),
        ({"pid": 7, "start": 8}, 9, True),
        ({"pid": 6, "start": 8, "inode": 9}, 9, False),
        ({"pid": 7, "start": 9, "inode": 9}, 9, False),
        ({"unknown": True}, 9, False),
    ],
)
def test_an_answer_about_another_process_is_none(answer: Message, inode: int, expected: bool) -> None:
    """The inode tells, where both know one; where one of them does not, pid and start time do."""
    identity = ProcessIdentity(pid=7, start_ticks=8, boot_id="boot", pidfd_inode=inode, pid_namespace=1)
    assert is_about(answer, identity) is expected
