"""The programs in docs/examples run as they stand, and print what is true."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet import Snapshot, errors
from limpet.engine import Engine
from limpet.recovery.host import has_pidfs
from tests.campaigns.sizes import Size
from tests.conftest import wait_until
from tests.docs.kill_executor import kill_executors

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


STARTED: list["subprocess.Popen[str]"] = []


def run(name: str, *arguments: object, stdin: int = subprocess.DEVNULL) -> "subprocess.Popen[str]":
    command: list[str] = [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)]
    STARTED.append(subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def no_program_is_left() -> Iterator[None]:
    """End the programs that a test which has failed has left."""
    yield
    while STARTED:
        program = STARTED.pop()
        if program.poll() is None:
            program.kill()
            program.communicate()


def test_run_containers(state_dir: str) -> None:
    """A container runs and its end is kept; one that outlives a killed engine is found again, and stopped."""
    output, _ = run("run_containers.py", state_dir).communicate(timeout=60)
    assert output.splitlines() == [
        "EXITED 3 Error",
        "settled: 1 examined: 0",
        "log: hello",
        "left: []",
        "recovered: RUNNING [survivor] the engine ended; the container is still running",
        "stopped: 143",
    ]


def test_the_library_in_fifteen_lines() -> None:
    """What the README shows of the example is fifteen lines at most, and complete."""
    text = (EXAMPLES / "run_containers.py").read_text()
    excerpt = re.search(
        r"^# The library in fifteen lines: from here\n(.*?)^# to here\n", text, re.DOTALL | re.MULTILINE
    )
    assert excerpt is not None
    assert len(excerpt[1].splitlines()) <= 15
    compile(excerpt[1], "excerpt", "exec")


@pytest.mark.skipif(not has_pidfs(), reason="before Linux 6.9 the job that runs is unproven")
def test_own_runtime(tmp_path: Path) -> None:
    """A runtime of its own kind is killed amid a stop: the next one finishes it, and every change is in the log."""
    output, _ = run("own_runtime.py", tmp_path).communicate(timeout=60)
    assert output.splitlines() == [
        "quick: EXITED [exit-observed]",
        "slow: RUNNING [survivor]",
        "mine: {'slow': 143}",
        "1 sandbox-added jobs 0",
        "2 added quick 0",
        "3 added slow 0",
        "4 intent slow 0",
        "5 extra slow 0",
        "6 state quick 7",
        "7 state slow 143",
    ]


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """A file that steps write their names to; whatever still waits for the file `go` is let go at the end."""
    (tmp_path / "trace").touch()
    yield tmp_path / "trace"
    (tmp_path / "go").touch()


def test_ci_executor(state_dir: str, tmp_path: Path, trace: Path) -> None:
    """Killed with a step running, and started again, it runs every step exactly once."""
    wait_for_go = f"until [ -e {tmp_path}/go ]; do sleep 0.01; done"
    stages = [
        {"build": f"echo build >> {trace}"},
        {"lint": f"echo lint >> {trace}", "test": f"echo test >> {trace}; {wait_for_go}"},
        {"publish": f"echo publish >> {trace}; exit 4"},
    ]
    pipeline = tmp_path / "pipeline.json"
    pipeline.write_text(json.dumps(stages))
    first = run("ci_executor.py", state_dir, pipeline)
    read_until(first, "lint: Completed (0)")
    wait_until(lambda: "test" in trace.read_text(), "the test step to run")
    first.send_signal(signal.SIGKILL)
    first.communicate()

    second = run("ci_executor.py", state_dir, pipeline)
    read_until(second, "recovered: RUNNING [survivor]")
    (tmp_path / "go").touch()
    assert second.stdout is not None
    output = second.stdout.read().splitlines()
    assert {"build: Completed (0)", "test: Completed (0)", "publish: Error (4)"} <= set(output)
    assert second.wait() == 1
    second.stdout.close()
    assert sorted(trace.read_text().split()) == ["build", "lint", "publish", "test"]


def test_ci_executor_after_a_reboot(state_dir: str, tmp_path: Path, trace: Path) -> None:
    """Its sandbox is NOTREADY then: what is done is kept, what was not started is run in the next one."""
    pipeline = tmp_path / "pipeline.json"
    pipeline.write_text(json.dumps([{"build": f"echo build >> {trace}"}, {"test": f"echo test >> {trace}"}]))
    with Engine.open(state_dir) as engine:
        sandbox = engine.get_or_create_sandbox({"metadata": {"name": "pipeline"}})
        for name in ("build", "test"):
            command = ["sh", "-c", f"echo {name} >> {trace}"]
            config = {"metadata": {"name": name}, "image": {"image": "host"}, "command": command}
            step = engine.create_container(config, sandbox)
            if name == "build":
                step.start()
                step.wait()
        sandbox.update(lambda old: replace(old, boot_id="another"))
    output, _ = run("ci_executor.py", state_dir, pipeline).communicate(timeout=60)
    assert output.splitlines()[1:] == ["build: Completed (0)", "test: starts, attempt 2", "test: Completed (0)"]
    assert trace.read_text().split() == ["build", "test"]


@pytest.mark.long
@pytest.mark.campaign("executor")
def test_ci_executor_is_killed_again_and_again(size: Size, tmp_path: Path) -> None:
    """Whenever it is killed, each job has run once in the end, or it is said that one never ran or ended unseen."""
    assert kill_executors(size.least, 1, tmp_path) >= size.least


def test_sandbox_manager(state_dir: str) -> None:
    """What is used stays; what expires is gone, also while no manager is there; a kill in between changes nothing."""
    first = run("sandbox_manager.py", state_dir, stdin=subprocess.PIPE)
    tell(first, "new used ann 2.5", "made: used")
    tell(first, "new idle bob 1.5", "made: idle")
    tell(first, "new kept eve 1000", "made: kept")
    tell(first, "new kept bob 1000", "refused: ")
    for _ in range(4):
        time.sleep(0.7)
        tell(first, "run used exit 3", "ran in used: Error (3)", "gone: idle of bob")
    tell(first, "list", "sandboxes: used of ann, kept of eve", "gone: idle of bob")
    tell(first, "run idle true", "refused: ")
    first.send_signal(signal.SIGKILL)
    first.communicate()

    time.sleep(2.6)  # it expires while no manager is there
    second = run("sandbox_manager.py", state_dir, stdin=subprocess.PIPE)
    read_until(second, "gone: used of ann")
    tell(second, "list", "sandboxes: kept of eve")
    tell(second, "run kept true", "ran in kept: Completed (0)")
    output, _ = second.communicate(timeout=30)
    assert (output, second.returncode) == ("", 0)


def tell(process: "subprocess.Popen[str]", line: str, wanted: str, *others: str) -> None:
    """Give a line, and read what begins with `wanted`; only what begins with one of `others` may come before."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(line, file=process.stdin, flush=True)
    while not (answer := process.stdout.readline()).startswith(wanted):
        assert answer.startswith(others), (line, answer)


