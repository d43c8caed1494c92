"""What sandboxes of an OCI runtime hold: namespaces without a process, files, a pid namespace, and nothing left."""

import errno
import fcntl
import glob
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from limpet import Engine, errors
from limpet.engine import Container, Sandbox
from limpet.engine.starters.contract import Launch
from limpet.engine.starters.oci import pin, sandboxes, starter, starts
from limpet.engine.starters.oci.root import RuntimeRoot
from limpet.engine.starters.oci.run_directory import Processes
from limpet.engine.starters.oci.sandboxes import PINS
from limpet.engine.starters.oci.target import open_target
from limpet.engine.state.descriptors import close_all
from limpet.recovery import host
from limpet.recovery.host import open_pidfd, read_boot_id, read_stat, wait_for_end
from limpet.recovery.mounts import find_mounts
from limpet.schema import ContainerState, ProcessIdentity
from limpet.schema.sandbox_status import SandboxState
from tests.conftest import EngineProcess, is_running, read_output, wait_until
from tests.starters.oci import (
    busybox_engine,
    config,
    each_runtime,
    end_everything,
    load_busybox,
    open_engine,
    processes_of,
)
from tests.stops import stop_by_signal

SANDBOX: dict[str, Any] = {
    "metadata": {"name": "pod"},
    "hostname": "pod-one",
    "dns_config": {"servers": ["192.0.2.53"]},
    "linux": {"sysctls": {"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1"}},
}
LINKS = "for n in net ipc uts; do ls -l /proc/self/ns/$n | grep -o '[a-z]*:.[0-9]*.$'; done"


@pytest.fixture
def engine(state_dir: str, tmp_path: Path) -> Iterator[Engine]:
    with busybox_engine(state_dir, tmp_path) as opened:
        yield opened


def pins_of(sandbox: Sandbox) -> str:
    return os.path.dirname(sandbox.status.namespaces["network"])


def run(engine: Engine, sandbox: Sandbox, name: str, script: str, options: dict[str, Any] | None = None) -> list[str]:
    linux = {"linux": {"security_context": {"namespace_options": options}}} if options is not None else {}
    container = engine.create_container(config(name, script, **linux), sandbox)
    container.start()
    container.wait(20)
    return [*read_output(container, 0), *sorted(container.status.unapplied)]


@each_runtime
def test_containers_share_what_the_sandbox_holds(engine: Engine, runtime: str) -> None:
    """Network, IPC with its /dev/shm, hostname, sysctls and /etc are the sandbox's; it goes with the sandbox."""
    sandbox = engine.create_sandbox(SANDBOX, runtime_handler=runtime)
    pins = pins_of(sandbox)
    assert set(sandbox.status.namespaces) == {"network", "ipc", "uts"}
    held = [f"{name}:[{os.stat(sandbox.status.namespaces[kind]).st_ino}]" for kind, name in
            (("network", "net"), ("ipc", "ipc"), ("uts", "uts"))]  # fmt: skip
    assert run(engine, sandbox, "one", f"{LINKS}; echo here > /dev/shm/x; echo 192.0.2.1 y >> /etc/hosts", {}) == held
    script = (
        "cat /dev/shm/x; grep -c 192.0.2.1 /etc/hosts; hostname; grep nameserver /etc/resolv.conf;"
        " cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shm_rmid_forced; busybox ping -c 1 127.0.0.1 >/dev/null;"
        " echo $?"
    )
    assert run(engine, sandbox, "two", script, {}) == [
        "here", "1", "pod-one", "nameserver 192.0.2.53", "1", "1", "0",
    ]  # fmt: skip
    other = engine.create_sandbox({"metadata": {"name": "other"}}, runtime_handler=runtime)
    assert run(engine, other, "three", "ls /dev/shm") == []
    sandbox.remove(force=True)
    assert not os.path.exists(pins)
    assert find_mounts(pins) == []


