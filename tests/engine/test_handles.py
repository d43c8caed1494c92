"""What users do with containers and sandboxes beside running them: find, compare, remove, prune."""

import asyncio
import copy
import gc
import inspect
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from limpet.engine import Container, Engine, Sandbox, errors
from limpet.engine.aio import AsyncEngine
from limpet.engine.control import ask_live
from limpet.engine.control.requests import Stop, Wait
from limpet.engine.inspection import Snapshot
from limpet.engine.lifecycle.prune import prune
from limpet.recovery.thread import Thread
from limpet.schema import ContainerState
from limpet.schema.layout import MARKER_FILE
from limpet.schema.status import Status
from tests import oci_layout
from tests.conftest import in_thread, is_running, wait_until


def config(name: str, *command: str, **fields: object) -> dict[str, object]:
    return {"metadata": {"name": name}, "image": {"image": "host"}, "command": list(command), **fields}


@pytest.fixture
def pod(engine: Engine) -> Sandbox:
    return engine.create_sandbox({"metadata": {"name": "pod", "uid": "u", "namespace": "n"}}, id="p0d")


async def stop_in_task(engine: Engine, container: Container) -> Status:
    return await (await AsyncEngine(engine).get(container.id)).stop(20)


WAYS: dict[str, Callable[[Engine, Container], Status]] = {
    "wait": lambda _, container: container.wait(20),
    "wait of a task": lambda _, container: asyncio.run(container.wait_async(20)),
    "wait of a command": lambda engine, container: ask_live(engine.store.directory.path, Wait(id=container.id)).status,
    "stop": lambda _, container: container.stop(20),
    "stop of a task": lambda engine, container: asyncio.run(stop_in_task(engine, container)),
    "stop of a command": lambda engine, container: (
        ask_live(engine.store.directory.path, Stop(id=container.id))[0].status
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_who_waits_is_told_how_it_ended_though_it_is_deleted_at_once(engine: Engine, pod: Sandbox, way: str) -> None:
    """Who is slow to wake up finds the container gone; the log of changes has its last status."""
    program = "trap asked=1 TERM; touch up; until [ -e go ]; do sleep 0.01; done; exit 7"
    container = engine.create_container(config("web", "sh", "-c", program), pod)
    working = Path(container.metadata.root_dir, "working")
    removed: list[object] = []

    def remove() -> None:
        if container.status.finished_at:
            thread, outcome = in_thread(container.remove)
            thread.join(20)
            removed.extend(outcome)

    with container.notify(remove):  # it is told before who begins to wait after it
        container.start()
        wait_until((working / "up").exists, "it to be ready")
        thread, outcome = in_thread(lambda: WAYS[way](engine, container))
        wait_until(lambda: len(engine._runtime._bells.get(container.id, ())) > 1, "somebody to wait")
        (working / "go").touch()
        thread.join(20)
    assert removed == [True]
    assert [each.exit_code if isinstance(each, Status) else each for each in outcome] == [7]
    with pytest.raises(errors.NotFoundError):
        container.wait()


@pytest.mark.parametrize("wrong", [[("A", "b")], "A=b", 7], ids=repr)
def test_arguments_of_another_type_are_refused(engine: Engine, pod: Sandbox, tmp_path: Path, wrong: object) -> None:
    """An error of limpet's own, which names the argument, and shows no secret."""
    container = engine.create_container(config("web", "true"), pod)
    asked = {"config": {"metadata": {"name": "x"}}}
    with pytest.raises(errors.InvalidInputError, match="secret_env") as caught:
        container.start(secret_env=wrong)  # type: ignore[arg-type]
    assert "b'" not in str(caught.value)
    with pytest.raises(errors.InvalidInputError, match="runtime_handler"):
        engine.create_sandbox(**asked, runtime_handler=wrong)  # type: ignore[arg-type]
    with pytest.raises(errors.LimpetError, match="mount type"):
        engine.create_container(config("other", "true"), pod, mount_type=wrong)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidInputError, match="addresses"):
        engine.create_sandbox(**asked, addresses=wrong if isinstance(wrong, str) else 7)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidInputError, match="inherit_env"):
        Engine.open(tmp_path, inherit_env=wrong)  # type: ignore[arg-type]
    assert container.start().state is ContainerState.RUNNING


