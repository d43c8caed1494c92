"""Calls that are refused: each once, by name, in the process that is meant, with nothing else disturbed."""

import errno
import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import pytest

from limpet.schema.errors import InvalidInputError
from limpet.testing import (
    LifeFailedError,
    NothingToTestError,
    NotReachedError,
    Report,
    Violation,
    call_faults,
    open_descriptors,
    replay,
)
from tests.workloads import Acknowledge


class Life:
    """A life that acknowledges the error that it met, "" for none; the check compares."""

    expected: Sequence[str] = ()

    def live(self, directory: str, acknowledge: Acknowledge) -> None:
        try:
            self.act(directory)
        except OSError as error:
            acknowledge(errno.errorcode[error.errno or 0].encode())
        else:
            acknowledge(b"")

    def act(self, directory: str) -> None:
        raise NotImplementedError

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        if [each.decode() for each in acknowledged] not in ([each] for each in self.expected):
            raise Violation("other", f"acknowledged {acknowledged}")


def names(report: Report) -> set[str]:
    return {finding.point for finding in report.findings}


class Many(Life):
    """One call of each of many kinds that change no file."""

    expected = ("", "EMFILE", "ENFILE", "ENOMEM", "EAGAIN", "EIO", "ENOBUFS", "EPIPE", "ECONNREFUSED", "ETOOMANYREFS")

    def act(self, directory: str) -> None:
        with open("/proc/self/stat", "rb", 0) as file:
            assert file.read()
        left, right = socket.socketpair()
        with left, right:
            socket.send_fds(left, [b"x"], [left.fileno()])
            with suppress(InterruptedError):
                _, (given,), _, _ = socket.recv_fds(right, 1, 1)
                os.close(given)
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.close(os.pidfd_open(pid))
        os.waitid(os.P_PID, pid, os.WEXITED)


def test_each_call_is_refused_once_with_each_error() -> None:
    """What changes no file is stopped and refused as well, without a deadlock where the filter is put in place."""
    calls = ("socketpair", "sendmsg", "recvmsg", "clone", "clone3", "pidfd_open", "openat", "read", "waitid")
    report = call_faults(Many(), failures={call: ["EMFILE", "ENOMEM"] for call in calls})
    assert report.faults >= 2 * 7
    assert report.unreached == 0
    assert report.violations == 0, report.findings


def test_what_a_life_does_not_handle_is_found_by_name(tmp_path: str) -> None:
    """A life that ends by an exception is a finding, and its name repeats it."""

    class Careless(Life):
        def live(self, directory: str, acknowledge: Acknowledge) -> None:
            os.close(os.eventfd(0))
            os.close(os.eventfd(0))

        def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
            pass

    report = call_faults(Careless(), failures={"eventfd2": ["EMFILE"]})
    assert names(report) == {"call:life/eventfd2:0:EMFILE", "call:life/eventfd2:1:EMFILE"}
    again = replay(Careless(), "call:life/eventfd2:1:EMFILE", f"{tmp_path}/again")
    assert names(again) == {"call:life/eventfd2:1:EMFILE"}
    assert os.listdir(f"{tmp_path}/again/found") == []
    with pytest.raises(NotReachedError):
        replay(Careless(), "call:life/eventfd2:2:EMFILE", f"{tmp_path}/again")


def test_a_close_is_done_and_then_reported_as_failed() -> None:
    """The other end sees it, and the descriptor counts as closed."""

    class Closing(Life):
        expected = ("EIO",)

        def act(self, directory: str) -> None:
            before = open_descriptors()
            read, write = os.pipe()
            try:
                os.close(write)
            finally:
                assert os.read(read, 1) == b""
                with suppress(OSError):
                    os.close(read)
                left = {number: target for number, target in open_descriptors().items() if number not in before}
                assert not left, left

    class Trial(Closing):
        def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
            if acknowledged != [b""]:
                super().check(directory, acknowledged)

    report = call_faults(Trial(), failures={"close": ["EIO"]})
    assert report.faults >= 2
    assert report.violations == 0, report.findings


def test_memory_runs_out() -> None:
    """Memory that is not mapped, and a break that does not move."""

    class Growing(Life):
        expected = ("", "ENOMEM")

        def act(self, directory: str) -> None:
            mmap.mmap(-1, 1 << 20).close()
            with suppress(MemoryError):
                kept = [bytes(100_000) for _ in range(20)]
                assert kept

    report = call_faults(Growing(), failures={"mmap": ["ENOMEM"], "brk": ["ENOMEM"]})
    assert report.faults
    assert report.violations == 0, report.findings


