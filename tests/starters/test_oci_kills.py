"""An engine is killed amid what it does with a container that runs: nothing of that runs on, and no status lies."""

import glob
import os
import pty
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from limpet import Engine
from limpet.engine.starters.oci.cgroups import list_directories
from limpet.schema import ContainerState
from tests.campaigns.sizes import Size
from tests.conftest import EngineProcess, wait_until
from tests.starters.oci import RUNTIMES, config, end_everything, load_busybox, open_engine, processes_of

Start = Callable[[str], EngineProcess]

PRELUDE = """
from limpet.engine.starters.oci import OciStarter
from limpet.engine.starters.oci import abilities, command, commands, sessions
from limpet.engine.lifecycle.bundle import ContainerBundle
from limpet.schema.cri import LinuxContainerResources
engine = Engine.open(state_dir, runtimes={name: OciStarter(name) for name in ("runc", "crun")})
container = engine.get("one")
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def after(owner, name):
    real = getattr(owner, name)
    def dying(*given, **named):
        real(*given, **named)
        die()
    setattr(owner, name, dying)
class Spawned(command.subprocess.Popen):
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        die()
"""
SCRIPT = "/bin/sh -c 'sleep {mark}'; sleep {mark}; true"
ACTS = {
    "execute": "container.execute(['/bin/sh', '-c', {script!r}])",
    "open_command": "session = container.open_command(['/bin/sh', '-c', {script!r}]); session.read()",
    "terminal": "session = container.open_command(['/bin/sh', '-c', {script!r}], terminal=True); session.read()",
    "attach": "session = container.attach(); session.write(b'x'); session.read()",
    "update": "container.change_limits(LinuxContainerResources(memory_limit_in_bytes={limit}))",
    "pause": "container.pause()",
    "resume": "container.resume()",
}
STEPS = {
    "before a command is started": ("execute", "commands.CommandFiles.arguments = die"),
    "once a command is started": ("execute", "command.subprocess.Popen = Spawned"),
    "once a command is connected": ("terminal", "sessions.subprocess.Popen = Spawned"),
    "before new limits": ("update", "OciStarter.change_limits = die"),
    "before new limits are written down": ("update", "after(OciStarter, 'change_limits')"),
    "before it is noted that they are": ("update", "ContainerBundle.forget_limits = die"),
    "before it is frozen": ("pause", "OciStarter.freeze = die"),
    "once it is frozen": ("pause", "after(OciStarter, 'freeze')"),
    "before it goes on": ("resume", "OciStarter.thaw = die"),
    "once it goes on": ("resume", "after(OciStarter, 'thaw')"),
}


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest, state_dir: str, tmp_path: Path) -> Iterator[str]:
    """A container `one` that runs, has input, and takes limits."""
    with open_engine(state_dir) as engine:
        load_busybox(engine, tmp_path / "image")
        engine.create_sandbox({"metadata": {"name": "a"}}, id="a", runtime_handler=request.param)
        limits = {"resources": {"memory_limit_in_bytes": str(64 << 20)}}
        engine.create_container(config("one", "sleep 100000", stdin=True, linux=limits), "a", id="one").start()
    yield request.param
    with open_engine(state_dir) as engine:
        engine.get("one").stop(0)
        engine.get("one").release()
    end_everything(state_dir)


MARK = f"47{os.getpid()}."
"""What no other test's commands sleep for."""


def act(name: str, number: int) -> str:
    mark = f"{MARK}{number:03}"
    return ACTS[name].format(script=SCRIPT.format(mark=mark), limit=(100 + number) << 20)


def begin(start: Start, name: str, number: int, kill: str = "") -> EngineProcess:
    """Have an engine do this, and be killed by itself on the way."""
    before = "container.pause()" if name == "resume" else ""
    process = start(f"{PRELUDE}\n{before}\nsay('ready')\n{kill}\n{act(name, number)}\nsay('done')\ntime.sleep(1000)")
    process.read()
    return process


