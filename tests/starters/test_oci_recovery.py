"""An engine with OCI containers is killed anywhere: each then has the one true verdict, and nothing is left over."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from limpet import Engine, Snapshot
from limpet.engine.drill.runtimes import clean
from limpet.engine.starters.oci import cgroups, commands
from limpet.engine.starters.oci.run_directory import list_runs
from limpet.schema import ContainerState, Reason
from tests.conftest import EngineProcess, is_running, read_output, wait_until
from tests.starters.oci import (
    RUNTIMES,
    config,
    each_runtime,
    end_everything,
    free_pins,
    load_busybox,
    open_engine,
    processes_of,
    runtime_entries,
)

Start = Callable[[str], EngineProcess]

PRELUDE = """
from limpet.engine.starters.oci import OciStarter, ends
from limpet.engine.starters.oci.run_directory import RunDirectory
from limpet.engine.starters.oci.starts import Starts
from limpet.engine.lifecycle.container import Container
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
"""

KILLS = {
    "while it is made": "RunDirectory.write_processes = die",
    "before the checkpoint": "Store.update = die",
    "before go": "OciStarter.go = die",
    "before the runtime's start": "Starts._start = die",
    "after the runtime's start": (
        "start = Starts._start\n"
        "def started(*given):\n    start(*given)\n    die()\n"
        "Starts._start = started"
    ),
    "before it is marked": (
        "mark = RunDirectory.mark\n"
        "def marked(self, name):\n    die() if name == 'executed' else mark(self, name)\n"
        "RunDirectory.mark = marked"
    ),
}  # fmt: skip


RELEASES = {
    "before": "OciStarter.release = die",
    "once the cgroups are gone": "ends.remove_entry = die",
    "amid the runtime's entry": "ends.remove_entry = lambda path: (os.unlink(path + '/' + os.listdir(path)[0]), die())",
    "after": (
        "release = OciStarter.release\n"
        "OciStarter.release = lambda self, container_id: (release(self, container_id), die())"
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def prepared(state_dir: str, tmp_path: Path) -> Iterator[None]:
    """Containers `one-runc` and `one-crun` that are created and not started."""
    with open_engine(state_dir) as engine:
        load_busybox(engine, tmp_path / "image")
        for name in RUNTIMES:
            engine.create_sandbox({"metadata": {"name": name}}, id=name, runtime_handler=name)
            engine.create_container(config(f"one-{name}", "echo ran; sleep 1000"), name, id=f"one-{name}")
    yield
    end_everything(state_dir)


def start_and_die(start: Start, kill: str, container_id: str) -> None:
    """Start a container in an engine that kills itself on the way."""
    script = f"""{PRELUDE}
