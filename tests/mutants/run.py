"""Try mutants of the modules, or of those whose path begins with a word; tell the score, and what survived.

python -m tests.mutants.run                          # as root; hours
python -m tests.mutants.run --only engine/store
python -m tests.mutants.run --again                  # those that survived the last time
python -m tests.mutants.run --table                  # what is known
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.mutants.apart import BUILD, ROOT, alone, copied, in_copy, pytest
from tests.mutants.modules import GROUPS, Group

RESULTS = BUILD / "results"
SEED = 14


def try_modules(group: Group, paths: list[str], options: argparse.Namespace) -> None:
    """Try a sample of the modules' mutants in a copy of the sources."""
    tests = pytest(group.tests)
    trial = [*shlex.split(options.before), *alone(*tests, seconds=options.limit)]
    with copied() as copy:
        # Only the module that is changed is compiled anew in a trial; and without a mutant the tests must pass.
        compiled = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
        subprocess.run(in_copy(copy, *tests, "--collect-only", "-qqq"), cwd=ROOT, check=True, env=compiled)
        subprocess.run(in_copy(copy, *trial), cwd=ROOT, check=True)
        for path in paths:
            session = [options.python, "tests/mutants/session.py", session_of(path), path, shlex.join(trial)]
            subprocess.run(in_copy(copy, *session, group.one_in, options.most, SEED), cwd=ROOT, check=True)


def session_of(path: str) -> Path:
    """Return where cosmic-ray keeps what it knows of a module, without the suffixes."""
    return RESULTS / path.replace("/", "-").removesuffix(".py")


def results() -> Iterator[dict[str, Any]]:
    """Yield what came of each module's mutants, in the order of the modules."""
    for group in GROUPS.values():
        for path in group.modules:
            told = session_of(path).with_suffix(".json")
            if told.exists():
                yield json.loads(told.read_text())


def is_of_today(module: dict[str, Any]) -> bool:
    """Say whether what is known is of the source as it is."""
    return bool(module["source"] == hashlib.sha256((ROOT / module["module"]).read_bytes()).hexdigest())


def table() -> str:
    """Return the score of each module as Markdown, and its survivors below."""
    rows, survivors = ["| module | tried | killed | survived | score |", "| --- | --- | --- | --- | --- |"], []
    for module in results():
        survived = [mutant for mutant in module["results"] if mutant["outcome"] == "survived"]
        tried = len(module["results"])
        slow = sum(mutant["outcome"] == "timed out" for mutant in module["results"])
        score = f"{100 * (tried - len(survived)) // tried} %" if tried else "-"
        killed = f"{tried - len(survived)}" + (f", {slow} by the limit of time" if slow else "")
        rows.append(f"| `{module['module']}` | {tried} of {module['mutants']} | {killed} | {len(survived)} | {score} |")
        for mutant in survived:
            changed = [
                line.strip()
                for line in mutant["diff"].splitlines()
                if line[:1] in "+-" and line[:2] not in {"++", "--"}
            ]
            survivors.append(f"- `{module['module']}`, `{mutant['function']}`: `{' => '.join(changed)}`")
    return "\n".join([*rows, "", *survivors])


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="modules whose path begins so")
    parser.add_argument("--most", type=int, default=1000, help="try at most about so many of each module")
    parser.add_argument("--limit", type=int, default=60, help="seconds that a trial may take; then it is killed")
    parser.add_argument("--again", action="store_true", help="try those that survived the last time")
    parser.add_argument("--table", action="store_true", help="print what is known, and try none")
    parser.add_argument("--before", default="", help="words before each trial's command, such as `nice -n 10`")
    parser.add_argument("--python", default=f"{BUILD}/venv/bin/python", help="the one with cosmic-ray")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for group in () if options.table else GROUPS.values():
        known = {module["module"] for module in results() if module["is_done"] and is_of_today(module)}
        wanted = [path for path in group.modules if path.startswith(tuple(options.only))]
        if paths := [path for path in wanted if (path in known) == options.again]:
            try_modules(group, paths, options)
    sys.stdout.write(table() + "\n")


if __name__ == "__main__":
    main()
