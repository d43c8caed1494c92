"""A container's whole life under runc and crun: made, held, let go, seen to end, and nothing left of it."""

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from limpet import Engine, errors
from limpet.engine import Container
from limpet.engine.lifecycle import watcher
from limpet.engine.starters.oci import OciStarter, conmon
from limpet.engine.starters.oci.cgroups import list_directories
from limpet.engine.starters.oci.conmon import end_monitor
from limpet.engine.starters.oci.exits import Program, is_monitor_alive, observe_program, read_program
from limpet.engine.starters.oci.run_directory import list_runs
from limpet.recovery import host
from limpet.recovery.host import open_pidfd, read_stat, wait_for_end
from limpet.schema import ContainerState, Reason
from limpet.testing import open_descriptors
from tests.conftest import is_running, read_output, wait_until
from tests.starters.oci import (
    RUNTIMES,
    busybox_engine,
    config,
    each_runtime,
    load_busybox,
    processes_of,
    runtime_entries,
)
from tests.stops import stop_by_signal


@pytest.fixture
def engine(state_dir: str, tmp_path: Path) -> Iterator[Engine]:
    with busybox_engine(state_dir, tmp_path, {}) as opened:
        yield opened


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_whole_life(engine: Engine, state_dir: str, runtime: str) -> None:
    """created, running, exited with its code and output, released: then neither process, entry nor bundle is left."""
    container = engine.create_container(config("one", "echo hello; echo oops >&2; sleep 0.2; exit 7"), runtime)
    assert container.metadata.starter == runtime
    before = time.time_ns()
    status = container.start()
    assert status.state is ContainerState.RUNNING
    processes = processes_of(state_dir, container.id)
    assert processes.init == status.identity
    assert is_running(processes.monitor.pid)
    status = container.wait(20)
    assert (status.exit_code, status.reason) == (7, Reason.ERROR)
    assert before < status.finished_at <= time.time_ns()
    assert sorted(read_output(container, 2)) == ["hello", "oops"]
    container.release()
    container.delete()
    assert runtime_entries(state_dir, runtime) == []
    assert not is_running(processes.monitor.pid)
    assert os.listdir(f"{state_dir}/containers") == []


@pytest.mark.parametrize("has_pidfs", [True, False])
def test_conmons_end_tells_of_the_containers(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch, has_pidfs: bool
) -> None:
    """What conmon has not written yet when its container ends is known once conmon has ended, without another look.

    One that a signal has stopped goes on; before Linux 6.9, too, where it is known by what it has open.
    """
    monkeypatch.setattr(host, "ask_for_pidfs", lambda: has_pidfs)
    monkeypatch.setattr(watcher, "_ASK_AGAIN_SECONDS", (60.0, 60.0))
    container = engine.create_container(config("one", "sleep 1000"), "crun")
    container.start()
    processes = processes_of(state_dir, container.id)
    stop_by_signal(processes.monitor.pid)
    wait_until(lambda: read_stat(processes.monitor.pid)[0] == b"T", "conmon is stopped")
    os.kill(processes.init.pid, signal.SIGKILL)
    assert container.wait(30).exit_code == 137


def run(engine: Engine, runtime: str, script: str, **fields: Any) -> list[str]:
    """Run a script to its end, and return the lines that it has written, after its exit code."""
    container = engine.create_container(config(f"c{time.monotonic_ns()}", script, **fields), runtime)
    container.start()
    code = container.wait(20).exit_code
    container.release()
    return [str(code), *read_output(container, 0)]


@each_runtime
def test_signals_and_ends(engine: Engine, runtime: str) -> None:
    """stop sends the stop signal, and SIGKILL to what ignores it; a program's own codes are told from it."""
    loop = "echo up; while :; do sleep 0.02; done"
    polite = engine.create_container(config("polite", f"trap 'exit 5' TERM; {loop}"), runtime)
    polite.start()
    wait_until(lambda: read_output(polite, 1), "the trap")
    assert polite.stop(10).exit_code == 5
    stubborn = engine.create_container(config("stubborn", f"trap '' TERM; {loop}"), runtime)
    stubborn.start()
    wait_until(lambda: read_output(stubborn, 1), "the trap")
    assert stubborn.stop(0.2).exit_code == 137
    assert run(engine, runtime, "exit 128") == ["128"]