engine = Engine.open(state_dir, runtimes={{name: OciStarter(name) for name in ("runc", "crun")}})
container = engine.get({container_id!r})
{kill}
container.start()
say("survived")
"""
    assert start(script).wait() == -signal.SIGKILL


@each_runtime
@pytest.mark.parametrize("has_ended", [False, True])
def test_one_that_is_held_and_of_which_somebody_removed_what_was_written(
    state_dir: str, engine_process: Start, runtime: str, has_ended: bool
) -> None:
    """Its mark tells that nobody let it go: with crun it was RUNNING, and its end had an exit code."""
    start_and_die(engine_process, KILLS["before go"], f"one-{runtime}")
    processes = processes_of(state_dir, f"one-{runtime}")
    (run,) = list_runs(f"{state_dir}/containers/one-{runtime}")
    os.unlink(run.join("processes.json"))
    if has_ended:
        os.kill(processes.init.pid, signal.SIGKILL)
        wait_until(lambda: not is_running(processes.init.pid), "its end")
    with open_engine(state_dir) as engine:
        status = engine.get(f"one-{runtime}").status
        assert (status.exit_code, status.reason) == (128, Reason.START_ERROR)
        wait_until(lambda: not is_running(processes.init.pid), "what is held to end")
        engine.recover()
        assert engine.get(f"one-{runtime}").status == status


@each_runtime
def test_one_that_is_held_and_of_which_nothing_is_left(state_dir: str, engine_process: Start, runtime: str) -> None:
    """It is not said to run: it is called as the runtime is."""
    start_and_die(engine_process, KILLS["before go"], f"one-{runtime}")
    processes = processes_of(state_dir, f"one-{runtime}")
    shutil.rmtree(f"{state_dir}/containers/one-{runtime}/oci")
    with open_engine(state_dir) as engine:
        assert engine.get(f"one-{runtime}").state is ContainerState.UNKNOWN
        os.kill(processes.init.pid, signal.SIGKILL)

        def is_seen_to_have_ended() -> bool:
            engine.recover()
            return engine.get(f"one-{runtime}").status.reason == Reason.UNKNOWN

        # runc's first thread may be a zombie before the others.
        wait_until(is_seen_to_have_ended, "the end of all its threads")


@each_runtime
@pytest.mark.parametrize("kill", ["while it is made", "before the checkpoint"])
def test_killed_before_the_checkpoint(
    state_dir: str, engine_process: Start, tmp_path: Path, runtime: str, kill: str
) -> None:
    """It was made and held: it is CREATED, its process and conmon are ended, and it can be started."""
    start_and_die(engine_process, KILLS[kill], f"one-{runtime}")
    assert runtime_entries(state_dir, runtime) == [f"one-{runtime}"]
    (run,) = list_runs(f"{state_dir}/containers/one-{runtime}")
    pids = [run.read_pid(name) for name in ("pidfile", "conmon-pidfile")]
    assert all(map(is_running, pids))
    with open_engine(state_dir) as engine:
        container = engine.get(f"one-{runtime}")
        assert container.state is ContainerState.CREATED
        assert runtime_entries(state_dir, runtime) == []
        wait_until(lambda: not any(map(is_running, pids)), "the held process and its conmon to end")
        assert container.start().state is ContainerState.RUNNING
        assert read_output(container, 1) == ["ran"]
        assert container.stop(0).exit_code == 137
        container.release()


@each_runtime
@pytest.mark.parametrize("kill", ["before go", "before the runtime's start"])
def test_killed_before_it_may_run(state_dir: str, engine_process: Start, runtime: str, kill: str) -> None:
    """RUNNING on disk, and held by the runtime: nobody says that it runs, it is ended, and was never executed."""
    start_and_die(engine_process, KILLS[kill], f"one-{runtime}")
    processes = processes_of(state_dir, f"one-{runtime}")
    assert is_running(processes.init.pid)
    with Snapshot.open(state_dir) as snapshot:
        (view,) = [each for each in snapshot.list() if each.id == f"one-{runtime}"]
        assert view.status.state is not ContainerState.RUNNING
    with open_engine(state_dir) as engine:
        container = engine.get(f"one-{runtime}")
        assert container.state is ContainerState.EXITED
        assert (container.status.exit_code, container.status.reason) == (128, Reason.START_ERROR)
        assert "never ran" in container.status.message
        assert runtime_entries(state_dir, runtime) == []
        wait_until(lambda: not is_running(processes.init.pid), "the held process to end")
        assert read_output(container, 0) == []
        container.release()
        container.delete()


@each_runtime
@pytest.mark.parametrize("kill", ["after the runtime's start", "before it is marked"])
def test_killed_once_it_runs(state_dir: str, engine_process: Start, runtime: str, kill: str) -> None:
    """It is found running by its identity, watched, and its code is known."""
    start_and_die(engine_process, KILLS[kill], f"one-{runtime}")
    with open_engine(state_dir) as engine:
        container = engine.get(f"one-{runtime}")
        assert container.state is ContainerState.RUNNING, container.status
        assert read_output(container, 1) == ["ran"]
        assert container.stop(0).exit_code == 137
        container.release()
        assert runtime_entries(state_dir, runtime) == []


@each_runtime
def test_ends_while_no_engine_runs(state_dir: str, runtime: str) -> None:
    """conmon's exit file has code and time, for the next engine, one without the runtime, and a reader alike."""
    with open_engine(state_dir) as engine:
        container = engine.create_container(config("short", "sleep 0.5; exit 9"), runtime, id="short")
        container.start()
    processes = processes_of(state_dir, "short")
    wait_until(lambda: not is_running(processes.init.pid), "its end")
    ended_at = time.time_ns()
    with Snapshot.open(state_dir) as snapshot:
        (view,) = [each for each in snapshot.list() if each.id == "short"]
        assert view.verdict is not None
        assert view.verdict.status.exit_code == 9
    with Engine.open(state_dir) as engine:
        status = engine.get("short").status
        assert (status.state, status.exit_code) == (ContainerState.EXITED, 9)
        assert abs(status.finished_at - ended_at) < 2e9
    with open_engine(state_dir) as engine:
        engine.get("short").release()
        assert runtime_entries(state_dir, runtime) == []


