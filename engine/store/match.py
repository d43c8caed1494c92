"""Which records are meant: ids by their beginning, and the filters of lists."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from limpet.schema.codec import read_labels
from limpet.schema.errors import NotFoundError, quote
from limpet.schema.rows import NameRow


def resolve_prefix(prefix: str, ids: Iterable[str], kind: str) -> str:
    """Return the id that is `prefix` or, if only one does, begins with it. Raises NotFoundError."""
    if prefix in ids:
        return prefix
    found = [key for key in ids if key.startswith(prefix)] if prefix else []
    if not found:
        raise NotFoundError(f"no {kind} has an id that is {quote(prefix)} or begins with it")
    if len(found) > 1:
        raise NotFoundError(f"{len(found)} {kind}s have ids that begin with {quote(prefix)}; give more of it")
    return found[0]


class Filter(NamedTuple):
    """What a list is to hold. What is empty is not asked for."""

    id: str = ""
    """An id, or the beginning of ids."""
    name: str = ""
    sandbox_id: str = ""
    """A sandbox's id or, if no sandbox has it, the beginning of ids."""
    labels: Mapping[str, str] = {}
    """All of them must be there, with these values."""

    @property
    def asks_for_names(self) -> bool:
        """True if ids alone do not tell what matches."""
        return bool(self.name or self.sandbox_id or self.labels)

    def accepts(self, row: NameRow, sandbox_ids: Collection[str]) -> bool:
        """Say whether a container is wanted; `sandbox_ids` are those of all sandboxes."""
        return (
            row.id.startswith(self.id)
            and (not self.name or row.name == self.name)
            and self._accepts_sandbox(row.sandbox_id, sandbox_ids)
            and (not self.labels or self.labels.items() <= read_labels(row.labels).items())
        )

    def _accepts_sandbox(self, sandbox_id: str, sandbox_ids: Collection[str]) -> bool:
        if self.sandbox_id in sandbox_ids:
            return sandbox_id == self.sandbox_id
        return sandbox_id.startswith(self.sandbox_id)


def holds(extra: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Say whether all that is wanted is among the top-level keys of `extra`, with these values."""
    return all(key in extra and extra[key] == value for key, value in wanted.items())
