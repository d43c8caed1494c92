"""What works for an OCI container, a conmon or a runtime, may be stopped by a signal: it takes longer, no more."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet import Engine, errors
from limpet.engine.starters.oci import OciStarter
from limpet.engine.starters.oci.tools import Tools
from limpet.schema import ContainerState
from tests.conftest import wait_until
from tests.starters.oci import RUNTIMES, config, end_everything, load_busybox

TIMEOUT = 5.0


@pytest.fixture(params=RUNTIMES)
def starter(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state_dir: str
) -> Iterator[OciStarter]:
    """A runtime and a conmon that are stopped whenever they are run."""
    for module in ("command", "conmon"):
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
