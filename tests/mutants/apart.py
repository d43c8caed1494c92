"""A place apart for mutated code, which removes directories and kills processes at will.

The sources are copied and the copy is put over them in a mount namespace, so that nothing need be installed anew. Each
trial has a pid and a mount namespace of its own, in which all but /tmp and /run, both new, is read-only.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/mutants"
_COPIED = ("engine", "recovery", "schema", "benchmarks", "tests")
_IN_COPY = f"""
for name in {" ".join(_COPIED)}; do mount --bind "$0/$name" "$name"; done
exec "$@"
"""
_ALONE = """
set -e
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs .hypothesis
for at in $(awk '$5 ~ "^/sys/fs/cgroup" { print $5 }' /proc/self/mountinfo | sort -u); do
    mount -o remount,bind,ro "$at"
done
mount -o remount,bind,ro /
timeout "$0" "$@" || { failed=$?; [ $failed != 124 ] || echo "timed out after $0 s"; exit $failed; }
"""


@contextmanager
def copied() -> Iterator[Path]:
    """Make a copy of the sources for as long as the block runs."""
    copy = BUILD / f"copy-{os.getpid()}"
    (ROOT / ".hypothesis").mkdir(exist_ok=True)
    try:
        for name in _COPIED:
            shutil.copytree(ROOT / name, copy / name)
        yield copy
    finally:
        shutil.rmtree(copy)


def in_copy(copy: Path, *command: object) -> list[str]:
    """Return a command, to be run in `ROOT`, that sees the copy where the sources are."""
    return ["unshare", "--mount", "sh", "-c", _IN_COPY, *map(str, (copy, *command))]


def pytest(tests: Sequence[str]) -> list[str]:
    """Return the command that runs tests until one fails."""
    return [f"{ROOT}/.venv/bin/pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]


def alone(*command: str, seconds: int = 30) -> list[str]:
    """Return the command that does it apart from all else, and fails after so many seconds."""
    return [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
        "sh",
        "-c",
        _ALONE,
        str(seconds),
        *command,
    ]
