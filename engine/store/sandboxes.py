"""The sandboxes in memory: metadata and newest status row of each, and which records are damaged."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from limpet.engine.database import Records
from limpet.schema.codec import row_is_sound, row_to_sandbox, row_to_sandbox_status
from limpet.schema.errors import StoreDamagedError
from limpet.schema.metadata import SandboxMetadata
from limpet.schema.rows import SandboxStatusRow

SandboxName = tuple[str, str, str, int]
"""Name, namespace, uid and attempt: what the CRI tells sandboxes apart by."""


class KeptSandbox(NamedTuple):
    """A sandbox as it is in memory."""

    metadata: SandboxMetadata
    row: SandboxStatusRow


class Sandboxes:
    """All sandboxes of a node. A record that is damaged, or misses a part, is kept by its id and what is wrong."""

    def __init__(self, node: str, records: Records) -> None:
        """Load them. Raises StoreError."""
        self._kept: dict[str, KeptSandbox] = {}
        self._names: dict[SandboxName, str] = {}
        self.damaged: dict[str, str] = {}
        statuses = {row.id: row for row in records.load_sandbox_statuses()}
        for of_node, row in records.load_all_sandboxes():
            if of_node != node and row_is_sound(of_node, row):
                continue  # another node's; one that is nobody's may have been ours
            try:
                metadata = row_to_sandbox(node, row)
                self.put(metadata.id, KeptSandbox(metadata, _require_status(node, metadata.id, statuses)))
            except StoreDamagedError as error:
                self.damaged[str(row.id)] = str(error)  # what stands for the id may be anything
        for key in records.load_sandbox_ids_in_use():
            if key not in self.ids:
                self.damaged[key] = f"sandbox {key}: its record is missing; restore a backup"

    @property
    def kept(self) -> Mapping[str, KeptSandbox]:
        """Those whose records can be read, by id."""
        return self._kept

    @property
    def ids(self) -> Collection[str]:
        """The ids of all, also of those whose records cannot be read."""
        return self._kept.keys() | self.damaged.keys()

    def find_by_name(self, name: SandboxName) -> str | None:
        """Return the id of the sandbox that has this name, if there is one."""
        return self._names.get(name)

    def put(self, sandbox_id: str, sandbox: KeptSandbox | None) -> None:
        """Add or replace a sandbox, or forget it if it is None."""
        old = self._kept.pop(sandbox_id, None)
        if old is not None and self._names.get(name_of(old.metadata)) == sandbox_id:
            del self._names[name_of(old.metadata)]
        if sandbox is None:
            self.damaged.pop(sandbox_id, None)
        else:
            self._kept[sandbox_id] = sandbox
            self._names.setdefault(name_of(sandbox.metadata), sandbox_id)


def name_of(metadata: SandboxMetadata) -> SandboxName:
    """Return what tells the sandbox apart from others, beside its id."""
    given = metadata.config.metadata
    return metadata.name, given.namespace, given.uid, given.attempt


def _require_status(node: str, sandbox_id: str, rows: Mapping[str, SandboxStatusRow]) -> SandboxStatusRow:
    row = rows.get(sandbox_id)
    if row is None:
        raise StoreDamagedError(f"sandbox {sandbox_id}: its status is missing; restore a backup")
    row_to_sandbox_status(node, row)
    return row
