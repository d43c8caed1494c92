"""Output: whoever copies it is killed or late, each line is in the log, and nothing stays of it elsewhere."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from limpet import Engine
from tests.campaigns.refused_life import IMPATIENT_KEEPER
from tests.conftest import is_running, wait_until
from tests.output import read_output
from tests.starters.host import make
from tests.starters.keepers import ALL, find_keepers, held, kill, wait_for_another_copier
from tests.stops import stop_by_signal


def test_a_copier_that_was_killed_leaves_no_zombie(engine: Engine, state_dir: str) -> None:
    """Whoever is its parent waits for it, and the keeper has another."""
    container = make(engine, "one", "sh", "-c", "while echo line; do sleep 0.01; done", log_path="one.log")
    container.start()
    for _ in range(2):  # the anchor's first, then the keeper's own
        killed = find_keepers(state_dir)["limpet-copier"]
        kill(state_dir, "limpet-copier")
        wait_for_another_copier(state_dir, killed)
        wait_until(lambda killed=killed: not Path(f"/proc/{killed}").exists(), "its end to be waited for")  # type: ignore[misc] # bound at once
    container.stop(0)


def test_the_next_copier_goes_on_with_every_log(engine: Engine, state_dir: str) -> None:
    """Whoever is killed, what is written before and after is in the log: each line once, in order."""
    count = "i=0; while echo $i; do i=$((i+1)); sleep 0.005; done"
    containers = [make(engine, name, "sh", "-c", count, log_path=f"{name}.log") for name in ("one", "two")]
    logs = [Path(container.metadata.log_path) for container in containers]
    for container in containers:
        container.start()

    def lines(log: Path) -> list[int]:
        text = log.read_text() if log.exists() else ""
        return [int(line.split()[-1]) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    for _ in range(2):  # the anchor's first, then the keeper's own
        before = [len(lines(log)) for log in logs]
        wait_until(
            lambda before=before: all(len(lines(log)) > old for log, old in zip(logs, before, strict=True)),  # type: ignore[misc] # bound at once
            "both logs to grow",
        )
        killed = find_keepers(state_dir)["limpet-copier"]
        kill(state_dir, "limpet-copier")
        wait_for_another_copier(state_dir, killed)
    before = [len(lines(log)) for log in logs]
    wait_until(lambda: all(len(lines(log)) > old for log, old in zip(logs, before, strict=True)), "both to go on")
    for container, log in zip(containers, logs, strict=True):
        container.stop(0)
        assert lines(log) == [*range(len(lines(log)))]


@pytest.mark.parametrize("killed", [("limpet-copier",), ALL])
def test_the_next_copier_finds_the_logs_of_a_moved_directory(state_dir: str, killed: tuple[str, ...]) -> None:
    """Whoever is killed once the state directory has been moved, the output goes on where the log is now."""
    moved = f"{state_dir}.moved"
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        make(engine, "one", "sh", "-c", "while echo line; do sleep 0.01; done", log_path="one.log").start()
    os.rename(state_dir, moved)
    before = find_keepers(moved)["limpet-copier"]
    kill(moved, *killed)
    with Engine.open(moved) as engine:
        wait_for_another_copier(moved, before)
        one = engine.get("one")
        lines = len(list(one.read_log()))
        wait_until(lambda: len(list(one.read_log())) > lines, "the log to grow")
        one.stop(0)
    assert not os.path.exists(state_dir)


def test_a_log_is_read_whole_once_its_container_has_ended(engine: Engine, state_dir: str) -> None:
    """Its end is known before its output is copied: a reader waits for what is on its way."""
    go = Path(state_dir, "go")
    one = make(
        engine, "one", "sh", "-c", f"until [ -e {go} ]; do sleep 0.01; done; seq 3000; echo last", log_path="one.log"
    )
    one.start()
    stop_by_signal(find_keepers(state_dir)["limpet-copier"])
    go.touch()
    one.wait(20)
    assert [each.text for each in one.read_log()][-1] == b"last\n"


@pytest.mark.parametrize("is_released", [True, False], ids=["the container is released", "the state is removed"])
def test_output_that_nobody_can_have_keeps_no_keeper(
    state_dir: str, monkeypatch: pytest.MonkeyPatch, *, is_released: bool
) -> None:
    """Output for a log whose directory is gone waits for as long as somebody may ask for it, and no longer."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", IMPATIENT_KEEPER)
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}, "log_directory": f"{state_dir}-logs"}, id="jobs")
        container = make(engine, "one", "sh", "-c", "while :; do echo x; sleep 0.01; done", log_path="one.log")
        container.start()
        read_output(container.metadata.log_path, "x\n")
        keeper = engine.starter._keeper.keeper_pid  # type: ignore[attr-defined]
        shutil.rmtree(f"{state_dir}-logs")
        kill(state_dir, "limpet-copier")
        container.stop(0)
        if is_released:
            container.release()
    if not is_released:
        time.sleep(0.5)
        assert is_running(keeper)
        shutil.rmtree(state_dir)
    wait_until(lambda: not is_running(keeper), "the keeper to end")


