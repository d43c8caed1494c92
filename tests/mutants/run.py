"""Try mutants of the modules named, or of all, each away from the rest of the machine; tell what survived.

    python -m tests.mutants.run                          # as root; hours
    python -m tests.mutants.run --only engine/store      # what begins so
    python -m tests.mutants.run --again                  # those that survived the last time
    python -m tests.mutants.run --count                  # nothing is tried

Mutated code removes directories and kills processes at will. So the sources are copied, and each trial has a pid and a
mount namespace of its own in which all but /tmp and /run, both new, is read-only.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.mutants.modules import GROUPS, Group

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build/mutants/results"
COPIED = ("engine", "recovery", "schema", "benchmarks", "tests")
SEED = 14

IN_COPY = """
for name in {names}; do mount --bind "$0/$name" "$name"; done
exec "$@"
"""
ALONE = """
set -e
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs .hypothesis
for at in $(awk '$5 ~ "^/sys/fs/cgroup" { print $5 }' /proc/self/mountinfo | sort -u); do
    mount -o remount,bind,ro "$at"
done
mount -o remount,bind,ro /
timeout 60 "$@" || { failed=$?; [ $failed != 124 ] || echo timed out after 60 s; exit $failed; }
"""


def try_modules(group: Group, paths: list[str], options: argparse.Namespace) -> None:
    """Try a sample of the modules' mutants in a copy of the sources, which is removed again."""
    copy = ROOT / f"build/mutants/copy-{os.getpid()}"
    for name in COPIED:
        shutil.copytree(ROOT / name, copy / name)
    in_copy = ["unshare", "--mount", "sh", "-c", IN_COPY.format(names=" ".join(COPIED)), copy]
    pytest = [f"{ROOT}/.venv/bin/pytest", "-x", "-q", "-p", "no:cacheprovider", *group.tests]
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", ALONE, "sh"]
    trial = [*shlex.split(options.before), *namespaces, *pytest]
    (ROOT / ".hypothesis").mkdir(exist_ok=True)
    try:
        if not options.count:
            # Mutants are not compiled anew but for the module that they change; and the tests must pass without one.
            compiled = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
            subprocess.run([*in_copy, *pytest, "--collect-only", "-qqq"], cwd=ROOT, check=True, env=compiled)
            subprocess.run([*in_copy, *trial], cwd=ROOT, check=True)
        for path in paths:
            command = "" if options.count else shlex.join(trial)
            session = [options.python, "tests/mutants/session.py", session_of(path), path, command]
            subprocess.run([*in_copy, *session, str(group.one_in), str(SEED)], cwd=ROOT, check=True)
    finally:
        shutil.rmtree(copy)


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


def table() -> str:
    """Return the score of each module as Markdown, and its survivors below."""
    rows, survivors = ["| module | tried | killed | survived | score |", "| --- | --- | --- | --- | --- |"], []
    for module in results():
        survived = [mutant for mutant in module["results"] if mutant["outcome"] == "survived"]
        tried = len(module["results"])
        score = f"{100 * (tried - len(survived)) // tried} %" if tried else "-"
        of = f"{tried} of {module['mutants']}"
        rows.append(f"| `{module['module']}` | {of} | {tried - len(survived)} | {len(survived)} | {score} |")
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
    parser.add_argument("--only", default="", help="modules whose path begins so")
    parser.add_argument("--count", action="store_true", help="count the mutants, and try none")
    parser.add_argument("--again", action="store_true", help="try those that survived the last time")
    parser.add_argument("--table", action="store_true", help="print what is known, and try none")
    parser.add_argument("--before", default="", help="words before each trial's command, such as `nice -n 10`")
    parser.add_argument("--python", default=f"{ROOT}/build/mutants/venv/bin/python", help="the one with cosmic-ray")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for group in () if options.table else GROUPS.values():
        known = {path for path in group.modules if session_of(path).with_suffix(".json").exists()}
        wanted = [path for path in group.modules if path.startswith(options.only)]
        if paths := [path for path in wanted if options.count or (path in known) == options.again]:
            try_modules(group, paths, options)
    sys.stdout.write(table() + "\n")


if __name__ == "__main__":
    main()