def find_processes(text: str) -> list[int]:
    """The processes that have this in their arguments, but for conmons."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            arguments = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(text.encode() in each for each in arguments) and not arguments[0].endswith(b"conmon"):
            found.append(int(name))
    return [pid for pid in found if pid != os.getpid()]


def memory_limit(state_dir: str) -> int:
    """What the kernel has in force."""
    cgroups = processes_of(state_dir, "one").cgroups
    name = next(os.path.basename(line) for line in cgroups if line.endswith("-one"))
    for controllers, directory in list_directories(cgroups, name):
        for file in ("memory.limit_in_bytes", "memory.max"):
            if controllers in {"memory", ""} and os.path.exists(f"{directory}/{file}"):
                return int(Path(directory, file).read_text())
    raise AssertionError("it has no memory cgroup")


def require_true(engine: Engine, state_dir: str, pid: int) -> None:
    """What the next engine has to have made of it."""
    container = engine.get("one")
    status = container.status
    assert (status.state, status.pid) == (ContainerState.RUNNING, pid)
    wait_until(lambda: not find_processes(MARK), "commands to be gone")
    assert glob.glob(f"{state_dir}/containers/one/oci/*/exec-*") == []
    wait_until(lambda: not find_processes(f"{state_dir}/oci/"), "runtimes to be gone")
    wait_until(lambda: container.is_frozen() is container.status.paused, "it to be frozen, or not, as is written down")

    wait_until(lambda: not os.path.exists(f"{state_dir}/containers/one/limits.json"), "the change of limits to be over")
    resources = container.status.resources
    assert resources is not None
    assert resources.requested.memory_limit_in_bytes == memory_limit(state_dir)
    if container.status.paused:
        container.resume()
    assert container.execute(["echo", "ok"]).output == b"ok\n"
    container.attach().close()


@pytest.mark.long
def test_killed_at_each_step(
    state_dir: str, engine_process: Start, runtime: str, request: pytest.FixtureRequest
) -> None:
    """No command runs on, no file of one stays; paused and limits are what is written down; all goes on as before.

    The shell of a person who looks around in the directory of a start is let alone.
    """
    with open_engine(state_dir) as engine:
        pid = engine.get("one").status.pid
    for number, (step, (name, kill)) in enumerate(STEPS.items()):
        assert begin(engine_process, name, number, kill).wait() == -signal.SIGKILL, step
        if step == "once a command is started":
            request.addfinalizer(partial(end_shell, *open_shell(glob.glob(f"{state_dir}/containers/one/oci/*")[0])))
        with open_engine(state_dir, wait=5) as engine:
            require_true(engine, state_dir, pid)


def open_shell(directory: str) -> tuple[int, int]:
    """Have somebody look around there on a terminal of its own; return the pid and the terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(directory)
        os.execvp("sh", ["sh", "-c", "read line"])
    wait_until(lambda: os.readlink(f"/proc/{pid}/cwd") == directory, "it to be there")
    return pid, terminal


def end_shell(pid: int, terminal: int) -> None:
    """Say a line, at which it ends: nobody has killed it."""
    os.write(terminal, b"done\n")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


@pytest.mark.campaign("amid")
def test_killed_amid_it(state_dir: str, engine_process: Start, runtime: str, size: Size) -> None:
    """The same, whenever the kill comes."""
    with open_engine(state_dir) as engine:
        pid = engine.get("one").status.pid
    chance = random.Random(runtime)
    for number in range(size.least // len(RUNTIMES)):
        name = list(ACTS)[number % len(ACTS)] if number < len(ACTS) else chance.choice(list(ACTS))
        process = begin(engine_process, name, number)
        seconds = chance.choice([0.01, 0.06, 0.12]) * chance.random()
        signal.sigtimedwait([], seconds)
        process.kill()
        with open_engine(state_dir, wait=5) as engine:  # a child that has executed nothing yet holds the lock, too
            require_true(engine, state_dir, pid)
