"""Engines that see other mounts than the one that made a sandbox, as units of systemd with mounts of their own do."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from limpet import errors
from limpet.schema import ContainerState
from limpet.schema.sandbox_status import SandboxState
from tests.conftest import PACKAGES, is_running, wait_until
from tests.starters.oci import config, end_everything, load_busybox, open_engine

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root's sandboxes hold namespaces")

BEGIN = """
import sys
from limpet import Engine, OciStarter, errors
engine = Engine.open(sys.argv[1], runtimes={name: OciStarter(name) for name in ("runc", "crun")})
def start(name):
    config = {"metadata": {"name": name}, "image": {"image": "box:1"}, "command": ["sleep", "1000"]}
    try:
        return engine.create_container(config, "pod").start().pid
    except errors.LimpetError as error:
        return type(error).__name__, str(error)
"""
MAKE = """
options = {"security_context": {"namespace_options": {"pid": "POD"}}}
pod = {"metadata": {"name": "pod"}, "linux": options}
sandbox = engine.create_sandbox(pod, id="pod", runtime_handler=sys.argv[2])
print(start("first"))
"""
LOOK = """
sandbox = engine.get_sandbox("pod")
print(sandbox.state.name, [each.state.name for each in engine.list()], type(start("second")).__name__)
"""
REMOVE = """
engine.get_sandbox("pod").remove(force=True, timeout=0)
"""
CLOSE = "engine.close()"
OTHER_VIEW = ("unshare", "--mount", "--propagation", "private")
FOLLOWING = """
mount --make-rshared /
for script in "$MAKE" "$LOOK" "$LOOK" "$REMOVE"; do
    unshare --mount --propagation slave "$@" "$script" "$STATE" "$RUNTIME" || exit 1
done
test -z "$(ls "/run/limpet/$(ls "$STATE/oci/$RUNTIME")")" && ! grep -q "$STATE" /proc/[0-9]*/cmdline && echo all is free
"""

RUN = """
for name in ("runc", "crun"):
    engine.create_sandbox({"metadata": {"name": name}}, id=name, runtime_handler=name)
    config = {"metadata": {"name": name}, "image": {"image": "box:1"}, "command": ["true"]}
    try:
        engine.create_container(config, name, id=name).start()
        print(name, engine.get(name).wait(20).exit_code)
    except errors.StartError as error:
        print(name, error)
    engine.get_sandbox(name).remove(force=True)
