"""The deadlines in memory: by which clock each time was set, so that a wall clock that is set brings none nearer.

They are by the clock of the machine's boot. That of an engine's own time namespace may be another.
"""

import time
from collections.abc import Iterator, Mapping

from limpet.engine.database import Changes, Records
from limpet.recovery.host import read_boot_id, read_machine_clock
from limpet.schema.codec import deadline_to_row, row_to_deadline
from limpet.schema.deadline import Deadline, DeadlineKind
from limpet.schema.errors import StoreDamagedError
from limpet.schema.rows import DeadlineRow, SandboxStatusRow, StatusRow
from limpet.schema.telling import get_log

_log = get_log("limpet.store")

Of = tuple[str, str]
"""A kind of deadline, and the id of the container or sandbox."""


class Deadlines:
    """A node's deadlines of this boot."""

    def __init__(self, node: str, records: Records) -> None:
        """Load them. Raises StoreError."""
        self._node = node
        self._boot_id = read_boot_id()
        self._known: dict[Of, Deadline] = {}
        for row in records.load_deadlines(self._boot_id, read_machine_clock()) if self._boot_id else ():
            try:
                self._known[row.kind, row.id] = row_to_deadline(node, row)
            except StoreDamagedError as error:
                _log.warning("%s", error)

    def find(self, of: Of, at: int) -> Deadline | None:
        """Return the deadline that a time is known by, None if there is none: it was set in another boot."""
        known = self._known.get(of)
        return known if known is not None and known.at == at else None

    def left(self, of: Of, at: int) -> int:
        """Return how many nanoseconds are left until a time, 0 if it is reached.

        From now on, one that was not known is known as it is seen now.
        """
        wall, boot = time.time_ns(), read_machine_clock()
        known = self.find(of, at)
        if known is None:
            known = self._known[of] = Deadline.begin(at, wall=wall, boot=boot)
        return known.left(wall=wall, boot=boot)

    def find_changed(self, old: Mapping[Of, int], new: Mapping[Of, int]) -> Iterator[tuple[Of, DeadlineRow | None]]:
        """Yield the row of each time that is set now; None for an old one that is over, or does not matter any more."""
        wall = time.time_ns()
        for of in {**old, **new}:
            before, at = old.get(of, 0), new.get(of, 0)
            if at != before and at > wall:
                yield of, self.make_row(of, Deadline.begin(at, wall=wall, boot=read_machine_clock()))
            elif at != before and before:
                yield of, None

    def make_row(self, of: Of, deadline: Deadline) -> DeadlineRow | None:
        """Return the row of a deadline; None where no boot can be told by its id."""
        return deadline_to_row(self._node, *of, deadline, self._boot_id) if self._boot_id else None

    def apply(self, changes: Changes) -> None:
        """Take over what was written."""
        for of, row in changes.deadlines.items():
            if row is None:
                self._known.pop(of, None)
            else:
                self._known[of] = Deadline(row.at, row.boot_at)
        gone = [of for key in changes.deleted_containers for of in deadlines_of_container(key)]
        gone += [(DeadlineKind.SANDBOX_EXPIRY, key) for key in changes.deleted_sandboxes]
        for of in gone:  # also those that were seen without a row
            self._known.pop(of, None)


def deadlines_of_container(container_id: str) -> tuple[Of, Of]:
    """Return what deadlines a container may have."""
    return (DeadlineKind.STOP, container_id), (DeadlineKind.EXPIRY, container_id)


def times_of_container(row: StatusRow) -> Mapping[Of, int]:
    """Return the times that matter of a container, 0 for none, from its status row: once it is released, none does."""
    times = (row.stop_deadline, row.expires_at)
    return {} if row.released else dict(zip(deadlines_of_container(row.id), times, strict=True))


def times_of_sandbox(row: SandboxStatusRow) -> Mapping[Of, int]:
    """Return the time that matters of a sandbox, 0 for none, from its status row."""
    return {(DeadlineKind.SANDBOX_EXPIRY, row.id): row.expires_at}
