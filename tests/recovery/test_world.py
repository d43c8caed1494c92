"""Recovery tells the truth about real processes, real directories and a real SIGKILL of the engine."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from limpet.engine import Engine, errors
from limpet.engine.starters.process import ProcessStarter
from limpet.recovery import HostProbe, Process
from limpet.recovery.host import has_pidfs
from limpet.recovery.probe import Witnessed
from limpet.schema import ContainerState, Reason
from tests.conftest import is_running, require_namespaces, wait_until
from tests.engine_lives import LIVE, Start, rule_of, start_one


def test_survivor_is_adopted_and_its_exit_code_is_read(engine_process: Start, state_dir: str) -> None:
    """A container that outlives its engine is RUNNING again, the same process, and its later exit code is known."""
    pid = start_one(engine_process, "sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.05; done")
    with Engine.open(state_dir) as engine:
        container = engine.get("one")
        assert (rule_of(engine), container.state, container.status.pid) == ("survivor", ContainerState.RUNNING, pid)
        os.kill(pid, signal.SIGTERM)
        status = container.wait(20)
        assert (status.exit_code, status.reason) == (7, Reason.ERROR)


def test_survivor_can_be_stopped_and_released(engine_process: Start, state_dir: str) -> None:
    """An adopted container ignores SIGTERM, is killed after the timeout with its whole group, and released."""
    pid = start_one(engine_process, "sh", "-c", "trap '' TERM; sleep 1000 & while :; do sleep 1000; done")
    with Engine.open(state_dir) as engine:
        container = engine.get("one")
        assert container.stop(timeout=0.2).exit_code == 128 + signal.SIGKILL
        assert not is_running(pid)
        container.release()
        assert not os.path.lexists(container.metadata.root_dir)
        container.delete()
        assert not engine.list()


def test_exited_while_down_is_told_as_the_keeper_saw_it(engine_process: Start, state_dir: str) -> None:
    """No engine was there, the keeper was: EXITED with its code, and what is left of the container is ended."""
    pid = start_one(engine_process, "sh", "-c", "sleep 1000 & echo $! > child; exec sleep 1000")
    note = Path(state_dir, "containers/one/working/child")
    wait_until(lambda: note.exists() and note.read_text().endswith("\n"), "the child to be noted")
    child = int(note.read_text())
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the process to be reaped")
    with Engine.open(state_dir) as engine:
        status = engine.get("one").status
        assert rule_of(engine) == "exit-observed"
        assert (status.state, status.exit_code, status.reason) == (ContainerState.EXITED, 137, Reason.ERROR)
        wait_until(lambda: not is_running(child), "the child that was left to be ended")


@pytest.mark.usefixtures("namespaces")
def test_host_rebooted(engine_process: Start, state_dir: str, tmp_path: Path) -> None:
    """Under another boot id no process is ours, though one has the very pid: it is not signalled."""
    pid = start_one(engine_process, "sleep", "1000")
    fake = tmp_path / "boot_id"
    fake.write_text("11111111-2222-3333-4444-555555555555\n")
    script = textwrap.dedent(f"""
        from limpet.engine import Engine
        with Engine.open({state_dir!r}) as engine:
            s = engine.get("one").status
            print(engine.recovery.findings[0].rule, s.state.name, s.exit_code, s.reason)
    """)
    told = in_namespace(f"mount --bind {fake} /proc/sys/kernel/random/boot_id", script, "-m")
    assert told.split() == ["rebooted", "EXITED", "255", "Rebooted"]
    assert is_running(pid)


@pytest.mark.usefixtures("namespaces")
def test_pid_reused_by_a_stranger(tmp_path: Path) -> None:
    """A stranger with the container's pid is never called ours and never signalled, though no keeper was there."""
    state = str(tmp_path / "state")
    first = textwrap.dedent(f"""
        import os, signal, subprocess, sys
        from limpet.engine.starters.process.client import KeeperClient
        from limpet.engine.starters.process.keeper.messages import VERSION
        {LIVE_IN_CHILD!r}
        command = [sys.executable, "-c", {LIVE_IN_CHILD!r}, {state!r}]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        pid = int(child.stdout.readline())
        keeper = KeeperClient({state!r} + "/keeper")
        with keeper.connection(begin=False) as connection:
            anchor = connection.ask({{"op": "hello", "version": VERSION}})[0]["anchor"]
        child.kill(); child.wait()
        for each in (anchor, keeper.keeper_pid): os.kill(each, signal.SIGKILL)  # nobody is to see the end
        os.kill(pid, signal.SIGKILL)
        while os.path.exists(f"/proc/{{pid}}"):
            try: os.waitpid(-1, os.WNOHANG)
            except ChildProcessError: pass
        open("/proc/sys/kernel/ns_last_pid", "w").write(str(pid - 1))
        stranger = subprocess.Popen(["sleep", "1000"])
        assert stranger.pid == pid, (stranger.pid, pid)
        from limpet.engine import Engine
        with Engine.open({state!r}) as engine:
            c = engine.get("one")
            print(engine.recovery.findings[0].rule, c.status.state.name, c.status.exit_code)
            c.stop(); c.release()
        print("stranger", stranger.poll())
        stranger.kill()
    """)
    told = in_namespace("true", first, "-pfm", "--mount-proc")
    assert told.split() == ["pid-reused", "EXITED", "255", "stranger", "None"]