"""
NOEXEC = 'mount --bind "$1" "$1" && mount -o remount,bind,noexec "$1" && shift && exec "$@"'
READ_ONLY = """
for each in /sys/fs/cgroup/* /sys/fs/cgroup; do
    ! mountpoint -q "$each" || mount -o remount,bind,ro "$each" || exit 1
done
shift && exec "$@"
"""
AS_DOCKER_DOES = """
cd /sys/fs/cgroup && mount -t tmpfs none /mnt || exit 1
for each in *; do
    mkdir "$each/$NAME" "/mnt/$each" || exit 1
done
for each in cpus mems; do
    cat "cpuset/cpuset.$each" > "cpuset/$NAME/cpuset.$each" || exit 1
done
for each in *; do
    echo $$ > "$each/$NAME/cgroup.procs" && mount --bind "$each/$NAME" "/mnt/$each" || exit 1
done
umount -l /sys/fs/cgroup && mount --move /mnt /sys/fs/cgroup && cd / && exec "$@"
"""
LIFE = """
engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod", runtime_handler=sys.argv[2])
start("first")
(container,) = engine.list()
used = container.measure()
container.pause()
print(used.processes, used.memory_bytes > 0, container.is_frozen())
container.resume()
print(container.is_frozen(), container.execute(["echo", "on"]).output)
container.pause()
print(container.stop(0).exit_code)
engine.get_sandbox("pod").remove(force=True)
"""


def run_script(script: str, *arguments: str, before: Sequence[str] = ()) -> list[str]:
    command = [*before, sys.executable, "-c", f"{BEGIN}{script}{CLOSE}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd="/", env=PACKAGES)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def find_first(pid: int) -> int:
    """Return the first process of the pid namespace that a process is in."""
    own = os.readlink(f"/proc/{pid}/ns/pid")
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "ns" / "pid") == own and (path / "comm").read_text() == "limpet-pause\n":
                return int(path.name)
        except OSError:
            continue
    raise AssertionError("there is none")


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_what_is_pinned_where_this_engine_does_not_see_it(state_dir: str, tmp_path: Path, runtime: str) -> None:
    """It is not lost: its containers run on, a start says why it cannot be, and all is freed by the engine here."""
    with open_engine(state_dir) as engine:
        load_busybox(engine, tmp_path / "image")
    (pid,) = map(int, run_script(MAKE, state_dir, runtime, before=OTHER_VIEW))
    first = find_first(pid)
    with open_engine(state_dir) as engine:
        sandbox = engine.get_sandbox("pod")
        (container,) = engine.list()
        engine.recover()
        assert (sandbox.state, container.state) == (SandboxState.READY, ContainerState.RUNNING)
        assert container.execute(["echo", "on"]).output == b"on\n"
        pins = os.path.dirname(sandbox.status.namespaces["network"])
        second = engine.create_container(config("second", "true"), sandbox)
        with pytest.raises(errors.StartError, match="is mounted in another mount namespace"):
            second.start()
        sandbox.remove(force=True, timeout=0)
        wait_until(lambda: not is_running(first), "the namespace's first process to be gone")
        assert not is_running(pid)
        assert not os.path.exists(pins)


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_mounts_that_follow_those_of_process_1(state_dir: str, tmp_path: Path, runtime: str) -> None:
    """Each engine has other ones: what one has pinned is there for the next, which starts more in the sandbox."""
    with open_engine(state_dir) as engine:
        load_busybox(engine, tmp_path / "image")
    scripts = {name: f"{BEGIN}{text}{CLOSE}" for name, text in (("MAKE", MAKE), ("LOOK", LOOK), ("REMOVE", REMOVE))}
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", FOLLOWING, "sh", sys.executable, "-c"],
        capture_output=True, text=True, timeout=100, check=False, cwd="/",
        env={**PACKAGES, **scripts, "STATE": state_dir, "RUNTIME": runtime, "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made, once, again, end = done.stdout.splitlines()
    assert made.isdigit()
    assert once == "READY ['RUNNING'] int"
    assert again == "READY ['RUNNING', 'RUNNING'] tuple"  # "second" is taken
    assert end == "all is free"


def test_a_state_directory_where_nothing_is_executed(state_dir: str, tmp_path: Path) -> None:
    """runc says "permission denied", as of a program with wrong rights; crun mounts the root anew, and executes it."""
    with open_engine(state_dir) as engine:
        load_busybox(engine, tmp_path / "image")
    of_runc, of_crun = run_script(RUN, state_dir, before=[*OTHER_VIEW, "sh", "-c", NOEXEC, "sh", state_dir])
    assert "which is mounted noexec; have the state directory on another" in of_runc
    assert of_crun == "crun 0" or "mounted noexec" in of_crun


def test_cgroups_that_are_read_only(state_dir: str, tmp_path: Path) -> None:
    """crun says of a directory that it cannot make that it is not there."""
    with open_engine(state_dir) as engine:
        load_busybox(engine, tmp_path / "image")
    for line in run_script(RUN, state_dir, before=[*OTHER_VIEW, "sh", "-c", READ_ONLY, "sh", ""]):
        assert "in /sys/fs/cgroup nothing can be made" in line


@pytest.mark.skipif(not Path("/sys/fs/cgroup/cpuset").is_dir(), reason="a container sees its own cgroups in version 2")
@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_an_engine_in_a_container_as_docker_makes_it(state_dir: str, tmp_path: Path, runtime: str) -> None:
    """With cgroup v1 it has its own cgroups, and reads the host's paths: what is paused goes on, and all is removed."""
    with open_engine(state_dir) as engine:
        load_busybox(engine, tmp_path / "image")
    name = f"limpet-test-{os.getpid()}-{runtime}"
    script = [sys.executable, "-c", f"{BEGIN}{LIFE}{CLOSE}", state_dir, runtime]
    try:
        done = subprocess.run(
            [*OTHER_VIEW, "sh", "-c", AS_DOCKER_DOES, "sh", *script],
            capture_output=True, text=True, timeout=100, check=False, cwd="/",
            env={**PACKAGES, "NAME": name, "PATH": os.environ["PATH"]},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == ["1 True True", "False b'on\\n'", "137"]
        assert list(Path("/sys/fs/cgroup").glob(f"*/{name}/limpet/*-*")) == []
    finally:
        end_everything(state_dir)
        for path in [*Path("/sys/fs/cgroup").glob(f"*/{name}/limpet"), *Path("/sys/fs/cgroup").glob(f"*/{name}")]:
            path.rmdir()
