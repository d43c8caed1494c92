"""The directory of one start: what is marked in it, and which processes it names."""

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.engine.starters.oci.run_directory import (
    KnownRuns,
    RunDirectory,
    list_runs,
    make_run_directory,
)
from tests.starters.oci import PROCESSES


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_run_directory(str(tmp_path))


def test_each_start_has_one_of_its_own(tmp_path: Path) -> None:
    """With a place for what conmon writes twice; they are listed by their names, and a bundle without has none."""
    assert list(list_runs(str(tmp_path))) == list(list_runs(str(tmp_path / "none"))) == []
    made = [make_run_directory(str(tmp_path)).path for _ in range(3)]
    assert len(set(made)) == 3
    assert all(sorted(os.listdir(path)) == ["exits", "held"] for path in made)
    assert [each.path for each in list_runs(str(tmp_path))] == sorted(made)
    (tmp_path / "file").touch()
    assert list(list_runs(str(tmp_path / "file"))) == []


def test_what_is_no_directory_of_ours_is_passed_over(run: RunDirectory, tmp_path: Path) -> None:
    """A stray file and links, beside the starts and in the place of all: nothing is marked in what they lead to."""
    above = Path(run.path).parent
    around = tmp_path / "around"
    (around / "inner").mkdir(parents=True)
    (above / "stray").touch()
    (above / "link").symlink_to(around)
    assert [each.path for each in list_runs(str(tmp_path))] == [run.path]
    above.rename(tmp_path / "before")
    above.symlink_to(around)
    assert list(list_runs(str(tmp_path))) == []
    with pytest.raises(NotADirectoryError, match="it is a symbolic link"):
        make_run_directory(str(tmp_path))
    assert os.listdir(around) == ["inner"]


def test_marks(run: RunDirectory) -> None:
    """They may be made twice, and a link that leads nowhere is one; whoever was let go, or executed, may have run."""
    assert not run.has("starting")
    assert not run.was_let_go()
    for name in ("executed", "executed"):
        run.mark(name)
        assert run.has(name)
    assert run.was_let_go()
    os.unlink(run.join("executed"))
    os.symlink("/nowhere", run.join("starting"))
    assert run.has("starting")
    assert run.was_let_go()


def test_how_far_a_start_came(run: RunDirectory) -> None:
    """One mark becomes the next; that all are missing says neither that it was let go nor that it was not."""

    def look() -> tuple[bool, bool]:
        return run.was_let_go(), run.was_never_let_go()

    assert look() == (False, True)
    run.mark_starting()
    assert (run.has("held"), *look()) == (False, True, False)
    os.unlink(run.join("starting"))
    assert look() == (False, False)
    run.mark_starting()
    assert look() == (True, False)


@pytest.mark.parametrize("was_starting", [False, True])
def test_one_that_never_ran_was_not_let_go(run: RunDirectory, was_starting: bool) -> None:
    """Its mark takes the place of the other, so that a full disk takes it."""
    if was_starting:
        run.mark_starting()
    run.mark_never_ran()
    assert (run.has("never-ran"), run.has("starting"), run.was_let_go()) == (True, False, False)
    assert (run.has("held"), run.was_never_let_go()) == (False, True)
    run.mark_never_ran()
    assert run.has("never-ran")


def test_processes_are_read_as_they_were_written(run: RunDirectory, tmp_path: Path) -> None:
    """None if nothing was, or what is there is damaged, whatever by."""
    assert run.read_processes() is None
    run.write_processes(PROCESSES)
    assert run.read_processes() == PROCESSES
    path = Path(run.join("processes.json"))
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], b"\xff" + whole, whole.replace(b'"init"', b'"inix"'), b"[]"):
        path.write_bytes(damaged)
        assert run.read_processes() is None
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert run.read_processes() is None
    path.unlink()
    path.mkdir()
    assert run.read_processes() is None
    path.rmdir()
    path.write_bytes(whole)
    assert RunDirectory(run.join("processes.json")).read_processes() is None


def test_a_start_under_way_is_seen_by_its_lock(run: RunDirectory) -> None:
    """As long as somebody has it, also through a descriptor that was inherited."""
    assert not run.is_being_started()
    run.mark("starting")
    assert not run.is_being_started()
    descriptor = os.open(run.join("starting"), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    other = os.dup(descriptor)
    os.close(descriptor)
    assert run.is_being_started()
    os.close(other)
    assert not run.is_being_started()


@pytest.mark.parametrize(("text", "pid"), [("4711", 4711), ("4711\n", 4711), ("", 0), ("x", 0), ("1" * 40, 0)])
def test_a_pid_file(run: RunDirectory, text: str, pid: int) -> None:
    """0 if there is none, or no number in it."""
    assert run.read_pid("pidfile") == 0
    Path(run.join("pidfile")).write_text(text)
    assert run.read_pid("pidfile") == pid


def test_a_pid_file_is_waited_for_where_it_may_come(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory that was just made; for so long at most, and not in one that is old, or gone."""
    began = time.monotonic()
    run.await_pid("pidfile", 0.1)
    assert time.monotonic() - began >= 0.1
    writer = threading.Timer(0.05, run.mark, ["pidfile"])
    writer.start()
    run.await_pid("pidfile", 1000)
    writer.join()
    os.unlink(run.join("pidfile"))
    monkeypatch.setattr(
        "limpet.engine.starters.oci.run_directory.time.sleep", lambda _: pytest.fail("it was waited for")
    )
    os.utime(run.path, (0, time.time() - 60.5))
    run.await_pid("pidfile", 1000)
    RunDirectory(run.join("none")).await_pid("pidfile", 1000)


def test_a_start_is_found_by_its_first_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And kept, until the file that tells of it changes; other processes are nobody's."""
    runs = [make_run_directory(str(tmp_path)) for _ in range(3)]
    other = replace(PROCESSES, init=PROCESSES.monitor)
    runs[1].write_processes(other)
    known = KnownRuns()
    assert known.find(str(tmp_path), PROCESSES.init) is None
    known.write(str(tmp_path), runs[0], PROCESSES)
    read = RunDirectory.read_processes
    monkeypatch.setattr(RunDirectory, "read_processes", lambda self: pytest.fail(f"{self.path} was read"))
    for _ in range(2):
        assert known.find(str(tmp_path), PROCESSES.init) == (runs[0], PROCESSES)
    monkeypatch.setattr(RunDirectory, "read_processes", read)
    found = known.find(str(tmp_path), other.init)
    assert found is not None
    assert (found[0].path, found[1]) == (runs[1].path, other)
    found = known.find(str(tmp_path), PROCESSES.init)
    assert found is not None
    changed = replace(PROCESSES, oci_id="changed")
    runs[0].write_processes(changed)
    found = known.find(str(tmp_path), PROCESSES.init)
    assert found is not None
    assert found[1] == changed
    os.unlink(runs[0].join("processes.json"))
    assert known.find(str(tmp_path), PROCESSES.init) is None
    known.write(str(tmp_path), runs[2], PROCESSES)
    known.forget(str(tmp_path))
    known.forget(str(tmp_path))
    found = known.find(str(tmp_path), PROCESSES.init)
    assert found is not None
    assert found[0].path == runs[2].path
