"""What works for an OCI container, a conmon or a runtime, may be stopped by a signal: it takes longer, no more."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from limpet import Engine, errors
from limpet.engine.starters.oci import OciStarter
from limpet.engine.starters.oci.tools import Tools
from limpet.schema import ContainerState
from tests.conftest import in_thread, wait_until
from tests.starters.oci import RUNTIMES, config, end_everything, load_busybox, processes_of
from tests.starters.test_oci_sessions import read_until

TIMEOUT = 5.0


@pytest.fixture(params=RUNTIMES)
def starter(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state_dir: str
) -> Iterator[OciStarter]:
    """A runtime and a conmon that are stopped whenever they are run."""
    for module in ("command", "conmon", "sessions"):
        monkeypatch.setattr(f"limpet.engine.starters.oci.{module}.LOOK_SECONDS", 0.1)
    monkeypatch.setattr("limpet.engine.starters.oci.conmon._LOOK_SECONDS", 0.1)
    for name in (request.param, "conmon"):
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\nkill -STOP $$\nexec {Tools().find(name).path} "$@"\n')
        script.chmod(0o755)
    yield OciStarter(str(tmp_path / request.param), conmon=str(tmp_path / "conmon"), timeout=TIMEOUT)
    end_everything(state_dir)


@pytest.mark.long
def test_a_life_whose_tools_are_stopped_each_time(
    state_dir: str, tmp_path: Path, starter: OciStarter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is its first process once it is made. A command that stops itself stays so, to its deadline."""
    real = OciStarter.go

    def go(self: OciStarter, prepared: object) -> None:
        os.kill(prepared.identity.pid, signal.SIGSTOP)  # type: ignore[attr-defined]
        real(self, prepared)  # type: ignore[arg-type]

    monkeypatch.setattr(OciStarter, "go", go)
    with Engine.open(state_dir, runtimes={"r": starter}) as engine:
        load_busybox(engine, tmp_path / "image")
        engine.create_sandbox({"metadata": {"name": "a"}}, id="a", runtime_handler="r")
        one = engine.create_container(config("one", "echo heard; exec sleep 1000"), "a", id="one")
        begun = time.monotonic()
        assert one.start().state is ContainerState.RUNNING
        assert one.execute(["sh", "-c", "exit 6"]).code == 6
        assert time.monotonic() - begun < TIMEOUT
        with pytest.raises(errors.WaitTimeoutError):
            one.execute(["sh", "-c", "kill -STOP $$; exit 7"], timeout=0.4)
        assert one.stop(0).exit_code == 128 + signal.SIGKILL
        assert one.release().released
        wait_until(lambda: [entry.text for entry in one.read_log()] == [b"heard\n"], "the log")


@pytest.mark.long
@pytest.mark.parametrize("terminal", [False, True])
def test_what_somebody_is_connected_to_is_stopped(
    state_dir: str, tmp_path: Path, starter: OciStarter, terminal: bool
) -> None:
    """The runtime of a command, as it begins, amid it and at its end, or a conmon. The command itself stays stopped."""
    with Engine.open(state_dir, runtimes={"r": starter}) as engine:
        load_busybox(engine, tmp_path / "image")
        engine.create_sandbox({"metadata": {"name": "a"}}, id="a", runtime_handler="r")
        shell = {"tty": terminal, "stdin": True}
        one = engine.create_container(config("one", "while read x; do echo own $x; done", **shell), "a", id="one")
        one.start()
        script = "echo here; read a; echo got $a; read b; [ $b = stop ] && kill -STOP $$; exit 6"
        with closing(one.open_command(["sh", "-c", script], terminal=terminal)) as session:
            assert read_until(session, b"here")
            runtime = find_runtime(script)
            os.kill(runtime, signal.SIGSTOP)
            session.write(b"x\n")
            assert read_until(session, b"got x")
            os.kill(runtime, signal.SIGSTOP)
            session.write(b"y\n")
            assert session.wait(TIMEOUT) == 6
        with closing(one.attach()) as session:
            os.kill(processes_of(state_dir, "one").monitor.pid, signal.SIGSTOP)
            session.write(b"z\n")
            assert read_until(session, b"own z")
        with closing(one.open_command(["sh", "-c", script], terminal=terminal)) as session:
            session.write(b"x\nstop\n")
            assert read_until(session, b"got x")
            with pytest.raises(errors.WaitTimeoutError):
                session.wait(0.4)
        assert one.stop(0).exit_code == 128 + signal.SIGKILL


