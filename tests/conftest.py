"""What the tests share: a state directory, engines in processes that can be killed, waiting with a deadline."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from limpet.engine import Container, Engine, errors
from limpet.engine.logs import read_log
from tests.campaigns.sizes import Size, size_of

# A shell ignores SIGINT in what it runs in the background, and that is inherited: here Ctrl-C is to be tried.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes, or to think of one, says more of the machine than of us.
settings.register_profile("limpet", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("limpet")

DEADLINE_SECONDS = 30.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the gate ask for all of each campaign."""
    parser.addoption(
        "--campaign-size", choices=["test", "gate"], default="test", help="see tests/campaigns/sizes.py (default: test)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave what takes long to the gate."""
    if config.getoption("--campaign-size") != "gate":
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="it takes long: the gate tries it"))


@pytest.fixture
def size(request: pytest.FixtureRequest) -> Size:
    """How much the test's campaign, which its marker names, is to try."""
    (name,) = request.node.get_closest_marker("campaign").args
    return size_of(name, is_gate=request.config.getoption("--campaign-size") == "gate")


def require_tools(*names: str) -> None:
    """Skip the test where a program is missing; fail it in the gate, which has installed it (see .ci/run)."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        (pytest.fail if "LIMPET_GATE" in os.environ else pytest.skip)(f"not installed: {', '.join(missing)}")


def require_namespaces() -> None:
    """Skip the test where nobody can make a namespace, or mount: in most containers not even root can."""
    if not _can_make_namespaces():
        pytest.skip("no namespace can be made here")


@pytest.fixture
def namespaces() -> None:
    """Skip the test as `require_namespaces` does."""
    require_namespaces()


@cache
def _can_make_namespaces() -> bool:
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    return subprocess.run(["unshare", *as_root, "--mount", "true"], capture_output=True, check=False).returncode == 0


PACKAGES = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if "packages" in path or "__editable__" in path)}
"""The environment in which another Python finds what this one does."""


def find_interpreter(uid: int) -> str:
    """Return a Python that another user can run limpet with; "" if there is none."""
    look = f"import os, sys; os.setuid({uid}); from limpet.engine import Engine; os.execv(sys.executable, ['x', '-V'])"
    for path in (sys.executable, "/usr/bin/python3"):
        if os.path.exists(path):
            done = subprocess.run([path, "-c", look], env=PACKAGES, capture_output=True, check=False)
            if done.returncode == 0:
                return path
    return ""


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait until `condition` is true; fail with `what` after the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {DEADLINE_SECONDS:.0f} s for {what}")
        time.sleep(0.005)


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Start a thread that calls; return it and a list for what comes of it, result or exception."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # noqa: BLE001
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def read_output(container: Container, lines: int) -> list[str]:
    """Return what a container has written to its log, once that is so many lines: they come after its end, too."""
    path = container.metadata.log_path

    def read() -> list[str]:
        with suppress(errors.NotFoundError):
            return [entry.text.decode().removesuffix("\n") for entry in read_log(os.path.dirname(path), path)]
        return []

    wait_until(lambda: len(read()) >= lines, f"{lines} lines of output")
    return read()


def find_processes(*command: str) -> list[int]:
    """Return the pids of the processes with exactly this command line, which has to be one that nobody else has."""
    wanted = b"".join(word.encode() + b"\0" for word in command)
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
            if file.read(len(wanted) + 1) == wanted:
                found.append(int(name))
    return found


def is_running(pid: int) -> bool:
    """Say whether a process is there and not a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return False


def read_descriptors(pid: int) -> list[str]:
    """Return what the open descriptors of a process are of; it may open and close some meanwhile."""
    links = []
    for each in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/{pid}/fd/{each}"))
    return links


def count_sockets(pid: int) -> int:
    """Return how many sockets a process has open."""
    return sum(link.startswith("socket:") for link in read_descriptors(pid))


class EngineProcess:
    """An engine in a process of its own, whose script prints lines; to be killed at will."""

    def __init__(self, state_dir: str, script: str) -> None:
        prelude = (
            "import os, signal, sys, time\n"
            "from limpet.engine import Engine, Store\n"
            "def say(*words): print(*words, flush=True)\n"
            f"state_dir = {state_dir!r}\n"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", prelude + script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def read(self) -> list[str]:
        """Return the words of the next line it says; fail if it ends first."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the engine process ended with {self._process.wait()}"
        return line.split()

    def kill(self) -> None:
        """SIGKILL it, and wait until it is gone."""
        self._process.send_signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Wait until it has ended by itself, and return its exit status."""
        code = self._process.wait(DEADLINE_SECONDS)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        return code

    def is_over(self) -> bool:
        """Say whether it has been waited for."""
        return self._process.returncode is not None


@pytest.fixture
def state_dir(tmp_path: Path) -> str:
    """A path for a state directory, on the disk that pytest uses."""
    return str(tmp_path / "state")


@pytest.fixture
def engine(state_dir: str) -> Iterator[Engine]:
    """An open engine."""
    with Engine.open(state_dir) as opened:
        yield opened
        for container in opened.list():
            with suppress(errors.NotFoundError):  # a policy that goes on deletes attempts meanwhile
                if container.status.pid:
                    container.stop(0)


@pytest.fixture
def engine_process(state_dir: str) -> Iterator[Callable[[str], EngineProcess]]:
    """Starts engine processes on the state directory; those that are left are killed at the end."""
    started: list[EngineProcess] = []

    def start(script: str) -> EngineProcess:
        started.append(EngineProcess(state_dir, script))
        return started[-1]

    yield start
    for process in started:
        if not process.is_over():
            process.kill()
    _kill_containers(state_dir)


def _kill_containers(state_dir: str) -> None:
    """Kill the keepers of a state directory and its containers: whoever works in it, or has a file of it open."""
    prefix = f"{os.path.realpath(state_dir)}/"
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            links = [f"/proc/{name}/cwd", *(f"/proc/{name}/fd/{each}" for each in os.listdir(f"/proc/{name}/fd"))]
            if int(name) != os.getpid() and any(_read_link(link).startswith(prefix) for link in links):
                os.kill(int(name), signal.SIGKILL)


def _read_link(link: str) -> str:
    with suppress(OSError):
        return os.readlink(link)
    return ""
