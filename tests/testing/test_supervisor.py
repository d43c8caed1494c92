"""Supervision: a life may have threads, children, signals and bad habits, and nothing is missed or left."""

import ctypes
import errno
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from limpet.schema.errors import UnsupportedError
from limpet.testing import (
    BlindSpotError,
    HungError,
    Images,
    Model,
    Violation,
    kill_points,
    power_cuts,
    record,
    supervisor,
    supported,
    syscalls,
    true_kills,
)
from limpet.testing.calls import ANY_CALL
from limpet.testing.operations import Chmod, Create, MakeDirectory, Write
from limpet.testing.process import start
from tests.workloads import Acknowledge, JSONFiles, SQLiteCheckpoints, require

libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def directory(tmp_path: Path) -> str:
    (tmp_path / "live").mkdir()
    return str(tmp_path / "live")


def test_threads_are_seen_in_one_order(directory: str) -> None:
    """Four threads that append to one file: the trace has every write once, at the offset where it landed."""

    def live(place: str, acknowledge: Acknowledge) -> None:
        file = os.open(f"{place}/log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

        def append(name: bytes) -> None:
            for _ in range(50):
                os.write(file, name * 8)
                acknowledge(name)

        threads = [threading.Thread(target=append, args=(name,)) for name in (b"a", b"b", b"c", b"d")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    trace = record(live, directory)
    rebuilt = b"".join(op.data for op in trace.operations if isinstance(op, Write))
    assert rebuilt == Path(directory, "log").read_bytes()
    assert [op.offset for op in trace.operations if isinstance(op, Write)] == list(range(0, 1600, 8))
    assert sorted(trace.acknowledged) == [b"a"] * 50 + [b"b"] * 50 + [b"c"] * 50 + [b"d"] * 50


def test_descendants_are_seen_and_ended(directory: str) -> None:
    """A program that the life starts is recorded, and one that detached itself does not outlive the life."""

    def live(place: str, acknowledge: Acknowledge) -> None:
        subprocess.run(
            ["/bin/sh", "-c", f"cd {place} && echo hello > greeting && mkdir d && mv greeting d"], check=True
        )
        detached = (
            "import os, time; os.fork() and os._exit(0); os.setsid(); print(os.getpid(), flush=True); time.sleep(600)"
        )
        with subprocess.Popen([sys.executable, "-c", detached], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            acknowledge(process.stdout.readline())
            process.stdout.close()

    trace = record(live, directory)
    assert Path(directory, "d", "greeting").read_bytes() == b"hello\n"
    assert [op.name for op in trace.operations if isinstance(op, Create)] == ["greeting"]
    assert not Path(f"/proc/{int(trace.acknowledged[0])}").exists()


def test_signals_interrupt_nothing(directory: str) -> None:
    """Under a hail of signals every write is done once."""

    def live(place: str, acknowledge: Acknowledge) -> None:
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
        file = os.open(f"{place}/log", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        for number in range(400):
            os.write(file, b"%04d" % number)
            acknowledge(b"%04d" % number)

    trace = record(live, directory)
    counted = [b"%04d" % number for number in range(400)]
    assert list(trace.acknowledged) == counted
    assert Path(directory, "log").read_bytes() == b"".join(counted)
    assert [op.data for op in trace.operations if isinstance(op, Write)] == counted


def test_a_life_that_hangs_is_killed(directory: str) -> None:
    """A life that does not end is killed at its deadline, asleep or busy, and said to have hung."""
    started = time.monotonic()
    with pytest.raises(HungError, match=r"0\.2 s"):
        record(lambda *_: time.sleep(600), directory, deadline_seconds=0.2)

    def busy(place: str, acknowledge: Acknowledge) -> None:
        while True:
            acknowledge(b"")

    with pytest.raises(HungError):
        record(busy, directory, deadline_seconds=0.2)
    assert time.monotonic() - started < 20


class BadCheck(JSONFiles):
    """Its check misbehaves once something was acknowledged."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__(count=3)
        self.act = act

    def check(self, directory: str, acknowledged: object) -> None:
        if acknowledged:
            self.act()


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: time.sleep(600), "no progress for 0.5 s"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "status -9"),
        (lambda: os._exit(3), "status 3"),
    ],
    ids=["hangs", "is killed", "exits"],
)
def test_a_check_that_does_not_end_is_a_finding(act: Callable[[], object], says: str) -> None:
    """A check that hangs or takes its process down is reported with its point, and the other points are tried."""
    report = kill_points(BadCheck(act), deadline_seconds=0.5)
    assert report.points > 8
    assert 2 < report.other < report.points
    assert all(says in finding.message and finding.point.startswith("snapshot:") for finding in report.findings)


@pytest.mark.parametrize("act", [lambda: sys.exit("it is gone"), lambda: pytest.fail("it is gone")])
def test_a_check_may_say_so_as_a_program_or_a_test_does(act: Callable[[], object]) -> None:
    """What ends a program or a test is the check's finding, in its words, and ends nothing else."""
    report = kill_points(BadCheck(act))
    assert 2 < report.other < report.points
    assert all(finding.message.endswith("it is gone") for finding in report.findings)


class LosesAndDies(JSONFiles):
    """Its check finds all lost, and once everything was acknowledged it takes its process with it."""

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        if len(acknowledged) == self.count:
            os._exit(3)
        if acknowledged:
            raise Violation("lost", "all of it")


def test_what_was_found_before_a_check_died_is_kept() -> None:
    """A check that ends its process takes no finding and no count of those before it with it."""
    report = power_cuts(LosesAndDies(count=2))
    assert report.lost > 5
    assert report.images > report.lost
    assert "status 3" in report.findings[-1].message


def test_a_kind_that_is_none_is_no_pass() -> None:
    """A violation whose kind a report could not count is one all the same, and says which kinds there are."""
    report = kill_points(BadCheck(lambda: require(False, "corrupt", "all is gone")))
    assert report.other > 2
    assert "unknown kind of violation 'corrupt'" in report.findings[0].message


def test_a_check_may_leave_threads_and_processes() -> None:
    """What a check leaves running neither disturbs the next point, by kill or copy, nor outlives the test."""
    marker = f"600.{os.getpid()}"

    def running() -> list[Path]:
        return [pid for pid in Path("/proc").glob("[0-9]*") if marker.encode() in _command(pid)]

    def leave_process() -> None:
        assert not running()
        subprocess.Popen(["sleep", marker], start_new_session=True)

    def leave_thread() -> None:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()

    for leave in (leave_process, leave_thread):
        for report in (kill_points(BadCheck(leave)), true_kills(BadCheck(leave), every=3)):
            assert report.clean, report.findings
            assert not running()


def _command(pid: Path) -> bytes:
    try:
        return (pid / "cmdline").read_bytes()
    except OSError:
        return b""


def _fill(place: str) -> int:
    file = os.open(f"{place}/file", os.O_CREAT | os.O_RDWR)
    os.write(file, bytes(8192))
    return file


def _map_writable(place: str) -> None:
    mmap.mmap(_fill(place), 8192)


def _protect_writable(place: str) -> None:
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, 8192, mmap.PROT_READ, mmap.MAP_SHARED, _fill(place), ctypes.c_long(0))
    libc.mprotect(ctypes.c_void_p(address), 8192, mmap.PROT_READ | mmap.PROT_WRITE)


def _send_file(place: str) -> None:
    with open(__file__, "rb") as source:
        os.sendfile(_fill(place), source.fileno(), 0, 10)


def _rename_into(place: str) -> None:
    Path(f"{place}.new").touch()
    os.rename(f"{place}.new", f"{place}/new")


BLIND_SPOTS: dict[str, Callable[[str], object]] = {
    "mmap": _map_writable,
    "mprotect": _protect_writable,
    "sendfile": _send_file,
    "copy_file_range": lambda place: os.copy_file_range(os.open(__file__, os.O_RDONLY), _fill(place), 10),
    "splice": lambda place: os.splice(os.pipe()[0], _fill(place), 10, flags=os.SPLICE_F_NONBLOCK),
    "fallocate": lambda place: libc.fallocate(_fill(place), 3, ctypes.c_long(0), ctypes.c_long(4096)),  # punch a hole
    "openat": lambda place: os.open(place, os.O_TMPFILE | os.O_WRONLY),
    "write": lambda place: os.write(os.open(f"{place}/f", os.O_CREAT | os.O_WRONLY | os.O_SYNC), b"x"),
    "pwrite64": lambda place: os.pwrite(
        os.open(f"{place}/f", os.O_CREAT | os.O_WRONLY | os.O_DIRECT), mmap.mmap(-1, 4096), 0
    ),
    "setxattr": lambda place: os.setxattr(place, "user.x", b"x"),
    "rename": _rename_into,
    "pwritev2": lambda place: os.pwritev(_fill(place), [b"x"], 0, os.RWF_DSYNC),
    "io_uring_setup": lambda place: libc.syscall(425, 1, 0),
    "linkat": lambda place: os.link(__file__, f"{place}/link"),
}


@pytest.mark.parametrize("call", BLIND_SPOTS)
def test_what_is_not_modelled_ends_the_test(call: str, directory: str) -> None:
    """A change that the model cannot follow stops the test and is named; nothing is missed in silence."""
    with pytest.raises(BlindSpotError, match=rf"^{call}|^link "):
        record(lambda place, _: BLIND_SPOTS[call](place), directory)  # type: ignore[arg-type]


def test_the_same_calls_elsewhere_are_let_go(directory: str, tmp_path: Path) -> None:
    """What the life does outside of its directory is none of our business, whatever it is."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def live(_place: str, acknowledge: Acknowledge) -> None:
        for call in set(BLIND_SPOTS) - {"io_uring_setup", "setxattr", "linkat"}:
            with tempfile.TemporaryDirectory(dir=elsewhere) as place:
                try:
                    BLIND_SPOTS[call](place)
                except OSError as error:
                    acknowledge(f"{call}: {error}".encode())

    trace = record(live, directory)
    fail_anyway = (b"splice", b"copy_file_range")  # the pipe is empty; the source may be on another device
    assert all(text.startswith(fail_anyway) for text in trace.acknowledged)
    assert len(trace.operations) == len(trace.acknowledged)


def test_shared_memory_of_sqlite_is_volatile(directory: str) -> None:
    """SQLite may map and write its -shm at will: no blind spot, and it comes back absent, zeroed and as garbage."""
    trace = record(SQLiteCheckpoints(count=1).live, directory)
    contents = [
        {file.path: file.content for file in image}.get("s.db-shm")
        for seed in range(12)
        for _, image in Images(trace, Model.JOURNALED, seed=seed).at(len(trace.operations) - 8)
    ]
    assert {None, bytes(32_768)} < set(contents)


def test_an_unknown_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no table of system calls fits, supported() says so, and the tests refuse instead of passing."""
    monkeypatch.setattr(syscalls, "machine", lambda: "riscv64")
    assert "riscv64" in (supported.__wrapped__() or "")
    with pytest.raises(UnsupportedError, match="riscv64"):
        power_cuts(JSONFiles())


def test_a_system_without_user_notification_is_said(directory: str) -> None:
    """Within a life itself, where the kernel grants no second listener, supported() gives the kernel's reason."""
    trace = record(lambda _, acknowledge: acknowledge(str(supported.__wrapped__()).encode()), directory)
    assert b"seccomp user notification" in trace.acknowledged[0]


def test_a_refusal_is_told_also_by_a_process_that_is_gone(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its supervisor may be slow to look: the kernel's reason is what it has said, not that it is gone."""

    def refuse(_: object) -> int:
        raise OSError(errno.EBUSY, "seccomp user notification: busy")

    def open_late(pid: int) -> int:
        end = time.monotonic() + 0.5  # the one that stays is the supervised process's parent
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
            time.sleep(0.01)
        return pidfd_open(pid)

    pidfd_open = os.pidfd_open
    monkeypatch.setattr(supervisor, "_install", refuse)
    monkeypatch.setattr(os, "pidfd_open", open_late)
    with pytest.raises(UnsupportedError, match="seccomp user notification: busy"):
        record(JSONFiles().live, directory)


def test_a_process_with_threads_is_refused(directory: str) -> None:
    """Forking beside other threads is refused with the way out, for it would deadlock now and then."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pytest.raises(UnsupportedError, match="one thread, and this one has 2"):
            record(JSONFiles().live, directory)
    finally:
        done.set()
        thread.join()


@pytest.mark.skipif(os.geteuid() != 0, reason="every other test shows it where the tests do not run as root")
def test_an_ordinary_user_can_do_it() -> None:
    """Neither root nor a capability is needed."""

    def run(report: socket.socket) -> None:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as for any process that did not begin as root
        assert supported.__wrapped__() is None, supported.__wrapped__()
        assert kill_points(SQLiteCheckpoints(count=2)).clean
        assert power_cuts(JSONFiles()).lost
        report.send(b"done")

    with start(run) as process:
        assert process.wait(60) == 0, process.report.recv(65_536)
        assert process.report.recv(10) == b"done"


HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("stops", [syscalls.FILE_CHANGES, ANY_CALL], ids=["file changes", "any call"])
@pytest.mark.parametrize("architecture", HEADERS)
def test_numbers_are_the_kernels(architecture: str, stops: syscalls.Stops) -> None:
    """Every number in the tables is the one that the kernel's own header gives."""
    if not HEADERS[architecture].exists():
        pytest.skip("the kernel's headers are not installed")
    known: dict[str, int] = {}
    for line in HEADERS[architecture].read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "#define" and words[1].startswith("__NR") and words[2].isdigit():
            known[words[1].removeprefix("__NR3264_").removeprefix("__NR_")] = int(words[2])
    known.setdefault("newfstatat", known.get("fstatat", -1))  # its name on architectures that have no older one
    newer = {"fchmodat2"} - known.keys()  # than some headers
    ours = {name: number for name, number in stops.numbers(architecture).items() if name not in newer}
    assert ours == {name: known[name] for name in ours}
    assert known["seccomp"] == syscalls.SECCOMP_NUMBERS[architecture]
    assert known["renameat2"] == syscalls.RENAMEAT2_NUMBERS[architecture]


def test_sockets_and_pipes_pass(directory: str) -> None:
    """What a life writes to pipes and sockets is let go, untouched."""

    def live(_place: str, acknowledge: Acknowledge) -> None:
        reading, writing = os.pipe()
        left, right = socket.socketpair()
        os.write(writing, b"pipe")
        os.writev(left.fileno(), [b"sock", b"et"])
        acknowledge(os.read(reading, 10) + right.recv(10))

    assert record(live, directory).acknowledged == (b"pipesocket",)


def test_what_the_kernel_refuses_it_refuses_here(directory: str) -> None:
    """A negative offset or size is the life's mistake, and it hears of it as it would alone."""

    def live(place: str, acknowledge: Acknowledge) -> None:
        file = os.open(f"{place}/file", os.O_CREAT | os.O_WRONLY)
        for call in (lambda: os.pwrite(file, b"x", -1), lambda: os.ftruncate(file, -1)):
            with pytest.raises(OSError, match="Invalid argument"):
                call()
        acknowledge(b"refused")

    assert record(live, directory).acknowledged == (b"refused",)


def test_sockets_may_be_renamed(directory: str) -> None:
    """A socket is bound and moved to its name, as daemons do; it is nobody's state."""

    def live(place: str, acknowledge: Acknowledge) -> None:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"{place}/s.tmp")
            os.rename(f"{place}/s.tmp", f"{place}/s.sock")
        acknowledge(b",".join(map(os.fsencode, os.listdir(place))))

    assert record(live, directory).acknowledged == (b"s.sock",)


def test_paths_through_ones_own_descriptors_are_seen(directory: str) -> None:
    """/proc/self and /dev/fd are the life's own, not the supervisor's."""

    def live(place: str, acknowledge: Acknowledge) -> None:
        number = os.open(place, os.O_RDONLY)
        os.mkdir(f"/proc/self/fd/{number}/sub")
        with open(f"/dev/fd/{number}/sub/file", "wb", buffering=0) as file:
            file.write(b"x")
            os.chmod(f"/proc/thread-self/fd/{file.fileno()}", 0o600)

    kinds = [type(operation) for operation in record(live, directory).operations]
    assert kinds == [MakeDirectory, Create, Write, Chmod]


def test_any_number_of_processes_and_failures(directory: str) -> None:
    """Neither short processes nor renames that fail use up the supervisor's descriptors."""

    def live(place: str, _: Acknowledge) -> None:
        for number in range(150):
            if os.fork() == 0:
                with open(f"{place}/{number}", "wb", buffering=0) as file:
                    file.write(b"x")
                os._exit(0)
            os.wait()
            with pytest.raises(FileNotFoundError):
                os.rename(f"{place}/{number}", f"{place}/missing/{number}")

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, before[1]))
    try:
        trace = record(live, directory)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert sum(isinstance(operation, Write) for operation in trace.operations) == 150
