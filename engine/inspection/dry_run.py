"""What a recovery pass would decide now: same observations, same rules; nothing is written or done."""

import os
import time

from limpet.engine.inspection.snapshot import Snapshot
from limpet.engine.reconcile import examine_all, find_remarkable, judge_orphans
from limpet.engine.starters import make_host_probe
from limpet.engine.state.names import CONTAINERS, SANDBOXES
from limpet.recovery.host import read_boot_id
from limpet.recovery.orphans import Orphan
from limpet.recovery.report import Report
from limpet.schema.file_name import find_owners


def find_orphans(snapshot: Snapshot) -> tuple[Orphan, ...]:
    """Return the entries of the state directory that no container or sandbox owns, each with its disposal."""
    bundles, sandboxes = (os.path.join(snapshot.path, name) for name in (CONTAINERS, SANDBOXES))
    # Read again: a live engine may have created some since the snapshot was opened.
    owned = {
        bundles: lambda: {row.id for row in snapshot.source.ask(lambda reader: reader.load_names())},
        sandboxes: lambda: {row.id for row in snapshot.source.ask(lambda reader: reader.load_sandboxes())},
    }
    here = {path: find_ids for path, find_ids in owned.items() if os.path.isdir(path)}
    return tuple(judge_orphans(here, snapshot.node))


def predict_recovery(snapshot: Snapshot) -> Report:
    """Return the report of a pass that begins now. Raises StoreDamagedError if no pass could begin.

    It treats the engine as dead: while an engine is running, it shows the recovery if that engine were killed now.
    """
    begun, now = time.monotonic_ns(), time.time_ns()
    bundles = os.path.join(snapshot.path, CONTAINERS)
    keeps_bundles = os.path.isdir(bundles)
    names = os.listdir(bundles) if keeps_bundles else []
    leftovers = set(find_owners(names, snapshot.ids).values())
    checkpoints = snapshot.checkpoints()
    unsettled = [
        one
        for one in checkpoints
        if (one.record.id in leftovers if one.record.status.released else not one.record.status.finished_at)
    ]
    sandboxes = snapshot.sandbox_statuses()
    return Report(
        number=0,
        at=now,
        boot_id=read_boot_id() or "",
        dry_run=True,
        settled=len(checkpoints) - len(unsettled),
        findings=tuple(one.finding for one in examine_all(unsettled, make_host_probe(bundles), now)),
        orphans=find_orphans(snapshot),
        sandboxes=find_remarkable(sandboxes, snapshot.judge_sandboxes(sandboxes), snapshot.damaged_sandboxes()),
        took_ns=time.monotonic_ns() - begun,
    )