@each_runtime
@pytest.mark.parametrize("when", RELEASES)
def test_killed_in_the_release(state_dir: str, engine_process: Start, runtime: str, when: str) -> None:
    """What was released on disk is finished by the next engine: entry and bundle go."""
    script = f"""{PRELUDE}
engine = Engine.open(state_dir, runtimes={{name: OciStarter(name) for name in ("runc", "crun")}})
container = engine.get("one-{runtime}")
container.start()
container.stop(0)
{RELEASES[when]}
container.release()
"""
    assert engine_process(script).wait() == -signal.SIGKILL
    with open_engine(state_dir) as engine:
        assert engine.get(f"one-{runtime}").status.released
        assert runtime_entries(state_dir, runtime) == []
        assert not Path(state_dir, "containers", f"one-{runtime}").exists()


@each_runtime
def test_conmon_is_killed(state_dir: str, runtime: str) -> None:
    """The container runs on and is watched by its pidfd; of its end it is said what the kernel tells, or nothing."""
    with open_engine(state_dir) as engine:
        container = engine.get(f"one-{runtime}")
        container.start()
        processes = processes_of(state_dir, container.id)
        os.kill(processes.monitor.pid, signal.SIGKILL)
        wait_until(lambda: not is_running(processes.monitor.pid), "conmon to end")
    with open_engine(state_dir) as engine:
        container = engine.get(f"one-{runtime}")
        assert container.state is ContainerState.RUNNING
        assert container.stop(0).exit_code in {137, 255}
        container.release()
        assert runtime_entries(state_dir, runtime) == []


@each_runtime
def test_a_drill_leaves_no_cgroup_of_one_that_nobody_released(state_dir: str, runtime: str) -> None:
    """As of one whose conmon was killed, and whose end nobody saw: the drill's own cleaning is all that comes."""
    with open_engine(state_dir) as engine:
        container = engine.get(f"one-{runtime}")
        container.start()
        processes = processes_of(state_dir, container.id)
        os.kill(processes.monitor.pid, signal.SIGKILL)
        os.kill(processes.init.pid, signal.SIGKILL)
        container.wait(20)
    clean(state_dir, runtime)
    assert [*cgroups.list_directories(processes.cgroups, os.path.basename(processes.cgroup))] == []


@each_runtime
def test_conmon_ends_under_a_live_engine(state_dir: str, runtime: str) -> None:
    """It is noticed at once, and written down; the container runs on, and its end is seen all the same."""
    with open_engine(state_dir) as engine:
        container = engine.get(f"one-{runtime}")
        container.start()
        os.kill(processes_of(state_dir, container.id).monitor.pid, signal.SIGKILL)
        wait_until(lambda: container.status.reason == Reason.MONITOR_GONE, "the note")
        assert container.state is ContainerState.RUNNING
        os.kill(container.status.pid, signal.SIGKILL)
        assert container.wait(10).state is ContainerState.EXITED
        container.release()


