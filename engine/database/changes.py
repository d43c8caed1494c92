"""What one commit writes: rows that were checked and encoded before, in the order that foreign keys want."""

from copy import copy
from dataclasses import dataclass, field, fields
from typing import Self

from limpet.schema.rows import (
    ContainerRow,
    DeadlineRow,
    EventRow,
    ItemRow,
    ReportRow,
    SandboxRow,
    SandboxStatusRow,
    StatusRow,
)

KEPT_EVENTS = 6_000
"""How many events of the log of changes are kept; older ones are dropped as newer ones come."""
KEPT_NS = 7 * 24 * 3600 * 10**9
"""Up to which age, in nanoseconds, they are kept: a week."""
KEPT_CHARACTERS = 32 << 20
"""How long all labels, messages and statuses of the events may be that are kept."""
PRUNED_AT_ONCE = 64
"""About so many events are dropped together. The more, the less often, and the longer that commit takes."""
KEPT_RECOVERIES = 16
"""How many reports of recovery passes are kept."""


@dataclass(slots=True)
class Changes:
    """Rows to write in one transaction. Rows lead with the id; the node's name is added when they are written."""

    new_sandboxes: dict[str, SandboxRow] = field(default_factory=dict)
    new_sandbox_statuses: dict[str, SandboxStatusRow] = field(default_factory=dict)
    sandbox_statuses: dict[str, tuple[SandboxStatusRow, int]] = field(default_factory=dict)
    """The new row of a sandbox that is there already, and the seq of the one that it replaces."""
    new_containers: dict[str, ContainerRow] = field(default_factory=dict)
    new_statuses: dict[str, StatusRow] = field(default_factory=dict)
    statuses: dict[str, tuple[StatusRow, int]] = field(default_factory=dict)
    """The new row of a container that is there already, and the seq of the one that it replaces."""
    events: list[EventRow] = field(default_factory=list)
    """Of consecutive revisions, each with its checksum."""
    deleted_containers: list[str] = field(default_factory=list)
    deleted_sandboxes: list[str] = field(default_factory=list)
    deadlines: dict[tuple[str, str], DeadlineRow | None] = field(default_factory=dict)
    """By kind and id, in place of what is there; None for one that is not needed any more."""
    items: dict[tuple[str, str], ItemRow] = field(default_factory=dict)
    """By kind and key, in place of what is there."""
    deleted_items: list[tuple[str, str]] = field(default_factory=list)
    reports: list[ReportRow] = field(default_factory=list)

    def copy(self) -> Self:
        """Return a copy that shares nothing but the rows, which are immutable."""
        return type(self)(**{field.name: copy(getattr(self, field.name)) for field in fields(self)})

    @property
    def only_statuses(self) -> bool:
        """True if this is nothing but checkpoints that change no state: the common case, made fast."""
        return not (self.events or self.deadlines or self._is_more)

    @property
    def is_of_statuses(self) -> bool:
        """True if this is nothing but checkpoints of containers that are there, their events and deadlines."""
        return not self._is_more

    @property
    def is_one_change(self) -> bool:
        """True if this is a checkpoint that changes the state of one container, and no more: the next common case."""
        return len(self.statuses) == 1 and bool(self.events) and not self._is_more

    @property
    def _is_more(self) -> bool:
        return bool(
            self.new_containers
            or self.new_sandboxes
            or self.deleted_containers
            or self.deleted_sandboxes
            or self.sandbox_statuses
            or self.items
            or self.deleted_items
            or self.reports
        )

    def __bool__(self) -> bool:
        return bool(self.statuses) or not self.only_statuses