LIVE_IN_CHILD = (
    "import sys, time\nfrom limpet.engine import Engine\nstate_dir = sys.argv[1] if len(sys.argv) > 1 else ''\n"
    "if state_dir:\n"
    + textwrap.indent(LIVE + "c = make('one', 'sleep', '1000'); c.start(); print(c.status.pid, flush=True)\n", "    ")
    + "    time.sleep(999)\n"
)


def in_namespace(before: str, script: str, *flags: str) -> str:
    """Run `before` in a shell and then Python code in new namespaces; as an ordinary user in a user namespace, too."""
    require_namespaces()
    if os.geteuid() != 0:
        flags = (*flags, "-Ur")
    command = ["unshare", *flags, "--", "sh", "-c", f'{before} && exec "$@"', "sh", sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_status_from_another_pid_namespace_is_unknown(engine_process: Start, state_dir: str) -> None:
    """A pid of another pid namespace means nothing here: Unknown, not signalled, and ours again at home."""
    pid = start_one(engine_process, "sleep", "1000")
    script = textwrap.dedent(f"""
        from limpet.engine import Engine, errors
        with Engine.open({state_dir!r}) as engine:
            c = engine.get("one")
            print(engine.recovery.findings[0].rule, c.state.name, c.status.pid)
            for step in (c.start, c.release, c.stop):
                try: step()
                except errors.InvalidStateError: print("refused")
    """)
    told = in_namespace("true", script, "-pfm", "--mount-proc")
    assert told.split() == ["not-proven", "UNKNOWN", str(pid), "refused", "refused", "refused"]
    with Engine.open(state_dir) as engine:
        assert (rule_of(engine), engine.get("one").state) == ("survivor", ContainerState.RUNNING)


@pytest.mark.usefixtures("namespaces")
def test_proc_that_may_not_be_read(engine_process: Start, state_dir: str) -> None:
    """Without /proc nothing can be proven: Unknown, with its fields kept; recovering again later finds the truth.

    This probe asks no witness, so before Linux 6.9 it finds no proof.
    """
    pid = start_one(engine_process, "sleep", "1000")
    script = textwrap.dedent(f"""
        import subprocess
        from limpet.engine import Engine
        from limpet.recovery import HostProbe
        from limpet.engine import Store, recover
        with Store.open({state_dir!r}) as store:
            subprocess.run(["mount", "-t", "tmpfs", "none", "/proc"], check=True)
            report = recover(store, probe=HostProbe({state_dir!r} + "/containers"))
            s = store.get("one").status
            print(report.findings[0].rule, s.state.name, s.pid)
            subprocess.run(["umount", "/proc"], check=True)
            report = recover(store, probe=HostProbe({state_dir!r} + "/containers"))
            print(report.findings[0].rule, store.get("one").status.state.name)
    """)
    told = in_namespace("true", script, "-m")
    later = ["survivor", "RUNNING"] if has_pidfs() else ["not-proven", "UNKNOWN"]
    assert told.split() == ["no-boot-id", "UNKNOWN", str(pid), *later]


def test_bundle_gone_under_a_running_and_under_stopped_containers(engine_process: Start, state_dir: str) -> None:
    """Without its bundle a running container runs, a created one cannot be vouched for, an ended one has ended."""
    process = engine_process(
        LIVE
        + "a = make('running', 'sleep', '1000'); a.start(); make('created', 'true')\n"
        + "e = make('ended', 'sh', '-c', 'exit 4'); e.start(); e.wait(); say('done'); time.sleep(999)"
    )
    process.read()
    process.kill()
    for name in ("running", "created", "ended"):
        shutil.rmtree(f"{state_dir}/containers/{name}")
    with Engine.open(state_dir) as engine:
        rules = {finding.id: finding.rule for finding in engine.recovery.findings}
        assert rules == {"running": "survivor-no-bundle", "created": "created-no-bundle"}
        assert engine.get("running").status.reason == Reason.BUNDLE_LOST
        assert engine.get("created").state is ContainerState.UNKNOWN
        assert engine.get("ended").status.exit_code == 4
        assert engine.get("created").stop().state is ContainerState.EXITED
        engine.get("created").release()
        engine.get("ended").release()


@pytest.mark.usefixtures("namespaces")
def test_orphan_directories(engine: Engine, state_dir: str, tmp_path: Path) -> None:
    """What is ours, old and unused is removed; unmarked or young is set aside; in use is left; links stay links."""
    containers = Path(state_dir, "containers")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("keep")
    for name in ("old", "young", "unmarked", "in-use", "mounted"):
        (containers / name / "rootfs").mkdir(parents=True)
        if name != "unmarked":
            (containers / name / ".limpet.json").write_text(f'{{"limpet":"container","id":"{name}","node":"local"}}')
    (containers / "unmarked" / "file").write_text("whose?")
    (containers / "link").symlink_to(outside)
    (containers / "old" / "rootfs" / "link").symlink_to(outside)
    os.utime(containers / "old", (1, 1))
    user = subprocess.Popen(["sleep", "1000"], cwd=containers / "in-use")
    is_root = os.geteuid() == 0  # who else may neither mount, nor see what others' processes use
    if is_root:
        subprocess.run(["mount", "-t", "tmpfs", "none", str(containers / "mounted" / "rootfs")], check=True)
    try:
        report = engine.recover()
    finally:
        user.kill()
        user.wait()
        if is_root:
            subprocess.run(["umount", str(containers / "mounted" / "rootfs")], check=True)
    told = {os.path.basename(orphan.path): orphan.disposal.value for orphan in report.orphans}
    expected = {"old": "remove" if is_root else "quarantine", "young": "quarantine", "unmarked": "quarantine"}
    expected |= {"link": "quarantine", "in-use": "leave", "mounted": "leave" if is_root else "quarantine"}
    assert told == expected
    assert not [orphan.error for orphan in report.orphans if orphan.error]
    left = {path.name for path in containers.iterdir()}
    assert left == {name for name, disposal in expected.items() if disposal == "leave"}
    moved = {path.name.rpartition(".")[0] for path in Path(state_dir, "quarantine").iterdir()}
    assert moved == {name for name, disposal in expected.items() if disposal == "quarantine"}
    assert (outside / "precious").read_text() == "keep"


def test_a_row_that_cannot_be_decoded_stops_nobody(engine_process: Start, state_dir: str) -> None:
    """One damaged row is Unknown, with a message, and can be deleted; its neighbours are recovered as ever."""
    import sqlite3

    start_one(engine_process, "sleep", "1000")
    with Engine.open(state_dir) as engine:
        other = engine.create_container(
            {"metadata": {"name": "b"}, "image": {"image": "host"}, "command": ["true"]}, engine.list_sandboxes()[0].id
        )
        engine.get("one").stop(5)
    with sqlite3.connect(f"{state_dir}/store.db") as connection:
        connection.execute("UPDATE container_status SET exit_code = 0 WHERE id = 'one'")
    connection.close()
    with Engine.open(state_dir) as engine:
        status = engine.get("one").status
        assert (status.state, status.reason, rule_of(engine)) == (ContainerState.UNKNOWN, Reason.DAMAGED, "damaged")
        assert engine.get(other.id).state is ContainerState.CREATED
        engine.delete("one")
        assert [c.id for c in engine.list()] == [other.id]


def test_damaged_metadata_stops_nobody(engine_process: Start, state_dir: str) -> None:
    """A container or sandbox whose metadata is damaged can be listed, seen and deleted; the others go on."""
    import sqlite3

    process = engine_process(
        LIVE + "a = make('one', 'sleep', '1000'); a.start(); make('two', 'true')\nsay('x'); time.sleep(9)"
    )
    process.read()
    process.kill()
    with sqlite3.connect(f"{state_dir}/store.db") as raw:
        raw.execute("UPDATE container SET config = replace(config, 'true', 'evil') WHERE id = 'two'")
        raw.execute("UPDATE sandbox SET config = replace(config, 'jobs', 'evil')")
    raw.close()
    Path(state_dir, "owner.json").unlink()
    with Engine.open(state_dir) as engine:
        assert [container.id for container in engine.list()] == ["one", "two"]
        assert engine.list_sandboxes() == []
        (sandbox_id,) = engine.store.sandbox_ids
        with pytest.raises(errors.StoreDamagedError, match="checksum"):
            engine.get_sandbox(sandbox_id)
        with pytest.raises(errors.StoreDamagedError, match="checksum"):
            engine.get("two").start()
        engine.delete("two")
        engine.get("one").stop(5)
        engine.get("one").release()
        engine.delete("one")
        engine.store.delete_sandbox(sandbox_id)
        assert not engine.recovery.orphans


def test_after_an_older_backup_is_restored_a_running_container_is_not_called_created(
    engine_process: Start, state_dir: str, tmp_path: Path
) -> None:
    """A process that the restored record does not know of: Unknown, not CREATED, so that nothing is started twice."""
    process = engine_process(
        LIVE + "c = make('one', 'sleep', '1000'); engine.store.back_up(state_dir + '/../older.db')\n"
        "c.start(); say(c.status.pid); time.sleep(999)"
    )
    pid = int(process.read()[0])
    process.kill()
    for path in Path(state_dir).glob("store.db*"):
        path.unlink()
    Path(state_dir, "owner.json").unlink()
    (tmp_path / "older.db").rename(f"{state_dir}/store.db")

    class Witnessing(ProcessStarter):
        def probe(self, containers_dir: str) -> HostProbe:
            alive = Witnessed(Process.ALIVE)
            return HostProbe(containers_dir, witness=lambda _id, _identity: alive if is_running(pid) else None)

    with Engine.open(state_dir, starter=Witnessing()) as engine:
        assert (rule_of(engine), engine.get("one").state) == ("created-perhaps", ContainerState.UNKNOWN)
        with pytest.raises(errors.InvalidStateError):
            engine.get("one").start()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid), "the process to end")
        engine.recover()
        assert engine.get("one").state is ContainerState.CREATED


def test_recovering_while_sandboxes_and_containers_come_and_go(engine: Engine) -> None:
    """A pass beside other work takes nothing away from it: no directory of a living record is an orphan."""
    import threading

    done = threading.Event()
    trouble: list[object] = []

    def pass_after_pass() -> None:
        while not done.is_set():
            report = engine.recover()
            trouble.extend(orphan for orphan in report.orphans if orphan.error or os.path.lexists(orphan.path))
            trouble.extend(
                finding
                for finding in report.findings
                if finding.problem or (finding.state == "UNKNOWN" and not finding.rule.startswith("new-"))
            )

    thread = threading.Thread(target=pass_after_pass)
    thread.start()
    try:
        for turn in range(25):
            sandbox = engine.create_sandbox({"metadata": {"name": f"s{turn}"}})
            container = engine.create_container(
                {"metadata": {"name": "n"}, "image": {"image": "host"}, "command": ["true"]}, sandbox.id
            )
            container.start()
            container.wait(20)
            container.release()
            container.delete()
            sandbox.delete()
    finally:
        done.set()
        thread.join()
    assert not trouble, [str(one) for one in trouble]
