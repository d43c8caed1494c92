"""Trials of a fleet with a PostgreSQL of their own: `python -m tests.fleet.trials`. It has one thread, as they ask for.

The long run: `python -m tests.fleet.trials --points 20000`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory

from limpet.engine.drill.fleet_controls import CONTROLS, acknowledge_early, hasten
from limpet.engine.drill.fleet_kills import run_kills
from limpet.engine.drill.fleet_trial import count_noticed, run_trials
from tests.campaigns.sizes import CAMPAIGNS
from tests.fleet.conftest import Base, running_cluster


def main() -> int:
    """Try points, or the controls alone, and print what they come to as JSON; status 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fleet.trials", description=__doc__)
    parser.add_argument("--points", type=int, default=CAMPAIGNS["fleet"].long_run)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--control", type=int, action="append", help="only this one, broken on purpose: 0, 1 or 2")
    parser.add_argument("--calls", type=int, help="kill nodes at each so many-th of their own writes instead")
    options = parser.parse_args()
    began = time.monotonic()
    # What is killed here loses nothing that it has written, flushed or not.
    with running_cluster("fsync=off") as cluster, TemporaryDirectory(prefix="limpet-fleet-", dir="/tmp") as directory:
        base = Base(cluster)
        if options.calls is not None:
            prepare = hasten if options.control is None else acknowledge_early
            report = run_kills(base.url, every=options.calls, seed=options.seed, prepare=prepare)
            told = {name: getattr(report, name) for name in ("points", "acknowledged", "lost", "violations")}
            print(json.dumps(told | {"findings": [str(finding) for finding in report.findings]}))
            return 1 if report.violations else 0
        if options.control is not None:
            noticed = {
                CONTROLS[number].broken: count_noticed(base.url, directory, CONTROLS[number], seed=options.seed)
                for number in options.control
            }
            print(json.dumps({"noticed": noticed}))
            return 0 if all(noticed.values()) else 1
        report = run_trials(
            base.url, directory, points=options.points, seed=options.seed, server=cluster, progress=_show(began)
        )
        schemas = base.ask("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'limpet%%'")
    told = {name: getattr(report, name) for name in ("points", "unreached", "acknowledged", "violations")}
    findings = [f"{finding.point}: {finding.kind}: {finding.message}" for finding in report.findings]
    print(json.dumps(told | {"findings": findings, "schemas": schemas, "seconds": round(time.monotonic() - began, 1)}))
    return 1 if report.violations else 0


def _show(began: float) -> Callable[[int, int], None]:
    """Return what says every minute how far it has come."""
    last = began

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 60:
            last = time.monotonic()
            print(f"{done:,} of {total:,} points", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
