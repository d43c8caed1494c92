"""What the drill and the engine's process say to each other: one JSON object a line, over two pipes."""

import msgspec

from limpet.engine.drill.plan import Round
from limpet.schema.status import Status


class Event(msgspec.Struct, frozen=True, tag=True):
    """From the engine's process to the drill."""


class Opening(Event, frozen=True):
    """It is about to open the engine."""


class Told(Event, frozen=True):
    """What the engine says now."""

    containers: dict[str, Status]
    sandboxes: list[str]


class Recovered(Event, frozen=True):
    """The engine is open; this is what it says."""

    took_ns: int
    told: Told


class Begun(Event, frozen=True):
    """The call of this step comes next."""

    step: int


class Returned(Event, frozen=True):
    """The call of this step has returned, or was refused; and what a reader is told of its container now."""

    step: int
    status: Status | None = None
    refused: str = ""
    broken: str = ""
    """What was raised, if it is no error of the engine's family."""


class Finished(Event, frozen=True):
    """All steps of the round are done."""


class Command(msgspec.Struct, frozen=True, tag=True):
    """From the drill to the engine's process."""


class Live(Command, frozen=True):
    """Do the steps of this round."""

    round: Round


class Tell(Command, frozen=True):
    """Say what the engine says now."""


class Close(Command, frozen=True):
    """Close the engine in order, and end."""


AnyEvent = Opening | Told | Recovered | Begun | Returned | Finished
AnyCommand = Live | Tell | Close