@each_runtime
def test_an_images_volumes(engine: Engine, tmp_path: Path, runtime: str) -> None:
    """They are there; and with a root that is read-only it is told that they are, too, where nothing is mounted.

    A file may be mounted there as well as a directory.
    """
    load_busybox(engine, tmp_path / "volumes", Volumes={"/data/": {}})
    (tmp_path / "file").write_text("content")
    mount = {"host_path": str(tmp_path / "file"), "container_path": "/data"}
    container = engine.create_container(config("file", "test $(cat /data) = content", mounts=[mount]), runtime)
    container.start()
    assert container.wait(20).exit_code == 0
    read_only: dict[str, Any] = {"linux": {"security_context": {"readonly_rootfs": True}}}
    mounts = [{"host_path": str(tmp_path / "volumes"), "container_path": "/data"}]
    told = []
    for number, fields in enumerate(({}, read_only, {**read_only, "mounts": mounts})):
        container = engine.create_container(config(f"v{number}", "echo > /data/file", **fields), runtime)
        container.start()
        told.append((container.wait(20).exit_code, list(container.status.unapplied)))
    assert told == [(0, []), (1, ["image.volumes"]), (0, [])]


@each_runtime
@pytest.mark.parametrize(
    ("program", "why"),
    [("/bin/private", "permission denied"), ("/bin/counting", "operation not permitted: it counts on CAP_NET_ADMIN")],
)
def test_what_its_user_may_not_execute_was_never_executed(engine: Engine, runtime: str, program: str, why: str) -> None:
    """A StartError, also of a command: the runtime's init ends with 1 then, as a program may."""
    linux: dict[str, Any] = {"linux": {"security_context": {"run_as_username": "web"}}}
    refused = engine.create_container({**config("refused", **linux), "command": [program]}, runtime)
    with pytest.raises(errors.StartError, match=why):
        refused.start()
    assert (refused.status.exit_code, refused.status.message[:10]) == (128, "never ran:")
    container = engine.create_container(config("other", "sleep 60", **linux), runtime)
    container.start()
    with pytest.raises(errors.StartError, match=why):
        container.execute([program])


