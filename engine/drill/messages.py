"""The messages between the drill and the engine's process: one JSON object per line, over two pipes."""

import msgspec

from limpet.engine.drill.script import Round
from limpet.schema.status import Status


class Event(msgspec.Struct, frozen=True, tag=True):
    """An event from the engine's process to the drill."""


class Opening(Event, frozen=True):
    """It is about to open the engine."""


class Told(Event, frozen=True):
    """What the engine reports now."""

    containers: dict[str, Status]
    sandboxes: list[str]


class Recovered(Event, frozen=True):
    """The engine is open; this is what it reports."""

    took_ns: int
    told: Told


class Begun(Event, frozen=True):
    """The call of this step is next."""

    step: int


class Returned(Event, frozen=True):
    """The call of this step has returned or was refused, with what a reader now sees of its container."""

    step: int
    status: Status | None = None
    refused: str = ""
    broken: str = ""
    """An unexpected exception, that is, none of limpet's own errors."""


class Finished(Event, frozen=True):
    """All steps of the round are done."""


class Command(msgspec.Struct, frozen=True, tag=True):
    """A command from the drill to the engine's process."""


class Live(Command, frozen=True):
    """Do the steps of this round."""

    round: Round


class Tell(Command, frozen=True):
    """Report everything now."""


class Close(Command, frozen=True):
    """Close the engine cleanly, and end."""


AnyEvent = Opening | Told | Recovered | Begun | Returned | Finished
AnyCommand = Live | Tell | Close