@pytest.mark.parametrize("entry", ["", "=x", "A\0=x"])
def test_an_images_variable_that_no_environment_can_hold(
    engine: Engine, pod: Sandbox, tmp_path: Path, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image of an older version's store may have one: it is refused at create, not by Python, or by the runtime."""
    monkeypatch.setattr("limpet.engine.images.directory.require_runnable", lambda _: None)
    layout = oci_layout.Layout(tmp_path / "layout")
    layout.add_image([oci_layout.tar(oci_layout.member("a", b"x"))], "a:1", configuration={"config": {"Env": [entry]}})
    engine.images.load(str(layout.path))
    with pytest.raises(errors.InvalidInputError, match="the image's environment variable"):
        engine.create_container(config("web", "/a", image={"image": "a:1"}), pod)


def test_more_groups_than_a_process_can_have_are_refused_at_create(engine: Engine, pod: Sandbox) -> None:
    context = {"security_context": {"supplemental_groups": list(range(65_537))}}
    with pytest.raises(errors.InvalidInputError, match="supplemental_groups: 65,537"):
        engine.create_container(config("web", "true", linux=context), pod)


def test_what_a_container_says_of_itself(engine: Engine, pod: Sandbox) -> None:
    """Name, labels, sandbox and exit code are told; several objects of one container are equal."""
    container = engine.create_container(config("web", "sh", "-c", "exit 3", labels={"tier": "a"}), pod)
    assert (container.name, container.labels, container.sandbox_id) == ("web", {"tier": "a"}, "p0d")
    codes = [container.exit_code]
    container.start()
    container.wait(20)
    assert [*codes, container.exit_code] == [None, 3]
    again = engine.get("web")
    assert again is not container
    assert {again, container, *engine.list()} == {container}
    assert container != pod
    assert {engine.get_sandbox("pod"), pod} == {pod}
    missing = engine.create_container(config("missing", "/nowhere/to/be/found"), pod)
    with pytest.raises(errors.StartError):
        missing.start()
    assert missing.exit_code is None


def test_labels_that_are_read_are_the_callers_own(engine: Engine) -> None:
    """Who changes them, as for the config of another container, changes those of none."""
    pod = engine.create_sandbox({"metadata": {"name": "labelled"}, "labels": {"app": "web"}})
    job = engine.create_container(config("job", "true", labels={"app": "web"}), pod)
    for handle in (job, pod):
        labels: Any = handle.labels
        labels["app"] = "other"
    seen = [job.labels, engine.get(job.id).labels, pod.labels, engine.get_sandbox(pod.id).labels]
    assert seen == [{"app": "web"}] * 4
    pod.remove(force=True)


def test_deleting_what_is_gone_does_nothing(engine: Engine, pod: Sandbox) -> None:
    """Delete, release and remove are repeated without an error, and say whether there was something."""
    container = engine.create_container(config("one", "true"), pod, id="one-1")
    neighbour = engine.create_container(config("two", "true"), pod, id="one-10")
    container.release()
    assert container.delete() is True
    assert container.delete() is False
    assert container.release().released
    assert container.remove() is False
    assert container.remove(force=True) is False
    assert engine.delete(container.id) is False
    assert engine.store.delete(container.id) is False
    assert neighbour.state is ContainerState.CREATED
    assert "deleted" in repr(container)
    with pytest.raises(errors.InvalidStateError, match="it has containers that have not ended"):
        pod.remove()
    neighbour.remove()
    assert (pod.delete(), pod.delete(), pod.remove(force=True)) == (True, False, False)
    assert engine.store.delete_sandbox(pod.id) is False


def test_remove_with_force_ends_what_runs(engine: Engine, pod: Sandbox) -> None:
    """Without force a running container stays; with it, its processes, its bundle and its record are gone."""
    container = engine.create_container(config("one", "sleep", "600"), pod)
    pid = container.start().pid
    with pytest.raises(errors.InvalidStateError, match="RUNNING"):
        container.remove()
    assert is_running(pid)
    assert container.remove(force=True, timeout=0)
    assert not is_running(pid)
    assert not Path(container.metadata.root_dir).exists()
    assert engine.list() == []


def test_removing_a_sandbox_takes_its_containers_along(engine: Engine, pod: Sandbox) -> None:
    """With force all its containers are stopped side by side and removed, whatever state they are in."""
    containers = [
        engine.create_container(config(f"c{n}", "sh", "-c", "trap '' TERM; sleep 600"), pod) for n in range(4)
    ]
    pids = [container.start().pid for container in containers[:3]]
    engine.add_container(config("never-made", "true"), pod)
    other = engine.create_container(config("other", "true"), engine.create_sandbox({"metadata": {"name": "other"}}))
    began = time.monotonic()
    assert pod.remove(force=True, timeout=0.5)
    assert time.monotonic() - began < 3 * 0.5 + 5
    assert not any(map(is_running, pids))
    assert engine.list() == [other]
    assert not Path(pod.metadata.root_dir).exists()


def test_prune_removes_what_has_ended(engine: Engine, pod: Sandbox) -> None:
    """Ended containers go, what runs or was not started stays; sandboxes without containers go if that is asked for."""
    ended, running, created = (
        engine.create_container(config(name, *command), pod)
        for name, command in (("ended", ["true"]), ("running", ["sleep", "600"]), ("created", ["true"]))
    )
    ended.start()
    running.start()
    ended.wait(20)
    empty = engine.create_sandbox({"metadata": {"name": "empty"}})
    assert engine.prune() == ([ended.id], [], {})
    assert engine.prune(sandboxes=True) == ([], [empty.id], {})
    assert set(engine.list()) == {running, created}
    assert engine.list_sandboxes() == [pod]


def test_prune_passes_over_what_is_deleted_meanwhile(engine: Engine, pod: Sandbox) -> None:
    """As a restart policy deletes older attempts; the others go."""
    listed = [engine.create_container(config(name, "true"), pod) for name in ("a", "b")]
    for one in listed:
        one.start()
        one.wait(20)
    listed[0].remove()
    assert prune(engine._runtime, listed, ()) == ([listed[1].id], [], {})


def test_prune_tells_what_it_could_not_remove(engine: Engine, pod: Sandbox) -> None:
    """One that cannot be removed keeps no other, and is told with the reason."""
    ended = [engine.create_container(config(name, "true"), pod) for name in ("a", "b")]
    for container in ended:
        container.start()
        container.wait(20)
    marker = Path(ended[0].metadata.root_dir) / MARKER_FILE
    for path in (marker, marker.with_name("config.json")):
        path.unlink(missing_ok=True)
    (marker.with_name("mine")).write_text("not ours any more")
    pruned = engine.prune()
    assert pruned.containers == [ended[1].id]
    assert "not ours" in pruned.problems[ended[0].id]


def test_get_or_create_makes_one(engine: Engine) -> None:
    """Of many threads that ask for the same sandbox one makes it, and all get it; another attempt is another one."""
    names = {"name": "pod", "uid": "u", "namespace": "n"}
    found: list[Sandbox] = []
    threads = [
        threading.Thread(target=lambda: found.append(engine.get_or_create_sandbox({"metadata": names})))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 8
    assert engine.list_sandboxes() == [found[0]]
    assert set(found) == {found[0]}
    assert engine.get_or_create_sandbox({"metadata": {**names, "attempt": 1}}, id="next").id == "next"
    for sandbox in engine.list_sandboxes():
        if sandbox.metadata.config.metadata.name == names["name"]:
            sandbox.stop()  # as a reboot does
    again = engine.get_or_create_sandbox({"metadata": names}, id="after")
    assert (again.id, again.attempt) == ("after", 2)
    assert engine.get_or_create_sandbox({"metadata": names}) == again


def test_a_sandbox_is_given_in_each_way(engine: Engine, pod: Sandbox) -> None:
    """create_container takes the sandbox itself, its id, its name, and a unique beginning of its id."""
    places: tuple[Sandbox | str, ...] = (pod, pod.id, "pod", "p0")
    made = [engine.create_container(config(f"c{number}", "true"), place) for number, place in enumerate(places)]
    assert {container.sandbox_id for container in made} == {pod.id}
    for text in (pod.id, "pod", "p0"):
        assert len(engine.list(sandbox_id=text, state="created")) == 4


def test_a_sandbox_that_is_given_stands_for_the_one_of_its_id_here(
    engine: Engine, pod: Sandbox, tmp_path: Path
) -> None:
    """A handle of another engine, or of one that was removed, brings neither its log directory nor its starter."""
    logged = config("job", "echo", "here", log_path="job.log")
    with Engine.open(tmp_path / "other") as other:
        foreign = other.create_sandbox({"metadata": {"name": "other"}}, id="only-there")
        with pytest.raises(errors.NotFoundError, match="only-there"):
            engine.create_container(logged, foreign)
        foreign = other.create_sandbox({"metadata": {"name": "pod"}}, id=pod.id)
        job = engine.create_container(logged, foreign)
        assert job.start().pid
        job.wait(timeout=10)
        assert [entry.text for entry in job.read_log()] == [b"here\n"]
        assert not os.path.exists(foreign.log_directory)
    job.remove()
    pod.delete()
    engine.create_sandbox({"metadata": {"name": "anew"}, "log_directory": str(tmp_path / "logs")}, id=pod.id)
    again = engine.create_container(logged, pod)
    assert again.metadata.log_path == str(tmp_path / "logs/job.log")
    engine.get_sandbox(pod.id).remove(force=True)


def test_a_strict_sandbox_is_refused_for_what_no_container_gets(engine: Engine) -> None:
    """With strict, a sandbox that asks for what is not done is refused by the fields' names, and not made."""
    names = {"name": "pod", "uid": "u", "namespace": "n"}
    asks = {"metadata": names, "port_mappings": [{"container_port": 80}], "linux": {"sysctls": {"a": "b"}}}
    with pytest.raises(errors.InvalidInputError, match=r"sandbox\.port_mappings.*sandbox\.sysctls"):
        engine.create_sandbox(asks, strict=True)
    assert engine.list_sandboxes() == []
    plain = engine.create_sandbox({"metadata": names, "dns_config": {"servers": ["10.0.0.1"]}}, strict=True)
    assert engine.get_sandbox("pod") == plain
    assert engine.create_sandbox({**asks, "metadata": {**names, "attempt": 1}}).name == "pod"


def test_history_and_backup(engine: Engine, pod: Sandbox, tmp_path: Path) -> None:
    """The engine tells a container's history, and makes a backup."""
    container: Container = engine.create_container(config("one", "true"), pod)
    assert [one.state.name for one in engine.history("one")] == ["UNKNOWN", "CREATED"]
    assert engine.history(container.id) == engine.history("one")
    engine.back_up(str(tmp_path / "copy.db"))
    assert (tmp_path / "copy.db").stat().st_size > 0
    with pytest.raises(errors.StoreError, match="null byte"):
        engine.back_up(str(tmp_path / "cut\0off"))
    assert not (tmp_path / "cut").exists()


def test_an_engine_without_a_thread_to_watch_leaves_nothing_open(
    state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what is wanting, and the next opening, with one, works."""

    def fail(thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    Engine.open(state_dir).close()
    before = sorted(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(Thread, "start", fail)
        with pytest.raises(errors.ResourcesError, match="no thread"):
            Engine.open(state_dir)
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before
    Engine.open(state_dir).close()


def find_calls(handle: Container | Sandbox) -> Iterator[Callable[[], object]]:
    """Return the public methods that take nothing, and properties."""
    for name in sorted(name for name in dir(type(handle)) if not name.startswith("_")):
        found = inspect.getattr_static(handle, name)
        needed = [
            each.name
            for each in (inspect.signature(found).parameters.values() if inspect.isfunction(found) else ())
            if each.default is each.empty and each.name != "self"
        ]
        if not needed and not inspect.iscoroutinefunction(found):
            call: Callable[[], object] = partial(getattr, handle, name)
            yield (lambda call=call: call()()) if inspect.isfunction(found) else call  # type: ignore[misc]


def test_handles_of_a_closed_engine_do_nothing_to_the_next_ones(state_dir: str) -> None:
    """Whatever is called: no process is ended, no file removed, nothing written; nobody waits."""
    with Engine.open(state_dir) as engine:
        pod = engine.create_sandbox({"metadata": {"name": "pod"}})
        runs, ended, made = (
            engine.create_container(config(name, *command, log_path=f"{name}.log"), pod)
            for name, command in (("runs", ("sleep", "1000")), ("ended", ("true",)), ("made", ("true",)))
        )
        runs.start()
        ended.start()
        ended.wait(20)
    with Engine.open(state_dir) as later:

        def look() -> list[object]:
            files = [(path, names) for path, _, names in os.walk(state_dir) if "keeper" not in path]
            records = [(each.id, each.status) for each in later.store.list()]
            return [*records, *files, later.store.revision]

        before = look()
        calls = [call for handle in (runs, ended, made, pod) for call in find_calls(handle)]
        assert len(calls) > 100
        for call in calls:
            with suppress(errors.LimpetError):
                call()
        assert look() == before
        later.get_sandbox(pod.id).remove(force=True, timeout=0)


def test_a_handle_is_shown_once_its_engine_is_closed(state_dir: str) -> None:
    """A log line or a debugger that shows it does not raise."""
    with Engine.open(state_dir) as engine:
        pod = engine.create_sandbox({"metadata": {"name": "pod"}})
        container = engine.create_container(config("c", "true"), pod, id="c")
    assert repr(container) == "<Container c: closed>"


def test_what_belongs_to_a_process_is_not_handed_to_another(engine: Engine, pod: Sandbox) -> None:
    """As to one of multiprocessing: that says what to hand over instead; a copy is the same, also within a dict."""
    container = engine.create_container(config("one", "true"), pod)
    front = AsyncEngine(engine)

    async def find() -> list[object]:
        return [await front.get("one"), await front.get_sandbox("p0d"), front.store.watch()]

    with Snapshot.open(engine.store.directory.path) as snapshot:
        store = engine.store
        bound = [engine, container, pod, store, store.get("one"), store.watch(), snapshot, front, front.store]
        for one in bound + asyncio.run(find()):
            with pytest.raises(TypeError, match=f"{type(one).__name__} belongs to this process .* paths and ids"):
                pickle.dumps(one)
            assert copy.copy(one) is copy.deepcopy({"one": one})["one"] is one
    assert pickle.loads(pickle.dumps(container.status)) == container.status