@each_runtime
def test_what_just_ends_has_lost_no_thread(engine: Engine, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of the runtime that ends may be seen between the end of its first thread and that of the others."""
    looks = itertools.count()
    monkeypatch.setattr(conmon, "_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(conmon, "find_half_dead", lambda _: {(next(looks), b"1")})
    container = engine.create_container(config("one", "exit 3"), runtime)
    container.start()
    assert container.wait(20).exit_code == 3
    assert next(looks) > 0


@each_runtime
def test_what_was_never_executed_is_told(engine: Engine, state_dir: str, runtime: str) -> None:
    """A missing, damaged or orphaned program is a StartError: 128, "never ran", and nothing is left at the runtime.

    A program that ends with 1 at once, as a failing runtime does, was executed.
    """
    for program, why, arguments in (
        ("/bin/nosuch", "no such file", ()),
        ("/bin/garbage", "format error", ()),
        ("/bin/lost", "interpreter", ()),
        ("/bin/short", "format error", ()),
        ("/bin/shorter", "format error", ()),
        ("/bin/nul", "interpreter '/bin/no' is missing", ()),
        ("/bin/itself", "too many levels", ()),
        ("/bin/echo", "argument list too long", ("x" * 1000,) * 3000),  # a quarter of the usual stack is 2 MiB
    ):
        container = engine.create_container({**config(program[5:]), "command": [program, *arguments]}, runtime)
        with pytest.raises(errors.StartError, match=f"(?i){why}"):
            container.start()
        status = container.status
        assert (status.exit_code, status.reason) == (128, Reason.START_ERROR)
        assert status.message.startswith("never ran: ")
        assert runtime_entries(state_dir, runtime) == []
    container = engine.create_container({**config("one"), "command": ["/bin/false"]}, runtime)
    container.start()
    assert (container.wait(20).exit_code, container.status.reason) == (1, Reason.ERROR)


@each_runtime
def test_nothing_of_the_engine_gets_in(
    engine: Engine, runtime: str, monkeypatch: pytest.MonkeyPatch, state_dir: str
) -> None:
    """A container has its image's and its config's environment, and no descriptor, umask or terminal from outside."""
    monkeypatch.setenv("LIMPET_TEST_SECRET", "leaked")
    previous = os.umask(0o077)
    try:
        said = run(
            engine,
            runtime,
            "env | grep -v -e ^PWD -e ^SHLVL; umask; ls /proc/self/fd | grep -v 3; pwd; cat /proc/self/oom_score_adj",
            envs=[{"key": "GIVEN", "value": "yes"}],
            working_dir="/work",
        )
    finally:
        os.umask(previous)
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert sorted(said[:4]) == ["0", "GIVEN=yes", "HOME=/root", path]
    assert said[4:] == ["0022", "0", "1", "2", "/work", "0"]


@each_runtime
def test_a_limit_of_the_engines_ends_no_conmon(engine: Engine, runtime: str) -> None:
    """Its log may grow beyond what the engine's other files may, and it works for as long as it has to.

    The container itself has the limits: they are those of who starts it.
    """
    script = "grep -E 'file size|cpu time' /proc/self/limits; busybox seq 100000 200000; echo end; exit 3"
    container = engine.create_container(config("long", script), runtime)
    numbers = {resource.RLIMIT_FSIZE: 1 << 19, resource.RLIMIT_CPU: 3600}
    before = {number: resource.getrlimit(number) for number in numbers}
    for number, soft in numbers.items():
        resource.setrlimit(number, (soft, before[number][1]))
    try:
        container.start()
    finally:
        for number, limits in before.items():
            resource.setrlimit(number, limits)
    assert (container.wait(20).exit_code, container.status.reason) == (3, Reason.ERROR)
    said = read_output(container, 100_004)
    assert [line.split()[3] for line in said[:2]] == ["3600", str(1 << 19)]
    assert said[-1] == "end"


def test_secrets_are_on_no_disk(engine: Engine, state_dir: str) -> None:
    """runc reads them from memory; crun, which keeps a copy of what it reads, is refused."""
    container = engine.create_container(config("secret", "echo got $TOKEN; sleep 1000"), "runc")
    container.start(secret_env={"TOKEN": "hush-4711"})
    assert read_output(container, 1) == ["got hush-4711"]
    for above, _, names in os.walk(state_dir):
        for name in names:
            path = Path(above, name)
            if path.is_file() and not path.is_symlink() and "images" not in path.parts and name != "secret.log":
                assert b"hush-4711" not in path.read_bytes(), path
    container.stop(0)
    other = engine.create_container(config("other", "true"), "crun")
    with pytest.raises(errors.StartError, match="crun keeps a copy"):
        other.start(secret_env={"TOKEN": "x"})


def test_a_missing_program_is_named_with_its_package(state_dir: str, tmp_path: Path) -> None:
    """What is not installed, too old or something else altogether is told when a container is to be created."""
    fake = tmp_path / "fake"
    fake.mkdir()
    for name, said in (("old", "runc version 1.0.3"), ("rubbish", "\\377\\000 hello")):
        (fake / name).write_text(f"#!/bin/sh\nprintf '{said}\\n'\n")
        (fake / name).chmod(0o755)
    starters = {
        "gone": OciStarter("nosuchrunc"),
        "no-conmon": OciStarter("runc", name="no-conmon", conmon="/nowhere/conmon"),
        "old": OciStarter(str(fake / "old")),
        "rubbish": OciStarter(str(fake / "rubbish")),
    }
    expected = {
        "gone": "nosuchrunc is not installed; on Debian: apt-get install nosuchrunc",
        "no-conmon": "/nowhere/conmon is not installed; on Debian: apt-get install conmon",
        "old": "runc 1.0; 1.1 or newer is needed",
        "rubbish": "neither runc, crun nor conmon",
    }
    with Engine.open(state_dir, runtimes=starters) as engine:
        load_busybox(engine, tmp_path / "image")
        for handler, message in expected.items():
            engine.create_sandbox({"metadata": {"name": handler}}, id=handler, runtime_handler=handler)
            with pytest.raises(errors.UnsupportedError, match=message):
                engine.create_container(config("one"), handler)
        assert engine.list() == []
        engine.create_sandbox({"metadata": {"name": "plain"}}, id="plain")
        plain = engine.create_container({**config("x", "true"), "image": {"image": "host"}}, "plain")
        plain.start()
        assert plain.wait(20).exit_code == 0


def test_ids_and_images_that_a_runtime_cannot_take(engine: Engine) -> None:
    """Ids of other runtimes are written in another way for it; an image without a root file system is refused."""
    for name, odd_id in (("odd", "ns/pod:web@1 ü"), ("dash", "-x")):
        odd = engine.create_container(config(name, "exit 3"), "runc", id=odd_id)
        odd.start()
        assert odd.wait(20).exit_code == 3
    with pytest.raises(errors.InvalidInputError, match="root file system"):
        engine.create_container({**config("host", "true"), "image": {"image": "host"}}, "runc")
    with pytest.raises(errors.InvalidInputError, match="too long for an OCI runtime"):
        engine.create_container(config("long", "true"), "runc", id="ü" * 200)


@each_runtime
def test_names_of_logs(engine: Engine, runtime: str) -> None:
    """What is not ASCII is taken; behind a ':' conmon would write into another file, so that is refused."""
    container = engine.create_container(config("log", "echo written", log_path="ü:/é 中.log"), runtime)
    container.start()
    container.wait(20)
    container.release()
    assert [entry.text for entry in container.read_log()] == [b"written\n"]
    with pytest.raises(errors.InvalidInputError, match="log_path 'a:b'"):
        engine.create_container(config("colon", "true", log_path="a:b"), runtime)


@each_runtime
def test_no_cgroup_is_left(engine: Engine, state_dir: str, runtime: str) -> None:
    """Those of the container are gone after its release, also if the runtime no longer knows the container."""
    container = engine.create_container(config("one", "sleep 1000"), runtime)
    container.start()
    processes = processes_of(state_dir, container.id)
    name = os.path.basename(processes.cgroup)
    directories = [path for _, path in list_directories(processes.cgroups, name)]
    assert directories
    os.mkdir(f"{directories[0]}/inner")
    shutil.rmtree(processes.entry)
    container.stop(0)
    container.release()
    assert [path for path in directories if os.path.exists(path)] == []


def test_a_pid_that_has_become_a_threads(engine: Engine, state_dir: str) -> None:
    """Where the container's pid, or its conmon's, has become a thread's: both have ended, and nothing is signalled."""
    container = engine.create_container(config("one", "sleep 1000"), "runc")
    container.start()
    processes = processes_of(state_dir, container.id)
    is_over = threading.Event()
    thread = threading.Thread(target=is_over.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        gone = replace(
            processes,
            init=replace(processes.init, pid=thread.native_id),
            monitor=replace(processes.monitor, pid=thread.native_id),
        )
        assert observe_program(gone) is Program.ENDED
        assert not is_monitor_alive(gone)
        (run,) = list_runs(os.path.join(state_dir, "containers", container.id))
        run.write_processes(gone)
        starter = OciStarter("runc")
        starter.open(state_dir)
        assert starter.signal(container.id, gone.init, 9) == 0
        run.write_processes(processes)
        pids = Path(run.join("conmon-pidfile"))
        right = pids.read_text()
        pids.write_text(str(thread.native_id))
        assert end_monitor(run)
        pids.write_text(right)
    finally:
        is_over.set()
        thread.join()


@each_runtime
@pytest.mark.parametrize("action", ["SCMP_ACT_KILL", "SCMP_ACT_ERRNO"])
def test_a_seccomp_profile_that_forbids_all(shared: Engine, tmp_path: Path, runtime: str, action: str) -> None:
    """The start says soon that it may be the profile: a thread that is killed left runc waiting until its deadline."""
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"defaultAction": action}))
    seccomp = {"profile_type": "Localhost", "localhost_ref": str(profile)}
    fields = {"linux": {"security_context": {"seccomp": seccomp}}}
    one = shared.create_container(config(f"{runtime}{action}", "true", **fields), runtime)
    began = time.monotonic()
    with pytest.raises(errors.StartError, match=f"perhaps its seccomp profile '{profile}' forbids"):
        one.start()
    assert time.monotonic() - began < 10
    one.release()


