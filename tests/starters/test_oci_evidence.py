"""What is said of an OCI container whose evidence is late, changes, or cannot be looked at: only what is known."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from limpet import Engine, errors
from limpet.engine.starters.contract import Exit, Prepared
from limpet.engine.starters.oci import OciStarter, exits, probe, starter, starts
from limpet.engine.starters.oci.busy import Busy
from limpet.engine.starters.oci.conmon import end_monitor
from limpet.engine.starters.oci.exits import Program, is_of_run
from limpet.engine.starters.oci.run_directory import Processes, RunDirectory, list_runs, make_run_directory
from limpet.engine.starters.oci.starts import Starts
from limpet.recovery import Process
from limpet.recovery.host import has_ended, open_pidfd, read_stat
from limpet.schema import ContainerState, Reason
from limpet.testing import open_descriptors
from tests.conftest import is_running, read_output, wait_until
from tests.starters.oci import (
    RUNTIMES,
    config,
    each_runtime,
    end_everything,
    load_busybox,
    open_engine,
    processes_of,
    runtime_entries,
)
from tests.stops import stop_by_signal


@pytest.fixture
def engine(state_dir: str, tmp_path: Path) -> Iterator[Engine]:
    """An engine with a sandbox for each runtime; a test may close it."""
    with open_engine(state_dir) as opened:
        load_busybox(opened, tmp_path / "image")
        for name in RUNTIMES:
            opened.create_sandbox({"metadata": {"name": name}}, id=name, runtime_handler=name)
        yield opened
    end_everything(state_dir)


def make_own_program(container: object, script: str) -> None:
    """Put a script into the container's root as /work/own."""
    path = Path(getattr(container, "metadata").root_dir, "rootfs", "work", "own")  # noqa: B009
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@each_runtime
def test_a_conmon_that_is_late_is_waited_for(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    """Its container has ended, and it does not get to write that down: Unknown until it has, not unseen for good."""
    monkeypatch.setattr(probe, "_EXIT_FILE_SECONDS", 0.1)
    monkeypatch.setattr(probe, "let_monitor_go_on", lambda *_: None)
    engine.create_container(config("one", "sleep 0.3; exit 9"), runtime, id="one").start()
    processes = processes_of(state_dir, "one")
    stop_by_signal(processes.monitor.pid)
    engine.close()
    wait_until(lambda: read_stat(processes.init.pid)[0] == b"Z", "its end")
    with open_engine(state_dir) as opened:
        assert opened.get("one").state is ContainerState.UNKNOWN
        os.kill(processes.monitor.pid, signal.SIGCONT)
        wait_until(lambda: not is_running(processes.monitor.pid), "conmon to write it down")
        opened.recover()
        assert opened.get("one").status.exit_code == 9
        opened.get("one").release()


@each_runtime
def test_a_stop_has_a_stopped_conmon_go_on(engine: Engine, state_dir: str, runtime: str) -> None:
    """Its container ends at once, and conmon is what has to say so."""
    container = engine.create_container(config("one", "sleep 1000"), runtime, id="one")
    container.start()
    stop_by_signal(processes_of(state_dir, "one").monitor.pid)
    assert container.stop(0).exit_code == 128 + signal.SIGKILL


def test_a_conmon_that_was_stopped_goes_on_when_an_engine_is_opened(engine: Engine, state_dir: str) -> None:
    """Its container has ended while no engine was there: how is told at once, and not Unknown until somebody acts."""
    engine.create_container(config("one", "sleep 0.3; exit 9"), "runc", id="one").start()
    processes = processes_of(state_dir, "one")
    stop_by_signal(processes.monitor.pid)
    engine.close()
    wait_until(lambda: read_stat(processes.init.pid)[0] == b"Z", "its end")
    with open_engine(state_dir) as again:
        assert again.get("one").exit_code == 9


@each_runtime
def test_a_stopped_conmon_goes_on_when_it_is_needed(engine: Engine, state_dir: str, runtime: str) -> None:
    """Whoever is attached is answered, a log is begun anew, and an end is told with its code."""
    script = "while read x; do echo got $x; done; exit 9"
    container = engine.create_container(config("one", script, stdin=True, stdin_once=True), runtime, id="one")
    container.start()
    monitor = processes_of(state_dir, "one").monitor.pid

    def stop_conmon() -> None:
        stop_by_signal(monitor)
        wait_until(lambda: read_stat(monitor)[0] == b"T", "it to stop")

    stop_conmon()
    session = container.attach()
    session.write(b"one\n")
    assert session.read(5) == ("stdout", b"got one\n")
    stop_conmon()
    os.rename(container.metadata.log_path, f"{container.metadata.log_path}.1")
    container.reopen_log()
    session.close()
    container.stop(0)
    short = engine.create_container(config("short", "sleep 0.2; exit 9"), runtime, id="short")
    short.start()
    stop_by_signal(processes_of(state_dir, "short").monitor.pid)
    assert short.wait(20).exit_code == 9


def remove_marks(run: RunDirectory) -> None:
    """As a cleaner does that removes what is old: files that are looked into stay longer."""
    for name in ("starting", "executed"):
        os.unlink(run.join(name))


def await_end(pid: int) -> None:
    wait_until(lambda: not is_running(pid), "its end")


def put_directory(path: str) -> None:
    os.unlink(path)
    os.mkdir(path)


ALTERED: dict[str, Callable[[RunDirectory], object]] = {
    "a directory of processes": lambda run: put_directory(run.join("processes.json")),
    "no processes": lambda run: os.unlink(run.join("processes.json")),
    "damaged processes": lambda run: Path(run.join("processes.json")).write_bytes(b'{"init":'),
    "no mark of the start": lambda run: os.unlink(run.join("starting")),
    "no marks": remove_marks,
}


@each_runtime
@pytest.mark.parametrize("how", ALTERED)
def test_a_bundle_that_somebody_altered(engine: Engine, state_dir: str, runtime: str, how: str) -> None:
    """A container that runs is not taken for one that was never let go, nor ended: its end is told as it is."""
    script = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    container = engine.create_container(config("one", script), runtime, id="one")
    container.start()
    assert read_output(container, 1) == ["ready"]
    processes = processes_of(state_dir, "one")
    (run,) = list_runs(f"{state_dir}/containers/one")
    ALTERED[how](run)
    engine.close()
    with open_engine(state_dir) as again:
        assert is_running(processes.init.pid)
        container = again.get("one")
        assert container.state is ContainerState.RUNNING
        assert container.stop(5).exit_code == 7
        container.release()
        wait_until(lambda: not is_running(processes.monitor.pid), "its conmon to end")
        assert runtime_entries(state_dir, runtime) == []


@each_runtime
def test_marks_that_are_gone_do_not_say_that_it_never_ran(engine: Engine, state_dir: str, runtime: str) -> None:
    """While the engine that started it lives, or one that has seen it run, nothing is missed.

    Where none was there until its end, a code that a held init can end with is said of nobody.
    """
    codes = {"seven": 7, "one": 1, "killed": 137}
    script = "while ! test -e /work/go; do sleep 0.01; done; exit $(cat /work/go)"

    def run_on(when: str) -> None:
        for name in codes:
            engine.create_container(config(f"{when}-{name}", script), runtime, id=f"{when}-{name}").start()

    def end(when: str) -> None:
        for name, code in codes.items():
            bundle = f"{state_dir}/containers/{when}-{name}"
            pid = processes_of(state_dir, f"{when}-{name}").init.pid
            (run,) = list_runs(bundle)
            remove_marks(run)
            if code > 128:
                kill(pid)
            else:
                Path(bundle, "rootfs/work/new").write_text(str(code))
                os.rename(f"{bundle}/rootfs/work/new", f"{bundle}/rootfs/work/go")
            await_end(pid)

    for when in ("live", "adopted", "away"):
        run_on(when)
    end("live")
    for name, code in codes.items():
        assert engine.get(f"live-{name}").wait(20).exit_code == code
    engine.close()
    end("away")
    with open_engine(state_dir) as again:
        found = {name: again.get(f"away-{name}").status for name in codes}
        assert (found["seven"].exit_code, found["seven"].reason) == (7, Reason.ERROR)
        assert [found[name].reason for name in ("one", "killed")] == [Reason.UNKNOWN] * 2
        end("adopted")
        for name, code in codes.items():
            assert again.get(f"adopted-{name}").wait(20).exit_code == code
        for each in again.list():
            each.release()


@pytest.mark.parametrize(("code", "is_told"), [(0, True), (9, True), (1, False), (2, False), (137, False)])
def test_a_start_that_was_killed_as_it_let_go(engine: Engine, state_dir: str, code: int, is_told: bool) -> None:
    """Its pipe is left, and no mark: a code that no held init ends with is that of the program."""
    engine.create_container(config("one", f"exit {code}"), "crun", id="one").start()
    engine.get("one").wait(20)
    processes = processes_of(state_dir, "one")
    (run,) = list_runs(f"{state_dir}/containers/one")
    os.unlink(run.join("executed"))
    os.mkfifo(os.path.join(processes.entry, "exec.fifo"))
    witnessed = probe.BundleWitness(f"{state_dir}/containers")("one", processes.init)
    assert witnessed is not None
    expected = (Process.ENDED, code) if is_told else (Process.GONE, None)
    assert (witnessed.process, witnessed.exit_code) == expected


def test_a_stopped_conmon_writes_down_the_end_before_its_own(engine: Engine, state_dir: str) -> None:
    """Its container has ended, and it is to go: a moment is its own, for which it goes on."""
    engine.create_container(config("one", "sleep 1000"), "runc", id="one").start()
    processes = processes_of(state_dir, "one")
    engine.close()
    stop_by_signal(processes.monitor.pid)
    wait_until(lambda: read_stat(processes.monitor.pid)[0] == b"T", "it to stop")
    os.kill(processes.init.pid, signal.SIGKILL)
    (run,) = list_runs(f"{state_dir}/containers/one")
    assert end_monitor(run)
    ended = exits.read_conmon_exit(run)
    assert ended is not None
    assert ended.code == 137


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has such sockets")
def test_a_conmon_amid_its_end_is_waited_for(tmp_path: Path) -> None:
    """It has closed all by which it is known, and is not gone: sockets of this kind take the kernel a while."""
    run = make_run_directory(str(tmp_path))
    program = f"""
import socket, time
kept = [open({run.join("log")!r}, "w"), *(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 768) for _ in range(32))]
print("ready", flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        Path(run.join("conmon-pidfile")).write_text(str(process.pid))
        assert is_of_run(run, process.pid)
        with open_pidfd(process.pid) as pidfd:
            process.kill()
            wait_until(lambda: not is_of_run(run, process.pid), "its files to be closed")
            assert end_monitor(run)
            assert has_ended(pidfd)


def test_the_last_act_of_a_conmon_is_seen(engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes the exit file and ends between the look for that file and the look for itself."""
    engine.create_container(config("one", "sleep 0.3; exit 9"), "runc", id="one").start()
    processes = processes_of(state_dir, "one")
    stop_by_signal(processes.monitor.pid)
    engine.close()
    wait_until(lambda: read_stat(processes.init.pid)[0] == b"Z", "its end")

    def go_on(of: Processes) -> bool:
        os.kill(of.monitor.pid, signal.SIGCONT)
        wait_until(lambda: not is_running(of.monitor.pid), "conmon to end")
        return exits.is_monitor_alive(of)

    with monkeypatch.context() as patch:
        patch.setattr(probe, "is_monitor_alive", go_on)
        witnessed = probe.BundleWitness(f"{state_dir}/containers")("one", processes.init)
    assert witnessed is not None
    assert (witnessed.process, witnessed.exit_code) == (Process.ENDED, 9)


@each_runtime
def test_a_program_that_changes_its_own_file(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    """It ends with 1, as an init does that cannot execute it, before anybody saw it run: nothing tells which it was.

    One that is in the container alone, by a link to a mount, is no missing one.
    """

    def look_late(processes: Processes, _seconds: float, **_: object) -> Program:
        wait_until(lambda: exits.observe_program(processes) is Program.ENDED, "its end")
        return Program.ENDED

    monkeypatch.setattr(starts, "await_program", look_late)
    for name, script, expected in (
        ("removes", "/bin/busybox rm /work/own; exit 1", (255, Reason.UNKNOWN)),
        ("spoils", "echo garbage > /work/own; exit 1", (255, Reason.UNKNOWN)),
        ("stays", "exit 1", (1, Reason.ERROR)),
        ("mounted", "exit 1", (1, Reason.ERROR)),
    ):
        mounts = [{"container_path": "/opt/x", "host_path": str(tmp_path)}] if name == "mounted" else []
        container = engine.create_container(config(name, command=["/work/own"], mounts=mounts), runtime, id=name)
        make_own_program(container, script)
        if name == "mounted":
            own = Path(container.metadata.root_dir, "rootfs", "work", "own")
            own.rename(tmp_path / "own")
            own.symlink_to("/opt/x/own")
        container.start()
        status = container.wait(20)
        assert (status.exit_code, status.reason) == expected


@each_runtime
def test_a_start_that_was_given_up_too_early_is_a_start(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    """Its program was executed between the last look and the decision: it runs on, and that is what is said."""

    def look_early(processes: Processes, _seconds: float, **_: object) -> Program:
        wait_until(lambda: exits.observe_program(processes) is Program.EXECUTED, "its program to be executed")
        return Program.HELD

    monkeypatch.setattr(starts, "await_program", look_early)
    container = engine.create_container(config("one", "sleep 1000"), runtime, id="one")
    assert container.start().state is ContainerState.RUNNING
    wait_until(lambda: read_stat(container.status.pid)[0] == b"S", "it to go on")
    assert container.stop(0).exit_code == 137


def test_a_start_that_was_given_up_as_it_ended_is_a_start(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody kills it, and its conmon reaps it, between two looks at it: it has run, and how it ended is told."""
    given_up: list[int] = []

    def look_early(processes: Processes, _seconds: float, **_: object) -> Program:
        wait_until(lambda: exits.observe_program(processes) is Program.EXECUTED, "its program to be executed")
        given_up.append(processes.init.pid)
        return Program.HELD

    def read_late(pid: int) -> list[bytes]:
        if pid in given_up:
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "its conmon to reap it")
        return read_stat(pid)

    monkeypatch.setattr(starts, "await_program", look_early)
    monkeypatch.setattr(exits, "read_stat", read_late)
    container = engine.create_container(config("one", "sleep 1000"), "crun", id="one")
    container.start()
    assert container.wait(20).exit_code == 137
    assert given_up


@each_runtime
def test_what_was_never_executed_is_told_without_the_kernels_word(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    """Before Linux 6.15 it says nothing of who was reaped: conmon does."""
    for module in (starter, starts):
        monkeypatch.setattr(module, "read_exit_code", lambda *_: None)
    container = engine.create_container(config("one", command=["/bin/garbage"]), runtime, id="one")
    with pytest.raises(errors.StartError, match="format error"):
        container.start()
    assert (container.status.exit_code, container.status.reason) == (128, Reason.START_ERROR)


@each_runtime
def test_a_start_under_way_is_not_taken_for_a_left_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    """A recovery comes once the container is made, and before it is let go: each starter looks at all bundles."""
    real = Starts._identify

    def identify_late(self: Starts, *args: Any) -> Prepared:
        engine._runtime.starters.end_leftovers(lambda _: False)
        return real(self, *args)

    monkeypatch.setattr(Starts, "_identify", identify_late)
    container = engine.create_container(config("one", "sleep 1000"), runtime, id="one")
    assert container.start().state is ContainerState.RUNNING
    assert container.stop(0).exit_code == 137


def test_a_start_that_is_done_amid_a_recovery_is_not_taken_for_a_left_one(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recovery has found it while the container was made, and asks who is at work once it runs."""
    real, real_answer = Starts._identify, Busy.has_bundle
    is_made, may_go_on = threading.Event(), threading.Event()

    def identify_late(self: Starts, *args: Any) -> Prepared:
        is_made.set()
        assert may_go_on.wait(20)
        return real(self, *args)

    def answer_late(self: Busy, name: str) -> bool:
        may_go_on.set()
        starting.join(20)
        return real_answer(self, name)

    monkeypatch.setattr(Starts, "_identify", identify_late)
    monkeypatch.setattr(Busy, "has_bundle", answer_late)
    container = engine.create_container(config("one", "sleep 1000"), "crun", id="one")
    starting = threading.Thread(target=container.start)
    starting.start()
    assert is_made.wait(20)
    engine._runtime.starters.end_leftovers(lambda _: False)
    assert container.state is ContainerState.RUNNING
    assert is_running(processes_of(state_dir, "one").monitor.pid)
    assert container.stop(0).exit_code == 137


def test_when_a_start_that_was_never_let_go_has_ended_is_not_made_up(engine: Engine, state_dir: str) -> None:
    """Its conmon was killed, too: nobody has seen it."""
    engine.create_container(config("one", "sleep 1000"), "crun", id="one").start()
    engine.close()
    processes = processes_of(state_dir, "one")
    (run,) = list_runs(f"{state_dir}/containers/one")
    os.rename(run.join("starting"), run.join("held"))
    os.unlink(run.join("executed"))
    kill(processes.monitor.pid)
    kill(processes.init.pid)
    later = OciStarter("crun")
    later.open(state_dir)
    ended = later.read_exit("one", processes.init, -1)
    assert ended == Exit(None, 0, never_ran="it ended before its program was executed")


@each_runtime
def test_a_disk_that_takes_no_mark_of_what_was_executed_ends_nothing(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    """It runs, and was said to have never run, and killed."""
    mark = RunDirectory.mark

    def refuse(run: RunDirectory, name: str) -> None:
        if name == "executed":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        mark(run, name)

    monkeypatch.setattr(RunDirectory, "mark", refuse)
    container = engine.create_container(config("one", "exit 1"), runtime, id="one")
    container.start()
    assert (container.wait(20).exit_code, container.status.reason) == (1, Reason.ERROR)


@each_runtime
@pytest.mark.parametrize("fails", ["mark", "rename"])
def test_a_disk_that_takes_no_mark_leaves_no_start(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch, runtime: str, fails: str
) -> None:
    """A full disk amid go: StartError, never ran, and nothing is left of it, not even where that cannot be noted."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "starting")

    monkeypatch.setattr(RunDirectory, "mark_starting", refuse)
    if fails == "rename":
        monkeypatch.setattr(RunDirectory, "mark_never_ran", refuse)
    container = engine.create_container(config("one", "sleep 1000"), runtime, id="one")
    with pytest.raises(errors.StartError, match="No space left"):
        container.start()
    assert not [target for target in open_descriptors().values() if "pidfd" in target]
    assert (container.status.exit_code, container.status.reason) == (128, Reason.START_ERROR)
    wait_until(lambda: not is_running(processes_of(state_dir, "one").init.pid), "what was held to end")
    assert runtime_entries(state_dir, runtime) == []


def test_what_cannot_be_looked_at_is_unknown(engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor is left for the look at a container that is held, or runs: neither is said."""
    engine.create_container(config("one", "sleep 1000"), "crun", id="one").start()
    engine.close()

    def refuse(_: Processes) -> Program:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(probe, "observe_program", refuse)
        began = time.monotonic()
        with open_engine(state_dir) as opened:
            assert opened.get("one").state is ContainerState.UNKNOWN
            assert time.monotonic() - began < 8
            patch.undo()
            opened.recover()
            assert opened.get("one").state is ContainerState.RUNNING
            opened.get("one").stop(0)
            opened.get("one").release()


def kill(pid: int) -> None:
    """Kill a process, and wait for its end."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid), "its end")


def make_socket(path: str) -> None:
    """Make a socket, under a short name: the path is longer than a socket's may be."""
    with socket.socket(socket.AF_UNIX) as listener:
        above = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
        listener.bind(f"/proc/self/fd/{above}/{os.path.basename(path)}")
        os.close(above)


def test_what_conmon_has_not_written_holds_no_container_fast(engine: Engine, state_dir: str) -> None:
    """A link, a directory, a pipe, a socket where conmon would have told the end: it is no evidence, nor in the way."""
    make: dict[str, Callable[[str], None]] = {
        "link": lambda path: os.symlink("/etc/hostname", path),
        "directory": os.mkdir,
        "pipe": os.mkfifo,
        "socket": make_socket,
    }
    for name in make:
        engine.create_container(config(name, "sleep 1000"), "runc", id=name).start()
    engine.close()
    for name, place in make.items():
        processes = processes_of(state_dir, name)
        kill(processes.monitor.pid)
        kill(processes.init.pid)
        (exits_dir,) = Path(state_dir).glob(f"containers/{name}/oci/*/exits")
        place(str(exits_dir.with_name("exit")))
    with open_engine(state_dir) as opened:
        for name in make:
            status = opened.get(name).status
            assert status.state is ContainerState.EXITED
            assert status.exit_code in {137, 255}  # what the kernel tells while nobody has reaped it, or unseen
            opened.get(name).release()


def test_a_forged_exit_is_not_believed(engine: Engine, state_dir: str) -> None:
    """Not one that somebody with a look at `exits` has written, nor another user's, nor what the kernel contradicts."""
    names = ("shown", "foreign", "open", "linked", "false")
    for name in names:
        engine.create_container(config(name, "sleep 1000"), "crun", id=name).start()
    found = {name: processes_of(state_dir, name) for name in names}
    with open_pidfd(found["false"].init.pid) as pidfd:
        engine.close()
        for name, processes in found.items():
            (run,) = list_runs(os.path.join(state_dir, "containers", name))
            kill(processes.monitor.pid)
            kill(processes.init.pid)
            forged = Path(run.join("exit" if name != "shown" else f"exits/{name}"))
            forged.write_text("0")
            if name == "foreign":
                os.chown(forged, 1000, 1000)
            if name == "open":
                forged.chmod(0o666)
            if name == "linked":
                os.link(forged, run.join("other"))
        later = OciStarter("crun")
        later.open(state_dir)
        ended = later.read_exit("false", found["false"].init, pidfd)
        assert ended is not None
        assert ended.code == 137
    with open_engine(state_dir) as opened:
        for name in names[:-1]:
            assert opened.get(name).status.exit_code in {137, 255}, name  # the kernel's, or unseen
            opened.get(name).release()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_nothing_but_a_pipe_is_taken_for_conmons_door(
    engine: Engine, state_dir: str, tmp_path: Path, kind: str
) -> None:
    """A link in its place leads the engine to no other's file, and a file is not written to."""
    container = engine.create_container(config("one", "sleep 1000", log_path="one.log"), "runc", id="one")
    container.start()
    (door,) = Path(state_dir).glob("containers/one/oci/*/ctl")
    door.unlink()
    other = tmp_path / "other" if kind == "link" else door
    other.write_text("precious")
    if kind == "link":
        door.symlink_to(other)
    os.rename(container.metadata.log_path, f"{container.metadata.log_path}.1")
    with pytest.raises(errors.InvalidStateError, match="conmon cannot be asked"):
        container.reopen_log()
    assert other.read_text() == "precious"
