"""What a reader gets: a container's record as it was at one instant, and how ids and labels are matched."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from limpet.schema.errors import NotFoundError, quote
from limpet.schema.metadata import Metadata
from limpet.schema.status import Status


class Record:
    """One container: its id and the status it had when it was read. The metadata is read when asked for."""

    __slots__ = ("_load_metadata", "id", "status")

    def __init__(self, id: str, status: Status, load_metadata: Callable[[str], Metadata]) -> None:
        self.id = id
        self.status = status
        self._load_metadata = load_metadata

    def __repr__(self) -> str:
        return f"<Record {self.id}: {self.status.state.name}>"

    @property
    def metadata(self) -> Metadata:
        """The immutable part. Raises StoreDamagedError if it is damaged, NotFoundError if it was deleted since."""
        return self._load_metadata(self.id)


class Unsettled(NamedTuple):
    """A container that a recovery pass must look at."""

    record: Record
    """With its status as it is on disk, without a doubt."""
    damage: str
    """Why the record cannot be believed, "" if it can."""


def resolve_prefix(prefix: str, ids: Iterable[str], kind: str) -> str:
    """Return the id that is `prefix` or, if only one does, begins with it. Raises NotFoundError."""
    if prefix in ids:
        return prefix
    found = [key for key in ids if key.startswith(prefix)] if prefix else []
    if not found:
        raise NotFoundError(f"no {kind} has the id {quote(prefix)}, or one that begins so")
    if len(found) > 1:
        raise NotFoundError(f"{len(found)} {kind}s have ids that begin with {quote(prefix)}; give more of it")
    return found[0]


def read_labels(labels_json: str) -> dict[str, str]:
    """Return labels as they are stored; none where they are damaged, which is for a check to tell."""
    try:
        return msgspec.json.decode(labels_json, type=dict[str, str])
    except msgspec.MsgspecError:
        return {}


def matches_labels(labels_json: str, wanted: Mapping[str, str]) -> bool:
    """Say whether labels, as they are stored, hold all that is wanted."""
    found = read_labels(labels_json)
    return all(found.get(name) == value for name, value in wanted.items())