def test_of_the_host(engine: Engine) -> None:
    """A sandbox on the host's network and IPC holds none of these, and what asks for the sandbox's gets the host's."""
    options = {"network": "NODE", "ipc": "NODE", "pid": "CONTAINER"}
    linux = {"security_context": {"namespace_options": options}}
    sandbox = engine.create_sandbox({"metadata": {"name": "host"}, "linux": linux}, runtime_handler="runc")
    assert sandbox.status.namespaces == {}
    assert run(engine, sandbox, "one", LINKS, {}) == [os.readlink(f"/proc/self/ns/{n}") for n in ("net", "ipc", "uts")]


def test_a_pid_namespace_is_shared(engine: Engine) -> None:
    """One that is asked for has a first process, which reaps; it ends with the sandbox, and with it all in it."""
    linux = {"security_context": {"namespace_options": {"pid": "POD"}}}
    sandbox = engine.create_sandbox({"metadata": {"name": "shared"}, "linux": linux}, runtime_handler="runc")
    long = engine.create_container(config("long", "sleep 1000"), sandbox)
    long.start()
    said = run(engine, sandbox, "look", "cat /proc/1/comm; cat /proc/[0-9]*/comm | grep -c ^sleep")
    assert said == ["limpet-pause", "1"]
    (first,) = find_first(os.stat(sandbox.status.namespaces["pid"]).st_ino)
    used = sum(map(int, read_stat(first)[11:13]))
    time.sleep(0.3)
    assert sum(map(int, read_stat(first)[11:13])) - used <= 2, "it sleeps while nobody ends"
    sandbox.remove(force=True)
    wait_until(lambda: not is_running(first), "the namespace's first process to be gone")


@each_runtime
@pytest.mark.parametrize(
    ("kind", "path"), [("network", "/etc/passwd"), ("ipc", "/proc/self/ns/net"), ("network", "/etc")]
)
def test_a_path_that_is_no_namespace(engine: Engine, runtime: str, kind: str, path: str) -> None:
    """Whatever a runtime says of it, the StartError names the path, and what it should be."""
    given = {"network": "/proc/self/ns/net", "ipc": "/proc/self/ns/ipc", "uts": "/proc/self/ns/uts", kind: path}
    sandbox = engine.create_sandbox({"metadata": {"name": "given"}}, runtime_handler=runtime, namespaces=given)
    with pytest.raises(errors.StartError, match=f"'{path}' is no {kind} namespace"):
        run(engine, sandbox, "one", "true", {})


def test_a_namespace_that_none_would_join_is_refused(engine: Engine) -> None:
    """Of a type that a container has for itself, the host's by the config's own word, or another sandbox's."""
    other = engine.create_sandbox({"metadata": {"name": "other"}}, runtime_handler="runc")
    on_host = {"security_context": {"namespace_options": {"network": "NODE"}}}
    for given, linux, why in (
        ({"user": "/proc/self/ns/user"}, {}, "'user': an OCI container joins none .* network, uts, ipc or pid"),
        ({"uts": "/proc/self/ns/uts"}, on_host, r"'uts': the sandbox's config asks for the host's \(network NODE\)"),
        ({"ipc": other.status.namespaces["ipc"]}, {}, "'ipc': '/run/limpet/.*' is held for another sandbox"),
    ):
        with pytest.raises(errors.InvalidInputError, match=f"^namespaces {why}"):
            engine.create_sandbox(
                {"metadata": {"name": "given"}, "linux": linux}, runtime_handler="runc", namespaces=given
            )
    assert engine.list_sandboxes() == [other]


@pytest.mark.parametrize("kind", ["network", "ipc", "pid"])
def test_a_sandbox_has_no_target(engine: Engine, kind: str) -> None:
    """There is no other container whose namespace it could have; its containers would get their own."""
    linux = {"security_context": {"namespace_options": {kind: "TARGET", "target_id": "one"}}}
    with pytest.raises(errors.InvalidInputError, match=f"namespace_options.{kind} TARGET: a sandbox can have no other"):
        engine.create_sandbox({"metadata": {"name": "bad"}, "linux": linux}, runtime_handler="runc")
    assert engine.list_sandboxes() == []


