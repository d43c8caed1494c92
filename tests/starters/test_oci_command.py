"""What is said of a program that was run, and what is kept of its output: with real ones, and with lines of theirs."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from limpet.engine.starters.oci import command
from limpet.engine.starters.oci.child import Child
from limpet.engine.starters.oci.command import Outcome, reap, run, shorten
from tests.conftest import wait_until
from tests.starters.oci import is_over

OF_NSEXEC = r"""
time="x" level=fatal msg="nsexec-1[12]: failed to set \"x\": No such thing"
time="x" level=fatal msg="nsexec-0[11]: failed to sync with stage-1: next state: Success"
time="x" level=error msg="runc create failed: can't get final child's PID from pipe: EOF"
"""
"""What runc writes where it has not yet come to be a program in Go."""


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("", ""),
        ("\n \n", ""),
        ("plain\n", "plain"),
        ("first\nlast\n\n", "last"),
        (
            'time="2026-01-01T00:00:00Z" level=error msg="runc create failed: \\"x\\" is none"\n',
            'runc create failed: "x" is none',
        ),
        ('level=warning msg="early"\nlevel=error msg="late"', "late"),
        ("\x1b[31mERRO[0000] \x1b[0mno such thing\n", "no such thing"),
        ("2026-01-01T00:00:00.123456Z: no such file\n", "no such file"),
        ("2026-01-01T00:00:00.1Z: ERRO[0012] both\n", "both"),
        ("cannot parse it: bad token\n          {'a': 1}\n   (right here) ---^\n", "cannot parse it: bad token"),
        ("   only indented\n", "only indented"),
        ("starting\nfatal error: out of memory\ngoroutine 1 [running]:\nmain()\n", "fatal error: out of memory"),
        ("panic: gone\n\ngoroutine 1:\n", "panic: gone"),
        ("runtime: cannot map pages\nstack\n", "runtime: cannot map pages"),
        ("runtime/cgo: pthread_create failed\nx\n", "runtime/cgo: pthread_create failed"),
        (OF_NSEXEC, 'failed to set "x": No such thing'),
        ("y" * 600, "y" * 500),
        ("no \x07bell, \x1b]0;title\x9c, tab\tor \u202eback\n", r"no \x07bell, \x1b]0;title\x9c, tab\tor \u202eback"),
    ],
)
def test_the_line_that_says_what_is_wrong(said: str, line: str) -> None:
    """The last, without time and level; of a crash the first, and of a document the one above what it shows.

    What a terminal would take for an order is escaped.
    """
    assert shorten(said) == line


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("unable to join session keyring: unable to create session key: disk quota exceeded", "kernel/keys/"),
        ("create keyring `x`: Disk quota exceeded", "kernel/keys/"),
        ("unshare: No space left on device", "/proc/sys/user/max_"),
        ("failed to unshare remaining namespaces (except cgroupns): No space left on device", "/proc/sys/user/max_"),
        ("unable to spawn stage-1: Resource temporarily unavailable", "pids.max"),
        ("runtime/cgo: pthread_create failed: Resource temporarily unavailable", "pids.max"),
        ("fork/exec /proc/self/exe: resource temporarily unavailable", "pids.max"),
        ("runtime: failed to create new OS thread (have 5 already; errno=11)", "pids.max"),
        ("read /state/x: resource temporarily unavailable", ""),
        ("write /state/x: no space left on device", ""),
        ("write /state/key: disk quota exceeded!", ""),
    ],
)
def test_what_has_run_out_is_named(said: str, names: str) -> None:
    """Where the kernel says so in words that mean a disk; a disk is a disk."""
    found = shorten(said)
    assert found.startswith(said)
    assert (names in found) if names else found == said


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        (Outcome(1, b"out", b"why\n"), "why"),
        (Outcome(3, b"out", b""), "it ended with 3 and said nothing"),
        (Outcome(-9, b"", b""), "it ended with -9 and said nothing"),
        (Outcome(None, b"", b""), "it did not end in time and was killed"),
        (Outcome(None, b"", b"why"), "it did not end in time and was killed (why)"),
        (Outcome(1, b"", b"\xff"), "\ufffd"),
    ],
)
def test_what_went_wrong(outcome: Outcome, problem: str) -> None:
    """In its own words, if it has any."""
    assert outcome.problem == problem


def test_what_a_program_gets_and_gives(tmp_path: Path) -> None:
    """Its input, its directory, its environment, a session of its own; its output, each stream apart, and its code."""
    script = "cat; pwd; echo $A >&2; umask; exit 7"
    outcome = run(
        ["/bin/sh", "-c", script], timeout=20, given=b"in ", directory=str(tmp_path), environment={"A": "given"}
    )
    assert outcome == Outcome(7, f"in {tmp_path}\n0022\n".encode(), b"given\n", False)
    assert run(["/bin/sh", "-c", "cat; kill -TERM $$"], timeout=20) == Outcome(-signal.SIGTERM, b"", b"")
    ours = run(["/bin/sh", "-c", "ps -o sid= -p $$; echo $$; echo $PATH; env | grep -c ''"], timeout=20)
    session, pid, path, count = ours.output.split()
    assert session == pid
    assert path.endswith(b":/usr/sbin:/sbin")
    assert int(count) < 6
    with pytest.raises(FileNotFoundError):
        run([str(tmp_path / "none")], timeout=1)


def test_no_more_output_is_kept_than_was_asked_for() -> None:
    """The rest is read all the same, so that nothing waits; and it is told."""
    script = "head -c 300000 /dev/zero; head -c 300000 /dev/zero >&2; exit 4"
    outcome = run(["/bin/sh", "-c", script], timeout=20, most_bytes=1000)
    assert (outcome.code, len(outcome.output), len(outcome.error), outcome.is_cut) == (4, 1000, 1000, True)
    exact = run(["/bin/sh", "-c", "head -c 1000 /dev/zero"], timeout=20, most_bytes=1000)
    assert (len(exact.output), exact.is_cut) == (1000, False)


def test_much_input_is_written_as_it_is_read() -> None:
    """By a pipe, once who is told of the pid has returned; what is not read does not matter."""
    told: list[int] = []
    given = b"x" * 300_000
    outcome = run(["/bin/sh", "-c", "echo $$; wc -c"], timeout=20, given=given, begin=told.append)
    assert outcome.output.split() == [str(told[0]).encode(), b"300000"]
    assert run(["/bin/true"], timeout=20, given=given, begin=told.append).code == 0
    with pytest.raises(ZeroDivisionError):
        run(["/bin/sleep", "1000"], timeout=20, given=b"x", begin=lambda pid: told.append(pid // 0))


def test_one_that_does_not_end_is_killed_with_what_it_has_started(tmp_path: Path) -> None:
    """At the deadline; what it has said is told."""
    script = (
        f"echo begun >&2; sleep 1000 & echo $! > {tmp_path}/pid; setsid sleep 1000 & echo $! > {tmp_path}/far; wait"
    )
    began = time.monotonic()
    outcome = run(["/bin/sh", "-c", script], timeout=1)
    assert outcome == Outcome(None, b"", b"begun\n")
    assert time.monotonic() - began >= 1
    pids = [int((tmp_path / name).read_text()) for name in ("pid", "far")]
    wait_until(lambda: all(map(is_over, pids)), "what it has started to end")


def test_output_that_somebody_else_holds_open_is_not_waited_for(tmp_path: Path) -> None:
    """Once it has ended, what is there is read, and no more."""
    script = (
        f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 1000' & while ! test -s {tmp_path}/pid; do :; done; echo x"
    )
    try:
        assert run(["/bin/sh", "-c", script], timeout=1000) == Outcome(0, b"x\n", b"")
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_one_that_says_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again, by its pid; one that says something is not."""
    monkeypatch.setattr(command, "LOOK_SECONDS", 0.05)
    seen: list[int] = []
    outcome = run(["/bin/sh", "-c", "echo $$; exec sleep 0.4"], timeout=20, see_to=seen.append)
    assert set(seen) == {int(outcome.output)}
    assert len(seen) > 1
    assert run(["/bin/true"], timeout=20, see_to=lambda pid: pytest.fail(f"{pid} was looked at")).code == 0


def test_who_does_not_end_is_reaped_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the next that is; a child that has ended is reaped at once."""
    monkeypatch.setattr(command, "_END_SECONDS", 0.05)
    stuck, quick = begin("/bin/cat", stdin=subprocess.PIPE), begin("/bin/true")
    reap(stuck)
    assert command._unreaped == [stuck]
    assert stuck.stdin is not None
    stuck.stdin.close()
    os.waitid(os.P_PID, stuck.pid, os.WEXITED | os.WNOWAIT)
    monkeypatch.setattr(command, "_END_SECONDS", 20)
    reap(quick)
    assert command._unreaped == []
    assert (stuck.poll(), quick.poll()) == (0, 0)
    quick.close()


def begin(*words: str, stdin: int = subprocess.DEVNULL) -> Child:
    return Child(words, stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, environment={})