def test_a_copy_ends_nothing_of_the_original(state_dir: str, tmp_path: Path) -> None:
    """In a copy of the state directory the runtime's own directory is another's: nothing of it is signalled."""
    with open_engine(state_dir) as engine:
        for name in RUNTIMES:
            engine.get(f"one-{name}").start()
        pids = [processes_of(state_dir, f"one-{name}").init.pid for name in RUNTIMES]
        sessions = [engine.get(f"one-{name}").open_command(["/bin/sleep", "1000"]) for name in RUNTIMES]
        found = [Path(next(list_runs(f"{state_dir}/containers/one-{name}")).path) for name in RUNTIMES]
        wait_until(lambda: all([*each.glob("exec-*.pid")] for each in found), "the commands")
        pids += [int(path.read_text()) for each in found for path in each.glob("exec-*.pid")]
    copy = str(tmp_path / "copy")
    shutil.copytree(state_dir, copy, symlinks=True, ignore=lambda _, names: {"attach", "ctl", "winsz", "exec.fifo"})
    commands._under_way.clear()  # as if the copy were opened by another process
    with open_engine(copy) as engine:
        first = engine.create_sandbox({"metadata": {"name": "first"}}, runtime_handler="runc")
        engine.create_container(config("first", "true"), first, id="first").start()
        engine.recover()
        assert not [*Path(copy).glob("containers/*/oci/*/exec-*")]
        for name in RUNTIMES:
            assert engine.get(f"one-{name}").state is ContainerState.UNKNOWN
            assert engine.get(f"one-{name}").status.reason == Reason.COPIED
            engine.declare_gone(f"one-{name}", "it is the original's")
            engine.get(f"one-{name}").release()
        own = engine.create_sandbox({"metadata": {"name": "own"}}, runtime_handler="runc")
        engine.create_container(config("own", "exit 4"), own, id="own").start()
        assert engine.get("own").wait(20).exit_code == 4
        own.remove(force=True)
        first.remove(force=True)
    assert all(map(is_running, pids))
    for session in sessions:
        session.close()
    with open_engine(state_dir) as engine:
        for name in RUNTIMES:
            assert engine.get(f"one-{name}").state is ContainerState.RUNNING
            engine.get(f"one-{name}").stop(0)


@each_runtime
def test_the_original_of_a_copy_is_found_by_its_conmon(state_dir: str, tmp_path: Path, runtime: str) -> None:
    """Wherever it was moved, as where its parent was renamed and copied back: what it runs is left alone."""
    with open_engine(state_dir) as engine:
        pid = engine.get(f"one-{runtime}").start().pid
    away = tmp_path / "where" / "no" / "path" / "leads"
    away.parent.mkdir(parents=True)
    os.rename(state_dir, away)
    try:
        shutil.copytree(away, state_dir, symlinks=True, ignore=lambda _, names: {"attach", "ctl", "winsz", "exec.fifo"})
        with open_engine(state_dir) as engine:
            assert engine.get(f"one-{runtime}").status.reason == Reason.COPIED
        assert is_running(pid)
        shutil.rmtree(state_dir)
    finally:
        os.rename(away, state_dir)
    with open_engine(state_dir) as engine:
        assert engine.get(f"one-{runtime}").state is ContainerState.RUNNING
        engine.get(f"one-{runtime}").stop(0)