def test_users_of_its_own_are_told(engine: Engine) -> None:
    """As they are of a container: they are those of the host."""
    options = {"userns_options": {"mode": "POD", "uids": [{"host_id": 1, "container_id": 0, "length": 1}]}}
    asked = {"metadata": {"name": "users"}, "linux": {"security_context": {"namespace_options": options}}}
    sandbox = engine.create_sandbox(asked, runtime_handler="runc")
    container = engine.create_container(config("told", "true"), sandbox)
    assert dict(container.status.unapplied) == {
        "sandbox.namespace_options.userns_options": "its users are those of the host"
    }
    with pytest.raises(errors.InvalidInputError, match="userns_options"):
        engine.create_sandbox({**asked, "metadata": {"name": "strict"}}, runtime_handler="runc", strict=True)


def test_strict_knows_what_the_sandbox_holds(engine: Engine) -> None:
    """A container that asks for its sandbox's namespaces was refused, though it gets them."""
    sandbox = engine.create_sandbox({"metadata": {"name": "one"}}, runtime_handler="runc", strict=True)
    options = {"linux": {"security_context": {"namespace_options": {"network": "POD", "pid": "CONTAINER"}}}}
    engine.create_container(config("strict", "true", **options), sandbox, strict=True)


@pytest.mark.parametrize("gone", ["etc/hosts", ""])
def test_files_that_somebody_removed_are_made_again(engine: Engine, gone: str) -> None:
    """And nothing else: what it holds is what its containers use, and the first process of it would end them all."""
    sandbox = engine.create_sandbox({**SHARED, "hostname": "pod-one"}, runtime_handler="runc")
    pods = {"linux": {"security_context": {"namespace_options": {"pid": "POD"}}}}
    container = engine.create_container(config("one", "sleep 1000", **pods), sandbox, id="one")
    pid = container.start().pid
    held = {path: os.stat(path).st_ino for path in sandbox.status.namespaces.values()}
    path = Path(sandbox.metadata.root_dir, gone)
    path.unlink() if gone else shutil.rmtree(path)
    engine.recover()
    assert (container.state, is_running(pid)) == (ContainerState.RUNNING, True)
    assert {path: os.stat(path).st_ino for path in sandbox.status.namespaces.values()} == held
    assert "pod-one" in Path(sandbox.metadata.root_dir, "etc/hosts").read_text()
    sandbox.remove(force=True)


def test_nothing_is_made_where_a_link_leads(engine: Engine, tmp_path: Path) -> None:
    """In the place of its directory: what it leads to is somebody else's."""
    sandbox = engine.create_sandbox(SANDBOX, id="pod", runtime_handler="runc")
    path = Path(sandbox.metadata.root_dir)
    shutil.rmtree(path)
    (tmp_path / "around").mkdir()
    path.symlink_to(tmp_path / "around")
    engine.recover()
    assert os.listdir(tmp_path / "around") == []
    with pytest.raises(errors.InvalidStateError, match="is not ours"):
        sandbox.remove()
    path.unlink()
    sandbox.remove()


@each_runtime
def test_a_shared_pid_namespace_that_has_ended(engine: Engine, runtime: str) -> None:
    """Somebody kills its first process: a start says so, and the next recovery makes the sandbox NOTREADY."""
    options = {"pid": "POD"}
    linux = {"security_context": {"namespace_options": options}}
    sandbox = engine.create_sandbox({"metadata": {"name": "shared"}, "linux": linux}, runtime_handler=runtime)
    assert run(engine, sandbox, "before", "true", options) == []
    engine.recover()
    assert sandbox.state is SandboxState.READY
    (first,) = find_first(os.stat(sandbox.status.namespaces["pid"]).st_ino)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not is_running(first), "the namespace's first process to be gone")
    with pytest.raises(errors.StartError, match="first process of its sandbox's pid namespace has ended"):
        run(engine, sandbox, "after", "true", options)
    engine.recover()
    assert (sandbox.state, sandbox.status.reason) == (SandboxState.NOTREADY, "Lost")
    sandbox.remove(force=True)


