"""What a timeline shows: a lane for each container, with spans and marks, and lines across all lanes.

Values only: `drill_timeline` and `history_timeline` make them, `drawing` draws them. Times are nanoseconds since the
epoch.
"""

from enum import StrEnum
from typing import NamedTuple

MOST_LANES = 40
"""More cannot be read."""


class Phase(StrEnum):
    """What a container was, for a span of time. The words are those of the legend."""

    CREATED = "created"
    RAN = "ran"
    RECORDED = "only a record: not yet created, or ended"
    UNKNOWN = "Unknown, or an end that nobody saw"


class Sign(StrEnum):
    """What happened to a container, at one moment. The words are those of the legend."""

    COMPLETED = "ended with code 0"
    FAILED = "ended with another code"
    UNSEEN = "said to have ended unseen"
    SAID_NEW = "restart: “not yet created”"
    SAID_CREATED = "restart: “created”"
    SAID_RUNNING = "restart: “runs”"
    SAID_EXITED = "restart: “ended”"
    SAID_UNKNOWN = "restart: “unknown”"
    UNKNOWN_NOW = "cannot be verified now"
    DISTURBED = "changed behind the engine's back"
    FAULT = "FALSE, LOST OR HARMED"


class Stroke(StrEnum):
    """A kind of line across all lanes. The words are those of the legend."""

    ENGINE = "kill of the engine"
    KEEPER = "kill of keepers, conmons or runtimes"
    CHANGE = "change of state"
    FAULT = "FAULT"


class Span(NamedTuple):
    """A container was this from `start` to `end`."""

    phase: Phase
    start: int
    end: int


class Mark(NamedTuple):
    """A sign at one moment, with a short text beside it."""

    sign: Sign
    at: int
    text: str = ""


class Lane(NamedTuple):
    """One container."""

    name: str
    spans: tuple[Span, ...]
    marks: tuple[Mark, ...]


class Line(NamedTuple):
    """A line across all lanes, with a label above."""

    stroke: Stroke
    at: int
    label: str


class Timeline(NamedTuple):
    """All of it."""

    title: str
    start: int
    end: int
    lanes: tuple[Lane, ...]
    lines: tuple[Line, ...]
    outages: tuple[tuple[int, int], ...] = ()
    """When no engine was open: from its kill until the next one has recovered."""
    note: str = ""
    """What was left out, and what else a reader must know."""


def choose_lanes(lanes: list[tuple[int, Lane]], most: int = MOST_LANES) -> tuple[Lane, ...]:
    """Return at most `most` of the lanes, in their order; those with the highest number come first.

    Of those with equal numbers that do not all fit, some from all over the time are taken.
    """
    kept: set[int] = set()
    for weight in sorted({weight for weight, _ in lanes}, reverse=True):
        equal = [place for place, (other, _) in enumerate(lanes) if other == weight]
        room = min(most - len(kept), len(equal))
        kept |= {equal[step * len(equal) // room] for step in range(room)}
    return tuple(lane for place, (_, lane) in enumerate(lanes) if place in kept)
