"""Mutants that once survived, by name: each breaks one promise, and its tests must fail.

python -m tests.mutants.named       # as root
"""

import subprocess
import sys
from typing import NamedTuple

from tests.mutants.apart import ROOT, alone, copied, in_copy, pytest


class Named(NamedTuple):
    """A change of one place of a file, and the tests that notice it."""

    path: str
    old: str
    new: str
    tests: tuple[str, ...]


_WAITS = "        if request.taken:\n            request.wait()\n"
_FLUSHES = "if landed and not move_wal(self._connection):"
_DROPS = "                restart_wal(self._connection)  # so that its remains"
_COMMIT, _CONTAINERS = "tests/store/test_commit.py", "tests/engine/test_containers.py"

NAMED = {
    "an observed end time that is ignored, by the rules": Named(
        "recovery/rules.py", "max(observation.finished_at or now, 1)", "max(now, 1)", ("tests/recovery/test_rules.py",)
    ),
    "an observed end time that is ignored, by the probe": Named(
        "recovery/probe.py", "finished_at=seen.finished_at", "finished_at=0", ("tests/recovery/test_probe.py",)
    ),
    "an observed end time that is ignored, by the watcher": Named(
        "engine/lifecycle/watcher.py",
        "finished_at = found.finished_at or watch.noticed_at",
        "finished_at = watch.noticed_at",
        (_CONTAINERS,),
    ),
    "an observed end time that is ignored, by the starter": Named(
        "engine/starters/process/ends.py",
        'finished_at = end.get("time", 0)',
        "finished_at = 0",
        (_CONTAINERS,),
    ),
    "a taken request whose interrupt is not waited for": Named("engine/store/commit.py", _WAITS, "", (_COMMIT,)),
    "an interrupted request that stays queued": Named(
        "engine/store/commit.py", "self._queue.remove(request)", "pass", (_COMMIT,)
    ),
    "a read-back that is not flushed anew": Named(
        "engine/database/sqlite/writer.py", _FLUSHES, "if False:", (_COMMIT,)
    ),
    "torn remains of a commit that are kept": Named(
        "engine/database/sqlite/writer.py",
        _DROPS,
        "                pass  # so that its remains",
        ("tests/store/test_store.py",),
    ),
    "torn remains of a killed writer that are kept": Named(
        "engine/database/sqlite/migrate.py",
        "        if is_torn:\n",
        "        if False:\n",
        ("tests/store/test_opening.py",),
    ),
    "create of an ended container": Named(
        "engine/lifecycle/starting.py",
        "status.created_at or status.finished_at or status.released",
        "status.created_at or status.released",
        (_CONTAINERS,),
    ),
    "an interrupted start that is not aborted": Named(
        "engine/lifecycle/starting.py",
        "        starter.abort(prepared)\n",
        "        pass\n",
        (_CONTAINERS,),
    ),
    "ENOENT from pidfd_open, in a recovery": Named(
        "recovery/host.py",
        "_NAMES_A_THREAD = {errno.EINVAL, errno.ENOENT}",
        "_NAMES_A_THREAD = {errno.EINVAL}",
        ("tests/recovery/test_probe.py",),
    ),
    "ENOENT from pidfd_open, in the keeper": Named(
        "engine/starters/process/keeper/kernel.py",
        "NO_PROCESS = {errno.ESRCH, errno.EINVAL, errno.ENOENT}",
        "NO_PROCESS = {errno.ESRCH, errno.EINVAL}",
        ("tests/starters/test_keeper_anew.py",),
    ),
    "orders that a runtime takes from annotations": Named(
        "engine/starters/oci/annotations.py",
        "if not name.startswith(_ORDERS)",
        "if name",
        ("tests/starters/test_oci_spec.py", "-k", "no_orders"),
    ),
    "a start that a recovery ends": Named(
        "engine/starters/oci/starter.py",
        "        self._busy.take(launch.id)\n",
        "        pass\n",
        ("tests/starters/test_oci_evidence.py", "-k", "under_way"),
    ),
}


def is_killed(named: Named) -> bool:
    """Say whether its tests fail, and pass without it."""
    with copied() as copy:
        trial = in_copy(copy, *alone(*pytest(named.tests), seconds=90))
        subprocess.run(trial, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        path = copy / named.path
        source = path.read_text()
        assert source.count(named.old) == 1, f"{named.path}: {named.old!r} is not there once"
        path.write_text(source.replace(named.old, named.new))
        return subprocess.run(trial, cwd=ROOT, check=False, stdout=subprocess.DEVNULL).returncode == 1


def main() -> int:
    """Try all of them; return how many survived."""
    survived = 0
    for name, named in NAMED.items():
        killed = is_killed(named)
        survived += not killed
        sys.stdout.write(f"{'killed' if killed else 'SURVIVED'}: {name}\n")
    return survived


if __name__ == "__main__":
    sys.exit(main())
