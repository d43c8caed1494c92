"""A place apart for mutated code, which removes directories and kills processes at will.

The sources are copied and the copy is put over them in a mount namespace, so that nothing need be installed anew. Each
trial has a pid and a mount namespace of its own, in which all but /tmp and /run, both new, is read-only, and sees no
cgroups but its own.
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
_OF_ITS_OWN = """
own=limpet-mutants-$$
awk '{ for (i = 1; i < NF; i++) if ($i == "-") { sub(/^rw,(xattr,)?/, "", $NF); sub(/^rw$/, "", $NF)
    if ($(i + 1) ~ /^cgroup2?$/) print $5, $(i + 1), $NF } }' /proc/self/mountinfo > /tmp/$own
while read -r at kind of; do
    [ $kind = cgroup ] || of=
    above=$at$(awk -F: -v of="$of" '$2 == of { print $3 }' /proc/self/cgroup)
    mkdir "$above/$own" 2>/dev/null || continue
    echo "$above/$own" >> /tmp/$own.made
    for file in cpuset.cpus cpuset.mems; do
        [ $kind = cgroup2 ] || [ ! -e "$above/$file" ] || cat "$above/$file" > "$above/$own/$file"
    done
done < /tmp/$own
sh -c 'while read -r at; do echo $$ > "$at/cgroup.procs"; done < "$0.made"
    exec unshare --cgroup --mount --pid --fork --mount-proc --kill-child sh -c "$@"' /tmp/$own "$0" "$@" 3< /tmp/$own
failed=$?
for round in 1 2 3 4 5 6 7 8 9 10; do
    while read -r at; do find "$at" -depth -type d -exec rmdir {} + 2>/dev/null; done < /tmp/$own.made
    find $(cat /tmp/$own.made) -maxdepth 0 2>/dev/null | grep -q . || break
    sleep 0.1
done
rm -f /tmp/$own /tmp/$own.made
exit $failed
"""
"""Makes cgroups below our own, puts the trial into them, and removes them afterwards."""
_ALONE = """
set -e
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs .hypothesis
umount -R /sys/fs/cgroup
mount -t tmpfs tmpfs /sys/fs/cgroup
while read -r at kind of; do
    mkdir -p "$at"
    mount -t $kind -o "${of:-rw}" cgroup "$at" || true
done <&3 2>/dev/null
exec 3<&-
mount -o remount,bind,ro /
failed=0
timeout "$0" "$@" || failed=$?
for state in $(find /sys/fs/cgroup -name freezer.state -path "*/*/limpet*" 2>/dev/null); do
    echo THAWED > "$state"  # or what is frozen would not end with us
done
[ $failed != 124 ] || echo "timed out after $0 s"
exit $failed
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
    return ["sh", "-c", _OF_ITS_OWN, _ALONE, str(seconds), *command]
