"""The CI executor of the documentation, killed at random amid 50 jobs: python -m tests.docs.kill_executor KILLS [SEED].

What the engine says of each job in the end is compared with the lines that the jobs have written.
"""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from limpet.engine import Engine
from limpet.schema import Reason

EXECUTOR = Path(__file__).parents[2] / "docs" / "examples" / "ci_executor.py"
JOBS = 50
SIDE_BY_SIDE = 10
KILL_WITHIN_SECONDS = 1.2


def kill_executors(least: int, seed: int, scratch: Path) -> int:
    """Kill at least so many executors, run by run until all jobs are done, and return how many. Raises AssertionError.

    The jobs are spread over stages, so that kills hit some that are to come, some that run and some that have ended.
    """
    chosen, kills = random.Random(seed), 0
    for number in itertools.count():
        directory = scratch / str(number)
        directory.mkdir()
        trace, pipeline = directory / "trace", directory / "pipeline.json"
        names = [f"job-{each}" for each in range(JOBS)]
        commands = {name: f"echo {name} >> {trace}; sleep 0.05" for name in names}
        stages = [dict(stage) for stage in zip(*[iter(commands.items())] * SIDE_BY_SIDE, strict=True)]
        pipeline.write_text(json.dumps(stages))
        kills += _kill_until_done(chosen, directory / "state", pipeline)
        _judge(directory / "state", names, trace.read_text().split())
        print(f"seed {seed}: {kills} of {least} kills, each of {JOBS} jobs as it was said", flush=True)
        if kills >= least:
            break
    return kills


def _kill_until_done(chosen: random.Random, state_dir: Path, pipeline: Path) -> int:
    """Start the executor again and again, and return how often it was killed before it was through."""
    for kills in itertools.count():
        command = [sys.executable, str(EXECUTOR), str(state_dir), str(pipeline)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            output, _ = process.communicate(timeout=chosen.uniform(0, KILL_WITHIN_SECONDS))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            continue
        assert process.returncode == 0, output
        return kills
    raise AssertionError


def _judge(state_dir: Path, names: list[str], traced: list[str]) -> None:
    """Each job has completed once; what was tried besides is said to have never run, or to have ended unseen."""
    with Engine.open(state_dir) as engine:
        for name in names:
            attempts = [one.status for one in engine.list(name=name)]
            ran = [one for one in attempts if one.reason == Reason.COMPLETED]
            unseen = [one for one in attempts if one.reason == Reason.UNKNOWN]
            never = [one for one in attempts if one.reason == Reason.START_ERROR and "never ran" in one.message]
            assert len(ran) == 1, (name, attempts)
            assert len(ran) + len(unseen) + len(never) == len(attempts), (name, attempts)
            assert 1 <= traced.count(name) <= 1 + len(unseen), (name, traced.count(name), attempts)


if __name__ == "__main__":
    with TemporaryDirectory(prefix="limpet-kill-executor-") as directory:
        kill_executors(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1, Path(directory))