@each_runtime
@pytest.mark.parametrize("is_over", [True, False])
def test_one_that_ends_while_it_is_identified(
    shared: Engine, runtime: str, is_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start says that it has ended, not which file of /proc is gone: that is so a moment before its end."""

    def read_late(pid: int) -> tuple[int, int]:
        if not is_over:  # what the kernel says once its memory is freed
            threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"/proc/{pid}/exe")
        os.kill(pid, signal.SIGKILL)
        with open_pidfd(pid) as pidfd:
            assert wait_for_end(pidfd, 20)
        return read_program(pid)

    monkeypatch.setattr("limpet.engine.starters.oci.starts.read_program", read_late)
    one = shared.create_container(config(f"ends{runtime}{is_over}", "true"), runtime)
    before = len(open_descriptors())
    with pytest.raises(errors.StartError, match="its first process ended before its program was executed"):
        one.start()
    assert len(open_descriptors()) == before
    one.release()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"process": []}', b"\xff", b"[" * 100_000])
def test_a_damaged_config_is_refused(shared: Engine, content: bytes) -> None:
    """A config.json that is not what was written is named, and the container can be removed all the same."""
    one = shared.create_container(config("damaged", "true"), "runc")
    Path(one.metadata.root_dir, "config.json").write_bytes(content)
    with pytest.raises(errors.StateDirectoryError, match=r"config\.json is damaged"):
        one.start()
    one.remove(force=True)


@each_runtime
def test_a_program_on_a_mount(shared: Engine, tmp_path: Path, runtime: str) -> None:
    """One that ends with 1 has run, also where the image has no such interpreter, or another file in its place.

    Nobody could tell that from the image alone, and it was said that it never ran.
    """
    for name in ("sh", "false"):
        shutil.copy(shutil.which("busybox") or "", tmp_path / name)
    mounts = [{"container_path": "/opt/x", "host_path": str(tmp_path)}]

    def put_in(container: Container) -> None:
        root = Path(container.metadata.root_dir, "rootfs")
        (root / "opt/x").mkdir(parents=True)
        for path, text in (("work/script", "#!/opt/x/sh\nexit 1\n"), ("opt/x/false", "garbage")):
            (root / path).write_text(text)
            (root / path).chmod(0o755)
        (root / "work/link").symlink_to("/opt/x")
        (root / "work/sh").symlink_to("/opt/x/sh")  # which the image has not

    for number, command in enumerate((["/work/script"], ["/work/link/false"])):
        one = shared.create_container(config(f"m{number}{runtime}", command=command, mounts=mounts), runtime)
        put_in(one)
        one.start()
        assert one.wait(20).exit_code == 1
        one.release()
    long = shared.create_container(config(f"m{runtime}", "sleep 1000", mounts=mounts), runtime)
    put_in(long)
    long.start()
    assert long.execute(["/work/script"]).code == 1
    assert long.execute(["/work/sh", "-c", "exit 1"]).code == 1
    long.stop(0)
    long.release()