def test_nothing_stays_of_output_that_a_lost_keeper_had_copied(engine: Engine, state_dir: str) -> None:
    """A copier that is late, whose keeper is killed meanwhile, copies what has ended, and leaves no file behind."""
    make(engine, "first", "true").start()
    engine.get("first").wait(20)
    old = find_keepers(state_dir)
    kill(state_dir, "limpet-copier")  # the next one is the keeper's own, and ends with it
    make(engine, "late", "sh", "-c", "exec >&2; echo said", log_path="late.log").start()
    wait_for_another_copier(state_dir, old["limpet-copier"])
    copier = find_keepers(state_dir)["limpet-copier"]
    with held(copier):
        container = make(engine, "last", "sh", "-c", "echo said", log_path="last.log")
        container.start()
        container.wait(20)
        for key in ("late", "last"):
            engine.get(key).release()
        os.kill(old["limpet-keeper"], signal.SIGKILL)
        make(engine, "next", "true").start()  # the anchor has taken over
    wait_until(lambda: not is_running(copier), "the end of the late copier")
    assert b"said" in Path(container.metadata.log_path).read_bytes()
    wait_until(lambda: not os.listdir(f"{state_dir}/keeper/fifo"), "an empty folder")


def test_a_folder_of_pipes_that_is_cleared_away_is_made_again(engine: Engine, state_dir: str) -> None:
    """As what is old and empty is where a state directory is in /tmp: what starts then has a log all the same."""
    make(engine, "one", "sleep", "1000").start()
    os.rmdir(os.path.join(state_dir, "keeper", "fifo"))
    second = make(engine, "two", "sh", "-c", "echo here", log_path="two.log")
    second.start()
    assert read_output(second.metadata.log_path, "here\n") == "here\n"
    engine.get("one").stop(0)


DEAF_ONCE = """
import errno, sys
sys.path.insert(0, sys.argv[1])
from keeper import loop, main

def watch(self, descriptor, handler, real=loop.Loop.watch):
    if handler.__name__ == "_listen":
        heard.append(descriptor)
        if len(heard) == 2:
            raise OSError(errno.ENOSPC, "max_user_watches")
    return real(self, descriptor, handler)

heard, loop.Loop.watch = [], watch
main.main()
"""
"""The keeper's program, which the kernel refuses to tell of its second copier."""


def test_output_is_copied_on_though_the_next_copier_cannot_be_watched(
    state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copier is killed, and the kernel has no room for the next one's link: the one after that gets all pipes."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", DEAF_ONCE)
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        script = "echo one; while [ ! -e GO ]; do sleep 0.02; done; echo two".replace("GO", state_dir + ".go")
        container = make(engine, "a", "sh", "-c", script, log_path="a.log")
        container.start()
        read_output(container.metadata.log_path, "one\n")
        time.sleep(0.2)  # one that ends sooner is begun anew at the next tick only
        kill(state_dir, "limpet-copier")
        Path(state_dir + ".go").touch()
        assert container.wait(20).exit_code == 0
        read_output(container.metadata.log_path, "one\ntwo\n")
        wait_until(lambda: not os.listdir(f"{state_dir}/keeper/fifo"), "its pipes to be removed")
