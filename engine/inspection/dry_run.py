"""What a recovery pass would say now: the same look, the same rules, and nothing is written or done."""

import os
import time

from limpet.engine.inspection.snapshot import Snapshot
from limpet.engine.reconcile import examine_all, judge_orphans
from limpet.engine.starters import make_host_probe
from limpet.engine.state.directory import CONTAINERS, SANDBOXES
from limpet.recovery.host import read_boot_id
from limpet.recovery.orphans import Orphan
from limpet.recovery.report import Report


def find_orphans(snapshot: Snapshot) -> tuple[Orphan, ...]:
    """Return what lies in the state directory and belongs to no container or sandbox, with what is to become of it."""
    bundles, sandboxes = (os.path.join(snapshot.path, name) for name in (CONTAINERS, SANDBOXES))
    # Read anew: a live engine may have made some since the snapshot was opened.
    owned = {
        bundles: lambda: {row.id for row in snapshot.source.ask(lambda reader: reader.load_names())},
        sandboxes: lambda: {row.id for row in snapshot.source.ask(lambda reader: reader.load_sandboxes())},
    }
    return tuple(judge_orphans({path: find_ids for path, find_ids in owned.items() if os.path.isdir(path)}))


def plan_recovery(snapshot: Snapshot) -> Report:
    """Return the report of a pass that begins now. Raises StoreDamagedError where no pass could begin.

    Its verdicts are those on a dead engine's containers: beside a live engine they are only what would be said if
    it were killed this instant.
    """
    begun, now = time.monotonic_ns(), time.time_ns()
    bundles = os.path.join(snapshot.path, CONTAINERS)
    keeps_bundles = os.path.isdir(bundles)
    leftovers = set(os.listdir(bundles)) if keeps_bundles else set()
    checkpoints = snapshot.checkpoints()
    unsettled = [
        one
        for one in checkpoints
        if (one.record.id in leftovers if one.record.status.released else not one.record.status.finished_at)
    ]
    return Report(
        number=0,
        at=now,
        boot_id=read_boot_id() or "",
        dry_run=True,
        settled=len(checkpoints) - len(unsettled),
        findings=tuple(one.finding for one in examine_all(unsettled, make_host_probe(bundles), now)),
        orphans=find_orphans(snapshot),
        took_ns=time.monotonic_ns() - begun,
    )