def test_supervisor(state_dir: str, tmp_path: Path, trace: Path) -> None:
    """It is killed and started again: what ended meanwhile is said, the policies go on, all is printed in order."""
    wait_for_go = f"until [ -e {tmp_path}/go ]; do sleep 0.01; done"
    services = [
        "job=on-failure:2=exit 7",
        f"web=always={wait_for_go}; echo ended >> {trace}",
    ]
    first = run("supervisor.py", state_dir, *services)
    assert first.stdout is not None
    read_lines(first, lambda line: line.split()[1::2][:2] == ["web", "state"] and "RUNNING" in line)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    (tmp_path / "go").touch()  # it ends while no supervisor is there
    wait_until(lambda: "ended" in trace.read_text(), "the service to end")
    (tmp_path / "go").unlink()
    second = run("supervisor.py", state_dir, *services)
    printed = read_lines(second, lambda line: line.split()[1::2][:2] == ["web", "state"] and "RUNNING" in line)
    wait_until(lambda: has_given_up(state_dir), "the policy of the job to be used up")
    second.kill()
    printed += second.communicate()[0].splitlines(keepends=True)
    (tmp_path / "go").touch()
    assert [line for line in printed if line.startswith("found: ") and "EXITED" in line], printed
    told = [int(line.split()[0]) for line in printed if not line.startswith("found: ")]
    assert sorted(set(told)) == told
    with Engine.open(state_dir) as engine:
        (job,) = [one for one in engine.list(name="job") if one.metadata.restart_count == 2]
        assert (job.restart_at, job.exit_code) == (0, 7)
        for web in engine.list(name="web"):
            with suppress(errors.NotFoundError):  # its policy has deleted it meanwhile
                web.stop(timeout=0)
        assert engine.list(state="running") == []


def has_given_up(state_dir: str) -> bool:
    """Say whether the job's last attempt has ended."""
    with Snapshot.open(state_dir) as snapshot:
        newest = snapshot.get("job")
        return snapshot.metadata(newest.id).restart_count == 2 and newest.status.exit_code == 7


def read_lines(process: "subprocess.Popen[str]", is_last: Callable[[str], bool]) -> list[str]:
    """Read lines up to one that is the last."""
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    while not is_last(lines[-1]):
        assert lines[-1], lines
        lines.append(process.stdout.readline())
    return lines


def read_until(process: "subprocess.Popen[str]", wanted: str) -> None:
    assert process.stdout is not None
    seen = []
    while wanted not in seen:
        seen.append(process.stdout.readline().rstrip("\n"))
        assert process.poll() is None, seen
