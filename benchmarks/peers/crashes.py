"""One crash, several managers of containers: what each says afterwards, and whether it is true.

Run by `make peers`, as root. Each manager starts N small shell programs. A fifth of them end, with codes that are
known. Amid the last of the starts, at a random instant, the manager is killed with SIGKILL. While it is down two fifths
end by themselves, with known codes, and a tenth is killed; the rest run on. A process that has nothing to do with it
gets the pid of one that has ended. A new manager is started and asked for its list, and that is compared with the
programs themselves, which are found in /proc by a mark in their command lines. In a trial of its own all is killed
instead, what is in memory on a real machine is removed, and the new manager finds another boot id.

Each trial is in a pid and a mount namespace of its own. Podman has no manager that stays: each command opens its state
anew, so the command that is at work is killed. What cannot run here is said, with its error.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from managers import MANAGERS, Manager, Said
from programs import (
    Program,
    Stranger,
    be_first,
    boot_again,
    draw,
    end_all,
    find_marked,
    have_end,
    is_inside,
    reboot,
    remove_cgroups,
    renew_run,
    run_inside,
    take_pid,
    unmount,
    wait_until,
)

_FAILURES = (RuntimeError, OSError, subprocess.SubprocessError)
_LEAST_SECONDS = 0.3
"""In which the kill comes where starts take no time."""


class Trial:
    """One manager, N programs, and one crash."""

    def __init__(self, kind: type[Manager], count: int, chance: random.Random, workdir: Path) -> None:
        self._manager = kind(workdir)
        self._workdir = workdir
        self._chance = chance
        self.token = f"{chance.getrandbits(24):06x}"
        self._programs = draw(count, self.token)
        self._ids = [program.id for program in self._programs]
        self._started: list[Program] = []
        """Those that were started when the manager was killed, as it has said."""
        self._unsure: str = ""
        """The one that was being started then."""
        self._stranger: Stranger | None = None

    def crash(self, most_seconds: float) -> dict[str, Any]:
        """Kill the manager amid its starts, have programs end, and return what the next one says that is not true."""
        version, took = self._start(most_seconds)
        pid = have_end(self._programs)
        self._stranger = take_pid(pid) if pid else None
        began = time.monotonic()
        self._manager.begin()
        said = self._manager.ask()
        seconds = time.monotonic() - began
        time.sleep(1)
        marked = find_marked(self._ids)
        found = {"version": version, **compare(self._started, said, marked), **self._look_at_unsure(said, marked)}
        try:
            self._manager.clean()
        except _FAILURES as error:
            found["clean_error"] = str(error)
        time.sleep(1)
        return {
            **found,
            "strangers_signalled": None if self._stranger is None else int(self._stranger.was_signalled()),
            "left": sum(map(len, find_marked(self._ids).values())),
            "seconds": round(seconds, 2),
            "starts_took": round(took, 1),
        }

    def reboot(self, most_seconds: float) -> dict[str, Any]:
        """Have the machine lose power amid the starts, and return what the manager says after the next boot."""
        version, _ = self._start(most_seconds)
        reboot(self._workdir, [self._workdir / name for name in self._manager.volatile])
        self._manager.begin()
        said = self._manager.ask()
        time.sleep(1)
        return {"version": version, **compare_after_boot(self._started, said, find_marked(self._ids))}

    def _start(self, most_seconds: float) -> tuple[str, float]:
        """Start the programs until the manager is killed; return its version, and how long they took."""
        version = self._manager.version()
        self._manager.prepare(self._programs)
        self._manager.begin()
        began = time.monotonic()
        last = self._chance.randrange(len(self._programs) * 4 // 5, len(self._programs))
        for number, program in enumerate(self._programs[:last]):
            if (took := time.monotonic() - began) > most_seconds:
                raise RuntimeError(f"{number} of {len(self._programs)} were started in {took:.0f} s")
            self._manager.start(program)
            self._started.append(program)
        took = time.monotonic() - began
        lasting = {program.id for program in self._started if program.fate != "early"}
        wait_until(lambda: {key for key, pids in find_marked(self._ids).items() if pids} >= lasting, "the programs")
        self._kill_amid(self._programs[last], max(took / last, _LEAST_SECONDS))
        return version, took

    def _kill_amid(self, program: Program, seconds: float) -> None:
        """Have another one started, and kill the manager at a random instant meanwhile, or right after it."""
        killer = threading.Timer(self._chance.uniform(0, seconds), self._manager.kill)
        killer.start()
        try:
            self._manager.start(program)
            self._started.append(program)
        except _FAILURES:  # it was killed before it had said so
            self._unsure = program.id
        killer.join()
        time.sleep(1)  # what works for it, such as conmon, may be amid that start still

    def _look_at_unsure(self, said: Mapping[str, Said], marked: Mapping[str, list[int]]) -> dict[str, int]:
        """Return 1 if the one that was being started runs and is not said to, or the other way round."""
        is_said_to_run = self._unsure in said and said[self._unsure].runs
        return {"cut_off_start": int(bool(self._unsure) and is_said_to_run is not bool(marked[self._unsure]))}

    def end(self) -> None:
        """End what is left."""
        with suppress(*_FAILURES):
            self._manager.kill()
        if self._stranger is not None:
            self._stranger.end()


def compare(programs: Sequence[Program], said: Mapping[str, Said], marked: Mapping[str, list[int]]) -> dict[str, int]:
    """Count what is not true."""
    counts = dict.fromkeys(
        ("lost", "said_to_run_but_ended", "said_to_have_ended_but_runs", "wrong_code", "unknown_code", "doubled"), 0
    )
    for program in programs:
        says, runs = said.get(program.id), bool(marked[program.id])
        has_ended = program.fate != "lasting"
        counts["doubled"] += len(marked[program.id]) > 1 or (has_ended and runs)
        if says is None:
            counts["lost"] += 1
        elif says.runs and has_ended and not runs:
            counts["said_to_run_but_ended"] += 1
        elif not says.runs and not has_ended:
            counts["said_to_have_ended_but_runs"] += 1
        elif says.runs:
            continue
        elif has_ended and says.code is None:
            counts["unknown_code"] += 1
        elif has_ended and says.code not in {program.code, program.code - 128 if program.code == 137 else program.code}:
            counts["wrong_code"] += 1
    return counts


def compare_after_boot(
    programs: Sequence[Program], said: Mapping[str, Said], marked: Mapping[str, list[int]]
) -> dict[str, int]:
    """Count what is not true where all have ended, and nobody has seen how those did that ran to the end."""
    known = [(program, said[program.id]) for program in programs if program.id in said]
    return {
        "lost": len(programs) - len(known),
        "said_to_run_but_ended": sum(says.runs and not marked[program.id] for program, says in known),
        "codes_made_up": sum(says.code is not None for program, says in known if program.fate != "early"),
        "codes_forgotten": sum(says.code != program.code for program, says in known if program.fate == "early"),
        "started_again": sum(bool(marked[program.id]) for program in programs),
    }


def try_one(
    kind: type[Manager], count: int, chance: random.Random, most_seconds: float, *, boot: bool
) -> dict[str, Any]:
    """Put one manager to one trial; return what came of it, or why it could not be done."""
    begun = {"manager": kind.name, "trial": "boot" if boot else "crash", "count": count}
    with directory() as workdir:
        trial = Trial(kind, count, chance, workdir)
        try:
            return begun | (trial.reboot(most_seconds) if boot else trial.crash(most_seconds))
        except _FAILURES as error:
            return begun | {"error": str(error)}
        finally:
            trial.end()
            end_all(workdir)
            remove_cgroups(trial.token)
            boot_again()


@contextmanager
def directory() -> Iterator[Path]:
    """Make a directory for one manager, and remove it with what is mounted in it."""
    path = Path(tempfile.mkdtemp(prefix="limpet-peers-"))
    try:
        yield path
    finally:
        unmount(path)
        shutil.rmtree(path, ignore_errors=True)


def main() -> None:
    """Try all, and print tables in Markdown; with --json a document."""
    options = parse()
    renew_run()
    chance = random.Random(options.seed)
    counts = [int(each) for each in options.counts.split(",")]
    trials = [*((count, False) for count in counts), (min(counts), True)]
    results = []
    for count, boot in trials:
        for kind in MANAGERS:
            if options.only in kind.name:
                results.append(try_one(kind, count, chance, options.most_seconds, boot=boot))
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"machine": platform.platform(), "seed": options.seed, "results": results}, indent=1))
    else:
        print_table([one for one in results if one["trial"] == "crash"], _COLUMNS)
        print_table([one for one in results if one["trial"] == "boot"], _BOOT_COLUMNS)
        print_versions(results)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="10,100", help="how many containers (default: 10,100; 1000 takes long)")
    parser.add_argument("--only", default="", help="a part of the managers' names")
    parser.add_argument("--seed", type=int, default=1, help="what chooses the instants (default: 1)")
    parser.add_argument(
        "--most-seconds", type=float, default=600.0, help="how long one may take to start its containers (default: 600)"
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


_COLUMNS = (
    "lost", "said_to_run_but_ended", "said_to_have_ended_but_runs", "wrong_code", "unknown_code", "doubled",
    "cut_off_start", "strangers_signalled", "left", "seconds",
)  # fmt: skip
_BOOT_COLUMNS = ("lost", "said_to_run_but_ended", "codes_made_up", "codes_forgotten", "started_again")


def print_table(results: Sequence[Mapping[str, Any]], columns: Collection[str]) -> None:
    """Print the results, and what could not run."""
    print("| manager | containers | " + " | ".join(each.replace("_", " ") for each in columns) + " |")
    print("| --- " * (len(columns) + 2) + "|")
    for one in results:
        failed = [f"did not run: {one.get('error')}"] + [""] * (len(columns) - 1)
        told = ["not tried" if one.get(column) is None else str(one[column]) for column in columns]
        print(f"| {one['manager']} | {one['count']} | " + " | ".join(failed if "error" in one else told) + " |")
    print()


def print_versions(results: Sequence[Mapping[str, Any]]) -> None:
    """Print the version of each, or why there is none."""
    for one in {one["manager"]: one for one in results}.values():
        print(f"- {one['manager']}: {one.get('version') or 'error: ' + one['error']}")


if __name__ == "__main__":
    if not is_inside():
        parse()  # which tells of what cannot be read, and of --help
        sys.exit(run_inside([sys.executable, *sys.argv], os.environ))
    sys.exit(be_first(main))
