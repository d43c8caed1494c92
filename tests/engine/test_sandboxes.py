"""A sandbox's life: READY and NOTREADY, stopped durably, removed with its containers, and what the CRI is told."""

import json
import re
import threading
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.engine import Container, Engine, Sandbox, errors
from limpet.engine.lifecycle.stops import finish_stops, try_each
from limpet.recovery.host import read_boot_id
from limpet.schema import ContainerState
from limpet.schema.events import EventKind
from limpet.schema.protobuf_json import to_json
from limpet.schema.sandbox_status import SandboxReason, SandboxState, SandboxStatus, require_namespaces, stop_sandbox
from limpet.testing import FakeStarter
from tests.conftest import EngineProcess, in_thread, is_running, wait_until

CONFIG = {
    "metadata": {"name": "web", "namespace": "default", "uid": "u-1", "attempt": 2},
    "labels": {"app": "web"},
    "annotations": {"note": "n"},
    "linux": {"security_context": {"namespace_options": {"network": 2, "pid": 1}}},
}
IGNORE_TERM = ("sh", "-c", "trap '' TERM; touch ready; while :; do sleep 1000; done")


def config(name: str, *command: str) -> dict[str, object]:
    return {"metadata": {"name": name}, "image": {"image": "host"}, "command": list(command)}


@pytest.fixture
def pod(engine: Engine) -> Sandbox:
    return engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod")


def start(engine: Engine, name: str, *command: str) -> Container:
    container = engine.create_container(config(name, *command), "pod", id=name)
    container.start()
    return container


def start_stubborn(engine: Engine, name: str) -> Container:
    """Start a container that ignores its stop signal."""
    container = start(engine, name, *IGNORE_TERM)
    note = Path(container.metadata.root_dir, "working", "ready")
    wait_until(note.exists, "the trap to be set")
    return container


def test_what_a_sandbox_is_made_with_is_kept(state_dir: str) -> None:
    """Handler, namespaces, addresses, extra and the boot: there at once, over a restart, and in the CRI's words."""
    with Engine.open(state_dir, runtimes={"fast": FakeStarter()}) as engine:
        made = engine.create_sandbox(
            CONFIG,
            id="web",
            runtime_handler="fast",
            namespaces={"network": "/run/netns/web"},
            addresses=["10.0.0.7", "fd00::7"],
            extra={"bridge": "br0"},
        )
        assert (made.state, made.name, made.attempt, made.runtime_handler) == (SandboxState.READY, "web", 2, "fast")
    with Engine.open(state_dir) as engine:
        found = engine.get_sandbox("web")
        status = found.status
        assert (found.extra, found.created_at, found.runtime_handler) == ({"bridge": "br0"}, made.created_at, "fast")
        assert (status.namespaces, status.addresses) == ({"network": "/run/netns/web"}, ("10.0.0.7", "fd00::7"))
        assert status.boot_id == read_boot_id()
        assert json.loads(to_json(found.cri_status(), camel_case=True)) == {
            "id": "web",
            "metadata": {"name": "web", "uid": "u-1", "namespace": "default", "attempt": 2},
            "state": "SANDBOX_READY",
            "createdAt": str(made.created_at),
            "network": {"ip": "10.0.0.7", "additionalIps": [{"ip": "fd00::7"}]},
            "linux": {"namespaces": {"options": {"network": "NODE", "pid": "CONTAINER"}}},
            "labels": {"app": "web"},
            "annotations": {"note": "n"},
            "runtimeHandler": "fast",
        }
        found.stop()
        assert found.cri_status().state.value == "SANDBOX_NOTREADY"


def test_what_cannot_be_kept_is_refused(engine: Engine) -> None:
    """Nothing is left then: neither a record nor a directory."""
    for wrong in (
        {"extra": {"a": object()}},
        {"addresses": [7]},
        {"addresses": "10.0.0.7"},
        {"namespaces": {"network": 7}},
        {"namespaces": {"network": ""}},
        {"namespaces": {"network": "run/netns/web"}},
        {"namespaces": {"net": "/run/netns/web"}},
        {"namespaces": "network"},
    ):
        with pytest.raises(errors.InvalidInputError, match=next(iter(wrong))):
            engine.create_sandbox(CONFIG, id="web", **wrong)
    Path(engine.store.directory.join("sandboxes"), "web").write_text("in the way")
    with pytest.raises(errors.StateDirectoryError):
        engine.create_sandbox(CONFIG, id="web")
    assert engine.list_sandboxes() == []


