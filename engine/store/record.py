"""What a reader gets: a container's record as it was at one instant."""

from collections.abc import Callable
from typing import NamedTuple

from limpet.engine.state.process_bound import ProcessBound
from limpet.schema.metadata import Metadata
from limpet.schema.status import Status


class Record(ProcessBound):
    """One container: its id and the status it had when it was read. The metadata is read when asked for."""

    __slots__ = ("_load_metadata", "id", "status", "version")

    def __init__(self, id: str, status: Status, load_metadata: Callable[[str], Metadata], version: int = 0) -> None:
        self.id = id
        self.status = status
        self.version = version
        """Grows by one with each checkpoint: for `Store.checkpoint(..., expect=version)`. 0 if it is damaged."""
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