STOPS_ONCE = """
import os, signal

space = {{"__name__": "pin"}}
with open({pin!r}) as file:
    exec(compile(file.read(), {pin!r}, "exec"), space)
real = space["_pin"]

def pin(namespace, path):
    pid = os.getpid() if {of_itself} else int(namespace.split("/")[2]) if path.endswith("/pid") else 0
    if {of_itself}:
        space["_pin"] = real
    else:
        real(namespace, path)
    if pid:
        with open({there!r}, "w") as file:
            file.write(str(pid))
        os.kill(pid, signal.SIGSTOP)
    if {of_itself}:
        real(namespace, path)

space["_pin"] = pin
main = space["main"]
"""
SHARED = {"metadata": {"name": "shared"}, "linux": {"security_context": {"namespace_options": {"pid": "POD"}}}}


@pytest.mark.parametrize("of_itself", [True, False], ids=["what makes them", "the first process"])
def test_what_a_killed_engine_leaves_stopped_while_it_makes_namespaces(
    state_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine_process: Callable[[str], EngineProcess],
    of_itself: bool,
) -> None:  # fmt: skip
    """It holds the lock of where the pins are: the next engine has it go on, and everything can be freed."""
    program, there = tmp_path / "pin.py", tmp_path / "there"
    program.write_text(STOPS_ONCE.format(pin=pin.__file__, there=str(there), of_itself=of_itself))
    process = engine_process(f"""
from limpet import OciStarter
from limpet.engine.starters.oci import command, pin
command.LOOK_SECONDS = 1000
pin.__file__ = {str(program)!r}
engine = Engine.open(state_dir, runtimes={{"runc": OciStarter("runc")}})
engine.create_sandbox({SHARED!r}, id="pod", runtime_handler="runc")
time.sleep(1000)
""")
    wait_until(lambda: there.exists() and there.read_text(), "it to stop")
    pid = int(there.read_text())
    wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "T", "it to stop")
    process.kill()
    monkeypatch.setattr("limpet.engine.starters.oci.sandboxes.LOOK_SECONDS", 0.1)
    with open_engine(state_dir) as engine:
        engine.get_sandbox("pod").remove()
    wait_until(lambda: not is_running(pid), "its end")
    assert not any(os.path.exists(f"{PINS}/{entry.name}") for entry in Path(state_dir, "oci/runc").iterdir())


def make_web(engine: Engine) -> None:
    sandbox = engine.create_sandbox({"metadata": {"name": "web"}}, runtime_handler="runc")
    assert sandbox.status.namespaces["network"] in find_mounts(pins_of(sandbox))
    sandbox.remove()