def test_update_changes_what_is_the_runtimes_own(engine: Engine, pod: Sandbox) -> None:
    """By comparison with the version where that is asked for; what was stopped is never READY again."""
    version = pod.version
    pod.update(lambda old: replace(old, addresses=("10.0.0.8",), extra={"n": 1}), expect=version)
    assert (pod.status.addresses, pod.extra, pod.version) == (("10.0.0.8",), {"n": 1}, version + 1)
    with pytest.raises(errors.VersionConflictError):
        pod.update(lambda old: replace(old, extra={"n": 2}), expect=version)
    pod.stop()
    pod.update(lambda old: replace(old, extra={"n": 3}))
    with pytest.raises(errors.InvalidStateError, match="never becomes READY again"):
        pod.update(lambda old: replace(old, stopped_at=0))
    assert (pod.state, pod.extra) == (SandboxState.NOTREADY, {"n": 3})
    pod.delete()
    with pytest.raises(errors.NotFoundError):
        _ = pod.status
    assert engine.list_sandboxes() == []


def test_nothing_comes_into_a_stopped_sandbox_and_nothing_starts(state_dir: str) -> None:
    """Also after a restart; what was created before stays, and is not started. Stopping again is fine."""
    with Engine.open(state_dir) as engine:
        pod = engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod")
        engine.create_container(config("made", "true"), "pod", id="made")
        running = start(engine, "runs", "sleep", "1000")
        pod.stop(1)
        assert running.state is ContainerState.EXITED
        first = pod.status
        assert (first.state, first.reason) == (SandboxState.NOTREADY, SandboxReason.STOPPED)
    with Engine.open(state_dir) as engine:
        pod = engine.get_sandbox("pod")
        pod.stop(1)
        assert pod.status == first
        with pytest.raises(errors.InvalidStateError, match=r"NOTREADY \(Stopped\)"):
            engine.create_container(config("late", "true"), "pod")
        with pytest.raises(errors.InvalidStateError, match="its sandbox pod is NOTREADY"):
            engine.get("made").start()
        assert engine.get("made").state is ContainerState.CREATED
        assert [container.id for container in engine.list()] == ["made", "runs"]


