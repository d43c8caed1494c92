"""What a container's first process leaves behind: whose it is stays known, and it ends with the container."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from limpet import Engine, errors
from limpet.engine.starters.process.client import KeeperClient
from limpet.engine.starters.process.keeper.messages import Message
from tests.conftest import find_processes, is_running, wait_until
from tests.starters.host import make
from tests.starters.keepers import KEEPER, Start, find_keepers, kill


@pytest.mark.usefixtures("namespaces")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has the namespaces by which these are told")
def test_what_is_left_by_a_program_that_ends_at_once_is_known(engine: Engine) -> None:
    """Also in a session of its own, and an orphan before the keeper has heard that the program was executed."""
    for number in range(25):
        mark = f"10{os.getpid()}{number:02}"
        container = make(engine, f"c{number}", "sh", "-c", f"setsid sleep {mark} & exit {number}")
        container.start()
        assert container.wait(20).exit_code == number
        container.remove()
        left = find_processes("sleep", mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"life {number} has left a process behind"


STRAY = f"{'unshare -u ' if os.geteuid() == 0 else ''}setsid sh -c 'trap : TERM; while :; do sleep MARK; done'"
"""A process that has left all by which it could be told, and does not end by SIGTERM."""


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("program", [f"{STRAY} & wait", f'sh -c "{STRAY} & wait" & sleep 0.3'])
def test_what_descended_from_a_container_when_it_was_signalled_ends_with_it(engine: Engine, program: str) -> None:
    """Its parent ends by the stop's signal, or with the first process: then nothing else tells whose it is."""
    mark = f"30{os.getpid()}{len(program)}"
    container = make(engine, "c", "sh", "-c", program.replace("MARK", mark))
    container.start()
    wait_until(lambda: len(find_processes("sleep", mark)) == 1, "it to run")
    if program.endswith("wait"):
        container.stop(0.5)
    container.wait(20)
    container.remove()
    left = find_processes("sleep", mark)
    subprocess.run(["pkill", "-KILL", "-f", f"sleep {mark}(;|$)"], check=False)
    assert not left


@pytest.mark.usefixtures("namespaces")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has the namespaces by which these are told")
@pytest.mark.parametrize("is_acknowledged", [True, False])
def test_what_is_left_is_known_to_the_keeper_that_takes_over(state_dir: str, is_acknowledged: bool) -> None:
    """Also where the end is written down already, and where no engine has heard of it."""
    mark = f"20{os.getpid()}{is_acknowledged:d}"
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        container = make(engine, "c", "sh", "-c", f"setsid sleep {mark} & sleep 0.3; exit 3")
        container.start()
        pid = container.status.pid
        if is_acknowledged:
            assert container.wait(20).exit_code == 3
    wait_until(lambda: not is_running(pid), "the program to end")
    wait_until(lambda: len(find_processes("sleep", mark)) == 1, "a daemon to be left")
    kill(state_dir, *KEEPER)
    wait_until(lambda: "limpet-anchor" not in find_keepers(state_dir), "the anchor to take over")
    with Engine.open(state_dir) as engine:
        assert engine.get("c").exit_code == 3
        engine.get("c").remove()
    left = find_processes("sleep", mark)
    for each in left:
        os.kill(each, signal.SIGKILL)
    assert not left


REFUSING = """
import errno, sys
sys.path.insert(0, sys.argv[1])
from keeper import main, members

def signal(self, containers, number, *given, real=members.Members.signal):
    if any(each.id == "refused" for each in containers):
        raise OSError(errno.ENFILE, "Too many open files in system")
    return real(self, containers, number, *given)

members.Members.signal = signal
main.main()
"""
"""The keeper's program, which cannot look for the processes of one container."""


def test_leftovers_that_cannot_be_ended_keep_no_engine_from_opening(
    engine_process: Start, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill has come between ends and their daemons': one cannot be looked at now, and the other one is ended."""
    lasting = ["sh", "-c", "setsid sleep 3000 & echo $! >PID; exit 3"]
    process = engine_process(
        """
import limpet.engine.starters.process.client as client
from limpet.engine.starters.process import ProcessStarter
client._PROGRAM = THE_KEEPER
ProcessStarter.signal = lambda *_, **__: 0
ProcessStarter.forget_exits = lambda *_: None
engine = Engine.open(state_dir)
engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
for key in ("other", "refused"):
    command = [each.replace("PID", f"{state_dir}.{key}") for each in THE_COMMAND]
    engine.create_container({"metadata": {"name": key}, "image": {"image": "host"}, "command": command},
        "jobs", id=key).start()
    engine.get(key).wait(20)
say("ended"); time.sleep(999)
""".replace("THE_KEEPER", repr(REFUSING)).replace("THE_COMMAND", repr(lasting))
    )
    process.read()
    process.kill()
    pids = {key: int(Path(f"{state_dir}.{key}").read_text()) for key in ("other", "refused")}
    try:
        with Engine.open(state_dir) as engine:
            assert {each.exit_code for each in engine.list()} == {3}
            wait_until(lambda: not is_running(pids["other"]), "what one has left to be ended")
            assert is_running(pids["refused"])
            monkeypatch.setattr(KeeperClient, "ask", refuse_to_answer)
            engine.recover()
    finally:
        for pid in pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def refuse_to_answer(_: KeeperClient, message: Message, **__: object) -> Message:
    raise errors.KeeperError(f"the keeper has not answered {message['op']!r} for 10 s")