def test_namespaces_are_made_where_the_package_is_in_an_archive(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a zipapp: the module is no file, but can be imported."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("app.pyz", "w") as archive:
        archive.write(pin.__file__, "limpet/pin.py")
    monkeypatch.setattr(pin, "__file__", "app.pyz/limpet/pin.py")
    make_web(engine)


def test_namespaces_are_made_where_the_program_is_no_python(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an embedded or frozen one: by the python3 in PATH; where there is none, either is said."""
    monkeypatch.setattr(sys, "executable", "/usr/bin/uwsgi")
    path = os.environ["PATH"]
    (tmp_path / "python3").symlink_to(os.path.realpath(f"{sys.base_prefix}/bin/python3"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{path}")
    make_web(engine)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(errors.UnsupportedError, match=r"uwsgi' is no Python .* no python3 in PATH"):
        make_web(engine)


def test_a_first_process_that_was_stopped_goes_on(engine: Engine) -> None:
    """With the next container; or whatever its containers leave would stay there as zombies."""
    sandbox = engine.create_sandbox(SHARED, runtime_handler="runc")
    (first,) = find_first(os.stat(sandbox.status.namespaces["pid"]).st_ino)
    stop_by_signal(first)
    try:
        run(engine, sandbox, "one", "true", {"pid": "POD"})
        assert Path(f"/proc/{first}/stat").read_text().split()[2] == "S"
    finally:
        sandbox.remove(force=True)
    assert not is_running(first)


def test_the_first_process_is_found_where_the_kernel_does_not_name_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Linux 6.12 all processes are looked at, of which some, as process 1, may have more rights than we."""
    real_ioctl, real_stat = fcntl.ioctl, os.stat

    def ioctl(descriptor: int, request: int, *rest: Any) -> Any:
        if request == sandboxes._NS_GET_PID_FROM_PIDNS:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        return real_ioctl(descriptor, request, *rest)

    def stat(path: Any, **options: Any) -> os.stat_result:
        if path == "/proc/1/ns/pid":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real_stat(path, **options)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(os, "stat", stat)
    sandbox = engine.create_sandbox(SHARED, runtime_handler="runc")
    (first,) = find_first(os.stat(sandbox.status.namespaces["pid"]).st_ino)
    assert run(engine, sandbox, "one", "echo here", {"pid": "POD"}) == ["here"]
    sandbox.remove(force=True)
    assert not is_running(first)


def find_first(inode: int) -> list[int]:
    found = []
    for path in glob.glob("/proc/[0-9]*"):
        try:
            comm = Path(path, "comm").read_text().strip()
            if comm == "limpet-pause" and os.stat(f"{path}/ns/pid").st_ino == inode:
                found.append(int(path.rpartition("/")[2]))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("has_pidfs", [True, False])
def test_the_pid_namespace_of_another(engine: Engine, monkeypatch: pytest.MonkeyPatch, has_pidfs: bool) -> None:
    """A container sees the processes of its target, while that one runs in its sandbox; else it is not started.

    Also before Linux 6.9, where its cgroup shows that it is the one.
    """
    monkeypatch.setattr(host, "ask_for_pidfs", lambda: has_pidfs)
    sandbox = engine.create_sandbox(SANDBOX, runtime_handler="runc")
    target = engine.create_container(config("target", "exec sleep 4714"), sandbox)
    options = {"pid": "TARGET", "target_id": target.id}
    linux = {"linux": {"security_context": {"namespace_options": options}}}
    early = engine.create_container(config("early", "true", **linux), sandbox)
    with pytest.raises(errors.StartError, match="target_id"):
        early.start()
    target.start()
    assert run(engine, sandbox, "look", "busybox tr -d '\\0' < /proc/1/cmdline", options) == ["sleep4714"]
    target.stop(0)


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_target_that_ends_as_it_is_to_be_joined(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch, is_reaped: bool
) -> None:
    """No container is started in the pid namespace of what has its number next, nor in one that has ended."""
    sandbox = engine.create_sandbox(SANDBOX, runtime_handler="runc")
    target = engine.create_container(config("target", "sleep 1000"), sandbox)
    target.start()
    processes = processes_of(state_dir, target.id)
    options = {"pid": "TARGET", "target_id": target.id}
    linux = {"linux": {"security_context": {"namespace_options": options}}}
    late = engine.create_container(config("late", "true", **linux), sandbox)

    @contextmanager
    def open_late(launch: Launch, find: Callable[[str, ProcessIdentity], Processes | None]) -> Iterator[str]:
        if not is_reaped:
            monkeypatch.setattr(starter, "let_monitor_go_on", lambda *_: None)
            stop_by_signal(processes.monitor.pid)
        with open_pidfd(processes.init.pid) as pidfd:
            os.kill(processes.init.pid, signal.SIGKILL)
            assert wait_for_end(pidfd, 20)
        if is_reaped:
            wait_until(lambda: not os.path.exists(f"/proc/{processes.init.pid}"), "its conmon to reap it")
        with open_target(launch, find) as path:
            yield path

    monkeypatch.setattr(starts, "open_target", open_late)
    with pytest.raises(errors.StartError, match=r"target_id .*: that container has ended"):
        late.start()
    assert os.path.exists(f"/proc/{processes.init.pid}") is not is_reaped
    monkeypatch.undo()
    if not is_reaped:
        os.kill(processes.monitor.pid, signal.SIGCONT)
    assert target.wait(20).exit_code == 137


def test_what_a_kill_leaves(engine: Engine, state_dir: str) -> None:
    """Between row and record it is made again; without a row it is freed; what somebody unmounts makes it NOTREADY."""
    half = engine.create_sandbox(SANDBOX, runtime_handler="runc")
    gone = engine.create_sandbox({"metadata": {"name": "gone"}}, runtime_handler="runc")
    lost = engine.create_sandbox({"metadata": {"name": "lost"}}, runtime_handler="runc")
    kept = engine.create_sandbox({"metadata": {"name": "kept"}}, runtime_handler="runc")
    inode = os.stat(kept.status.namespaces["network"]).st_ino
    half.update(lambda old: type(old)(boot_id=old.boot_id))
    gone_pins = pins_of(gone)
    gone.bundle.remove()
    engine.store.delete_sandbox(gone.id)
    subprocess.run(["umount", lost.status.namespaces["ipc"]], check=True)
    engine.recover()
    assert set(half.status.namespaces) == {"network", "ipc", "uts"}
    assert run(engine, half, "one", "hostname", {}) == ["pod-one"]
    assert not os.path.exists(gone_pins)
    assert (lost.state, lost.status.reason) == (SandboxState.NOTREADY, "Lost")
    engine.recover()
    assert not os.path.exists(pins_of(lost))
    assert os.stat(kept.status.namespaces["network"]).st_ino == inode


@each_runtime
@pytest.mark.parametrize("kind", ["net", "ipc", "shm"])
def test_what_somebody_has_unmounted_is_not_used(engine: Engine, runtime: str, kind: str) -> None:
    """No container gets a directory of the host as its /dev/shm: a start says why, and the sandbox is NOTREADY."""
    sandbox = engine.create_sandbox(SANDBOX, runtime_handler=runtime)
    path = os.path.join(pins_of(sandbox), kind)
    subprocess.run(["umount", path], check=True)
    with pytest.raises(errors.StartError, match=f"somebody has unmounted '{path}'; make another sandbox"):
        run(engine, sandbox, "one", "echo x > /dev/shm/x", {})
    engine.recover()
    assert (sandbox.state, sandbox.status.reason) == (SandboxState.NOTREADY, "Lost")
    sandbox.remove(force=True)


def test_the_first_process_of_what_is_pinned_no_more_ends(engine: Engine) -> None:
    """Somebody has unmounted its pid namespace: nothing of a sandbox is there once that is removed."""
    sandbox = engine.create_sandbox(SHARED, runtime_handler="runc")
    other = engine.create_sandbox({**SHARED, "metadata": {"name": "other"}}, runtime_handler="runc")
    (first,) = find_first(os.stat(sandbox.status.namespaces["pid"]).st_ino)
    (others,) = find_first(os.stat(other.status.namespaces["pid"]).st_ino)
    pins = pins_of(sandbox)
    subprocess.run(["umount", sandbox.status.namespaces["pid"]], check=True)
    sandbox.remove()
    assert not is_running(first)
    assert is_running(others)
    assert not os.path.exists(pins)
    other.remove()


def test_the_first_process_of_a_pid_namespace_has_no_descriptor(engine: Engine) -> None:
    """Nor the lock of its pins, whatever number that has in an engine with many files open: it lives for long."""
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        sandbox = engine.create_sandbox(SHARED, runtime_handler="runc")
    finally:
        close_all(opened)
    (first,) = find_first(os.stat(sandbox.status.namespaces["pid"]).st_ino)
    assert os.listdir(f"/proc/{first}/fd") == []
    sandbox.remove()


LOOK_AT_FIRST = """
for each in root cwd fd; do echo $each: $(ls -A /proc/1/$each/); done
for each in environ cmdline; do echo $each: $(busybox tr -d '\\0' < /proc/1/$each); done
echo mounts: $(busybox cut -d ' ' -f 4-6 /proc/1/mountinfo)
echo rights: $(grep -E '^(Cap...|NoNewPrivs|Seccomp):' /proc/1/status)
cat /proc/1/root/etc/passwd 2>&1
(sleep 0.01 &)
while grep -q '(sleep)' /proc/[0-9]*/stat 2>/dev/null; do :; done
echo reaped
busybox nsenter -t 1 -m ls / 2>&1 | grep -v Operation.not.permitted
"""


@pytest.fixture(params=["its own", "none", "none that this system executes"])
def first_program(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Which program the first process of a pid namespace has for this machine."""
    made = {"none": b"", "none that this system executes": b"?"}.get(request.param)
    if made is not None:
        program = tmp_path / "pin.py"
        program.write_text(f"{Path(pin.__file__).read_text()}\n\ndef _make_code(machine):\n    return {made!r}\n")
        monkeypatch.setattr(pin, "__file__", str(program))
    return request.param


@each_runtime
def test_the_first_process_of_a_pid_namespace_leads_nowhere(engine: Engine, runtime: str, first_program: str) -> None:
    """A container that may trace it had the host's root directory there, and any saw all that is mounted."""
    sandbox = engine.create_sandbox(SHARED, runtime_handler=runtime)
    for rights in (["SYS_PTRACE"], ["ALL"]):
        context = {"namespace_options": {"pid": "POD"}, "capabilities": {"add_capabilities": rights}}
        asked = config(rights[0], LOOK_AT_FIRST, linux={"security_context": context})
        container = engine.create_container(asked, sandbox)
        container.start()
        container.wait(20)
        has_own = first_program == "its own"
        none, others = "0000000000000000", f"NoNewPrivs: 1 Seccomp: {2 if has_own else 0}"
        assert read_output(container, 9)[:9] == [
            f"root: {'' if first_program == 'none' else 'limpet-pause'}".strip(),
            f"cwd: {'' if first_program == 'none' else 'limpet-pause'}".strip(),
            "fd:",
            "environ:",
            f"cmdline: {'limpet-pause' if has_own else ''}".strip(),
            "mounts: / / ro,nosuid,nodev,relatime",
            f"rights: CapInh: {none} CapPrm: {none} CapEff: {none} CapBnd: {none} CapAmb: {none} {others}",
            "cat: can't open '/proc/1/root/etc/passwd': No such file or directory",
            "reaped",
        ]
        assert set(read_output(container, 9)[9:]) <= {"nsenter: can't execute 'ls': No such file or directory"}
    sandbox.remove(force=True)


def test_only_who_may_trace_all_can_trace_the_first_process(engine: Engine) -> None:
    """It has no capabilities, so that any process of its user could."""
    sandbox = engine.create_sandbox(SHARED, runtime_handler="runc")
    said = run(engine, sandbox, "one", "ls /proc/1/root/ 2>&1", {"pid": "POD"})
    assert said == ["ls: /proc/1/root/: Permission denied"]
    sandbox.remove(force=True)


def test_a_bad_hostname_makes_nothing(engine: Engine, state_dir: str) -> None:
    """What cannot be made is refused, and leaves neither row nor directory nor pin."""
    with pytest.raises(errors.InvalidInputError, match="hostname"):
        engine.create_sandbox({**SANDBOX, "hostname": "a b"}, id="bad", runtime_handler="runc")
    with pytest.raises(errors.UnsupportedError, match=r"sysctls .net\.no\.such."):
        engine.create_sandbox({**SANDBOX, "linux": {"sysctls": {"net.no.such": "1"}}}, id="bad", runtime_handler="runc")
    assert list(engine.store.sandbox_ids) == []
    assert os.listdir(f"{state_dir}/sandboxes") == []
    assert glob.glob(f"{PINS}/*/bad/*") == []


def test_it_outlives_its_containers_and_the_engine(state_dir: str, tmp_path: Path) -> None:
    """No process holds them: what one container leaves in /dev/shm, one of the next engine finds."""
    with open_engine(state_dir) as first:
        load_busybox(first, tmp_path / "image")
        sandbox = first.create_sandbox(SANDBOX, id="pod", runtime_handler="runc")
        container: Container = first.create_container(config("one", "echo kept > /dev/shm/x; sleep 1000"), sandbox)
        container.start()
        kept = Path(pins_of(sandbox), "shm", "x")
        wait_until(lambda: kept.exists() and kept.read_text(), "the file")
        os.kill(container.status.pid, signal.SIGKILL)
        container.wait(10)
    try:
        with open_engine(state_dir) as second:
            assert run(second, second.get_sandbox("pod"), "two", "cat /dev/shm/x", {}) == ["kept"]
            second.get_sandbox("pod").remove(force=True)
    finally:
        end_everything(state_dir)


def test_what_is_mounted_over_a_pin_goes_with_it(engine: Engine) -> None:
    """By somebody else: a sandbox is freed at once all the same."""
    made = engine.create_sandbox(SANDBOX, id="pod", runtime_handler="runc")
    pins = pins_of(made)
    for path in made.status.namespaces.values():
        subprocess.run(["mount", "--bind", path, path], check=True)
    assert made.remove()
    assert not os.path.exists(pins)


def test_a_sysctl_of_the_host_is_refused(engine: Engine, state_dir: str) -> None:
    """One that no namespace has would be set for the whole machine; each that fails is named."""
    path = Path("/proc/sys/kernel/printk_ratelimit_burst")
    now = path.read_text(encoding="ascii").strip()  # so that nothing changes where it is set nevertheless
    for name, value, kind, why in (
        ("kernel.printk_ratelimit_burst", now, errors.InvalidInputError, "belongs to no namespace"),
        ("kernel/printk_ratelimit_burst", now, errors.InvalidInputError, "belongs to no namespace"),
        ("kernel.shmmax", "", errors.InvalidInputError, "'kernel.shmmax': a value in one line is needed"),
        ("net.ipv4.ip_forward", "1\n0", errors.InvalidInputError, "a value in one line is needed"),
        ("kernel.hostname", "another", errors.InvalidInputError, "the sandbox has a hostname, 'pod-one'"),
        ("kernel.hostname", "x" * 65, errors.InvalidInputError, "the kernel keeps 64 bytes"),
        ("kernel.domainname", "ü" * 33, errors.InvalidInputError, "the kernel keeps 64 bytes"),
        ("net.a\nb", "1", errors.UnsupportedError, r"made: sysctls .net.a.nb.: No such file"),
        ("kernel.shmmax", "rubbish", errors.UnsupportedError, "sysctls .kernel.shmmax.: Invalid argument"),
    ):
        with pytest.raises(kind, match=why):
            engine.create_sandbox({**SANDBOX, "linux": {"sysctls": {name: value}}}, id="bad", runtime_handler="runc")
    assert engine.list_sandboxes() == []


@each_runtime
def test_sysctls_in_a_namespace_of_the_containers_own(engine: Engine, runtime: str) -> None:
    """The host's name is set, though the runtimes take no such sysctl; what they do not set is told there."""
    sysctls = {"kernel.hostname": "by-sysctl", "kernel.msg_next_id": "7", "kernel.msgmax": "4096"}
    asked = {"metadata": {"name": "own"}, "linux": {"sysctls": sysctls}}
    sandbox = engine.create_sandbox(asked, runtime_handler=runtime)
    script = "hostname; cat /proc/sys/kernel/msgmax /proc/sys/kernel/msg_next_id"
    assert run(engine, sandbox, "shared", script) == ["by-sysctl", "4096", "7"]
    own = {"network": "CONTAINER", "ipc": "CONTAINER"}
    assert run(engine, sandbox, "own", script, own) == ["by-sysctl", "4096", "-1", "sandbox.sysctls"]


def test_a_cgroup_parent_that_can_be_none_is_refused(engine: Engine) -> None:
    """When the sandbox is made, and nothing is left of it."""
    for parent in ("/a\nb", "/" + "x" * 256, "/cgroup.procs", "/new/cgroup.procs", "/new/new/tasks/x", "new//tasks"):
        if "tasks" in parent and not os.path.exists("/sys/fs/cgroup/cpu/tasks"):
            continue  # version 2 has none
        with pytest.raises(errors.InvalidInputError, match=r"^cgroup_parent "):
            engine.create_sandbox({**SANDBOX, "linux": {"cgroup_parent": parent}}, id="bad", runtime_handler="runc")
    assert engine.list_sandboxes() == []


def test_what_earlier_boots_have_left_on_a_disk_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /run is no tmpfs: files that hold nothing any more. What is of this boot, or nobody's, stays."""
    monkeypatch.setattr(sandboxes, "PINS", str(tmp_path))
    now = read_boot_id()
    assert now
    names = [f"{now}.a", f"{'0' * len(now)}.a", "other.a"]
    for name in names:
        (tmp_path / name / "pod" / "shm").mkdir(parents=True)
        (tmp_path / name / "pod" / "net").touch()
    sandboxes.SandboxHoldings("", RuntimeRoot("")).remove_old()
    assert sorted(os.listdir(tmp_path)) == sorted((names[0], names[2]))
    assert (tmp_path / names[0] / "pod" / "net").exists()