def test_a_start_that_meets_a_stop_loses(engine: Engine, pod: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process was made before the sandbox was stopped, and is not yet let go: it never runs the program."""
    container = engine.create_container(config("one", "touch", "ran"), "pod", id="one")
    starter = engine.starter
    real, pids = starter.prepare, []

    def stop_meanwhile(launch: object) -> object:
        prepared = real(launch)  # type: ignore[arg-type]
        pids.append(prepared.identity.pid)
        pod.update(lambda old: stop_sandbox(old, SandboxReason.STOPPED, at=5))
        return prepared

    monkeypatch.setattr(starter, "prepare", stop_meanwhile)
    with pytest.raises(errors.InvalidStateError, match="NOTREADY"):
        container.start()
    assert container.state is ContainerState.CREATED
    wait_until(lambda: not is_running(pids[0]), "the process at its gate to end")
    assert not Path(container.metadata.root_dir, "working", "ran").exists()


def test_threads_that_start_while_it_is_stopped_leave_nothing_running(engine: Engine, pod: Sandbox) -> None:
    """Whichever comes first: each container is stopped, or was refused."""
    containers = [engine.create_container(config(f"c{n}", "sleep", "1000"), "pod") for n in range(8)]
    begin = threading.Barrier(len(containers) + 1)

    def run(container: Container) -> None:
        begin.wait()
        container.start()

    threads = [in_thread(partial(run, one)) for one in containers]
    begin.wait()
    pod.stop(5)
    for thread, _ in threads:
        thread.join(60)
    for container, (_, outcome) in zip(containers, threads, strict=True):
        if container.state is ContainerState.CREATED:
            assert isinstance(outcome[0], errors.InvalidStateError)
        else:
            assert container.wait(20).state is ContainerState.EXITED


def test_all_are_stopped_side_by_side(engine: Engine, pod: Sandbox) -> None:
    """Four that have to be killed take the time of one, and each tells that it was asked."""
    containers = [start_stubborn(engine, f"c{n}") for n in range(4)]
    pod.stop(1)
    assert max(one.status.stop_requested_at for one in containers) < min(one.status.finished_at for one in containers)
    assert {one.status.exit_code for one in containers} == {128 + 9}
    assert len({one.status.stop_requested_at for one in containers}) <= 4
    assert all(one.status.stop_requested_at for one in containers)


def test_a_stop_of_a_sandbox_that_is_gone_does_nothing(engine: Engine, pod: Sandbox) -> None:
    """As in the CRI, where stopping and removing may be repeated at any time."""
    pod.delete()
    pod.stop()
    assert pod.remove() is False
    assert pod.remove(force=True) is False
    assert engine.list_sandboxes() == []
    with pytest.raises(errors.InvalidInputError, match="seconds are needed"):
        pod.stop(-1)


def test_remove_without_force_takes_what_has_ended(engine: Engine, pod: Sandbox) -> None:
    """It refuses while something runs or waits to be started, and has changed nothing then."""
    running = start(engine, "runs", "sleep", "1000")
    ended = start(engine, "ended", "true")
    ended.wait(20)
    with pytest.raises(errors.InvalidStateError, match=r"^cannot remove sandbox pod: .* have not ended \(runs\); "):
        pod.remove()
    assert (pod.state, running.state) == (SandboxState.READY, ContainerState.RUNNING)
    running.stop(0)
    engine.create_container(config("made", "true"), "pod", id="made")
    with pytest.raises(errors.InvalidStateError, match=r"have not ended \(made\)"):
        pod.remove()
    pod.stop()  # now it never will be started
    assert pod.remove()
    assert (engine.list(), engine.list_sandboxes()) == ([], [])
    assert not Path(pod.metadata.root_dir).exists()


def test_remove_with_force_takes_all_along(engine: Engine, pod: Sandbox) -> None:
    """Whatever state they are in; their directories are gone, and those of other sandboxes are left."""
    pids = [start_stubborn(engine, f"c{n}").status.pid for n in range(2)]
    engine.create_container(config("made", "true"), "pod")
    engine.add_container(config("added", "true"), "pod")
    other = engine.create_container(config("other", "true"), engine.create_sandbox({"metadata": {"name": "o"}}))
    assert pod.remove(force=True, timeout=0)
    assert not any(map(is_running, pids))
    assert engine.list() == [other]
    for folder, kept in (("containers", [other.id]), ("sandboxes", [other.metadata.sandbox_id])):
        assert [path.name for path in Path(engine.store.directory.join(folder)).iterdir()] == kept


def test_many_are_removed_in_few_transactions(engine: Engine, pod: Sandbox) -> None:
    """All that has ended is released in one, and deleted in one; with a policy, or without an end, each has its own."""
    ended = [start(engine, f"c{n}", "true") for n in range(5)]
    for one in ended:
        one.wait(20)
    engine.create_container(config("made", "true"), "pod", id="made")
    engine.create_container(config("kept", "true"), "pod", id="kept", restart="on-failure").start()
    engine.get("kept").wait(20)
    since = engine.store.revision
    assert pod.remove(force=True)
    with engine.store.watch(since=since, kinds=[EventKind.DELETED]) as watch:
        deleted = list(islice(watch, len(ended) + 2))
    assert {event.id for event in deleted} == {*(one.id for one in ended), "made", "kept"}
    assert len({event.commit for event in deleted}) == 3


def test_one_that_cannot_be_removed_keeps_no_other(engine: Engine, pod: Sandbox) -> None:
    """It stays, released, and is told with the reason; once nothing is in the way, a repetition finishes it."""
    ended = [start(engine, f"c{n}", "true") for n in range(3)]
    for one in ended:
        one.wait(20)
    marker = Path(ended[1].metadata.root_dir, ".limpet.json")
    content = marker.read_text()
    marker.write_text(content.replace("c1", "c9"))  # a directory of somebody else, by what it says
    with pytest.raises(errors.InvalidStateError, match=r"1 of its containers were not removed: .*c1"):
        pod.remove(force=True)
    assert [one.id for one in engine.list()] == ["c1"]
    assert pod.state is SandboxState.NOTREADY
    marker.write_text(content)
    assert pod.remove(force=True)
    assert engine.list() == []


def test_what_is_refused_names_what_was_called(engine: Engine, pod: Sandbox) -> None:
    """An error tells which call was refused, of which sandbox or container, why, and what to do: no inner step."""
    running = start(engine, "runs", "sleep", "1000")
    engine.create_container(config("made", "true"), "pod", id="made")
    two = re.escape("(made and 1 more)")
    calls: list[tuple[Callable[[], object], str]] = [
        (pod.delete, f"cannot delete sandbox pod: it still has containers {two}; delete them first, or remove it .*"),
        (pod.end, f"cannot end sandbox pod: it has containers that have not ended {two}; stop it first, or .*"),
        (pod.remove, f"cannot remove sandbox pod: it has containers that have not ended {two}; stop it first, or .*"),
        (running.release, "cannot release container runs: it is RUNNING; stop it first"),
        (running.delete, "cannot delete container runs: it is RUNNING; stop and release it first"),
        (running.remove, "cannot remove container runs: it is RUNNING; stop it first, or remove it with force"),
    ]
    for call, told in calls:
        with pytest.raises(errors.InvalidStateError, match=f"^{told}$"):
            call()
    assert pod.state is SandboxState.READY
    pod.update(lambda old: replace(old, stopped_at=1))  # without a reason
    calls = [
        (lambda: pod.renew(0), "cannot renew sandbox pod: it is NOTREADY; make another"),
        (
            lambda: engine.create_container(config("late", "true"), "pod"),
            "cannot create container 'late': its sandbox pod is NOTREADY; make another",
        ),
        (engine.get("made").start, "cannot start container made: .*; its sandbox pod is NOTREADY; make another"),
    ]
    for call, told in calls:
        with pytest.raises(errors.InvalidStateError, match=f"^{told}$"):
            call()


def test_what_the_disk_or_a_starter_refuses_names_the_sandbox_and_the_call(engine: Engine, pod: Sandbox) -> None:
    """What is in the way of its directory is told with what was called; the command line and prune tell it, too."""
    moved = Path(f"{pod.metadata.root_dir}.moved")
    Path(pod.metadata.root_dir).rename(moved)
    Path(pod.metadata.root_dir, "another's").mkdir(parents=True)
    for call, verb in ((pod.delete, "delete"), (pod.remove, "remove")):
        with pytest.raises(errors.InvalidStateError, match=rf"^cannot {verb} sandbox pod: .*/pod is not ours; .*move"):
            call()
    pruned = engine.prune(sandboxes=True)
    assert pruned.sandboxes == []
    assert "is not ours" in pruned.problems["pod"]
    Path(pod.metadata.root_dir, "another's").rmdir()
    Path(pod.metadata.root_dir).rmdir()
    moved.rename(pod.metadata.root_dir)
    assert pod.remove()
    Path(f"{pod.metadata.root_dir}2").write_text("in the way")
    with pytest.raises(errors.StateDirectoryError, match=r"^cannot create sandbox pod2: .*/pod2 is not ours; move it"):
        engine.create_sandbox({"metadata": {"name": "two"}}, id="pod2")
    assert engine.list_sandboxes() == []


def test_one_that_is_deleted_amid_a_stop_keeps_no_other(engine: Engine, pod: Sandbox) -> None:
    """Nor what is done to each of many, one after the other; and nobody is told that something went wrong."""
    gone, other = start(engine, "gone", "sleep", "1000"), start(engine, "other", "sleep", "1000")
    begun, problems = pod.begin_stop(20)
    assert (list(begun), problems) == ([gone, other], [])
    gone.wait(20)
    gone.release()
    gone.delete()
    assert finish_stops(engine._runtime, begun) == []
    codes: list[int | None] = []
    assert try_each(lambda one: codes.append(one.exit_code), [gone, other]) == []
    assert codes == [128 + 15]


def test_the_next_engine_goes_on_with_a_stop(engine_process: Callable[[str], EngineProcess], state_dir: str) -> None:
    """Killed while it waits for two that ignore the signal: they get what is left of the time, and no more."""
    process = engine_process(
        "engine = Engine.open(state_dir)\n"
        "pod = engine.create_sandbox({'metadata': {'name': 'pod'}}, id='pod')\n"
        "def make(name):\n"
        f"    given = {config('x', *IGNORE_TERM)!r} | {{'metadata': {{'name': name}}}}\n"
        "    c = engine.create_container(given, 'pod', id=name); c.start()\n"
        "    while not os.path.exists(c.metadata.root_dir + '/working/ready'): time.sleep(0.01)\n"
        "    return c.status.pid\n"
        "import threading\n"
        "pids = [make('a'), make('b')]\n"
        "threading.Thread(target=pod.stop, args=(2,), daemon=True).start()\n"
        "while not all(c.status.stop_requested_at for c in engine.list()): time.sleep(0.01)\n"
        "say(*pids); time.sleep(1000)\n"
    )
    pids = list(map(int, process.read()))
    process.kill()
    with Engine.open(state_dir) as engine:
        assert engine.get_sandbox("pod").state is SandboxState.NOTREADY
        assert [engine.get(key).wait(20).exit_code for key in "ab"] == [128 + 9] * 2
        assert not any(map(is_running, pids))
        assert engine.get_sandbox("pod").remove()


def test_recovery_stops_what_came_in_late(engine_process: Callable[[str], EngineProcess], state_dir: str) -> None:
    """A runtime wrote that the sandbox is stopped, and was killed before its containers were asked."""
    process = engine_process(
        "from limpet.schema.sandbox_status import stop_sandbox\n"
        "engine = Engine.open(state_dir)\n"
        "pod = engine.create_sandbox({'metadata': {'name': 'pod'}}, id='pod')\n"
        f"engine.create_container({config('one', 'sleep', '1000')!r}, 'pod', id='one').start()\n"
        "pod.update(lambda old: stop_sandbox(old, 'Stopped', at=5))\n"
        "say(engine.get('one').status.pid); time.sleep(1000)\n"
    )
    pid = int(process.read()[0])
    process.kill()
    with Engine.open(state_dir) as engine:
        assert engine.get("one").wait(20).exit_code == 128 + 15
        assert not is_running(pid)


def test_a_namespace_of_no_type_there_is(engine: Engine) -> None:
    """A mistyped one would be kept and never joined: the error names it, and the types there are. So does update's.

    One that an earlier version has let in stays, and keeps nobody from changing the rest.
    """
    with pytest.raises(errors.InvalidInputError, match=r"^namespaces 'nett': .* network, ipc, uts, .* or time$"):
        engine.create_sandbox(CONFIG, namespaces={"nett": "/run/netns/web"})
    sandbox = engine.create_sandbox(CONFIG, namespaces={"network": "/run/netns/web"})
    with pytest.raises(errors.InvalidInputError, match=r"^namespaces 'net': there is no such type"):
        sandbox.update(lambda old: replace(old, namespaces={**old.namespaces, "net": "/run/netns/web"}))
    old = SandboxStatus(namespaces={"nett": "/x"})
    require_namespaces({"nett": "/x", "ipc": "/run/ipc"}, old.namespaces)
    with pytest.raises(errors.InvalidInputError, match="'nett'"):
        require_namespaces({"nett": "/y"}, old.namespaces)


def test_given_namespaces_are_not_joined_by_processes(engine: Engine) -> None:
    """Host processes use the host's: the containers' status tells, and `strict` refuses."""
    sandbox = engine.create_sandbox(CONFIG, namespaces={"network": "/run/netns/web"})
    config = {"metadata": {"name": "a"}, "image": {"image": "host"}, "command": ["true"]}
    told = engine.create_container(config, sandbox).status.unapplied
    assert told["sandbox.namespaces"] == "the host's network, pid and IPC namespaces are used"
    with pytest.raises(errors.InvalidInputError, match=r"sandbox\.namespaces"):
        engine.create_container({**config, "metadata": {"name": "b"}}, sandbox, strict=True)
    with pytest.raises(errors.InvalidInputError, match=r"sandbox\.namespaces"):
        engine.create_sandbox({"metadata": {"name": "c"}}, namespaces={"network": "/run/netns/web"}, strict=True)