@pytest.mark.long
@pytest.mark.parametrize("way", ["attached", "command", "terminal"])
def test_what_somebody_writes_to_is_stopped(state_dir: str, tmp_path: Path, starter: OciStarter, way: str) -> None:
    """More than there is room for, and nobody reads: the runtime, or conmon, is continued all the same.

    What reads it may have been stopped on purpose: then it is waited for, until the session is closed.
    """
    with Engine.open(state_dir, runtimes={"r": starter}) as engine:
        load_busybox(engine, tmp_path / "image")
        engine.create_sandbox({"metadata": {"name": "a"}}, id="a", runtime_handler="r")
        one = engine.create_container(config("one", "cat >/dev/null", stdin=True), "a", id="one")
        one.start()
        if way == "attached":
            session = one.attach()
            stopped = processes_of(state_dir, "one").monitor.pid
        else:
            script = "echo here; cat >/dev/null; exit 6"
            session = one.open_command(["sh", "-c", script], terminal=way == "terminal")
            assert read_until(session, b"here")
            stopped = find_runtime(script)
        os.kill(stopped, signal.SIGSTOP)
        writer, outcome = in_thread(lambda: session.write(b"0123456789abcd\n" * 100_000))
        writer.join(30)
        assert outcome == [None]
        session.close()
        if way != "attached":
            session = one.open_command(["sh", "-c", "echo here; kill -STOP $$"], terminal=way == "terminal")
            assert read_until(session, b"here")
            writer, outcome = in_thread(lambda: session.write(b"0123456789abcd\n" * 100_000))
            writer.join(0.3)
            assert not outcome
            session.close()
            writer.join(30)
            assert outcome == [None]
        one.stop(0)


def find_runtime(script: str) -> int:
    """Return the parent of the shell that runs a script, which may have forked what is to be its program."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if Path(path, "cmdline").read_bytes() == b"\0".join([b"sh", b"-c", script.encode(), b""]):
                parents[int(path.name)] = int(Path(path, "stat").read_text().rpartition(")")[2].split()[1])
    (runtime,) = {parent for parent in parents.values() if parent not in parents}
    return runtime


def test_a_conmon_that_is_stopped_before_it_has_written_its_pid(
    state_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its second process has answered by then, and is known by nothing else: the first is continued, not killed."""
    monkeypatch.setattr("limpet.engine.starters.oci.conmon.LOOK_SECONDS", 0.1)
    script = tmp_path / "conmon"
    script.write_text(f"""#!/bin/bash
given=("$@")
for ((i = 0; i < $#; i++)); do
    if [ "${{given[i]}}" = -P ]; then file=${{given[i + 1]}}; given[i + 1]=$file.late; fi
done
{Tools().find("conmon").path} "${{given[@]}}" || exit
[ -z "$file" ] || {{ kill -STOP $$; mv "$file.late" "$file"; }}
""")
    script.chmod(0o755)
    try:
        with Engine.open(state_dir, runtimes={"r": OciStarter("crun", conmon=str(script), timeout=TIMEOUT)}) as engine:
            load_busybox(engine, tmp_path / "image")
            engine.create_sandbox({"metadata": {"name": "a"}}, id="a", runtime_handler="r")
            one = engine.create_container(config("one", "exit 6"), "a", id="one")
            one.start()
            assert one.wait(20).exit_code == 6
            one.release()
    finally:
        end_everything(state_dir)
