"""Where the keeper's descriptors run out: whose they are is said, and no end is lost."""

import os
import re
import resource

import pytest

from limpet import Engine, errors
from tests.starters.host import make
from tests.starters.keepers import Start, find_keepers

NARROW = """
import resource
from limpet import errors
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
engine = Engine.open(state_dir)
engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
def start(n, log_path=""):
    config = {"metadata": {"name": f"c{n}"}, "image": {"image": "host"}, "log_path": log_path,
        "command": ["sh", "-c", f"while [ ! -e {state_dir}.go ]; do sleep 0.02; done; exit {n}"]}
    engine.create_container(config, "jobs", id=f"c{n}").start()
count, problem = 0, ""
while not problem:
    try:
        start(count, LOG)
        count += 1
    except errors.StartError as error:
        problem = str(error)
open(state_dir + ".go", "w").close()
codes = [engine.get(f"c{n}").wait(20).exit_code for n in range(count)]
start(99)
say(0 < count == len([n for n in range(count) if codes[n] == n]), engine.get("c99").wait(20).exit_code, problem)
"""


@pytest.mark.parametrize("log_path", ["", "one.log"])
def test_a_keeper_that_has_no_descriptor_left_says_so(engine_process: Start, log_path: str) -> None:
    """Whether it is the keeper that needs one, or the gate that it forks; no end is lost, and others can start then."""
    told = " ".join(engine_process(NARROW.replace("LOG", repr(log_path))).read())
    said = r"True 99 container c\d+: the keeper, process \d+, has no file descriptor left: its limit is 40"
    assert re.match(said, told)


def test_a_keeper_that_has_fewer_descriptors_gives_what_it_has(engine_process: Start, state_dir: str) -> None:
    """It was begun by an engine with a lower limit than today's, and may not raise it: a start was refused for that."""
    first = engine_process(
        """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (500, 1000))
engine = Engine.open(state_dir)
engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
config = {"metadata": {"name": "a"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
engine.create_container(config, "jobs", id="a").start()
say("ready")
"""
    )
    first.read()
    first.kill()
    with Engine.open(state_dir) as engine:
        script = 'test "$(ulimit -Hn)" = 1000 || test "$(ulimit -Hn)" = "$1"'
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        command = ["sh", "-c", script, "sh", str(hard)]
        config = {"metadata": {"name": "b"}, "image": {"image": "host"}, "command": command}
        second = engine.create_container(config, "jobs", id="b")
        second.start()
        assert second.wait(20).exit_code == 0
        engine.get("a").stop(0)


def test_a_keeper_without_descriptors_says_whose_are_missing(engine: Engine, state_dir: str) -> None:
    """Its limit is that of who began it: what the engine has says nothing, and the number of an error even less."""
    make(engine, "one", "sleep", "1000").start()
    keeper = find_keepers(state_dir)["limpet-keeper"]
    soft, hard = resource.prlimit(keeper, resource.RLIMIT_NOFILE)
    resource.prlimit(keeper, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{keeper}/fd")), hard))
    with pytest.raises(errors.StartError, match=f"process {keeper}, has no file descriptor left"):
        make(engine, "two", "true", log_path="two.log").start()
    resource.prlimit(keeper, resource.RLIMIT_NOFILE, (soft, hard))
    make(engine, "three", "true", log_path="three.log").start()
    engine.get("one").stop(0)