def test_after_a_reboot(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the runtime kept of another boot is removed unread, and every container has ended with it."""
    with open_engine(state_dir) as engine:
        container = engine.get("one-runc")
        container.start()
        processes = processes_of(state_dir, "one-runc")
    above = Path(state_dir, "oci", "runc")
    (root,) = above.iterdir()
    other = "0" * 8 + "-0000-0000-0000-" + "0" * 12
    root.rename(above / f"{other}{root.name[36:]}")
    with open_engine(state_dir) as engine:
        assert list(above.iterdir()) == []
        assert is_running(processes.init.pid)  # whoever has that pid now is left alone
        engine.get("one-runc").stop(0)
    cgroups.remove(processes.cgroups, os.path.basename(processes.cgroup))
    free_pins(root.name)


@each_runtime
def test_killed_between_a_pause_and_its_record(state_dir: str, engine_process: Start, runtime: str) -> None:
    """The next engine freezes it, as is written down; one that is frozen is found, and goes on again."""
    script = f"""{PRELUDE}
engine = Engine.open(state_dir, runtimes={{name: OciStarter(name) for name in ("runc", "crun")}})
container = engine.get("one-{runtime}")
container.start()
OciStarter.freeze = die
container.pause()
"""
    assert engine_process(script).wait() == -signal.SIGKILL
    with open_engine(state_dir) as engine:
        container = engine.get(f"one-{runtime}")
        assert container.state is ContainerState.RUNNING
        assert container.status.paused
        wait_until(container.is_frozen, "it to be frozen")
    with open_engine(state_dir) as engine:
        container = engine.get(f"one-{runtime}")
        assert (container.state, container.status.paused) == (ContainerState.RUNNING, True)
        assert not container.resume().paused
        assert not container.is_frozen()
        container.stop(0)
        container.release()


def conmons_of(state_dir: str) -> list[int]:
    """The conmons that have a file of this state directory open, whoever has written down their pids."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path(f"/proc/{name}/comm").read_text() == "conmon\n" and is_running(int(name)):
                links = [os.readlink(each) for each in Path(f"/proc/{name}/fd").iterdir()]
                found += [int(name)] if any(link.startswith(state_dir) for link in links) else []
        except OSError:
            continue
    return found


@each_runtime
@pytest.mark.parametrize("moment", range(3))
def test_killed_at_any_moment(state_dir: str, engine_process: Start, runtime: str, moment: int) -> None:
    """Whenever it comes: CREATED and nothing is left, or never ran and nothing is left, or it runs and is watched."""
    process = engine_process(f"""
from limpet.engine.starters.oci import OciStarter
engine = Engine.open(state_dir, runtimes={{name: OciStarter(name) for name in ("runc", "crun")}})
container = engine.get("one-{runtime}")
say("ready")
container.start()
say("started")
time.sleep(1000)
""")
    process.read()
    time.sleep(random.Random(f"{runtime}{moment}").random() * 0.15)
    process.kill()
    with open_engine(state_dir) as engine:
        container = engine.get(f"one-{runtime}")
        status = container.status
        if status.state is ContainerState.RUNNING:
            assert read_output(container, 1) == ["ran"]
            assert len(conmons_of(state_dir)) == 1
            assert container.stop(0).exit_code == 137
        else:
            assert (status.state, status.exit_code) in {(ContainerState.CREATED, 0), (ContainerState.EXITED, 128)}
            assert read_output(container, 0) == []
            wait_until(lambda: not conmons_of(state_dir), "the conmon of the start to end")
            assert runtime_entries(state_dir, runtime) == []
        container.release()
        wait_until(lambda: not conmons_of(state_dir), "its conmon to end")
        assert runtime_entries(state_dir, runtime) == []


@each_runtime
def test_a_moved_state_directory_goes_on(state_dir: str, runtime: str) -> None:
    """What runs there is paused, resumed and stopped by the cgroup that it has, and the code of what ends is known."""
    loop = "while :; do sleep 0.02; done"
    with open_engine(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod", runtime_handler=runtime)
        for name, script in (
            ("stays", loop),
            ("ends", "while [ ! -e /work/go ]; do sleep 0.02; done; echo bye; exit 5"),
        ):
            one = engine.create_container(config(name, script), "pod", id=name)
            one.start()
    monitor = processes_of(state_dir, "ends").monitor.pid
    moved = f"{state_dir}-moved"
    os.rename(state_dir, moved)
    Path(moved, "containers", "ends", "rootfs", "work", "go").touch()
    wait_until(lambda: not is_running(monitor), "its conmon to end")
    assert os.path.isdir(processes_of(moved, "stays").entry)
    with open_engine(moved) as engine:
        ends, stays = engine.get("ends"), engine.get("stays")
        assert (ends.exit_code, [entry.text for entry in ends.read_log()]) == (5, [b"bye\n"])
        assert stays.pause().paused
        assert stays.is_frozen()
        assert not stays.resume().paused
        assert not stays.is_frozen()
        assert stays.stop(0).exit_code == 137
        engine.get_sandbox("pod").remove(force=True)
