"""Engines with one promise broken each, for the drill to find out. Each opens an engine as `Engine.open` does."""

import os
import time

from limpet.engine.database import Changes
from limpet.engine.drill.controls import open_taking_gates_for_starts, open_trusting_pids
from limpet.engine.engine import Engine
from limpet.engine.starters import Launch, Prepared
from limpet.engine.starters.process import ProcessStarter
from limpet.engine.store import Draft, Store
from limpet.recovery import rules
from limpet.schema.status import Status
from limpet.schema.status import end as real_end


def acknowledges_before_commit(state_dir: str) -> Engine:
    """A change of status is acknowledged at once, and written together with the next change."""
    write, waiting = Store._write, list[Draft]()

    def write_later(store: Store, draft: Draft) -> None:
        while waiting:
            write(store, waiting.pop())
        changes = draft.changes
        if changes == Changes(statuses=changes.statuses, events=changes.events, deadlines=changes.deadlines):
            waiting.append(draft)
            store._apply(draft)
        else:
            write(store, draft)

    setattr(Store, "_write", write_later)  # noqa: B010
    return Engine.open(state_dir)


def commits_by_halves(state_dir: str) -> Engine:
    """A transaction over several containers is committed one container at a time."""
    write = Store._write

    def write_by_halves(store: Store, draft: Draft) -> None:
        changed = draft.changes.statuses
        is_transaction = len(changed) > 1 and all(draft.status(key).message.isdigit() for key in changed)
        if is_transaction:
            for key in list(draft.changes.statuses):
                half = store._draft()
                half.replace(key, draft.status(key))
                write(store, half)
                time.sleep(0.2)  # as on a slow disk
        else:
            write(store, draft)

    setattr(Store, "_write", write_by_halves)  # noqa: B010
    return Engine.open(state_dir)


def compares_pids_alone(state_dir: str) -> Engine:
    """Whoever has the pid is taken for the container's process."""
    return open_trusting_pids(state_dir)


def invents_exit_codes(state_dir: str) -> Engine:
    """What ended unseen is said to have ended well."""

    def invent(status: Status, exit_code: int | None, *, finished_at: int, message: str = "") -> Status:
        return real_end(status, exit_code or 0, finished_at=finished_at, message=message)

    setattr(rules, "end", invent)  # noqa: B010
    return Engine.open(state_dir)


class HastyStarter(ProcessStarter):
    """Opens the gate at once, while the checkpoint is still to be written."""

    def prepare(self, launch: Launch) -> Prepared:
        prepared = super().prepare(launch)
        held = prepared.own
        held.connection.ask({"op": "go", "id": held.container_id})  # type: ignore[attr-defined]
        time.sleep(0.3)  # as on a slow disk
        return prepared


def opens_the_gate_early(state_dir: str) -> Engine:
    """A container's program runs before its process is written down."""
    return Engine.open(state_dir, starter=HastyStarter())


def takes_gates_for_starts(state_dir: str) -> Engine:
    """A start that came to nothing is said to have succeeded."""
    return open_taking_gates_for_starts(state_dir)


def follows_links(state_dir: str) -> Engine:
    """The sweep empties whatever it finds, also through a link."""
    containers = os.path.join(state_dir, "containers")
    for name in os.listdir(containers) if os.path.isdir(containers) else ():
        path = os.path.join(containers, name)
        if os.path.islink(path):
            for inner in os.listdir(path):
                os.unlink(os.path.join(path, inner))
    return Engine.open(state_dir)
