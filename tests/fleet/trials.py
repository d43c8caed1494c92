"""Trials of a fleet with a PostgreSQL of their own: `python -m tests.fleet.trials`. It has one thread, as they ask for.

They are the part `fleet` of the long run: `try_seed` and `count_noticed_controls`, in processes of their own.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from limpet.engine.drill.fleet_controls import CONTROLS, CONTROLS_OF_SERVERS, acknowledge_early, hasten
from limpet.engine.drill.fleet_kills import run_kills
from limpet.engine.drill.fleet_trial import ACTIONS, Point, count_noticed, run_trials, try_point
from limpet.testing import Report
from tests.fleet.conftest import Base
from tests.fleet.pair import Pair, running_pair

ALL_CONTROLS: Final = (*CONTROLS, *CONTROLS_OF_SERVERS)
TOOLS: Final = ("postgres", "initdb", "pg_basebackup", "setpriv")
"""What they need, on the PATH."""
_SETTINGS: Final = ("fsync=on", "recovery_init_sync_method=syncfs")
"""It flushes as one that is to keep what it has. After a kill it does not open each file of each database for that."""
_POINTS_OF_A_SEED: Final = 210
_OWN_WRITES: Final = 36
"""About so many of them are such:"""
_CALLS_EVERY: Final = 40
"""In each seed nodes are killed at each so many-th of their own writes, from another one on."""


def main() -> int:
    """Try points, or the controls alone, and print what they come to as JSON; status 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fleet.trials", description=__doc__)
    parser.add_argument("--points", type=int, default=0, help="so many, drawn by the seed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--action", choices=ACTIONS, action="append", help="only points with this; repeatable")
    parser.add_argument("--point", action="append", help="this one, as a finding names it; repeatable")
    parser.add_argument("--calls", type=int, default=0, help="also kill nodes at each so many-th of their own writes")
    parser.add_argument("--first", type=int, default=0, help="from this one on")
    parser.add_argument("--control", type=int, action="append", help="only this one, broken on purpose: 0 to 4")
    options = parser.parse_args()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what it has started ends, too
    with running_pair(*_SETTINGS) as pair, TemporaryDirectory(prefix="limpet-fleet-", dir="/tmp") as directory:
        base = Base(pair)
        if options.control and not options.calls:
            noticed = {
                ALL_CONTROLS[number].broken: count_noticed(
                    base.url, directory, ALL_CONTROLS[number], seed=options.seed, server=pair
                )
                for number in options.control
            }
            print(json.dumps({"noticed": noticed}))
            return 0 if all(noticed.values()) else 1
        report, kinds = _try_points(base.url, directory, options, pair)
        schemas = base.ask("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'limpet%%'")
    told = {name: getattr(report, name) for name in ("points", "unreached", "acknowledged", "lost", "violations")}
    told |= {"kinds": dict(kinds.most_common()), "findings": [str(finding) for finding in report.findings]}
    print(json.dumps(told | {"schemas": schemas, "seconds": round(time.monotonic() - began, 1)}))
    return 1 if report.violations else 0


def _try_points(url: str, directory: str, options: argparse.Namespace, pair: Pair) -> tuple[Report, Counter[str]]:
    report, kinds = Report(), Counter[str]()
    for name in options.point or ():
        report += try_point(url, directory, Point.parse(name), server=pair)

    def note(point: Point) -> None:
        kinds[point.action] += 1

    if options.points:
        report = run_trials(
            url,
            directory,
            points=options.points,
            seed=options.seed,
            server=pair,
            actions=options.action or ACTIONS,
            note=note,
        )
    if options.calls:
        prepare = acknowledge_early if options.control else hasten
        found = run_kills(url, every=options.calls, first=options.first, seed=options.seed, prepare=prepare)
        kinds["kill at an own write"] = found.points
        report += found
    return report, kinds


def try_seed(seed: int, workers: int) -> list[dict[str, Any]]:
    """Try some hundred points, and return what each process has told; `workers` is how many have work at a time."""
    processes = workers + 1  # a point waits for a third of its time
    points = [_POINTS_OF_A_SEED // processes] * processes
    points[0] -= min(_OWN_WRITES, points[0] - 1)
    commands = [["--points", str(count), "--seed", str(seed * 1000 + number)] for number, count in enumerate(points)]
    commands[0] += ["--calls", str(_CALLS_EVERY), "--first", str(seed % _CALLS_EVERY)]
    return _run(commands)


def count_noticed_controls(seed: int) -> int:
    """Return how often the controls were noticed; 0 unless each was."""
    chosen = [word for number in range(len(ALL_CONTROLS)) for word in ("--control", str(number))]
    (told,) = _run([["--seed", str(seed), *chosen]])
    noticed: list[int] = list(told["noticed"].values())
    return sum(noticed) if all(noticed) else 0


def _run(commands: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Run trials side by side, each in an interpreter of its own, which ends with this thread."""
    start = ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "tests.fleet.trials"]
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen([*start, *command], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    told: list[dict[str, Any]] = []
    for process, (out, error) in [(process, process.communicate()) for process in processes]:
        if not out:
            raise RuntimeError(f"trials of a fleet ended, {process.returncode}: {error[-4000:]}")
        told.append(json.loads(out.splitlines()[-1]))
    return told


if __name__ == "__main__":
    sys.exit(main())