def test_no_thread_can_be_started() -> None:
    """A thread is refused as a process is."""

    class Threaded(Life):
        expected = ("",)

        def act(self, directory: str) -> None:
            try:
                thread = threading.Thread(target=time.sleep, args=(0,))
                thread.start()
                thread.join()
            except RuntimeError:
                raise OSError(errno.EAGAIN, "no thread") from None

        def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
            assert acknowledged in ([b""], [b"EAGAIN"])
            if acknowledged == [b"EAGAIN"]:
                raise Violation("lost", "seen")

    report = call_faults(Threaded(), failures={"clone3": ["EAGAIN"], "clone": ["EAGAIN"]})
    assert report.lost == 1


class Family(Life):
    """A child names itself, and is refused something; it lives on until the check ends it."""

    expected = ("ok",)

    def live(self, directory: str, acknowledge: Acknowledge) -> None:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                with open("/proc/self/comm", "w", encoding="ascii") as file:
                    file.write("helper")
                said = b"ok"
                try:
                    os.close(os.eventfd(0))
                except OSError:
                    said = b"refused"
                os.write(write, said)
                while not os.path.exists(f"{directory}/end"):
                    time.sleep(0.005)
                with open(f"{directory}/ended", "x", encoding="ascii"):
                    pass
            finally:
                os._exit(0)
        os.close(write)
        acknowledge(os.read(read, 10))

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        with open(f"{directory}/end", "x", encoding="ascii"):
            pass
        deadline = time.monotonic() + 20
        while not os.path.exists(f"{directory}/ended"):
            if acknowledged == [b""]:
                raise Violation("other", "killed")
            if time.monotonic() > deadline:
                raise Violation("other", "what was left behind does not go on")
            time.sleep(0.005)
        super().check(directory, acknowledged)


def test_a_process_has_its_role_and_goes_on_while_the_check_runs() -> None:
    """Only processes that have a role are refused anything, and their calls are answered until the check ends."""
    report = call_faults(Family(), roles={"helper": "aide"}, failures={"eventfd2": ["EMFILE"]})
    assert names(report) == {"call:aide/eventfd2:0:EMFILE"}
    assert "refused" in report.findings[0].message
    with pytest.raises(NothingToTestError):
        call_faults(Family(), roles={}, failures={"eventfd2": ["EMFILE"]})


def test_a_process_is_killed_at_a_call() -> None:
    """With KILL the process that makes the call ends there."""
    report = call_faults(Family(), roles={"helper": "aide"}, failures={"eventfd2": ["KILL"]})
    assert [finding.message for finding in report.findings] == ["killed"]


@pytest.mark.parametrize(("having", "faults", "unreached"), [({1, 2}, 0, 1), ({1, 2, 4}, 1, 0)])
def test_a_call_that_is_not_reached_is_counted_apart(having: set[int], faults: int, unreached: int) -> None:
    """A life that has fewer calls than the one before says nothing of those it has not; it is lived again."""

    class Shrinking(Life):
        expected = ("", "EMFILE")

        def __init__(self, place: str) -> None:
            self.place = place

        def act(self, directory: str) -> None:
            with open(self.place, "a+", encoding="ascii") as lives:
                lives.write("x")
                lives.seek(0)
                if len(lives.read()) in having:  # the first two are counted
                    os.close(os.eventfd(0))

    place = f"/tmp/limpet-shrinking-{os.getpid()}"
    try:
        report = call_faults(Shrinking(place), failures={"eventfd2": ["EMFILE"]})
    finally:
        os.unlink(place)
    assert (report.faults, report.unreached, report.violations) == (faults, unreached, 0)
    assert report.clean is not bool(unreached)


def test_a_life_that_hangs_is_a_finding() -> None:
    """Also where the refusal has made it wait for something that does not come."""

    class Waiting(Life):
        def act(self, directory: str) -> None:
            try:
                os.close(os.eventfd(0))
            except OSError:
                time.sleep(60)

    Waiting.expected = ("",)
    report = call_faults(Waiting(), failures={"eventfd2": ["EMFILE"]}, deadline_seconds=1.0)
    assert "hangs" in report.findings[0].message


def test_a_workload_that_fails_alone_is_no_finding() -> None:
    """What fails without a fault ends the test."""

    class Broken(Life):
        def live(self, directory: str, acknowledge: Acknowledge) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(LifeFailedError):
        call_faults(Broken())


@pytest.mark.parametrize("failures", [{"exit": ["EIO"]}, {"read": ["NONE"]}])
def test_failures_that_are_none_are_refused(failures: dict[str, list[str]]) -> None:
    """Calls that never fail, and errors that there are none of."""
    with pytest.raises(InvalidInputError):
        call_faults(Family(), failures=failures)


@pytest.mark.parametrize("name", ["call:life/read", "call:life/exit:0:EIO", "call:life/read:x:EIO"])
def test_a_name_that_is_none_is_refused(name: str, tmp_path: str) -> None:
    """A point is repeated by its name only."""
    with pytest.raises(InvalidInputError):
        replay(Family(), name, f"{tmp_path}/again")
